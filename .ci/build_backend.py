"""The build backend of setuptools, with the template of the source distribution in this folder."""

from setuptools.build_meta import *  # noqa: F403
from setuptools.command.egg_info import manifest_maker

manifest_maker.template = ".ci/MANIFEST.in"  # MANIFEST.in at the root is the only place that setuptools looks at

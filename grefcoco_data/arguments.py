"""Command lines of all programs here: flags of several words are accepted with dashes and with underscores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


class ArgumentParser(argparse.ArgumentParser):
    """Accepts `--num-proc` and `--num_proc` alike; refuses abbreviations. Declare flags with dashes."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, after underscores in the names of flags were replaced by dashes."""
        arguments = [str(argument) for argument in (sys.argv[1:] if args is None else args)]
        end = arguments.index("--") if "--" in arguments else len(arguments)  # after it there are no flags
        return super().parse_known_args([*map(_with_dashes, arguments[:end]), *arguments[end:]], namespace)


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value

"""Command lines of all programs: flags of several words with dashes or underscores, errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

LONGEST_MESSAGE = 800  # characters


def one_line(message: object) -> str:
    """The text of an error in one line; of a long one, such as one with a value from a file, its two ends."""
    text = " ".join(str(message).split())
    return (
        text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    )


class ArgumentParser(argparse.ArgumentParser):
    """Accepts both `--num-proc` and `--num_proc`, refuses abbreviations, and exits with code 2 after one line.

    Declare flags with dashes.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, after underscores in the names of flags were replaced by dashes."""
        arguments = [str(argument) for argument in (sys.argv[1:] if args is None else args)]
        end = arguments.index("--") if "--" in arguments else len(arguments)  # after it there are no flags
        return super().parse_known_args([*map(_with_dashes, arguments[:end]), *arguments[end:]], namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def _with_dashes(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value

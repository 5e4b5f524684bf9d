"""The command line, `python grefcoco.py COMMAND`: bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grefcoco


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after one line that says what is wrong with the input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError) as error:
        print(f"grefcoco {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grefcoco", description="gRefCOCO as a Hugging Face data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write the genuine files as Parquet that load_dataset reads")
    build.add_argument("--annotations", required=True, help="folder of the refs file and instances.json")
    build.add_argument("--images", required=True, help="folder or zip of the images")
    build.add_argument("--out", required=True, help="folder to make, or a former build to replace")
    build.add_argument("--config", default="grefcoco", choices=grefcoco.CONFIGS)
    build.add_argument("--strict", action="store_true", help="stop at any problem in the files")
    build.add_argument("--skip-bad-images", action="store_true", help="leave bad images out, and say so")
    build.add_argument("--num-proc", "--num_proc", type=int, default=1)
    build.set_defaults(run=_build)
    return parser


def _build(options: argparse.Namespace) -> None:
    report = grefcoco.build(
        options.annotations,
        options.images,
        options.out,
        config=options.config,
        strict=options.strict,
        skip_bad_images=options.skip_bad_images,
        num_proc=options.num_proc,
    )
    for split, counts in report["splits"].items():
        kinds = f"{counts['no_target']:,} none, {counts['single']:,} single, {counts['multi']:,} multi"
        print(f"{split}: {counts['images']:,} images, {counts['expressions']:,} expressions ({kinds})")
    for line in grefcoco.Problems(report["problems"]).lines():
        print(f"problem: {line}")
    print(f"{options.out} is ready: datasets.load_dataset({options.out!r})")

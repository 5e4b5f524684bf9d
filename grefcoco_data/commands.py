"""The command line, `grefcoco COMMAND` or `python grefcoco.py COMMAND`: bad input gives one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from grefcoco_data.annotations import Problems, find_files, read_annotations
from grefcoco_data.arguments import ArgumentParser, one_line
from grefcoco_data.atomic_files import sha256
from grefcoco_data.building import REPORT, build, check_card, damaged_files, read_report, stored_image_ids
from grefcoco_data.collections import COLLECTIONS, CONFIGS
from grefcoco_data.export import export
from grefcoco_data.grefer import GRefer
from grefcoco_data.loading import load
from grefcoco_data.official import download, push
from grefcoco_data.show import draw_statistics, sentence_statistics, write_samples_page
from grefcoco_data.video_collections import VIDEO_CONFIGS
from grefcoco_data.video_commands import run_video_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0; 1 when `check` finds damage; 2 after one line on bad input."""
    options = _parser().parse_args(arguments)
    try:
        if options.config in VIDEO_CONFIGS:
            return run_video_command(options)
        if getattr(options, "images", "") is None and options.command in ("build", "download"):
            raise ValueError("--images is missing.")
        return options.run(options)
    except (OSError, ValueError) as error:
        print(f"grefcoco {options.command}: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="grefcoco", description="gRefCOCO and its relatives as Hugging Face data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    source = "a built folder, or a folder of genuine files"
    add = commands.add_parser("build", help="write the genuine files as Parquet that load_dataset reads")
    add.add_argument("--annotations", required=True, help="folder of the refs file and instances.json")
    add.add_argument("--images", help="folder or zip of the images, or hf://datasets/OWNER/NAME/PATH; not for videos")
    add.add_argument("--out", required=True, help="folder to make, or an earlier build to replace")
    add.add_argument("--download", action="store_true", help="download missing official files first")
    add.add_argument("--strict", action="store_true", help="stop at any problem in the files")
    add.add_argument("--skip-bad-images", action="store_true", help="skip bad images and report them")
    add.add_argument("--num-proc", type=int, default=1, help="number of processes")
    add.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder as a data set")
    _finish(add, _build)
    add = commands.add_parser("download", help="download missing official annotation files and images")
    add.add_argument("--annotations", required=True, help="folder for the annotation files")
    add.add_argument("--images", help="path for the zip of images, or a folder that has them; not for videos")
    _finish(add, _download)
    add = commands.add_parser("check", help="check a data set: damage, official hashes and counts")
    add.add_argument("source", help=source)
    _finish(add, _check)
    add = commands.add_parser("stats", help="table and plots of targets, sentence lengths and mask sizes")
    add.add_argument("source", help=source)
    add.add_argument("--out", help="PNG to draw; needs matplotlib (grefcoco[plot])")
    _finish(add, _stats)
    add = commands.add_parser("show", help="HTML page and PNGs of samples")
    add.add_argument("source", help=source)
    add.add_argument("--images", help="folder or zip of the images; with genuine files")
    add.add_argument("--out", required=True, help="folder of the page")
    add.add_argument("--split", help="default: the first one")
    add.add_argument("--id", type=int, action="append", help="sentence id; can be repeated")
    add.add_argument("--targets", type=int, help="only sentences with this number of targets")
    add.add_argument("--text", help="only sentences that hold this text")
    add.add_argument("--limit", type=int, default=20, help="most sentences to show, drawn at random")
    add.add_argument("--seed", type=int, default=0, help="seed of the random sample")
    _finish(add, _show)
    add = commands.add_parser("export", help="COCO-style JSON files, one per split")
    add.add_argument("source", help=source)
    add.add_argument("--out", required=True, help="folder of the files")
    add.add_argument("--format", choices=("mdetr", "coco"), default="mdetr", help="for MDETR or for pycocotools")
    _finish(add, _export)
    return parser


def _finish(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--config", default="grefcoco", choices=[*CONFIGS, *VIDEO_CONFIGS])
    parser.set_defaults(run=run)


def _build(options: argparse.Namespace) -> int:
    if options.num_proc < 1:
        raise ValueError(f"--num-proc is {options.num_proc}; it must be 1 or more.")
    if options.download:
        download(Path(options.annotations), Path(options.images), options.config)
    report = build(
        options.annotations,
        options.images,
        options.out,
        config=options.config,
        strict=options.strict,
        skip_bad_images=options.skip_bad_images,
        num_proc=options.num_proc,
    )
    for split, counts in report["splits"].items():
        print(_counts_line(split, counts))
    _print_problems(report["problems"])
    if options.push_to_hub:
        push(options.out, options.push_to_hub)
    place = options.push_to_hub or options.out
    print(f"{place} is ready: datasets.load_dataset({place!r})")
    return 0


def _download(options: argparse.Namespace) -> int:
    download(Path(options.annotations), Path(options.images), options.config)
    print(f"{options.annotations} and {options.images} are complete")
    return 0


def _check(options: argparse.Namespace) -> int:
    source = Path(options.source)
    if (source / REPORT).is_file():
        report = read_report(source)
        damage, splits, config = damaged_files(source), report["splits"], report["config"]
        _print_problems(report["problems"])
        if not damage:
            check_card(source, config)
            _print_shared_images({split: stored_image_ids(source, split) for split in splits})
    else:
        notes = read_annotations(source, options.config)
        damage, splits, config = [], notes.counts(), options.config
        _print_hashes(source, config)
        _print_problems(notes.problems)
        _print_shared_images({split: set(groups) for split, groups in notes.splits.items()})
    for split, counts in splits.items():
        print(f"{_counts_line(split, counts)}: {_verdict(split, counts, config)}")
    for line in damage:
        print(f"DAMAGED: {line}")
    return int(bool(damage))


def _counts_line(split: str, counts: dict[str, int]) -> str:
    kinds = f"{counts['no_target']:,} none, {counts['single']:,} single, {counts['multi']:,} multi"
    return f"{split}: {counts['images']:,} images, {counts['expressions']:,} expressions ({kinds})"


def _verdict(split: str, counts: dict[str, int], config: str) -> str:
    differences = COLLECTIONS[config].differences(split, counts)
    if differences is None:
        return "no official counts"
    official = ", ".join(f"{name} {number:,}" for name, number in differences.items())
    return f"not the official release (which has {official})" if differences else "as in the official release"


def _print_problems(problems: dict[str, list[str]]) -> None:
    for line in Problems(problems).lines():
        print(f"problem: {line}")


def _print_hashes(source: Path, config: str) -> None:
    release = COLLECTIONS[config].release
    for path in find_files(source, config):
        digest, official = sha256(path), release and release.sha256.get(path.name)
        verdict = "no official hash"
        if official:
            verdict = "official release" if digest == official else "not the official release"
        print(f"{path}: sha256 {digest}, {verdict}")


def _print_shared_images(images: dict[str, set[int]]) -> None:
    splits_each = Counter(image_id for ids in images.values() for image_id in ids)
    shared = sorted(image_id for image_id, count in splits_each.items() if count > 1)
    for image_id in shared[:5]:
        print(f"image {image_id} is in {' and '.join(split for split, ids in images.items() if image_id in ids)}")
    print(f"{len(shared)} images shared between splits, {len(splits_each):,} images in all")


def _stats(options: argparse.Namespace) -> int:
    refer = _refer(options)
    statistics = {split: sentence_statistics(refer, split) for split in refer.availableSplits}
    if options.out:
        draw_statistics(statistics, Path(options.out))
    print("| split | expressions | none | single | multi | words | mask, % of image |\n" + "|---" * 7 + "|")
    for split, columns in statistics.items():
        numbers = columns["targets"]
        kinds = [len(numbers), (numbers == 0).sum(), (numbers == 1).sum(), (numbers > 1).sum()]
        means = [columns[name].mean() if len(columns[name]) else 0.0 for name in ("words", "mask_share")]
        print(f"| {split} | " + " | ".join(f"{n:,}" for n in kinds) + f" | {means[0]:.1f} | {means[1]:.1f} |")
    if options.out:
        print(f"The plots are in {options.out}")
    return 0


def _show(options: argparse.Namespace) -> int:
    if options.limit < 1:
        raise ValueError(f"--limit is {options.limit}; it must be 1 or more.")
    splits = load(options.source, images=options.images, config=options.config)
    split = options.split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"{options.source} has no split {split!r}; choose one of {', '.join(splits)}.")
    index = splits[split].with_format(None).select_columns(["sent_id", "ann_ids", "sentence"])
    fitting = [number for number, row in enumerate(index) if _is_shown(row, options)]
    if not fitting:
        raise ValueError(f"No sentence of {split} fits --id, --targets and --text.")
    numbers = sorted(random.Random(options.seed).sample(fitting, min(options.limit, len(fitting))))
    title = f"{COLLECTIONS[options.config].title}, {split}"
    filters = {"id": options.id, "targets": options.targets, "text": options.text}
    chosen = "".join(f", --{name} {value}" for name, value in filters.items() if value is not None)
    subtitle = f"{len(numbers):,} of {len(fitting):,} sentences{chosen}, seed {options.seed}"
    rows = splits[split].__getitems__(numbers)
    page = write_samples_page(rows, Path(options.out), split, title, subtitle)
    print(f"{len(numbers)} sentences of {split} in {page}")
    return 0


def _is_shown(row: dict, options: argparse.Namespace) -> bool:
    """Whether a sentence passes the filters of `show`."""
    return (
        (not options.id or row["sent_id"] in options.id)
        and options.targets in (None, len(row["ann_ids"]))
        and (options.text or "").lower() in row["sentence"].lower()
    )


def _export(options: argparse.Namespace) -> int:
    for path, content in export(_refer(options), Path(options.out), options.format):
        print(f"{path}: {len(content['images']):,} images, {len(content['annotations']):,} annotations")
    return 0


def _refer(options: argparse.Namespace) -> GRefer:
    """The index over a source; genuine files are checked first."""
    if not os.path.isfile(os.path.join(options.source, REPORT)):
        problems = read_annotations(options.source, options.config).problems
        for line in problems.lines():
            print(f"problem: {line}", file=sys.stderr)
        if unusable := [kind for kind in problems if "skipped" in kind]:
            raise ValueError(f"{options.source} has {'; '.join(unusable)}. Build it first, then use the built folder.")
    collection = COLLECTIONS[options.config]
    return GRefer(options.source, collection.dataset, collection.split_by)

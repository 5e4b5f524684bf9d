"""The command line, `python grefcoco.py COMMAND`: bad input ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HTTPError
from tqdm.auto import tqdm

import grefcoco
from grefcoco_data.files import (
    CONFIGS,
    REPORT,
    Annotations,
    Problems,
    as_list,
    find_files,
    read_annotations,
    read_report,
    targets,
)
from grefcoco_data.grefer import GRefer

OFFICIAL_REPO, OFFICIAL_REVISION = "FudanCVL/gRefCOCO", "81eede59b3ac070049f597d023c0ff08d1fb80e9"
OFFICIAL_SHA256 = {
    "grefs(unc).json": "cc37c5ff95373c78a6a3f98b4c7bc67fde387ea8514752a1392db64223eb3366",
    "instances.json": "7f86adb7f4c39db19c7f02a3cc604d17f8016e4c4e8312652d0acc4eae3a2cbd",
}
OFFICIAL_COUNTS = {  # as in `grefcoco.COUNTED`
    "train": (16_994, 78_930, 209_344, 19_140, 120_624, 69_580, 18),
    "val": (1_501, 4_237, 14_229, 8_905, 0, 5_324, 14),
    "testA": (750, 6_265, 19_200, 4_448, 5_917, 8_835, 16),
    "testB": (750, 4_618, 16_063, 4_673, 5_646, 5_744, 14),
}
COCO_IMAGES = "http://images.cocodataset.org/zips/train2014.zip"
# The converter of MDETR numbers images and annotations through the splits in this order.
EXPORT_ORDER = ("testA", "testB", "testC", "testAB", "testBC", "test", "val", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 when `check` finds damage, 2 after one line on bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError) as error:
        print(f"grefcoco {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grefcoco", description="gRefCOCO as a Hugging Face data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="write the genuine files as Parquet that load_dataset reads")
    add.add_argument("--annotations", required=True, help="folder of the refs file and instances.json")
    add.add_argument("--images", required=True, help="folder or zip of the images, or hf://datasets/OWNER/NAME/PATH")
    add.add_argument("--out", required=True, help="folder to make, or a former build to replace")
    add.add_argument("--download", action="store_true", help="fetch what is missing of gRefCOCO and COCO first")
    add.add_argument("--strict", action="store_true", help="stop at any problem in the files")
    add.add_argument("--skip-bad-images", action="store_true", help="leave bad images out, and say so")
    add.add_argument("--num-proc", "--num_proc", type=int, default=1, help="processes")
    add.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder as a data set")
    _finish(add, _build)
    source = "a built folder, or a folder of genuine files"
    add = commands.add_parser("check", help="integrity, and the official hashes and counts")
    add.add_argument("source", help=source)
    _finish(add, _check)
    add = commands.add_parser("stats", help="table and plots of targets, sentence lengths and mask sizes")
    add.add_argument("source", help=source)
    add.add_argument("--out", help="PNG to draw")
    _finish(add, _stats)
    add = commands.add_parser("show", help="an HTML page and PNGs of samples")
    add.add_argument("source", help=source)
    add.add_argument("--images", help="folder or zip of the images; with genuine files")
    add.add_argument("--out", required=True, help="folder of the page")
    add.add_argument("--split", help="the first there is, when not given")
    add.add_argument("--id", type=int, action="append", help="sentence ids")
    add.add_argument("--targets", type=int, help="sentences with so many targets only")
    add.add_argument("--limit", type=int, default=20)
    _finish(add, _show)
    add = commands.add_parser("export", help="COCO-style JSON files, one per split")
    add.add_argument("source", help=source)
    add.add_argument("--out", required=True, help="folder of the files")
    add.add_argument("--format", choices=("mdetr", "coco"), default="mdetr", help="MDETR's, or what pycocotools loads")
    _finish(add, _export)
    return parser


def _finish(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--config", default="grefcoco", choices=CONFIGS)
    parser.set_defaults(run=run)


# ---- build -------------------------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    if options.num_proc < 1:
        raise ValueError(f"--num-proc is {options.num_proc}; 1 or more processes can work.")
    if options.download:
        download(Path(options.annotations), Path(options.images), options.config)
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
        print(_counts_line(split, counts))
    _print_problems(report["problems"])
    if options.push_to_hub:
        _push(options.out, options.push_to_hub)
    place = options.push_to_hub or options.out
    print(f"{place} is ready: datasets.load_dataset({place!r})")
    return 0


def _push(folder: str, repo: str) -> None:
    """Upload a built folder as a data set; shards of a former build that it lacks leave the repository."""
    place = {"repo_id": repo, "repo_type": "dataset"}
    try:
        HfApi().create_repo(**place, exist_ok=True)
        HfApi().upload_folder(**place, folder_path=folder, delete_patterns="data/*")
    except (HTTPError, RuntimeError) as error:  # a RuntimeError is what an upload given up on ends in
        raise OSError(f"The upload to {repo} stopped: {error} Run again to complete it.") from error


def _counts_line(split: str, counts: dict[str, int]) -> str:
    kinds = f"{counts['no_target']:,} none, {counts['single']:,} single, {counts['multi']:,} multi"
    return f"{split}: {counts['images']:,} images, {counts['expressions']:,} expressions ({kinds})"


def download(annotations: Path, images: Path, config: str) -> None:
    """Fetch what is missing: the annotation files of the pinned official revision, and COCO's train2014.zip.

    Raises:
        ValueError: a configuration that has no download; a transfer that was cut off or whose sha256 differs.
    """
    if config != "grefcoco":
        raise ValueError(f"--download knows gRefCOCO alone; fetch the files of {config} by hand.")
    annotations.mkdir(parents=True, exist_ok=True)
    for name, digest in OFFICIAL_SHA256.items():
        url = hf_hub_url(OFFICIAL_REPO, name, repo_type="dataset", revision=OFFICIAL_REVISION)
        fetch(url, annotations / name, digest)
    if not images.is_dir():
        fetch(COCO_IMAGES, images)


def fetch(url: str, path: Path, digest: str | None = None) -> None:
    """Download `url` to `path` unless it is there; a transfer that was cut off goes on where it stopped.

    Raises:
        ValueError: the transfer ended early, or the sha256 is not `digest`.
        OSError: network or disk.
    """
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.part")
    try:
        total = _transfer(url, partial)
    except OSError as error:
        raise OSError(f"{url} -> {partial}: {error}. Run again to go on from there.") from error
    if (size := partial.stat().st_size) != total:
        raise ValueError(f"{url} was cut off after {size} of {total} bytes. Run again to go on from there.")
    if digest and (found := grefcoco.sha256(partial)) != digest:
        partial.unlink()
        raise ValueError(f"{url} has sha256 {found}, not {digest}; it was thrown away. Run again.")
    partial.replace(path)


def _transfer(url: str, partial: Path) -> int:
    """Append to `partial` what it lacks; returns the size of the whole."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies behind what is there
            return have
        raise
    with answer:
        length = answer.headers["Content-Length"]
        if length is None:
            raise OSError("the server does not say how long the file is")
        if answer.status != 206:
            have = 0
        _copy(answer, partial, have, have + int(length))
        return have + int(length)


def _copy(answer: BinaryIO, partial: Path, have: int, total: int) -> None:
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem, disable=None)
    with bar, partial.open("ab" if have else "wb") as file:
        while block := answer.read(1 << 20):
            file.write(block)
            bar.update(len(block))


# ---- check -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    source = Path(options.source)
    if (source / REPORT).is_file():
        damage, splits, config = _check_built(source)
    else:
        notes = read_annotations(source, options.config)
        damage, splits, config = [], _count_genuine(notes), options.config
        _print_hashes(source, config)
        _print_problems(notes.problems)
        _print_shared({split: set(groups) for split, groups in notes.splits.items()})
    for split, counts in splits.items():
        print(f"{_counts_line(split, counts)}: {_verdict(split, counts, config)}")
    for line in damage:
        print(f"DAMAGED: {line}")
    return int(bool(damage))


def _check_built(source: Path) -> tuple[list[str], dict[str, dict[str, int]], str]:
    report = read_report(source)
    damage = []
    for name, digest in tqdm(report["shards"].items(), desc="sha256", disable=None):
        if not (source / name).is_file():
            damage.append(f"{source / name} is missing; build again.")
        elif grefcoco.sha256(source / name) != digest:
            damage.append(f"{source / name} is not what was built (sha256 differs); build again.")
    strange = {str(path.relative_to(source)) for path in source.glob("data/*")} - set(report["shards"])
    damage += [f"{source / name} is no part of what was built; remove it." for name in sorted(strange)]
    _print_problems(report["problems"])
    if not damage:
        _print_shared({split: _stored_image_ids(source, split) for split in report["splits"]})
    return damage, report["splits"], report["config"]


def _stored_image_ids(source: Path, split: str) -> set[int]:
    tables = (pq.read_table(path, columns=["image_id"]) for path in (source / "data").glob(f"{split}-*.parquet"))
    return {image_id for table in tables for image_id in table["image_id"].to_pylist()}


def _print_hashes(source: Path, config: str) -> None:
    for path in find_files(source, config):
        found = grefcoco.sha256(path)
        known = OFFICIAL_SHA256.get(path.name) if config == "grefcoco" else None
        verdict = "official release" if found == known else "not the official release" if known else "no official hash"
        print(f"{path}: sha256 {found}, {verdict}")


def _print_problems(problems: dict[str, list[str]]) -> None:
    for line in Problems(problems).lines():
        print(f"problem: {line}")


def _count_genuine(notes: Annotations) -> dict[str, dict[str, int]]:
    splits = {}
    for split, groups in notes.splits.items():
        refs = [ref for group in groups.values() for ref in group]
        numbers = np.repeat([len(targets(ref)) for ref in refs], [len(ref["sentences"]) for ref in refs])
        kinds = [(numbers == 0).sum(), (numbers == 1).sum(), (numbers > 1).sum(), numbers.max()]
        splits[split] = dict(zip(grefcoco.COUNTED, map(int, (len(groups), len(refs), len(numbers), *kinds))))
    return splits


def _print_shared(images: dict[str, set[int]]) -> None:
    names = Counter(image_id for ids in images.values() for image_id in ids)
    shared = sorted(image_id for image_id, count in names.items() if count > 1)
    for image_id in shared[:5]:
        print(f"image {image_id} is in {' and '.join(split for split, ids in images.items() if image_id in ids)}")
    print(f"{len(shared)} images shared between splits, {len(names):,} images in all")


def _verdict(split: str, counts: dict[str, int], config: str) -> str:
    official = OFFICIAL_COUNTS.get(split) if config == "grefcoco" else None
    if official is None:
        return "no official counts"
    wrong = [f"{name} {want:,}" for name, want in zip(grefcoco.COUNTED, official) if counts[name] != want]
    return f"not the official release ({', '.join(wrong)} there)" if wrong else "as in the official release"


# ---- stats and show ----------------------------------------------------------------------------------------------


def _stats(options: argparse.Namespace) -> int:
    refer = _refer(options)
    numbers = {split: _numbers(refer, split) for split in refer.availableSplits}
    print("| split | expressions | none | single | multi | words | mask, % of image |\n" + "|---" * 7 + "|")
    for split, columns in numbers.items():
        found = columns["targets"]
        kinds = [len(found), (found == 0).sum(), (found == 1).sum(), (found > 1).sum()]
        means = [columns[name].mean() if len(columns[name]) else 0.0 for name in ("words", "mask_share")]
        print(f"| {split} | " + " | ".join(f"{n:,}" for n in kinds) + f" | {means[0]:.1f} | {means[1]:.1f} |")
    if options.out:
        from grefcoco_data import report

        report.draw_statistics(numbers, Path(options.out))
        print(f"{options.out} shows them")
    return 0


def _numbers(refer: GRefer, split: str) -> dict[str, np.ndarray]:
    """Per sentence: targets, words; per sentence with targets: their area in percent of the image."""
    refs = [refer.Refs[ref_id] for ref_id in refer.getRefIds(split=split)]
    repeats = [len(ref["sentences"]) for ref in refs]
    shares = np.array([_share(refer, ref) for ref in refs])
    return {
        "targets": np.repeat([len(targets(ref)) for ref in refs], repeats),
        "words": np.array([len(sentence["sent"].split()) for ref in refs for sentence in ref["sentences"]]),
        "mask_share": np.repeat(shares, repeats)[np.repeat(shares > 0, repeats)],
    }


def _share(refer: GRefer, ref: dict) -> float:
    image = refer.Imgs[ref["image_id"]]
    return 100 * sum(refer.Anns[key]["area"] for key in targets(ref)) / (image["width"] * image["height"])


def _show(options: argparse.Namespace) -> int:
    from grefcoco_data import report

    loaded = grefcoco.load(options.source, images=options.images, config=options.config)
    split = options.split or next(iter(loaded))
    if split not in loaded:
        raise ValueError(f"{options.source} has no split {split!r}; choose one of {', '.join(loaded)}.")
    plain = loaded[split].with_format(None).select_columns(["sent_id", "ann_ids"])
    chosen = (
        index
        for index, row in enumerate(plain)
        if (not options.id or row["sent_id"] in options.id) and options.targets in (None, len(row["ann_ids"]))
    )
    indices = list(islice(chosen, options.limit))
    if not indices:
        raise ValueError(f"No sentence of {split} fits; loosen --id and --targets.")
    page = report.write_samples_page(loaded[split].__getitems__(indices), Path(options.out), split)
    print(f"{len(indices)} sentences of {split} in {page}")
    return 0


def _refer(options: argparse.Namespace) -> GRefer:
    """The index over a source; genuine files go through all checks first."""
    if not os.path.isfile(os.path.join(options.source, REPORT)):
        problems = read_annotations(options.source, options.config).problems
        for line in problems.lines():
            print(f"problem: {line}", file=sys.stderr)
        if unusable := [kind for kind in problems if "left out" in kind]:
            raise ValueError(f"{options.source} has {'; '.join(unusable)}. Build it first, and use what was built.")
    dataset, _, split_by = options.config.partition("_")
    return GRefer(options.source, dataset, split_by or "unc")


# ---- export ------------------------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    refer = _refer(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    made = mdetr_format(refer) if options.format == "mdetr" else coco_format(refer)
    for split, content in made:
        stem = f"finetune_{refer.data['dataset']}" if options.format == "mdetr" else "instances"
        path = out / f"{stem}_{split}.json"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
        print(f"{path}: {len(content['images']):,} images, {len(content['annotations']):,} annotations")
    return 0


def mdetr_format(refer: GRefer) -> Iterable[tuple[str, dict]]:
    """What MDETR's converter for gRefCOCO writes, for each split: an "image" per sentence, an annotation per target.

    Boxes are xywh in pixels. `tokens_positive` is the span of the whole sentence, as there when no parser is
    installed. No target: one annotation with an empty box, category and iscrowd -1.
    """
    next_image = next_annotation = 0
    for split in _splits(refer):
        images, annotations = [], []
        for ref, sentence in _sentences(refer, split):
            span = [[0, len(sentence["sent"])]]
            image = refer.Imgs[ref["image_id"]]
            images.append(
                {key: image[key] for key in ("file_name", "height", "width")}
                | {"id": next_image, "original_id": image["id"], "caption": sentence["sent"]}
                | {"dataset_name": refer.data["dataset"], "tokens_negative": span}
            )
            for ann in refer.loadAnns(as_list(ref["ann_id"])):
                ids = {"image_id": next_image, "id": next_annotation, "tokens_positive": span}
                annotations.append(_mdetr_annotation(ann) | ids)
                next_annotation += 1
            next_image += 1
        yield split, _coco_file(refer, images, annotations)


def _mdetr_annotation(ann: dict | None) -> dict:
    if ann is None:
        empty = {"area": -1, "iscrowd": -1, "category_id": -1, "original_id": -1}
        return empty | {"bbox": [0, 0, 0, 0], "empty": True}
    kept = {key: ann[key] for key in ("area", "iscrowd", "category_id", "bbox")}
    return kept | {"original_id": ann["id"], "empty": False}


def coco_format(refer: GRefer) -> Iterable[tuple[str, dict]]:
    """Plain COCO instances of each split's images, which pycocotools' COCO class loads, with `expressions` beside."""
    for split in _splits(refer):
        expressions = [
            {"id": sentence["sent_id"], "ref_id": ref["ref_id"], "image_id": ref["image_id"]}
            | {"sentence": sentence["sent"], "ann_ids": targets(ref), "no_target": not targets(ref)}
            for ref, sentence in _sentences(refer, split)
        ]
        image_ids = list(dict.fromkeys(expression["image_id"] for expression in expressions))
        images = refer.loadImgs(image_ids)
        annotations = refer.loadAnns(refer.getAnnIds(image_ids=image_ids))
        yield split, _coco_file(refer, images, annotations) | {"expressions": expressions}


def _splits(refer: GRefer) -> list[str]:
    return [split for split in EXPORT_ORDER if split in refer.availableSplits]


def _sentences(refer: GRefer, split: str) -> list[tuple[dict, dict]]:
    refs = (refer.Refs[ref_id] for ref_id in refer.getRefIds(split=split))
    return [(ref, sentence) for ref in refs for sentence in ref["sentences"]]


def _coco_file(refer: GRefer, images: list[dict], annotations: list[dict]) -> dict:
    head = {"info": refer.data.get("info", {}), "licenses": refer.data.get("licenses", [])}
    return head | {"images": images, "annotations": annotations, "categories": refer.data["categories"]}

"""Speed of the data set, compared with plain ways of doing the same and with the limit of the machine.

    python benchmarks/data.py --generator GENERATOR --work DIR [--original grefer.py]

The generator writes data in the genuine format (`--out --images --refs --anns-per-image --jpegs`). --original is
gRefCOCO's own grefer.py; it is measured too when it is given. Every measurement runs in a process of its own. Times
are CPU seconds, so that other work on the machine counts less. Peaks are resident memory with all libraries.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask

from grefcoco_data.arguments import ArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import grefcoco
from grefcoco_data import annotations as annotation_files
from grefcoco_data import rows as row_tables

FULL = {"--images": 19_994, "--refs": 250_000, "--anns-per-image": 9.84, "--seed": 2}
PICTURES = {"--images": 1_500, "--refs": 18_750, "--anns-per-image": 9.84, "--seed": 3, "--jpegs": 1_500}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data; reused when it exists")
    parser.add_argument("--original", type=Path)
    options = parser.parse_args()
    full = generate(options.generator, options.work / "full", FULL)
    pictures = generate(options.generator, options.work / "pictures", PICTURES)
    built = options.work / "built"
    if not built.exists():
        grefcoco.build(pictures, pictures / "images/train2014", built, num_proc=2)
    built_full = options.work / "built-full"
    if not built_full.exists():
        link_images(full, pictures)
        grefcoco.build(full, full / "images/train2014", built_full, num_proc=2)
    print("| what | ours | plain way | ratio | limit |\n|---|---|---|---|---|")
    compare("JSON parsed, CPU s", apart(read_ours, full), apart(read_plain, full), apart(read_bytes, full))
    for parser in ("json.load", "reader"):
        ours, plain, limit = (apart(way, full, parser) for way in (build_columns, build_rows, copy_table))
        compare(f"Arrow table, 4,000 images, input parsed by {parser}, CPU s", ours, plain, limit)
    index = apart(index_ours, full), apart(index_original, full, options.original) if options.original else None
    compare("GRefer ready, CPU s", index[0][:1], index[1], apart(read_ours, full))
    print(f"| GRefer, peak GB | {index[0][1]:.2f} | {'' if index[1] is None else f'{index[1][1]:.2f}'} | | |")
    compare("4,000 merged masks, CPU s", apart(masks_ours, full), apart(masks_plain, full), apart(masks_limit, full))
    apart(load_train, built_full)  # the first call makes the cache of `datasets`
    seconds, memory, loaded = apart(load_train, built_full)
    print(f"| {loaded['rows']:,} rows of train loaded, s | {loaded['wall']:.1f} | | | |")
    print(f"| the same, CPU s, and peak GB | {seconds:.1f}, {memory:.2f} | | | |")
    import data_samples as samples  # here and not above: torch would count as memory of the other measurements

    one, by_torch = (apart(samples.ours, pictures, built, way) for way in (samples.by_pillow, samples.by_torch))
    shared, mapper = (apart(way, pictures, built) for way in (samples.shared, samples.mapper))
    alone, once = (apart(samples.limit, pictures, built, sharing) for sharing in (False, True))
    name = f"{samples.SENTENCES:,} samples"
    compare(f"{name} one by one, CPU s", one, mapper, alone)
    compare(f"{name} one by one, resized by torch, CPU s", by_torch, mapper, alone)
    compare(f"{name} sharing images, CPU s", shared, mapper, once)
    stream = apart(stream_epoch, built)
    print(f"| first streamed row, s | {stream[2]['first']:.2f} | | | |")
    print(f"| streamed rows per CPU s | {stream[2]['rows'] / stream[0]:.0f} | | | |")
    print(
        f"| streaming, GB after a tenth and after an epoch | {stream[2]['early']:.2f}, {stream[2]['late']:.2f} | | | |"
    )


Measure = tuple[float, float, object]  # CPU seconds, peak GB, what the function returned


def compare(name: str, ours: tuple, plain: tuple | None, limit: tuple) -> None:
    columns = f"{plain[0]:.2f} | {plain[0] / ours[0]:.1f}x" if plain else " | "
    print(f"| {name} | {ours[0]:.2f} | {columns} | {limit[0]:.2f} |", flush=True)


def apart(function: Callable, *arguments: object) -> Measure:
    """Run in a new process. A function that prepares something first returns its own CPU seconds."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, function, arguments).result()


def _measured(function: Callable, arguments: tuple) -> Measure:
    datasets.disable_progress_bars()
    start = time.process_time()
    value = function(*arguments)
    seconds = value if isinstance(value, float) else time.process_time() - start
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1e6  # `ru_maxrss` counts what the parent had when it forked
    return seconds, peak, value if isinstance(value, dict) else None


def generate(generator: Path, folder: Path, sizes: dict[str, float]) -> Path:
    if not folder.exists():
        arguments = [str(part) for pair in sizes.items() for part in pair]
        subprocess.run([sys.executable, generator, "--out", folder, *arguments], check=True, stdout=subprocess.DEVNULL)
    return folder


def link_images(folder: Path, pictures: Path) -> None:
    """Give every image of the full set a file: a picture of the same size under its name."""
    by_size: dict[tuple[int, int], list[Path]] = {}
    for path in sorted((pictures / "images/train2014").iterdir()):
        with Image.open(path) as image:
            by_size.setdefault(image.size, []).append(path)
    sources = {size: itertools.cycle(paths) for size, paths in by_size.items()}
    for record in json.loads((annotation_files.find_files(folder, "grefcoco")[1]).read_text())["images"]:
        target = folder / "images/train2014" / record["file_name"]
        if not target.exists():
            os.link(next(sources[record["width"], record["height"]]), target)


def load_train(built: Path) -> dict[str, float]:
    start = time.perf_counter()
    rows = grefcoco.load(built, split="train")
    return {"wall": time.perf_counter() - start, "rows": len(rows)}


# ---- JSON --------------------------------------------------------------------------------------------------------


def read_ours(folder: Path) -> float:
    start = time.process_time()
    content = annotation_files.read_files(folder)  # freed after the time is taken
    return time.process_time() - start if content else 0.0


def read_plain(folder: Path) -> float:
    start, contents = time.process_time(), []
    for path in annotation_files.find_files(folder, "grefcoco"):
        with path.open() as file:
            contents.append(json.load(file))
    return time.process_time() - start


def read_bytes(folder: Path) -> float:
    start = time.process_time()
    contents = [path.read_bytes() for path in annotation_files.find_files(folder, "grefcoco")]
    return time.process_time() - start if contents else 0.0


# ---- Arrow -------------------------------------------------------------------------------------------------------


def parsed_input(folder: Path, parser: str) -> tuple[annotation_files.Annotations, list[int]]:
    """Parsed annotations with all segmentations as RLE, and images without content: only the tables are measured.

    `json.load` leaves millions of lists, which the garbage collector may search while rows are built.
    """
    if parser == "json.load":
        annotation_files.read_instances = lambda path, as_lists=False: annotation_files.read_json(path)
    notes = annotation_files.read_annotations(folder)
    image_ids = list(notes.splits["train"])[:4_000]
    for image_id in image_ids:
        image = notes.images[image_id]
        for item in notes.objects[image_id]:
            item["segmentation"] = row_tables.to_rle(item["segmentation"], image["height"], image["width"])[0]
    row_tables.to_rle = lambda rle, height, width: (rle, None)
    row_tables.read_image = lambda source, image: b"picture"
    return notes, image_ids


class Columns(datasets.ArrowBasedBuilder):
    """The tables of `grefcoco`, as its builder yields them."""

    parsed: tuple

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=grefcoco.IMAGE_FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train")]

    def _generate_tables(self) -> Iterator[tuple[int, object]]:
        notes, image_ids = self.parsed
        yield from enumerate(row_tables.image_tables(notes, "train", image_ids, None, annotation_files.Problems()))


class Rows(datasets.GeneratorBasedBuilder):
    """The same rows, one dictionary at a time."""

    parsed: tuple
    _info = Columns._info
    _split_generators = Columns._split_generators

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        notes, image_ids = self.parsed
        for image_id in image_ids:
            image = notes.images[image_id]
            yield (
                image_id,
                {
                    "image": {"bytes": b"picture", "path": image["file_name"]},
                    "image_id": image_id,
                    **{key: image[key] for key in ("file_name", "width", "height")},
                    "objects": [_object_row(item) for item in notes.objects[image_id]],
                    "expressions": [
                        _expression_row(ref, sentence)
                        for ref in notes.splits["train"][image_id]
                        for sentence in ref["sentences"]
                    ],
                },
            )


def _object_row(item: dict) -> dict:
    fields = {key: item[key] for key in ("category_id", "bbox", "area", "segmentation")}
    return {"ann_id": item["id"], "iscrowd": bool(item["iscrowd"]), **fields}


def _expression_row(ref: dict, sentence: dict) -> dict:
    ann_ids = annotation_files.targets(ref)
    ids = {"ref_id": ref["ref_id"], "sent_id": sentence["sent_id"], "raw": sentence["raw"]}
    return ids | {"sentence": sentence["sent"], "no_target": not ann_ids, "ann_ids": ann_ids}


def _prepare(kind: type[datasets.DatasetBuilder], folder: Path, parser: str) -> float:
    kind.parsed = parsed_input(folder, parser)
    with tempfile.TemporaryDirectory() as cache:
        builder = kind(cache_dir=cache, hash="benchmark")
        start = time.process_time()
        builder.download_and_prepare()
        return time.process_time() - start


def build_columns(folder: Path, parser: str) -> float:
    return _prepare(Columns, folder, parser)


def build_rows(folder: Path, parser: str) -> float:
    return _prepare(Rows, folder, parser)


def copy_table(folder: Path, parser: str) -> float:
    """Only write the finished table."""
    notes, image_ids = parsed_input(folder, parser)
    tables = list(row_tables.image_tables(notes, "train", image_ids, None, annotation_files.Problems()))
    start = time.process_time()
    with tempfile.TemporaryFile() as file, pa.ipc.new_stream(file, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return time.process_time() - start


# ---- index and masks ---------------------------------------------------------------------------------------------


def index_ours(folder: Path) -> None:
    grefcoco.GRefer(folder)


def index_original(folder: Path, path: Path) -> None:
    spec = importlib.util.spec_from_file_location("original", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.G_REFER(str(folder), "grefcoco", "unc")


def _masks(folder: Path, merged: Callable[[grefcoco.GRefer, dict], object]) -> float:
    refer = grefcoco.GRefer(folder)
    refs = random.Random(0).sample(refer.data["refs"], 4_000)
    start = time.process_time()
    for ref in refs:
        merged(refer, ref)
    return time.process_time() - start


def masks_ours(folder: Path) -> float:
    return _masks(folder, lambda refer, ref: refer.getMaskByRef(ref, merge=True))


def masks_plain(folder: Path) -> float:
    """As published loaders do: decode every polygon of every target, add up, clip at 1."""
    return _masks(folder, plain_mask)


def plain_mask(refer: grefcoco.GRefer, ref: dict) -> np.ndarray:
    image = refer.Imgs[ref["image_id"]]
    total = np.zeros((image["height"], image["width"]), np.uint8)
    for ann in refer.loadAnns(annotation_files.targets(ref)):
        if not ann["iscrowd"]:
            rles = coco_mask.frPyObjects(ann["segmentation"], image["height"], image["width"])
            total += np.sum(coco_mask.decode(rles), axis=2).astype(np.uint8)
            sum(coco_mask.area(rles))
    total[np.where(total > 1)] = 1
    return total


def masks_limit(folder: Path) -> float:
    """pycocotools alone, unchecked: all polygons in one call, one merge, one decode."""
    return _masks(folder, _mask_unchecked)


def _mask_unchecked(refer: grefcoco.GRefer, ref: dict) -> None:
    image = refer.Imgs[ref["image_id"]]
    anns = [ann for ann in refer.loadAnns(annotation_files.targets(ref)) if not ann["iscrowd"]]
    if rings := [ring for ann in anns for ring in ann["segmentation"]]:
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, image["height"], image["width"])))


# ---- streaming ----------------------------------------------------------------------------------------------------


def stream_epoch(built: Path) -> dict[str, float]:
    start = time.perf_counter()
    stream = grefcoco.load(built, split="train", streaming=True)
    rows = 0
    sizes = []
    for _ in stream:
        if not rows:
            first = time.perf_counter() - start
        rows += 1
        if rows % 100 == 0:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9)
    return {"first": first, "rows": rows, "early": sizes[len(sizes) // 10], "late": sizes[-1]}


if __name__ == "__main__":
    main()

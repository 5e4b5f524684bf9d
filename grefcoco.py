"""gRefCOCO and the RefCOCO family as Hugging Face data sets.

    python grefcoco.py build --annotations DIR --images train2014.zip --out data/grefcoco
    python grefcoco.py check | stats | show | export

    rows = grefcoco.load("data/grefcoco", split="val")      # one row per sentence, images decoded on access
    load_dataset("data/grefcoco", streaming=True)           # one row per image, as stored

A Parquet row holds an image once, with all its objects and all its sentences; `load` unfolds such rows into one per
sentence.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import string
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from PIL import Image
from tqdm.auto import tqdm

if find_spec("grefcoco_data") is None and (note := Path(__file__).with_suffix(".json")).is_file():
    # `datasets` before 4 runs a copy of a loading script, far from its folder, and notes beside it whence it came.
    sys.path.append(str(Path(json.loads(note.read_text(encoding="utf-8"))["original file path"]).resolve().parent))
if find_spec("grefcoco_data") is None:
    raise ImportError(
        "grefcoco.py needs the folder grefcoco_data, which lies beside it in the repository: keep both together, "
        "or install the repository (pip install FOLDER)."
    )
else:  # indented, since `datasets` before 4 takes other imports for packages of the index
    from grefcoco_data.files import (
        CONFIGS,
        REPORT,
        Annotations,
        Problems,
        find_files,
        local_images,
        merge_rles,
        open_images,
        read_annotations,
    )
    from grefcoco_data.grefer import GRefer
    from grefcoco_data.image_rows import (
        EXPRESSION_FEATURES,
        IMAGE_FEATURES,
        ROWS_PER_GROUP,
        TARGET_COLUMNS,
        image_tables,
        list_column,
    )

__all__ = ["CONFIGS", "EXPRESSION_FEATURES", "IMAGE_FEATURES", "GRefer", "Grefcoco", "build", "load", "shuffle_shards"]

VERSION = "1.0.0"
COUNTED = ("images", "refs", "expressions", "no_target", "single", "multi", "max_targets")  # per split


@dataclass
class GrefcocoConfig(datasets.BuilderConfig):
    """Where the genuine files are: a folder of annotations, a folder or zip of images."""

    annotations: str = ""
    images: str = ""
    skip_bad_images: bool = False

    def create_config_id(self, config_kwargs: dict, custom_features: Features | None = None) -> str:
        """Name of the cache folder: another one for files that changed, lest `datasets` serve their former rows."""
        if not self.annotations or not self.images:
            raise ValueError("Say where the files are: annotations=FOLDER, images=FOLDER_OR_ZIP.")
        stamp = _fingerprint(find_files(self.annotations, self.name), self.images)
        return super().create_config_id({**config_kwargs, "files": stamp}, custom_features)


class Grefcoco(datasets.ArrowBasedBuilder):
    """Image rows made from the genuine files into the cache of `datasets`, for use without building Parquet first."""

    VERSION = datasets.Version(VERSION)
    BUILDER_CONFIG_CLASS = GrefcocoConfig
    BUILDER_CONFIGS = [GrefcocoConfig(name=name, version=VERSION) for name in CONFIGS]
    DEFAULT_CONFIG_NAME = "grefcoco"

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=IMAGE_FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        annotations = read_annotations(self.config.annotations, self.config.name)
        for line in annotations.problems.lines():
            datasets.logging.get_logger(__name__).warning(line)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "image_ids": list(groups)})
            for split, groups in annotations.splits.items()
        ]

    def _generate_tables(self, split: str, image_ids: list[int]) -> Iterator[tuple[int, pa.Table]]:
        annotations = read_annotations(self.config.annotations, self.config.name)
        source = open_images(self.config.images)
        yield from enumerate(
            image_tables(annotations, split, image_ids, source, Problems(), self.config.skip_bad_images)
        )


# ---- loading -----------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    images: str | Path | None = None,
    config: str = "grefcoco",
    split: str | None = None,
    streaming: bool = False,
    layout: Literal["expression", "image"] = "expression",
    columns: Sequence[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load gRefCOCO (or a configuration of the RefCOCO family) with one row per sentence, or per image.

    Map-style expression rows are an index in memory; an image is decoded when its row is read, and once for all rows
    of a batch that share it (`dataset[indices]`, `dataset.__getitems__(indices)`: these rows hold the same PIL
    object, so copy before drawing). To group sentences by image without decoding anything, read the column from
    `dataset.with_format(None)["image_id"]`. Functions of `map` and `filter` see decoded rows; name `input_columns`
    to spare what they do not use.

    Streams decode an image once, then yield all its sentences in a row. They split over nodes and workers by shard
    and resume exactly through `state_dict`/`load_state_dict`, with `shuffle_shards` too (with workers, through
    torchdata's `StatefulDataLoader`); the buffer of `.shuffle(...)` is not saved, which loses and repeats rows.

    Args:
        source: A built folder, a Hub data set id, or a folder with the genuine annotation files.
        images: Folder or zip of the images; with the genuine files only.
        config: Key of `CONFIGS`.
        split: Split to load; None loads all into a dictionary.
        streaming: Yield rows without preparing anything on disk.
        layout: "expression" gives the columns of `EXPRESSION_FEATURES` (boxes xywh in pixels, masks as RLE at the
            image's size, images RGB); "image" those of `IMAGE_FEATURES`, as stored.
        columns: Columns to keep; without `image`, no image is read. The expression layout also knows `objects`, the
            list of all objects of the image.

    Raises:
        ValueError: unknown configuration, split, layout or column; annotations that cannot be used.
        FileNotFoundError: nothing usable at `source` or `images`.
    """
    if config not in CONFIGS:
        raise ValueError(f"Unknown configuration {config!r}; choose one of {', '.join(CONFIGS)}.")
    known = {"expression": [*EXPRESSION_FEATURES, "objects"], "image": list(IMAGE_FEATURES)}.get(layout)
    if known is None:
        raise ValueError(f"Unknown layout {layout!r}; choose 'expression' or 'image'.")
    usual = list(EXPRESSION_FEATURES if layout == "expression" else IMAGE_FEATURES)
    wanted = usual if columns is None else list(columns)
    if unknown := set(wanted) - set(known):
        raise ValueError(f"Unknown columns {sorted(unknown)}; layout {layout!r} has {', '.join(known)}.")
    rows = _load_image_rows(str(source), images, config, split, streaming, "image" in wanted)
    if isinstance(rows, dict):
        return type(rows)({name: _arrange(part, layout, wanted) for name, part in rows.items()})
    return _arrange(rows, layout, wanted)


def shuffle_shards(stream: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """Put the groups of up to 100 images of a stream into a random order, another one after each `set_epoch`.

    Rows keep their order within a group. Unlike with a shuffle buffer, a state saved anywhere resumes exactly; call
    `set_epoch` before `load_state_dict`. (What `datasets` says about a refilled buffer is of a buffer of one.)
    """
    return stream.reshard().shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)


def _load_image_rows(
    source: str, images: str | Path | None, config: str, split: str | None, streaming: bool, pictures: bool
) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    if images is None and os.path.isdir(source) and not os.path.isfile(os.path.join(source, REPORT)):
        find_files(source, config)
        raise ValueError(f"{source} holds genuine annotation files: say where the images are (images=FOLDER_OR_ZIP).")
    if images is None:
        columns = {} if pictures else {"columns": [name for name in IMAGE_FEATURES if name != "image"]}
        return datasets.load_dataset(source, config, split=split, streaming=streaming, **columns)
    place = local_images(str(images))
    builder = Grefcoco(config_name=config, annotations=os.path.abspath(source), images=os.path.abspath(place))
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__)) from error
    return builder.as_dataset(split=split)


def _fingerprint(files: Iterable[Path], images: str) -> str:
    """Changes whenever an input does: a file, or the list, sizes or times of the images."""
    open_images(images)
    paths = [*files, Path(images)]
    if os.path.isdir(images):
        paths += sorted(Path(images).iterdir())
    stamps = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((VERSION, stamps)).encode()).hexdigest()[:16]


def _arrange(
    rows: datasets.Dataset | datasets.IterableDataset, layout: str, columns: list[str]
) -> datasets.Dataset | datasets.IterableDataset:
    if layout == "image":
        return rows.select_columns(columns)
    if isinstance(rows, datasets.Dataset):
        return _unfold(rows).select_columns(columns)
    needed = [name for name in IMAGE_FEATURES if name in ("objects", "expressions", "height", "width", *columns)]
    stream = rows.select_columns(needed)
    if "image" in needed:
        stream = stream.cast_column("image", datasets.Image(decode=False))
    return stream.map(explode, batched=True, batch_size=1, remove_columns=needed, fn_kwargs={"columns": columns})


def explode(batch: dict[str, list], columns: list[str]) -> dict[str, list]:
    """One image row, as a batch of one, to one row per sentence; all share the decoded image."""
    objects, expressions = batch["objects"][0], batch["expressions"][0]
    by_id = {item["ann_id"]: item for item in objects}
    found = [[by_id[ann_id] for ann_id in expression["ann_ids"]] for expression in expressions]
    height, width = batch["height"][0], batch["width"][0]
    rows: dict[str, list] = {}
    for name in columns:
        if name == "image":
            rows[name] = [decode_image(batch["image"][0])] * len(expressions)
        elif name in batch:
            rows[name] = batch[name] * len(expressions)
        elif name == "mask":
            rows[name] = [
                merge_rles([o["segmentation"] for o in group], [o["iscrowd"] for o in group], height, width)
                for group in found
            ]
        elif name in TARGET_COLUMNS:
            rows[name] = [[item[TARGET_COLUMNS[name]] for item in group] for group in found]
        else:
            rows[name] = [expression[name] for expression in expressions]
    return rows


def decode_image(stored: dict) -> Image.Image:
    """RGB image of a stored `{"bytes", "path"}`, not rotated by EXIF, since the masks are not."""
    image = Image.open(io.BytesIO(stored["bytes"]))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB image too


def _unfold(images: datasets.Dataset) -> datasets.Dataset:
    """Index of expression rows over image rows, made of whole Arrow columns; nothing is decoded.

    Heavy columns hold positions, which `_Lookup` turns into what they stand for on access: `image` and `objects` the
    row of the image, `masks` and `mask` the targets' places among all objects.
    """
    light = [name for name in IMAGE_FEATURES if name != "image"]
    table = images.with_format(None).select_columns(light).data.table.combine_chunks()
    objects, expressions = (pc.list_flatten(table[name]).combine_chunks() for name in ("objects", "expressions"))
    rows = pc.list_parent_indices(table["expressions"]).combine_chunks()
    ann_ids = expressions.field("ann_ids")
    lengths = pc.list_value_length(ann_ids).to_numpy()
    known_ids = objects.field("ann_id").to_numpy()
    order = np.argsort(known_ids)
    places = order[np.searchsorted(known_ids, ann_ids.flatten().to_numpy(), sorter=order)]
    per_image = {name: table[name].take(rows) for name in ("image_id", "file_name", "width", "height")}
    sizes = np.stack([per_image["height"].to_numpy(), per_image["width"].to_numpy()], axis=1)
    starts = np.cumsum([0, *lengths])[:-1]
    columns = {
        "image": rows,
        **per_image,
        **{name: expressions.field(name) for name in ("ref_id", "sent_id", "sentence", "raw", "no_target")},
        "ann_ids": ann_ids,
        "category_ids": list_column(objects.field("category_id").take(places), lengths),
        "boxes": list_column(objects.field("bbox").take(places), lengths),
        "masks": list_column(pa.array(places), lengths),
        "mask": list_column(pa.array(np.insert(places, np.repeat(starts, 2), sizes.ravel())), lengths + 2),
        "objects": rows,
    }
    index = datasets.Dataset(pa.table(columns), split=images.split, fingerprint=f"{images._fingerprint}-expressions")
    return index.with_transform(_Lookup(images, objects))


class _Lookup:
    """Turns the positions in the index of `_unfold` into what they stand for, column by column."""

    def __init__(self, images: datasets.Dataset, objects: pa.StructArray) -> None:
        if "image" in images.column_names:
            self.pictures = images.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        self.objects = images.select_columns(["objects"])
        self.sizes = np.array(objects.field("segmentation").field("size").flatten()).reshape(-1, 2)
        self.counts = objects.field("segmentation").field("counts")
        self.crowd = objects.field("iscrowd").to_numpy(zero_copy_only=False)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        found = dict(batch)
        if "image" in batch:
            pictures = self._rows(self.pictures, "image", batch["image"])
            decoded = {row: decode_image(stored) for row, stored in pictures.items()}
            found["image"] = [decoded[row] for row in batch["image"]]
        if "objects" in batch:
            objects = self._rows(self.objects, "objects", batch["objects"])
            found["objects"] = [objects[row] for row in batch["objects"]]
        if "masks" in batch:
            found["masks"] = [self._segmentations(places) for places in batch["masks"]]
        if "mask" in batch:
            found["mask"] = [self._merged(*size_and_places) for size_and_places in batch["mask"]]
        return found

    def _rows(self, source: datasets.Dataset, column: str, rows: list[int]) -> dict[int, dict | list]:
        unique = sorted(set(rows))
        return dict(zip(unique, source[unique][column]))

    def _segmentations(self, places: Sequence[int]) -> list[dict]:
        return [{"size": self.sizes[place].tolist(), "counts": self.counts[place].as_py()} for place in places]

    def _merged(self, height: int, width: int, *places: int) -> dict:
        return merge_rles(self._segmentations(places), self.crowd[list(places)], height, width)


# ---- building ----------------------------------------------------------------------------------------------------


def build(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    config: str = "grefcoco",
    strict: bool = False,
    skip_bad_images: bool = False,
    num_proc: int = 1,
) -> dict:
    """Write the data set as Parquet that `load_dataset(out)` and the Hub read, image bytes untouched.

    `out` gets `data/{split}-00000-of-0000N.parquet`, a README with the card and `build.json`, the report that is
    also returned: counts, problems by kind, sha256 of every file read and written. All is written beside `out` and
    renamed at the end, so a build that is cut off leaves what was there before.

    Args:
        annotations: Folder of the refs file and instances.json.
        images: Folder or zip.
        out: Folder to make, or a former build to replace.
        config: Key of `CONFIGS`.
        strict: Raise on any problem.
        skip_bad_images: Leave images that are missing, damaged or of another size out, and say so in the report.
        num_proc: Processes. The annotations are parsed once.

    Raises:
        ValueError: unusable annotations, a bad image (without `skip_bad_images`), any problem (with `strict`),
            nothing left to write, or an `out` that is not a former build.
        FileNotFoundError: annotation files or images are not there.
    """
    out, images = Path(out), local_images(str(images))
    if out.exists() and not (out / REPORT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no former build; choose another --out or remove it.")
    open_images(images)
    notes = read_annotations(annotations, config)
    _refuse_problems(notes.problems, strict)
    # Of this process alone: workers that outlived a killed build may still write to theirs.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    for abandoned in out.parent.glob(f".{out.name}.partial-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        (partial / "data").mkdir(parents=True)
        jobs = _shard_jobs(str(annotations), config, images, partial / "data", notes, skip_bad_images)
        report = _write_shards(jobs, notes, num_proc)
        _refuse_problems(Problems(report["problems"]), strict)
        sources = find_files(annotations, config)
        report = {
            "version": VERSION,
            "config": config,
            **report,
            "sources": {path.name: sha256(path) for path in sources},
        }
        write_card(partial, config, report)
        (partial / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


@dataclass(frozen=True)
class ShardJob:
    """One Parquet file to write, small enough to send to another process."""

    annotations: str
    config: str
    images: str
    path: str
    split: str
    image_ids: tuple[int, ...]
    skip_bad_images: bool


def shard_count(num_images: int) -> int:
    """Files for a split: a power of two, at least 100 images each, 64 at most, so that usual world sizes divide it."""
    return 2 ** min(6, max(0, int(math.log2(max(1, num_images // ROWS_PER_GROUP)))))


def _shard_jobs(
    annotations: str, config: str, images: str, folder: Path, notes: Annotations, skip_bad_images: bool
) -> list[ShardJob]:
    jobs = []
    for split, groups in notes.splits.items():
        count = shard_count(len(groups))
        for number, ids in enumerate(np.array_split(np.array(list(groups), dtype=np.int64), count)):
            path = str(folder / f"{split}-{number:05}-of-{count:05}.parquet")
            jobs.append(ShardJob(annotations, config, images, path, split, tuple(ids.tolist()), skip_bad_images))
    return jobs


def _write_shards(jobs: list[ShardJob], notes: Annotations, num_proc: int) -> dict:
    """Run the jobs, with a progress bar over images; returns counts, hashes and all problems."""
    problems = Problems(notes.problems)
    splits: dict[str, dict[str, int]] = {}
    shards = {}
    with tqdm(total=sum(len(job.image_ids) for job in jobs), unit="image", desc="build", disable=None) as bar:
        for job, (counts, digest, found) in zip(jobs, _run(jobs, num_proc)):
            bar.update(len(job.image_ids))
            problems.merge(found)
            shards[f"data/{Path(job.path).name}"] = digest
            _add_counts(splits.setdefault(job.split, dict.fromkeys(counts, 0)), counts)
    for job in jobs:
        if not splits[job.split]["images"]:
            os.remove(job.path)
            del shards[f"data/{Path(job.path).name}"]
    splits = {split: counts for split, counts in splits.items() if counts["images"]}
    if not splits:
        raise ValueError(
            "Nothing is left to build: " + ("; ".join(problems.lines()) or "the refs file is empty") + "."
        )
    parts = {"categories": notes.categories, "refs_without_sentences": notes.wordless, "shards": shards}
    return {"splits": splits, "problems": problems, **parts}


def _run(jobs: list[ShardJob], num_proc: int) -> Iterator[tuple[dict[str, int], str, Problems]]:
    if num_proc == 1:
        yield from map(write_shard, jobs)
        return
    # Forked workers inherit the parsed annotations; where there is no fork, each parses them once.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context(method)) as pool:
        try:
            yield from pool.map(write_shard, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_shard(job: ShardJob) -> tuple[dict[str, int], str, Problems]:
    """Write one Parquet file; returns its counts, its sha256 and the problems met."""
    notes = read_annotations(job.annotations, job.config)
    problems = Problems()
    counts = dict.fromkeys((*COUNTED, "bytes"), 0)
    tables = image_tables(notes, job.split, job.image_ids, open_images(job.images), problems, job.skip_bad_images)
    try:
        with open(job.path, "wb") as file:
            with pq.ParquetWriter(file, IMAGE_FEATURES.arrow_schema) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=ROWS_PER_GROUP)
                    _add_counts(counts, _counts(table))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk, which names no file
        raise OSError(f"{job.path} could not be written: {error}") from error
    return counts, sha256(job.path), problems


def _counts(table: pa.Table) -> dict[str, int]:
    expressions = pc.list_flatten(table["expressions"]).combine_chunks()
    found = pc.list_value_length(expressions.field("ann_ids")).to_numpy()
    kinds = ((found == 0).sum(), (found == 1).sum(), (found > 1).sum(), found.max())
    refs = len(pc.unique(expressions.field("ref_id")))
    values = map(int, (table.num_rows, refs, len(found), *kinds))
    return dict(zip(COUNTED, values)) | {"bytes": table.nbytes}


def _add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = max(total[name], count) if name == "max_targets" else total[name] + count


def write_card(folder: Path, config: str, report: dict) -> None:
    """README.md: the card of `dataset_card.md` filled with what was built, and the YAML `load_dataset` reads."""
    splits = report["splits"]
    card = DatasetCard.load(_card_template())
    infos = datasets.splits.SplitDict()
    for split, counts in splits.items():
        infos.add(datasets.SplitInfo(split, num_bytes=counts["bytes"], num_examples=counts["images"]))
    info = datasets.DatasetInfo(
        features=IMAGE_FEATURES,
        splits=infos,
        download_size=sum(path.stat().st_size for path in (folder / "data").iterdir()),
        dataset_size=sum(counts["bytes"] for counts in splits.values()),
    )
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    DatasetInfosDict({config: info}).to_dataset_card_data(card.data)
    # `datasets` names its cache by folder name, configuration and version, not by content: other rows, other version.
    content = int(hashlib.sha256(json.dumps(report["shards"]).encode()).hexdigest()[:8], 16)
    parameters = {"data_files": files, "version": f"{VERSION.rpartition('.')[0]}.{content}"}
    MetadataConfigs({config: parameters}).to_dataset_card_data(card.data)
    rows = [" | ".join([split, *(f"{counts[name]:,}" for name in COUNTED)]) for split, counts in splits.items()]
    table = "\n".join(f"| {row} |" for row in rows)
    problems = "\n".join(f"- {line}" for line in Problems(report["problems"]).lines()) or "None was met."
    text = string.Template(card.text).substitute(config=config, splits=table, problems=problems)
    (folder / "README.md").write_text(f"---\n{card.data.to_yaml()}\n---\n{text}", encoding="utf-8")


def _card_template() -> Path:
    """dataset_card.md lies beside this file in a checkout, and under `share` where the package is installed."""
    beside = Path(__file__).with_name("dataset_card.md")
    return beside if beside.exists() else Path(sysconfig.get_path("data"), "share", "grefcoco", beside.name)


def _replace(partial: Path, out: Path) -> None:
    """Put `partial` in the place of `out`; at no moment is a half-written folder there."""
    for path in (*partial.iterdir(), partial / "data", partial):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    former = out.with_name(f".{out.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if out.exists():
        out.rename(former)
    partial.rename(out)
    shutil.rmtree(former, ignore_errors=True)


def _refuse_problems(problems: Problems, strict: bool) -> None:
    if strict and problems:
        raise ValueError("Problems in the files, and --strict was asked for: " + "; ".join(problems.lines()) + ".")


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    from grefcoco_data.commands import main

    raise SystemExit(main())

"""Building: the genuine files as Parquet shards with a card, which `load_dataset` and the Hub read.

`build` writes everything into a folder beside `out` and renames it at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import string
import sysconfig
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from tqdm.auto import tqdm

from grefcoco_data.annotation_json import read_json
from grefcoco_data.annotations import (
    CATEGORY_FIELDS,
    REF_FIELDS,
    Annotations,
    Problems,
    check_records,
    count_kinds,
    find_files,
    read_annotations,
)
from grefcoco_data.atomic_files import publish, sha256, sole_writer, staging_folder, sync
from grefcoco_data.collections import COLLECTIONS, COUNTED, Collection, collection_of
from grefcoco_data.images import local_images, open_images
from grefcoco_data.rows import IMAGE_FEATURES, ROWS_PER_GROUP, image_tables
from grefcoco_data.video_collections import VIDEO_COLLECTIONS

VERSION = "1.0.0"  # of the stored rows
REPORT = "build.json"  # the file that marks a built folder
PARTS = {"config": str, "splits": dict, "problems": dict, "shards": dict}  # of the report
PARTS_OF_IMAGES = {"categories": list, "refs_without_sentences": list}  # of the report of a data set of images


def build(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    config: str = "grefcoco",
    strict: bool = False,
    skip_bad_images: bool = False,
    num_proc: int = 1,
) -> dict:
    """Write the data set as Parquet that `load_dataset(out)` and the Hub read.

    Image bytes are not changed, except that orientation tags, which the masks ignore, are removed and named.

    `out` gets `data/{split}-00000-of-0000N.parquet`, a README with the card and `build.json`, the report that is
    also returned: counts, problems by kind, sha256 of every file read and written. Everything is written beside `out`
    and renamed at the end: a build that is interrupted leaves `out` as it was.

    Args:
        annotations: Folder of the refs file and instances.json.
        images: Folder or zip of the images, or `hf://datasets/OWNER/NAME/PATH`.
        out: Folder to make, or an earlier build to replace.
        config: One of `CONFIGS`.
        strict: Raise on any problem.
        skip_bad_images: Skip images that are missing, damaged or of another size, and name them in the report.
        num_proc: Number of processes. The annotations are parsed once.

    Raises:
        ValueError: unusable annotations, a bad image (without `skip_bad_images`), any problem (with `strict`),
            no row to write, an `out` that is not an earlier build, that `load_dataset` cannot read or that another
            process writes.
        FileNotFoundError: annotation files or images do not exist.
    """
    out, images = _checked_out(out), local_images(str(images))
    open_images(images)
    with sole_writer(out):
        staging = staging_folder(out)
        try:
            report = _write_build(staging, str(annotations), config, images, strict, skip_bad_images, num_proc)
            publish(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return report


def _checked_out(out: str | Path) -> Path:
    """Absolute path of the folder to build, symbolic links followed; raises ValueError when it is unusable."""
    path = Path(out).resolve()
    if str(out).startswith("~") or "::" in str(path) or set(str(path)) & set("*?[]"):
        raise ValueError(f"load_dataset cannot read {out}: choose an --out without ~, ::, *, ?, [ and ].")
    if path == Path.cwd() or path in Path.cwd().parents:
        raise ValueError(f"{out} is the working folder or holds it; choose another --out.")
    if path.exists() and not (path / REPORT).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{out} exists and is not an earlier build; choose another --out or remove it.")
    return path


def _write_build(
    folder: Path, annotations: str, config: str, images: str, strict: bool, skip_bad_images: bool, num_proc: int
) -> dict:
    """Write all files of a build into an empty folder; returns the report."""
    notes = read_annotations(annotations, config)
    _refuse_problems(notes.problems, strict)
    (folder / "data").mkdir()
    jobs = _shard_jobs(annotations, config, images, folder / "data", notes, skip_bad_images)
    report = _write_shards(jobs, notes, num_proc)
    _refuse_problems(Problems(report["problems"]), strict)
    sources = {path.name: sha256(path) for path in find_files(annotations, config)}
    report = {"version": VERSION, "config": config, **report, "sources": sources}
    write_card(folder, config, report)
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def read_report(folder: str | Path) -> dict:
    """The report that `build` wrote into a folder. Raises ValueError when it is damaged."""
    path = Path(folder) / REPORT
    report = read_json(path)
    parts = PARTS | (PARTS_OF_IMAGES if isinstance(report, dict) and str(report.get("config")) in COLLECTIONS else {})
    if not (isinstance(report, dict) and all(isinstance(report.get(name), kind) for name, kind in parts.items())):
        raise ValueError(f"{path} is not a build report; build again.")
    if report["config"] not in COLLECTIONS and report["config"] not in VIDEO_COLLECTIONS:
        raise ValueError(f"{path} names an unknown configuration ({report['config'][:80]!r}); build again.")
    splits, names = report["splits"].values(), [*report["problems"].values(), list(report["shards"].values())]
    if not (
        all(isinstance(split, dict) and all(type(number) is int for number in split.values()) for split in splits)
        and all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in names)
        and all(re.fullmatch(r"data/[\w-]+\.parquet", name) for name in report["shards"])
        and (parts == PARTS or all(set(COUNTED) <= set(split) for split in splits))
    ):
        raise ValueError(f"{path} holds values of wrong types; build again.")
    if parts != PARTS:
        check_records(report["categories"], CATEGORY_FIELDS, f"{path}: categories")
        check_records(report["refs_without_sentences"], REF_FIELDS, f"{path}: refs_without_sentences")
    return report


@contextlib.contextmanager
def one_error(folder: str | Path) -> Iterator[None]:
    """Turn what libraries raise on a damaged folder into one ValueError; errors of the system stay what they are."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and (error.errno or isinstance(error, (FileNotFoundError, ConnectionError))):
            raise
        raise ValueError(_damage(folder, error)) from error  # OSError without a number: a damaged Parquet file
    except ValueError as error:
        if type(error) is ValueError:
            raise
        raise ValueError(_damage(folder, error)) from error
    except Exception as error:  # YAML, Arrow and `datasets` have many kinds
        raise ValueError(_damage(folder, error.__cause__ or error)) from error


def _damage(folder: str | Path, error: BaseException) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{folder} is damaged or was not built by this program ({reason[:300]}); build again."


def damaged_files(folder: Path) -> list[str]:
    """One line for each file of a built folder that is missing, changed or not part of the build."""
    shards = read_report(folder)["shards"]
    damage = []
    for name, digest in tqdm(shards.items(), desc="sha256", disable=None):
        if not (folder / name).is_file():
            damage.append(f"{folder / name} is missing; build again.")
        elif sha256(folder / name) != digest:
            damage.append(f"{folder / name} was changed after the build (sha256 differs); build again.")
    extra = {str(path.relative_to(folder)) for path in folder.glob("data/*")} - set(shards)
    return damage + [f"{folder / name} is not part of the build; remove it." for name in sorted(extra)]


def check_card(folder: Path, config: str) -> None:
    """Raise ValueError when `load_dataset` cannot read the YAML of README.md."""
    with one_error(folder / "README.md"):
        datasets.load_dataset_builder(str(folder), config)


def stored_image_ids(folder: Path, split: str) -> set[int]:
    """Ids of the images in a split of a built folder."""
    with one_error(folder):
        tables = (pq.read_table(path, columns=["image_id"]) for path in (folder / "data").glob(f"{split}-*.parquet"))
        return {image_id for table in tables for image_id in table["image_id"].to_pylist()}


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
    process: int  # id of the process that builds


def shard_count(num_images: int) -> int:
    """Number of files of a split: a power of two, so that usual world sizes divide it; at most 64.

    Each file has at least 100 images, where there are that many.
    """
    return 2 ** min(6, max(0, int(math.log2(max(1, num_images // ROWS_PER_GROUP)))))


def write_shard(job: ShardJob) -> tuple[dict[str, int], str, Problems]:
    """Write one Parquet file; returns its counts, its sha256 and the problems found."""
    if job.process not in (os.getpid(), os.getppid()):  # a worker of a killed build; a new build may use the folder
        raise SystemExit("The build that started this worker has ended.")
    notes = read_annotations(job.annotations, job.config)
    problems = Problems()
    counts = dict.fromkeys((*COUNTED, "bytes"), 0)
    tables = image_tables(notes, job.split, job.image_ids, open_images(job.images), problems, job.skip_bad_images)
    try:
        with open(job.path, "wb") as file, pq.ParquetWriter(file, IMAGE_FEATURES.arrow_schema) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
                _add_counts(counts, _counts(table))
        sync(job.path)
    except OSError as error:  # a full disk; the error of the system has no file name
        raise OSError(f"{job.path} could not be written: {error}") from error
    return counts, sha256(job.path), problems


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows, such as 10K<n<100K."""
    limits = [("1K", 1000), ("10K", 10_000), ("100K", 100_000), ("1M", 1_000_000), ("10M", 10_000_000)]
    lower = [name for name, limit in limits if rows >= limit]
    upper = [name for name, limit in limits if rows < limit]
    return f"{lower[-1]}<n<{upper[0]}" if lower and upper else f"n<{upper[0]}" if upper else f"n>{lower[-1]}"


def write_card(folder: Path, config: str, report: dict) -> None:
    """Write README.md: the template `dataset_card.md`, filled in, and the YAML that `load_dataset` reads."""
    splits, collection = report["splits"], collection_of(config)
    card = DatasetCard.load(_card_template())
    card.data.pretty_name = collection.title
    card.data.size_categories = [size_category(sum(counts["images"] for counts in splits.values()))]
    card.data.license = collection.licence or "unknown"
    card.data.tags = list(collection.tags)
    card.data.source_datasets = [collection.source_dataset]
    card.data.annotations_creators = [collection.annotators]
    infos = datasets.splits.SplitDict()
    for split, counts in splits.items():
        infos.add(datasets.SplitInfo(split, num_bytes=counts["bytes"], num_examples=counts["images"]))
    info = datasets.DatasetInfo(
        features=IMAGE_FEATURES,
        splits=infos,
        download_size=sum(path.stat().st_size for path in (folder / "data").iterdir()),
        dataset_size=sum(counts["bytes"] for counts in splits.values()),
    )
    DatasetInfosDict({config: info}).to_dataset_card_data(card.data)
    # `datasets` names its cache by folder, configuration and version, not by content: the version is a content hash.
    content = int(hashlib.sha256(json.dumps(report["shards"]).encode()).hexdigest()[:8], 16)
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    parameters = {"data_files": files, "version": f"{VERSION.rpartition('.')[0]}.{content}"}
    MetadataConfigs({config: parameters}).to_dataset_card_data(card.data)
    text = string.Template(card.text).substitute(
        config=config,
        splits=_table_rows(splits),
        problems="\n".join(f"- {line}" for line in Problems(report["problems"]).lines()) or "None.",
        **_card_facts(collection),
    )
    (folder / "README.md").write_text(f"---\n{card.data.to_yaml()}\n---\n{text}", encoding="utf-8")


def _card_facts(collection: Collection) -> dict[str, str]:
    """The fields of the card that do not depend on the build."""
    licence = f"The annotations are under {collection.licence_name}."
    if collection.licence is None:
        licence = (
            "The licence of the annotations is not known to this project; ask their authors before you share a copy."
        )
    official = "The official counts of this data set are not known to this project."
    if collection.counts:
        head = "| split | images | refs | expressions | none | single | multi | most targets |\n" + "|---" * 8 + "|"
        official = f"The official release, for comparison:\n\n{head}\n{_table_rows(collection.counts)}"
    notes = f"{collection.notes}\n" if collection.notes else ""
    names = ("title", "description", "homepage", "image_terms", "citation")
    facts = {name: getattr(collection, name) for name in names}
    return facts | {"licence": licence, "official": official, "notes": notes}


def _table_rows(splits: dict[str, dict[str, int]]) -> str:
    """Markdown rows of counts; what is not known is a dash."""
    cells = (
        [split, *(f"{counts[name]:,}" if name in counts else "–" for name in COUNTED)]
        for split, counts in splits.items()
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _card_template() -> Path:
    """dataset_card.md: beside the package in a checkout, under `share` where the package is installed."""
    in_checkout = Path(__file__).resolve().parents[1] / "dataset_card.md"
    return in_checkout if in_checkout.exists() else Path(sysconfig.get_path("data"), "share/grefcoco/dataset_card.md")


def _shard_jobs(
    annotations: str, config: str, images: str, folder: Path, notes: Annotations, skip_bad_images: bool
) -> list[ShardJob]:
    jobs = []
    for split, groups in notes.splits.items():
        count = shard_count(len(groups))
        for number, ids in enumerate(np.array_split(np.array(list(groups), dtype=np.int64), count)):
            path = str(folder / f"{split}-{number:05}-of-{count:05}.parquet")
            image_ids = tuple(ids.tolist())
            jobs.append(ShardJob(annotations, config, images, path, split, image_ids, skip_bad_images, os.getpid()))
    return jobs


def _write_shards(jobs: list[ShardJob], notes: Annotations, num_proc: int) -> dict:
    """Run the jobs, with a progress bar over images; returns counts, sha256 sums and all problems."""
    problems = Problems(notes.problems)
    splits: dict[str, dict[str, int]] = {}
    shards = {}
    with tqdm(total=sum(len(job.image_ids) for job in jobs), unit="image", desc="build", disable=None) as bar:
        for job, (counts, digest, shard_problems) in zip(jobs, run_jobs(write_shard, jobs, num_proc)):
            bar.update(len(job.image_ids))
            problems.merge(shard_problems)
            shards[f"data/{Path(job.path).name}"] = digest
            _add_counts(splits.setdefault(job.split, dict.fromkeys(counts, 0)), counts)
    for job in jobs:
        if not splits[job.split]["images"]:
            os.remove(job.path)
            del shards[f"data/{Path(job.path).name}"]
    splits = {split: counts for split, counts in splits.items() if counts["images"]}
    if not splits:
        reasons = "; ".join(problems.lines()) or "the refs file is empty"
        raise ValueError(f"There is no row to build: {reasons}.")
    parts = {"categories": notes.categories, "refs_without_sentences": notes.refs_without_sentences, "shards": shards}
    return {"splits": splits, "problems": problems, **parts}


def run_jobs(write: Callable, jobs: list, num_proc: int) -> Iterator[tuple[dict[str, int], str, Problems]]:
    """The results of `write` for each job, in order, from `num_proc` processes."""
    if num_proc == 1:
        yield from map(write, jobs)
        return
    # Forked workers inherit the parsed annotations. Without fork, each worker parses them once.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(write, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this worker when the process that builds is killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _counts(table: pa.Table) -> dict[str, int]:
    expressions = pc.list_flatten(table["expressions"]).combine_chunks()
    targets_each = pc.list_value_length(expressions.field("ann_ids")).to_numpy()
    refs = len(pc.unique(expressions.field("ref_id")))
    numbers = (table.num_rows, refs, len(targets_each), *count_kinds(targets_each))
    return dict(zip(COUNTED, numbers)) | {"bytes": table.nbytes}


def _add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = max(total[name], count) if name == "max_targets" else total[name] + count


def _refuse_problems(problems: Problems, strict: bool) -> None:
    if strict and problems:
        raise ValueError("--strict, and the files have problems: " + "; ".join(problems.lines()) + ".")

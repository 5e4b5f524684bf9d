"""Building a data set about videos: the genuine files as Parquet shards with a card. As `building.build` does it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData, hf_hub_url
from tqdm.auto import tqdm

from grefcoco_data.annotations import Problems, count_kinds
from grefcoco_data.atomic_files import publish, sha256, staging_folder, sync
from grefcoco_data.building import REPORT, VERSION, run_jobs
from grefcoco_data.mevis import Video, read_videos
from grefcoco_data.official import download_file
from grefcoco_data.video_collections import VIDEO_COUNTED, video_collection_of
from grefcoco_data.video_rows import VIDEO_FEATURES, VIDEOS_PER_GROUP, VideoSource, video_tables

VIDEOS_PER_SHARD = 16  # the least, where there are that many
CARD = """
# {title}

{description} Published at {homepage}.

```python
import grefcoco

videos = grefcoco.load("FOLDER", config="{config}", split="{split}", layout="video")  # one row per video
frames = grefcoco.load("FOLDER", config="{config}", split="{split}", layout="frame")  # one row per frame and sentence
```

Without grefcoco, `datasets.load_dataset` gives the rows of videos. Masks are COCO run lengths of the size of the
frame, null where an object is not visible. `no_target` says that a sentence refers to nothing in its video. `sentence`
is `raw` in lower case with single spaces.

| split | {columns} |
|{rule}|
{counts}

Splits whose masks are not published: {withheld}. There `anno_ids` is empty and `no_target` is false for
every sentence.

## Problems of the source files

{problems}

## Licence

{licence}

## Citation

```bibtex
{citation}
```
"""


def build_videos(
    root: str | Path,
    out: str | Path,
    config: str = "mevis",
    strict: bool = False,
    skip_bad_videos: bool = False,
    num_proc: int = 1,
) -> dict:
    """Write a data set about videos as Parquet that `load_dataset(out)` and the Hub read.

    The bytes of frames are not changed. Returns the report that is also written as `build.json`. A build that is
    interrupted leaves `out` as it was.

    Args:
        root: Folder of the genuine files; see `mevis`.
        out: Folder to make, or an earlier build to replace.
        config: One of `VIDEO_COLLECTIONS`.
        strict: Raise on any problem.
        skip_bad_videos: Skip videos with a frame that is missing, damaged or of another size.
        num_proc: Number of processes.

    Raises:
        ValueError: unusable files, a bad frame (without `skip_bad_videos`), any problem (with `strict`), no row to
            write, or an `out` that is not an earlier build.
        FileNotFoundError: files do not exist.
    """
    root, out = Path(root), Path(out)
    if out.exists() and not (out / REPORT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an earlier build; choose another --out or remove it.")
    videos = read_videos(root, config)
    staging = staging_folder(out)
    try:
        (staging / "data").mkdir()
        jobs = []
        for split, entries in videos.splits.items():
            source = VideoSource(root, config, split, split in videos.withheld)
            source.open_files()
            jobs += _shard_jobs(source, entries, staging / "data", skip_bad_videos)
        report = _write_shards(jobs, videos.problems, num_proc)
        if strict and report["problems"]:
            raise ValueError(f"--strict, and the files have problems: {'; '.join(report['problems'].lines())}.")
        sources = {str(path.relative_to(root)): sha256(path) for path in source_files(root, config)}
        report |= {"version": VERSION, "config": config, "categories": {}, "sources": sources}
        report["withheld"] = sorted(videos.withheld)
        _write_card(staging, config, report)
        (staging / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        publish(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return report


def source_files(root: Path, config: str) -> list[Path]:
    """The files of sentences and of masks that a build reads."""
    sentences = read_videos(root, config).sources
    masks = [path.parent / "mask_dict.json" for path in sentences]
    return sentences + [path for path in masks if path.is_file()]


def download_videos(root: Path, config: str) -> None:
    """Download what is missing of the official files; a download that was cut off continues.

    Raises:
        ValueError: a configuration without a download; a download that was cut off.
        OSError: network or disk.
    """
    release = video_collection_of(config).release
    if release is None:
        raise ValueError(f"No download is known for {config}; put its files into {root} yourself.")
    for name, digest in release.sha256.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(release.repo, name, repo_type="dataset", revision=release.revision)
        download_file(url, root / name, digest or None)


@dataclass(frozen=True)
class VideoShardJob:
    """One Parquet file to write, small enough to send to another process."""

    source: VideoSource
    videos: tuple[Video, ...]
    path: str
    skip_bad_videos: bool
    process: int  # id of the process that builds


def _shard_jobs(source: VideoSource, videos: list[Video], folder: Path, skip_bad_videos: bool) -> list[VideoShardJob]:
    """Jobs of a split: a power of two of files, at most 64, of at least `VIDEOS_PER_SHARD` videos."""
    count = 2 ** min(6, max(0, int(math.log2(max(1, len(videos) // VIDEOS_PER_SHARD)))))
    jobs = []
    for number, places in enumerate(np.array_split(np.arange(len(videos)), count)):
        path = str(folder / f"{source.split}-{number:05}-of-{count:05}.parquet")
        part = tuple(videos[place] for place in places)
        jobs.append(VideoShardJob(source, part, path, skip_bad_videos, os.getpid()))
    return jobs


def _write_shards(jobs: list[VideoShardJob], problems: Problems, num_proc: int) -> dict:
    splits: dict[str, dict[str, int]] = {}
    shards = {}
    with tqdm(total=sum(len(job.videos) for job in jobs), unit="video", desc="build", disable=None) as bar:
        for job, (counts, digest, shard_problems) in zip(jobs, run_jobs(write_video_shard, jobs, num_proc)):
            bar.update(len(job.videos))
            problems.merge(shard_problems)
            if not counts["videos"]:
                os.remove(job.path)
                continue
            shards[f"data/{Path(job.path).name}"] = digest
            _add_counts(splits.setdefault(job.source.split, dict.fromkeys(counts, 0)), counts)
    if not splits:
        raise ValueError(f"There is no row to build: {'; '.join(problems.lines()) or 'the files have no sentence'}.")
    return {"splits": splits, "problems": problems, "shards": shards}


def write_video_shard(job: VideoShardJob) -> tuple[dict[str, int], str, Problems]:
    """Write one Parquet file; returns its counts, its sha256 and the problems found."""
    if job.process not in (os.getpid(), os.getppid()):  # a worker of a killed build; a new build may use the folder
        raise SystemExit("The build that started this worker has ended.")
    problems, counts = Problems(), dict.fromkeys((*VIDEO_COUNTED, "bytes"), 0)
    try:
        with open(job.path, "wb") as file, pq.ParquetWriter(file, VIDEO_FEATURES.arrow_schema) as writer:
            for table in video_tables(job.source, job.videos, problems, job.skip_bad_videos):
                writer.write_table(table, row_group_size=VIDEOS_PER_GROUP)
                _add_counts(counts, _counts(table))
        sync(job.path)
    except FileNotFoundError:
        raise
    except OSError as error:  # a full disk; the error of the system has no file name
        raise OSError(f"{job.path} could not be written: {error}") from error
    return counts, sha256(job.path), problems


def _counts(table: pa.Table) -> dict[str, int]:
    rows = table.select(["frame_names", "objects", "expressions"]).to_pylist()
    expressions = [expression for row in rows for expression in row["expressions"]]
    # of sentences whose targets are not published, none counts as one without target
    targets_each = np.array([len(e["anno_ids"]) for e in expressions if e["anno_ids"] or e["no_target"]], int)
    objects = [item for row in rows for item in row["objects"]]
    masks = sum(mask is not None for item in objects for mask in item["segmentations"])
    frames = sum(len(row["frame_names"]) for row in rows)
    numbers = (len(rows), frames, len(objects), masks, len(expressions), *count_kinds(targets_each))
    return dict(zip(VIDEO_COUNTED, numbers)) | {"bytes": table.nbytes}


def _add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = max(total[name], count) if name == "max_targets" else total[name] + count


def _write_card(folder: Path, config: str, report: dict) -> None:
    """Write README.md: the card, and the YAML that `load_dataset` reads."""
    splits, collection = report["splits"], video_collection_of(config)
    data = DatasetCardData(
        pretty_name=collection.title,
        license=collection.licence or "unknown",
        language=["en"],
        task_categories=["image-segmentation"],
        tags=["referring-video-object-segmentation", "video"],
    )
    infos = datasets.splits.SplitDict()
    for split, counts in splits.items():
        infos.add(datasets.SplitInfo(split, num_bytes=counts["bytes"], num_examples=counts["videos"]))
    info = datasets.DatasetInfo(
        features=VIDEO_FEATURES,
        splits=infos,
        download_size=sum(path.stat().st_size for path in (folder / "data").iterdir()),
        dataset_size=sum(counts["bytes"] for counts in splits.values()),
    )
    DatasetInfosDict({config: info}).to_dataset_card_data(data)
    # `datasets` names its cache by folder, configuration and version, not by content: the version is a content hash
    content = int(hashlib.sha256(json.dumps(report["shards"]).encode()).hexdigest()[:8], 16)
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    parameters = {"data_files": files, "version": f"{VERSION.rpartition('.')[0]}.{content}"}
    MetadataConfigs({config: parameters}).to_dataset_card_data(data)
    licence = f"The data set is under {collection.licence}, for research that is not commercial."
    text = CARD.format(
        config=config,
        split=next(iter(splits)),
        columns=" | ".join(VIDEO_COUNTED),
        rule="---|" * len(VIDEO_COUNTED) + "---",
        counts="\n".join(
            f"| {split} | " + " | ".join(f"{counts[name]:,}" for name in VIDEO_COUNTED) + " |"
            for split, counts in splits.items()
        ),
        withheld=", ".join(report["withheld"]) or "none",
        problems="\n".join(f"- {line}" for line in Problems(report["problems"]).lines()) or "None.",
        licence=licence if collection.licence else "The licence is not known to this project; ask the authors.",
        **{name: getattr(collection, name) for name in ("title", "description", "homepage", "citation")},
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")

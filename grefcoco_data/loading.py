"""Loading: rows of a built data set, of a data set on the Hub, or straight from the genuine files.

rows = load("data/grefcoco", split="val")                           # map-style, one row per sentence
stream = shuffle_shards(load(..., split="train", streaming=True), seed=0)
category_ids("data/grefcoco", ["train", "val"])                     # [1, 2, 3, ...]
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import datasets
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HfHubHTTPError

from grefcoco_data.annotations import Problems, find_files, read_annotations
from grefcoco_data.building import REPORT, VERSION, one_error, read_report
from grefcoco_data.collections import CONFIGS, collection_of
from grefcoco_data.expressions import ExpressionTable, expression_features, expression_table
from grefcoco_data.images import local_images, open_images
from grefcoco_data.rows import EXPRESSION_FEATURES, IMAGE_FEATURES, image_tables
from grefcoco_data.video_collections import VIDEO_COLLECTIONS
from grefcoco_data.video_rows import THING, load_videos

NEEDED = ("image_id", "height", "width", "objects", "expressions")  # columns of image rows that make expression rows
IMAGES_AT_ONCE = 16  # image rows of a stream that become expression rows at once
HTTP_LIBRARIES = ("requests", "httpx", "httpx2")
RETRY_WAITS = (1, 4)  # seconds before a Hub is asked again
STREAM_TRIES = 2  # of a read, each of which takes huggingface_hub up to 90 seconds where the line is dead
# the kinds of errors of the HTTP library that this huggingface_hub uses
HTTP_ERRORS = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] in HTTP_LIBRARIES)
Result = TypeVar("Result")


@dataclass
class GrefcocoConfig(datasets.BuilderConfig):
    """Where the genuine files are: a folder of annotations, a folder or zip of images."""

    annotations: str = ""
    images: str = ""
    skip_bad_images: bool = False

    def create_config_id(self, config_kwargs: dict, custom_features: Features | None = None) -> str:
        """Name of the cache folder. It changes with the files; otherwise `datasets` would return old rows."""
        if not self.annotations or not self.images:
            raise ValueError("The paths of the files are missing: pass annotations=FOLDER and images=FOLDER_OR_ZIP.")
        stamp = _fingerprint(find_files(self.annotations, self.name), self.images)
        return super().create_config_id({**config_kwargs, "files": stamp}, custom_features)


class Grefcoco(datasets.ArrowBasedBuilder):
    """Image rows from the genuine files in the cache of `datasets`, for use without building Parquet first."""

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


def load(
    source: str | Path,
    images: str | Path | None = None,
    config: str = "grefcoco",
    split: str | None = None,
    streaming: bool = False,
    layout: Literal["expression", "image", "video", "frame"] = "expression",
    columns: Sequence[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load gRefCOCO, or another configuration, with one row per sentence or per image.

    Map-style expression rows are a table in memory, which points to the bytes of the images where they lie. An image
    is decoded when its row is read. Rows of one image that are in use at the same time, such as those of a batch
    (`dataset[indices]`, `dataset.__getitems__(indices)`), hold the same PIL object, so copy it before you draw.
    Functions of `map` and `filter` decode the columns that they use; name `input_columns` to be sure.

    All operations of `datasets` work on these rows. Those that write a copy (`save_to_disk`, `to_parquet`,
    `push_to_hub`, `map` to a cache file) write the bytes of the image with each of its sentences, 14 times the size
    of gRefCOCO's images: use `layout="image"` for copies. `datasets` does not keep the shared storage after a cast:
    `cast_column("image", datasets.Image(decode=False))` copies as much. JSON, CSV and SQL cannot hold images: take
    columns by `columns` or `select_columns`. (After `remove_columns`, `datasets` forgets the types of a stream.)

    Streams decode an image once and then yield all its sentences. They split over nodes and workers by shard and
    resume exactly through `state_dict`/`load_state_dict`, also with `shuffle_shards` (with workers: torchdata's
    `StatefulDataLoader`). The buffer of `.shuffle(...)` is not saved: after a resume rows are lost and repeated.

    Args:
        source: A built folder, a Hub data set id, or a folder with the genuine annotation files.
        images: Folder or zip of the images; with the genuine files only.
        config: One of `CONFIGS` or of `VIDEO_CONFIGS`; a built folder of videos needs none.
        split: Split to load; None loads all into a dictionary.
        streaming: Yield rows without preparing anything on disk.
        layout: "expression" gives the columns of `EXPRESSION_FEATURES` (boxes xywh in pixels, masks as RLE at the
            size of the image, images RGB); "image" gives those of `IMAGE_FEATURES`, as stored. Data sets about
            videos have "frame" (the same columns as "expression") and "video", their streams also "image"; see
            `load_videos`.
        columns: Columns to keep; without `image`, no image is read. The expression layout also has `objects`, the
            list of all objects of the image.

    Raises:
        ValueError: unknown configuration, split, layout or column; annotations that cannot be used.
        FileNotFoundError: nothing usable at `source` or `images`.
        ConnectionError: the Hub cannot be reached; a stream raises it when it is read, after at most three minutes.
    """
    if (stored := _stored_config(source, config)) in VIDEO_COLLECTIONS:
        return load_videos(source, stored, split, streaming, layout, columns)
    collection_of(config)
    available = {"expression": [*EXPRESSION_FEATURES, "objects"], "image": list(IMAGE_FEATURES)}.get(layout)
    if available is None:
        raise ValueError(f"Unknown layout {layout!r}; choose 'expression' or 'image'.")
    default = list(EXPRESSION_FEATURES if layout == "expression" else IMAGE_FEATURES)
    columns = default if columns is None else list(columns)
    if unknown := set(columns) - set(available):
        raise ValueError(f"Unknown columns {sorted(unknown)}; layout {layout!r} has {', '.join(available)}.")
    rows = _load_image_rows(str(source), images, config, split, streaming, with_images="image" in columns)
    with one_error(source):
        if isinstance(rows, dict):
            return type(rows)({name: _arrange(part, layout, columns) for name, part in rows.items()})
        return _arrange(rows, layout, columns)


def _stored_config(source: str | Path, config: str) -> str:
    """The configuration of a built folder of videos, which needs no `config`; else `config`."""
    if config != "grefcoco" or not os.path.isfile(os.path.join(source, REPORT)):
        return config
    stored = read_report(source)["config"]
    return stored if stored in VIDEO_COLLECTIONS else config


def category_ids(source: str | Path, splits: Iterable[str], config: str = "grefcoco") -> list[int]:
    """Category ids of all objects in these splits, ascending; only the column of the ids is read.

    Args:
        source: A built folder or a Hub data set id, as for `load`.
        splits: Names of splits.
        config: One of `CONFIGS`.

    Raises:
        ValueError: unknown configuration or split.
    """
    if _stored_config(source, config) in VIDEO_COLLECTIONS:
        return [THING]
    collection_of(config)
    ids: set[int] = set()
    with one_error(source):
        files = from_hub(source, lambda: datasets.load_dataset_builder(str(source), config).config.data_files)
        for split in dict.fromkeys(splits):
            if split not in files:
                raise ValueError(f"{source} has no split {split!r}; choose one of {', '.join(files)}.")
            for path in files[split]:
                ids.update(from_hub(source, lambda path=path: _category_ids_of(path)))
    return sorted(ids)


def _category_ids_of(path: str) -> list[int]:
    """Category ids of all objects in a Parquet file, which may be on a Hub."""
    with fsspec.open(path) as file:
        column = pq.ParquetFile(file).read(["objects.list.element.category_id"])["objects"]
    return pc.unique(pc.struct_field(pc.list_flatten(column), "category_id")).to_pylist()


def from_hub(source: str | Path, read: Callable[[], Result]) -> Result:
    """The result of `read`, which is tried again when a connection to the Hub breaks.

    Raises:
        ConnectionError: it broke every time; one line. What had arrived stays in the cache of huggingface_hub.
    """
    waits = iter(RETRY_WAITS)
    while True:
        try:
            return read()
        except Exception as error:  # HTTP_ERRORS and others
            if os.path.isdir(source) or datasets.config.HF_HUB_OFFLINE or not _is_broken_line(error):
                raise
            wait = next(waits, None)
            if wait is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                message = f"the connection to the Hub broke while {source} was read ({reason}); run it again."
                raise ConnectionError(message) from None
        time.sleep(wait)


def _is_broken_line(error: Exception) -> bool:
    """Whether an error is one of the connection: no answer of the Hub, or that it cannot answer now."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, (*HTTP_ERRORS, ConnectionError, TimeoutError))


def shuffle_shards(stream: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """Put the row groups of a stream (up to 100 images each) into a random order, a new one after each `set_epoch`.

    Rows keep their order within a group. Other than with a shuffle buffer, a state saved anywhere resumes exactly;
    call `set_epoch` before `load_state_dict`. (`datasets` warns of a buffer that is refilled; it holds one row here.)

    Raises:
        ValueError: `datasets` is older than 5 and cannot divide a stream into row groups.
    """
    if int(datasets.__version__.partition(".")[0]) < 5:
        raise ValueError(f"shuffle_shards needs datasets>=5, and datasets {datasets.__version__} is installed.")
    return stream.reshard().shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)


def _load_image_rows(
    source: str, images: str | Path | None, config: str, split: str | None, streaming: bool, with_images: bool
) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    if images is None and os.path.isdir(source) and not os.path.isfile(os.path.join(source, REPORT)):
        find_files(source, config)
        raise ValueError(f"{source} holds genuine annotation files: name the images too (images=FOLDER_OR_ZIP).")
    if images is None:
        columns = {} if with_images else {"columns": [name for name in IMAGE_FEATURES if name != "image"]}
        if os.path.isdir(source):
            with one_error(source):
                return datasets.load_dataset(source, config, split=split, streaming=streaming, **columns)
        if streaming:  # `datasets` would wait for half an hour
            datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = STREAM_TRIES
        return from_hub(
            source, lambda: datasets.load_dataset(source, config, split=split, streaming=streaming, **columns)
        )
    paths = {"annotations": os.path.abspath(source), "images": os.path.abspath(local_images(str(images)))}
    builder = Grefcoco(dataset_name="grefcoco", config_name=config, **paths)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__)) from error
    return builder.as_dataset(split=split)


def _fingerprint(files: Iterable[Path], images: str) -> str:
    """Hash that changes with any input: the annotation files, and the list, sizes or times of the images."""
    open_images(images)
    paths = [*files, Path(images)]
    if os.path.isdir(images):
        paths += sorted(Path(images).iterdir())
    stamps = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((VERSION, stamps)).encode()).hexdigest()[:16]


def _arrange(
    rows: datasets.Dataset | datasets.IterableDataset, layout: str, columns: list[str]
) -> datasets.Dataset | datasets.IterableDataset:
    needed = columns if layout == "image" else [*NEEDED, *(name for name in columns if name in IMAGE_FEATURES)]
    if missing := set(needed) - set(rows.column_names or ()):
        raise ValueError(f"The rows have no column {', '.join(sorted(missing))}; build the data set again.")
    if layout == "image":
        return rows.select_columns(columns)
    if isinstance(rows, datasets.Dataset):
        return _expression_rows(rows, columns)
    # As tables: rows that Python functions make have no types of their own, and copies of them would have others.
    stream = rows.select_columns([name for name in IMAGE_FEATURES if name in needed]).with_format("arrow")
    stream = stream.map(expression_table, batched=True, batch_size=IMAGES_AT_ONCE, fn_kwargs={"columns": columns})
    return stream.with_format(None).cast(expression_features(columns))


def _expression_rows(images: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """Expression rows of map-style image rows, as a table in memory whose images stay where they are."""
    name = Hasher.hash((images._fingerprint, columns, EXPRESSION_FEATURES))
    info = datasets.DatasetInfo(features=expression_features(columns))
    table = ExpressionTable(images.data, columns)
    return datasets.Dataset(table, info=info, split=images.split, fingerprint=name)

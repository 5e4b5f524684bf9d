"""Rows of videos: the schema, Arrow tables made of the genuine files, and loading as rows of videos or of frames.

    rows = load_videos("data/mevis", "mevis", split="valid_u", layout="video")    # one row per video, as stored
    rows = load_videos("data/mevis", "mevis", split="valid_u", layout="frame")    # one row per frame and sentence

A frame row has the columns of an expression row: to a model of images, a frame is an image. Its targets are those that
are visible on the frame; where none is, `no_target` is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Value
from datasets.fingerprint import Hasher
from pycocotools import mask as coco_mask

from grefcoco_data.annotations import Problems
from grefcoco_data.expressions import ALL_FEATURES, ExpressionTable, Step, expression_features
from grefcoco_data.images import image_size, pixel_fault
from grefcoco_data.masks import MAX_PIXELS, empty_rle, merge_rles, rle_covers_image
from grefcoco_data.mevis import MaskFile, Video, open_frames, open_masks, palette_masks
from grefcoco_data.rows import EXPRESSION, EXPRESSION_FEATURES, IMAGE_FEATURES, RLE, list_column
from grefcoco_data.video_collections import video_collection_of

VIDEOS_PER_GROUP = 2  # video rows of a row group: the least that a stream reads
MAX_FRAMES = 10_000  # a frame row's sent_id is the sentence's times this, plus the number of the frame
LARGE = ("frames", "objects", "expressions")  # columns of a video row of which frames read a part
MADE = ("image", "boxes", "masks", "mask", "objects")  # columns of frame rows that are made when they are read
PLACE = ("video", "frame", "sentence")  # what a `FrameTable` stores for large columns
ROWS_AT_ONCE = 1000  # frame rows whose values are made together, where all are needed
ALL_TYPES = ALL_FEATURES.arrow_schema
THING = 1  # category of every object; the data sets have none
VIDEO_FEATURES = Features(
    {
        "video_id": Value("string"),
        "frames": [datasets.Image()],
        "frame_names": [Value("string")],
        "first_frame": Value("int64"),
        "width": Value("int32"),
        "height": Value("int32"),
        "objects": [{"anno_id": Value("int64"), "obj_id": Value("string"), "segmentations": [RLE]}],
        "expressions": [
            {
                "exp_id": Value("string"),
                "sent_id": Value("int64"),
                "sentence": Value("string"),
                "raw": Value("string"),
                "no_target": Value("bool"),
                "anno_ids": [Value("int64")],
            }
        ],
    }
)


@dataclass(frozen=True)
class VideoSource:
    """Where the files of a split are."""

    root: Path
    config: str
    split: str
    withheld: bool  # whether its masks are not published

    def open_files(self) -> None:
        """Read the tables of contents now: processes that are forked later share them."""
        open_frames(self.root / self.split / "JPEGImages")
        if not self.withheld and video_collection_of(self.config).masks == "mask_dict":
            self._mask_file()

    def frames_of(self, video: Video) -> tuple[list[bytes], int, int]:
        """The bytes of all frames, and their common width and height; ValueError names a bad one."""
        files = open_frames(self.root / self.split / "JPEGImages")
        frames, size = [], None
        for name in video.frames:
            try:
                data = files.read(video.video_id, name)
                frame_size, fault = image_size(data)
                size = size or frame_size
                if not fault and frame_size != size:
                    fault = f"is {frame_size}, the first frame {size} (width, height)"
                fault = fault or pixel_fault(data)
            except FileNotFoundError:
                fault = "is missing"
            except (OSError, ValueError) as error:
                fault = f"cannot be read ({error})"
            if fault:
                raise ValueError(f"{files.path}: frame {video.video_id}/{name}.jpg {fault}")
            frames.append(data)
        return frames, *size

    def objects_of(self, video: Video, width: int, height: int, problems: Problems) -> dict[int, list[dict | None]]:
        """The masks of all objects that can be used, by `anno_id`."""
        if self.withheld:
            return {}
        if video_collection_of(self.config).masks == "palette":
            return palette_masks(open_frames(self.root / self.split / "Annotations"), video, height, width)
        file = self._mask_file()
        masks = {anno_id: file.masks(video, anno_id, height, width, problems) for anno_id in video.objects}
        return {anno_id: column for anno_id, column in masks.items() if column is not None}

    def _mask_file(self) -> MaskFile:
        path = self.root / self.split / "mask_dict.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, and the sentences of {self.split} have targets; put it there."
            )
        return open_masks(path, path.stat().st_mtime_ns)


def video_tables(
    source: VideoSource, videos: Sequence[Video], problems: Problems, skip_bad_videos: bool = False
) -> Iterator[pa.Table]:
    """Video rows as tables of up to `VIDEOS_PER_GROUP` rows with the schema of `VIDEO_FEATURES`.

    Raises:
        ValueError: a frame is missing or bad and `skip_bad_videos` is off.
    """
    rows = []
    for video in videos:
        try:
            rows.append(_video_row(source, video, problems))
        except ValueError as error:
            if not skip_bad_videos:
                raise ValueError(
                    f"{error}. Get it again, or build with --skip-bad-images to skip such videos."
                ) from error
            problems.add("video with a bad frame, skipped with its sentences", error)
        if len(rows) == VIDEOS_PER_GROUP or (rows and video is videos[-1]):
            yield pa.Table.from_pylist(rows, schema=VIDEO_FEATURES.arrow_schema)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=VIDEO_FEATURES.arrow_schema)


def _video_row(source: VideoSource, video: Video, problems: Problems) -> dict:
    if len(video.frames) > MAX_FRAMES:
        raise ValueError(f"video {video.video_id} has {len(video.frames)} frames, more than {MAX_FRAMES}")
    frames, width, height = source.frames_of(video)
    masks = source.objects_of(video, width, height, problems)
    return {
        "video_id": video.video_id,
        "frames": [{"bytes": data, "path": f"{name}.jpg"} for data, name in zip(frames, video.frames)],
        "frame_names": list(video.frames),
        "first_frame": video.first_frame,
        "width": width,
        "height": height,
        "objects": [
            {"anno_id": anno_id, "obj_id": video.objects[anno_id], "segmentations": column}
            for anno_id, column in masks.items()
        ],
        "expressions": [
            {
                "exp_id": expression.exp_id,
                "sent_id": expression.sent_id,
                "sentence": " ".join(expression.raw.lower().split()),
                "raw": expression.raw,
                "no_target": not expression.anno_ids and not source.withheld,
                "anno_ids": list(expression.anno_ids),
            }
            for expression in video.expressions
            if source.withheld or {*expression.anno_ids} <= masks.keys()
        ],
    }


# ---- loading -----------------------------------------------------------------------------------------------------


def load_videos(
    source: str | Path,
    config: str,
    split: str | None = None,
    streaming: bool = False,
    layout: str = "frame",
    columns: Sequence[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load a built data set about videos with one row per video, or one per frame and sentence.

    Args:
        source: A built folder, or a Hub data set id.
        config: One of `VIDEO_COLLECTIONS`.
        split: Split to load; None loads all into a dictionary.
        streaming: Yield rows without preparing anything on disk.
        layout: "video" gives the columns of `VIDEO_FEATURES`, as stored; "frame" (or "expression") those of
            `EXPRESSION_FEATURES`, frame by frame, all sentences of a frame one after the other; "image", of a stream
            only, those of `IMAGE_FEATURES`, one row per frame. Map-style, images, boxes and masks are read when a row
            is asked for. What needs one whole table (concatenate, interleave, sort, add a column) makes all rows in
            memory, about 10 kB a row: select the columns first, or join streams.
        columns: Columns to keep; without images, no image is read.

    Raises:
        ValueError: unknown configuration, split, layout or column; or a mask that is not one of its video, of a stream
            when the video is read.
    """
    video_collection_of(config)
    features = {"video": VIDEO_FEATURES, "image": IMAGE_FEATURES}.get(layout, EXPRESSION_FEATURES)
    if layout not in ("video", "frame", "expression") and not (layout == "image" and streaming):
        raise ValueError(f"Unknown layout {layout!r}; choose 'video' or 'frame', of a stream also 'image'.")
    available = [*features, "objects"] if features is EXPRESSION_FEATURES else list(features)
    columns = list(features if columns is None else columns)
    if unknown := set(columns) - set(available):
        raise ValueError(f"Unknown columns {sorted(unknown)}; layout {layout!r} has {', '.join(available)}.")
    with_images = "frames" in columns or "image" in columns
    stored = {} if with_images else {"columns": [name for name in VIDEO_FEATURES if name != "frames"]}
    rows = datasets.load_dataset(str(source), config, split=split, streaming=streaming, **stored)
    if isinstance(rows, dict):
        return type(rows)({name: _arrange(part, layout, columns) for name, part in rows.items()})
    return _arrange(rows, layout, columns)


def _arrange(
    videos: datasets.Dataset | datasets.IterableDataset, layout: str, columns: list[str]
) -> datasets.Dataset | datasets.IterableDataset:
    if isinstance(videos, datasets.Dataset):
        _check_masks(videos.data.table)
        return videos.select_columns(columns) if layout == "video" else _frame_rows(videos, columns)
    # as tables, as in `loading`: rows that Python functions make have no types of their own
    has_frames = "frames" in columns or "image" in columns
    stream = videos.select_columns([name for name in VIDEO_FEATURES if name != "frames" or has_frames])
    make, features = {
        "video": (pa.Table.select, VIDEO_FEATURES),
        "image": (_image_table, IMAGE_FEATURES),
    }.get(layout, (_frame_table, ALL_FEATURES))
    options = {"fn_kwargs": {"make": make, "columns": columns}}
    stream = stream.with_format("arrow").map(_checked_rows, batched=True, batch_size=1, **options)
    return stream.with_format(None).cast(_features_of(features, columns))


def _checked_rows(videos: pa.Table, make: Callable[..., pa.Table], columns: Sequence[str]) -> pa.Table:
    """The rows that `make` makes of one video row, whose masks are checked before."""
    _check_masks(videos)
    return make(videos, columns)


def _features_of(features: Features, columns: Sequence[str]) -> Features:
    """The features of these columns."""
    return Features({name: features[name] for name in columns})


def _check_masks(videos: pa.Table) -> None:
    """Refuse masks that would crash in C code or are not of their video."""
    sizes = zip(videos["height"].to_pylist(), videos["width"].to_pylist())
    for video, names, objects, size in zip(videos["video_id"], videos["frame_names"], videos["objects"], sizes):
        if min(size) <= 0 or size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"The rows cannot be used: video {video} has a width and height that no frame can have.")
        frames = objects.values.field("segmentations")
        if pc.any(pc.not_equal(pc.list_value_length(frames), len(names))).as_py():
            raise ValueError(f"The rows cannot be used: video {video} has an object without a mask or null per frame.")
        masks = frames.flatten().drop_null()
        shapes = masks.field("size").flatten().to_numpy(zero_copy_only=False)
        covers = rle_covers_image(masks.field("counts"), np.full(len(masks), size[0] * size[1]))
        if len(shapes) != 2 * len(masks) or (shapes.reshape(-1, 2) != size).any() or not covers.all():
            fault = "has an RLE that does not cover its frame exactly or has empty runs"
            raise ValueError(f"The rows cannot be used: video {video} {fault}.")


def _frame_table(videos: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Turn one video row, given as a table, into frame rows; the sentences of a frame share the bytes of its image."""
    video = _without_frames(videos)
    places = [(frame, expression) for frame in range(len(video["frame_names"])) for expression in video["expressions"]]
    rows = [frame_row(video, frame, expression, columns) for frame, expression in places]
    return _table(rows, expression_features(columns), videos, [frame for frame, _ in places])


def _image_table(videos: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Turn one video row, given as a table, into image rows, one per frame; none where the video has no sentence."""
    video = _without_frames(videos)
    frames = range(len(video["frame_names"]) if video["expressions"] else 0)
    return _table(
        [_image_row(video, frame, columns) for frame in frames], _features_of(IMAGE_FEATURES, columns), videos, frames
    )


def _without_frames(videos: pa.Table) -> dict[str, object]:
    (video,) = videos.select([name for name in videos.column_names if name != "frames"]).to_pylist()
    return video


def _table(rows: Sequence[dict], features: Features, videos: pa.Table, frames: Sequence[int]) -> pa.Table:
    """A table of rows, whose images are these frames of the one video."""
    schema = features.arrow_schema
    table = pa.Table.from_pylist(rows, schema=schema)
    if "image" in features:
        stored = pc.list_flatten(videos["frames"]).combine_chunks()
        images = pa.chunked_array([stored.slice(frame, 1) for frame in frames], stored.type)
        table = table.set_column(schema.get_field_index("image"), schema.field("image"), images)
    return table


def _image_row(video: dict, frame: int, columns: Sequence[str]) -> dict:
    """Columns of the image row that a frame is, without the image."""
    sentences = [frame_row(video, frame, item, () if i else columns) for i, item in enumerate(video["expressions"])]
    expressions = [{name: sentence[name] for name in EXPRESSION} for sentence in sentences]
    values = sentences[0] | {"expressions": expressions}  # the first has the objects
    return {name: values[name] for name in columns if name != "image"}


def frame_row(video: dict, frame: int, expression: dict, columns: Sequence[str]) -> dict:
    """The columns of a sentence on a frame, without the image; see the schema of expression rows."""
    size = video["height"], video["width"]
    visible = [item for item in video["objects"] if item["segmentations"][frame] is not None]
    targets = [item for item in visible if item["anno_id"] in expression["anno_ids"]]
    masks = [item["segmentations"][frame] for item in targets]
    row = {
        "image_id": video["first_frame"] + frame,
        "file_name": f"{video['video_id']}/{video['frame_names'][frame]}.jpg",
        "width": size[1],
        "height": size[0],
        "ref_id": expression["sent_id"],
        "sent_id": expression["sent_id"] * MAX_FRAMES + frame,
        "sentence": expression["sentence"],
        "raw": expression["raw"],
        # of a sentence whose targets are not published it is not known; then it has no anno_ids either
        "no_target": not masks and (expression["no_target"] or bool(expression["anno_ids"])),
        "ann_ids": [item["anno_id"] for item in targets],
        "category_ids": [THING] * len(targets),
        "masks": masks,
    }
    if "boxes" in columns:
        row["boxes"] = [coco_mask.toBbox(mask).tolist() for mask in masks]
    if "mask" in columns:
        row["mask"] = merge_rles(masks, [False] * len(masks), *size)
    if "objects" in columns:
        row["objects"] = [_object(item["anno_id"], item["segmentations"][frame]) for item in visible]
    return row


def _object(anno_id: int, mask: dict) -> dict:
    """An object of an image row, of an object on a frame."""
    area, box = float(coco_mask.area(mask)), coco_mask.toBbox(mask).tolist()
    item = {"ann_id": anno_id, "category_id": THING, "bbox": box, "area": area}
    return item | {"iscrowd": False, "segmentation": mask}


def _frame_rows(videos: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """Frame rows of map-style video rows."""
    name = Hasher.hash((videos._fingerprint, columns, EXPRESSION_FEATURES))
    info = datasets.DatasetInfo(features=expression_features(columns))
    return datasets.Dataset(FrameTable(videos.data, columns), info=info, split=videos.split, fingerprint=name)


def _frame_index(videos: pa.Table, columns: Sequence[str]) -> pa.Table:
    """All frame rows, with places, which are one array, instead of large columns; their fields name the columns."""
    large = [name for name in columns if name in MADE]
    stored = [name for name in columns if name not in large[1:]]
    parts = [_frame_places(row, videos).select(stored) for row in range(len(videos))]
    index = pa.concat_tables(parts).combine_chunks()
    small = {name: index[name].cast(ALL_TYPES.field(name).type) for name in columns if name not in MADE}
    arrays = [index[large[0]] if name in large else small[name] for name in columns]
    fields = [
        pa.field(name, array.type, metadata={"made": name} if name in large else None)
        for name, array in zip(columns, arrays)
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _frame_places(row: int, table: pa.Table) -> pa.Table:
    """The index of one video: all sentences of the first frame, of the second, ..."""
    video = {name: table[name][row] for name in VIDEO_FEATURES if name not in ("frames", "objects")}
    names, expressions = video["frame_names"].as_py(), video["expressions"].values
    objects = table["objects"][row].values
    num_frames, num_sentences = len(names), len(expressions)
    frames, sentences = (part.ravel() for part in np.indices((num_frames, num_sentences)))
    places = [pa.array(part, pa.int32()) for part in (np.full(len(frames), row), frames, sentences)]
    places = pa.StructArray.from_arrays(places, names=list(PLACE))  # with names, so that none takes it for a value
    sent_ids = expressions.field("sent_id").to_numpy()
    ann_ids = objects.field("anno_id").to_numpy()
    visible = np.array(pc.is_valid(objects.field("segmentations").flatten()), bool).reshape(len(ann_ids), num_frames)
    meant = np.array([np.isin(ann_ids, ids.as_py()) for ids in expressions.field("anno_ids")], bool)
    shown = visible.T[:, None] & meant.reshape(1, num_sentences, len(ann_ids))  # (frames, sentences, objects)
    shown = shown.reshape(len(frames), len(ann_ids))
    # of a sentence whose targets are not published it is not known; then it has no anno_ids either
    nothing = np.array(expressions.field("no_target"), bool) | meant.any(axis=1)
    targets = list_column(pa.array(ann_ids[np.nonzero(shown)[1]], pa.int64()), shown.sum(axis=1))
    files = [f"{video['video_id'].as_py()}/{name}.jpg" for name in names]
    columns = {
        "image_id": pa.array(video["first_frame"].as_py() + frames),
        "file_name": pa.array(files).take(pa.array(frames)),
        **{name: pa.repeat(video[name], len(frames)) for name in ("width", "height")},
        "ref_id": pa.array(sent_ids[sentences]),
        "sent_id": pa.array(sent_ids[sentences] * MAX_FRAMES + frames),
        **{name: expressions.field(name).take(pa.array(sentences)) for name in ("sentence", "raw")},
        "no_target": pa.array(~shown.any(axis=1) & nothing[sentences]),
        "ann_ids": targets,
        "category_ids": list_column(pa.repeat(pa.scalar(THING, pa.int32()), len(targets.values)), shown.sum(axis=1)),
    }
    return pa.table({name: columns.get(name, places) for name in (*EXPRESSION_FEATURES, "objects")})


class FrameTable(ExpressionTable):
    """The table of frame rows as `datasets` uses it, over a table of video rows.

    Images, boxes and masks would take gigabytes: of the rows that are asked for, they are made of the video rows. The
    stored table holds the other values, and in place of these the video, the frame and the sentence. What needs all
    rows as one Arrow table, such as to concatenate or to sort, makes all values; images are not copied.
    """

    _make = staticmethod(lambda videos, columns: _frame_index(videos.table, columns))

    def _set(
        self, images: datasets.table.Table, columns: Sequence[str], steps: Sequence[Step], stored: pa.Table
    ) -> None:
        super()._set(images, columns, steps, stored)
        fields = [
            pa.field(field.name, ALL_TYPES.field(_made_column(field)).type) if _made_column(field) else field
            for field in stored.schema
        ]
        self._schema = pa.schema(fields, metadata=stored.schema.metadata)

    @property
    def table(self) -> pa.Table:
        """All rows, with their values."""
        parts = [self.fast_slice(start, ROWS_AT_ONCE) for start in range(0, self.num_rows, ROWS_AT_ONCE)]
        return pa.concat_tables(parts) if parts else self._schema.empty_table()

    schema = property(lambda self: self._schema)
    num_rows = property(lambda self: self.stored.num_rows)
    num_columns = property(lambda self: self.stored.num_columns)
    shape = property(lambda self: self.stored.shape)
    column_names = property(lambda self: self.stored.column_names)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def nbytes(self) -> int:
        """The size of all values, estimated of some rows."""
        some = np.linspace(0, self.num_rows - 1, min(self.num_rows, 50)).astype(int)
        return self.fast_gather(some).nbytes * self.num_rows // max(len(some), 1)

    def column(self, name: str | int) -> pa.ChunkedArray:
        """The values of one column."""
        return self.select([name]).table.column(0)

    __getitem__ = column

    def fast_gather(self, indices: Sequence[int]) -> pa.Table:
        """The rows at these positions."""
        return self._values(super().fast_gather(indices))

    def fast_slice(self, offset: int = 0, length: int | None = None) -> pa.Table:
        """`length` rows from `offset` on, or all."""
        return self._values(super().fast_slice(offset, length))

    def to_reader(self, max_chunksize: int | None = None) -> pa.RecordBatchReader:
        """All rows in batches of at most this many, each made when it is read."""
        size = max_chunksize or ROWS_AT_ONCE
        parts = (self.fast_slice(start, size) for start in range(0, self.num_rows, size))
        return pa.RecordBatchReader.from_batches(
            self._schema, (batch for part in parts for batch in part.to_batches())
        )

    def _values(self, stored: pa.Table) -> pa.Table:
        """Rows of the stored table, with values in the place of places."""
        made = [_made_column(field) for field in stored.schema]
        if not any(made):
            return stored
        names = list(filter(None, made))
        places = stored[made.index(names[0])].to_pylist()
        places = [tuple(place[part] for part in PLACE) for place in places]
        frames = {place: self._frame(*place) for place in dict.fromkeys(place[:2] for place in places)}
        expressions = {place: self._expression(*place) for place in {(place[0], place[2]) for place in places}}
        rows = (
            [frame_row(frames[v, f], f, expressions[v, s], names) for v, f, s in places] if names != ["image"] else []
        )
        columns = [
            column
            if name is None
            else self._images([place[:2] for place in places], field.type)
            if name == "image"
            else pa.array([row[name] for row in rows], field.type)
            for name, column, field in zip(made, stored.columns, self._schema)
        ]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _images(self, places: Sequence[tuple[int, int]], kind: pa.DataType) -> pa.ChunkedArray:
        """Chunks of one image, which point to the stored bytes: all sentences on a frame share them."""
        images = {(v, f): self.images["frames"][v].values.slice(f, 1) for v, f in dict.fromkeys(places)}
        return pa.chunked_array([images[place] for place in places], kind)

    def _expression(self, video: int, sentence: int) -> dict:
        return self.images["expressions"][video].values[sentence].as_py()

    def _frame(self, video: int, frame: int) -> dict:
        """A video row whose objects have the masks of one frame only."""
        row = {name: self.images[name][video].as_py() for name in VIDEO_FEATURES if name not in LARGE}
        objects = self.images["objects"][video].values
        places = np.arange(len(objects)) * len(row["frame_names"]) + frame
        masks = objects.field("segmentations").flatten().take(pa.array(places)).to_pylist()
        ids = objects.field("anno_id").to_pylist()
        row["objects"] = [{"anno_id": key, "segmentations": {frame: mask}} for key, mask in zip(ids, masks)]
        return row


def _made_column(field: pa.Field) -> str | None:
    """The column of frame rows that a field of places stands for, also after it is renamed."""
    return (field.metadata or {}).get(b"made", b"").decode() or None


def merged_masks(video: dict, expression: dict) -> list[dict]:
    """The mask of all targets of a sentence together, on each frame of a video row, as the J&F metric takes them."""
    columns = [item["segmentations"] for item in video["objects"] if item["anno_id"] in expression["anno_ids"]]
    empty = empty_rle(video["height"], video["width"])
    masks = []
    for frame in range(len(video["frame_names"])):
        visible = [column[frame] for column in columns if column[frame] is not None]
        masks.append(
            merge_rles(visible, [False] * len(visible), video["height"], video["width"]) if visible else empty
        )
    return masks

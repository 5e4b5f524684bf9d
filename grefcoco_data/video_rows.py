"""Rows of videos: the schema, Arrow tables made of the genuine files, and loading as rows of videos or of frames.

    rows = load_videos("data/mevis", "mevis", split="valid_u", layout="video")    # one row per video, as stored
    rows = load_videos("data/mevis", "mevis", split="valid_u", layout="frame")    # one row per frame and sentence

A frame row has the columns of an expression row: to a model of images, a frame is an image. Its targets are those that
are visible on the frame; where none is, `no_target` is true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Value
from PIL import Image
from pycocotools import mask as coco_mask

from grefcoco_data.annotations import Problems
from grefcoco_data.expressions import expression_features
from grefcoco_data.images import image_size, pixel_fault
from grefcoco_data.masks import empty_rle, merge_rles
from grefcoco_data.mevis import MaskFile, Video, open_frames, open_masks, palette_masks
from grefcoco_data.pictures import decode_image
from grefcoco_data.rows import EXPRESSION, EXPRESSION_FEATURES, IMAGE_FEATURES, RLE, list_column
from grefcoco_data.video_collections import video_collection_of

VIDEOS_PER_GROUP = 2  # video rows of a row group: the least that a stream reads
MAX_FRAMES = 10_000  # a frame row's sent_id is the sentence's times this, plus the number of the frame
LARGE = ("frames", "objects", "expressions")  # columns of a video row of which frames read a part
PLACE = ("video", "frame", "sentence")  # what large columns of the index of frame rows hold
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
            only, those of `IMAGE_FEATURES`, one row per frame. Map-style, a transform reads images, boxes and masks:
            in another format, and in copies on disk, these columns hold places such as
            `{"video": 0, "frame": 3, "sentence": 1}`. Streams hold the values.
        columns: Columns to keep; without images, no image is read.

    Raises:
        ValueError: unknown configuration, split, layout or column.
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
    if layout == "video":
        return videos.select_columns(columns)
    if isinstance(videos, datasets.Dataset):
        return _frame_index(videos, columns)
    # as tables, as in `loading`: rows that Python functions make have no types of their own
    stored = [name for name in VIDEO_FEATURES if name != "frames" or "image" in columns]
    of_images = layout == "image"
    rows, features = (_image_table, _image_features) if of_images else (_frame_table, expression_features)
    stream = videos.select_columns(stored).with_format("arrow")
    stream = stream.map(rows, batched=True, batch_size=1, fn_kwargs={"columns": columns})
    return stream.with_format(None).cast(features(columns))


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
    return _table([_image_row(video, frame, columns) for frame in frames], _image_features(columns), videos, frames)


def _image_features(columns: Sequence[str]) -> Features:
    return Features({name: IMAGE_FEATURES[name] for name in columns})


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


def _frame_index(videos: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """Index of frame rows over video rows; large columns hold places, which `_FrameLookup` replaces by values."""
    table = videos.with_format(None).data
    index = pa.concat_tables([_frame_places(row, table) for row in range(len(videos))])
    index = datasets.Dataset(index, split=videos.split, fingerprint=f"{videos._fingerprint}-frames")
    return index.select_columns(columns).with_transform(_FrameLookup(videos))


def _frame_places(row: int, table: pa.Table) -> pa.Table:
    """The index of one video: all sentences of the first frame, of the second, ..."""
    video = {name: table[name][row] for name in VIDEO_FEATURES if name not in ("frames", "objects")}
    names, expressions = video["frame_names"].as_py(), video["expressions"].values
    objects = table["objects"][row].values
    num_frames, num_sentences = len(names), len(expressions)
    frames, sentences = (part.ravel() for part in np.indices((num_frames, num_sentences)))
    places = [pa.array(part) for part in (np.full(len(frames), row), frames, sentences)]
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


class _FrameLookup:
    """Replaces the places in `_frame_index` by values; of a video, only the frame that is asked for is read."""

    def __init__(self, videos: datasets.Dataset) -> None:
        self.videos = videos.with_format(None)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        values = dict(batch)
        if "image" in batch:
            places = [(place["video"], place["frame"]) for place in batch["image"]]
            images = {place: self._image(*place) for place in dict.fromkeys(places)}
            values["image"] = [images[place] for place in places]
        for name in batch.keys() & {"boxes", "masks", "mask", "objects"}:
            places = [tuple(place[part] for part in PLACE) for place in batch[name]]
            frames = {place: self._frame(*place) for place in dict.fromkeys(place[:2] for place in places)}
            values[name] = [
                frame_row(frames[video, frame], frame, self._expression(video, sentence), [name])[name]
                for video, frame, sentence in places
            ]
        return values

    def _image(self, video: int, frame: int) -> Image.Image:
        return decode_image(self.videos.data["frames"][video].values[frame].as_py())

    def _expression(self, video: int, sentence: int) -> dict:
        return self.videos.data["expressions"][video].values[sentence].as_py()

    def _frame(self, video: int, frame: int) -> dict:
        """A video row whose objects have the masks of one frame only."""
        row = {name: self.videos.data[name][video].as_py() for name in VIDEO_FEATURES if name not in LARGE}
        objects = self.videos.data["objects"][video].values
        places = np.arange(len(objects)) * len(row["frame_names"]) + frame
        masks = objects.field("segmentations").flatten().take(pa.array(places)).to_pylist()
        ids = objects.field("anno_id").to_pylist()
        row["objects"] = [{"anno_id": key, "segmentations": {frame: mask}} for key, mask in zip(ids, masks)]
        return row


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

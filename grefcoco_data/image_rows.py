"""Image rows: their schema, and Arrow tables of them made from the annotations.

A row holds an image once, with all its objects and all its sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features, Value

from grefcoco_data.files import Annotations, ImageFolder, ImageZip, Problems, read_image, targets, to_rle

ROWS_PER_GROUP = 100

RLE = {"size": [Value("int32")], "counts": Value("string")}
BOX = datasets.Sequence(Value("float32"), length=4)
# `[...]` and not `List(...)`: it says the same and older releases of `datasets` know it too.
OBJECT = {
    "ann_id": Value("int64"),
    "category_id": Value("int32"),
    "bbox": BOX,
    "area": Value("float32"),
    "iscrowd": Value("bool"),
    "segmentation": RLE,
}
EXPRESSION = {
    "ref_id": Value("int64"),
    "sent_id": Value("int64"),
    "sentence": Value("string"),
    "raw": Value("string"),
    "no_target": Value("bool"),
    "ann_ids": [Value("int64")],
}
IMAGE = {
    "image": datasets.Image(),
    "image_id": Value("int64"),
    "file_name": Value("string"),
    "width": Value("int32"),
    "height": Value("int32"),
}
TARGETS = {"category_ids": [Value("int32")], "boxes": [BOX], "masks": [RLE], "mask": RLE}
# Column of an expression row -> field of the objects it lists.
TARGET_COLUMNS = {"category_ids": "category_id", "boxes": "bbox", "masks": "segmentation"}
IMAGE_FEATURES = Features({**IMAGE, "objects": [OBJECT], "expressions": [EXPRESSION]})
EXPRESSION_FEATURES = Features({**IMAGE, **EXPRESSION, **TARGETS})


def image_tables(
    annotations: Annotations,
    split: str,
    image_ids: Sequence[int],
    source: ImageFolder | ImageZip,
    problems: Problems,
    skip_bad_images: bool = False,
) -> Iterator[pa.Table]:
    """Image rows of `image_ids` as tables of up to `ROWS_PER_GROUP` rows with the schema of `IMAGE_FEATURES`.

    Image bytes are passed on as they are. What is wrong with polygons and images goes to `problems`.

    Raises:
        ValueError: an image is missing or bad and `skip_bad_images` is off.
    """
    for start in range(0, len(image_ids), ROWS_PER_GROUP):
        pictures = {}
        for image_id in image_ids[start : start + ROWS_PER_GROUP]:
            picture = _read_or_note(source, annotations.images[image_id], problems, skip_bad_images)
            if picture is not None:
                pictures[image_id] = picture
        if pictures:
            yield _image_table(annotations, split, list(pictures), list(pictures.values()), problems)


def _read_or_note(
    source: ImageFolder | ImageZip, image: dict, problems: Problems, skip_bad_images: bool
) -> bytes | None:
    try:
        return read_image(source, image)
    except ValueError as error:
        if not skip_bad_images:
            raise ValueError(
                f"{source.path}: {error}. Fetch it again, or build with --skip-bad-images to leave such images out."
            ) from error
        problems.add("bad image, left out with its sentences", error)
        return None


def _image_table(
    annotations: Annotations, split: str, image_ids: list[int], pictures: list[bytes], problems: Problems
) -> pa.Table:
    """Columns are made whole, for all rows at once: several times faster than row by row."""
    images = [annotations.images[image_id] for image_id in image_ids]
    names = [image["file_name"] for image in images]
    columns = [
        pa.StructArray.from_arrays([pa.array(pictures, pa.binary()), pa.array(names)], names=["bytes", "path"]),
        pa.array(image_ids, pa.int64()),
        pa.array(names),
        pa.array([image["width"] for image in images], pa.int32()),
        pa.array([image["height"] for image in images], pa.int32()),
        _object_column([annotations.objects[image_id] for image_id in image_ids], images, problems),
        _expression_column([annotations.splits[split][image_id] for image_id in image_ids]),
    ]
    schema = IMAGE_FEATURES.arrow_schema
    return pa.Table.from_arrays([column.cast(kind) for column, kind in zip(columns, schema.types)], schema=schema)


def _object_column(groups: list[list[dict]], images: list[dict], problems: Problems) -> pa.ListArray:
    items = list(chain.from_iterable(groups))
    sizes = [(image["height"], image["width"]) for image, group in zip(images, groups) for _ in group]
    rles = []
    for item, (height, width) in zip(items, sizes):
        rle, fault = to_rle(item["segmentation"], height, width)
        rles.append(rle)
        if fault:
            problems.add(fault, f"annotation {item['id']}")
    boxes = np.array([item["bbox"] for item in items], dtype=np.float32).reshape(-1)
    columns = {
        "ann_id": pa.array([item["id"] for item in items], pa.int64()),
        "category_id": pa.array([item["category_id"] for item in items], pa.int32()),
        "bbox": pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4),
        "area": pa.array(np.array([item["area"] for item in items], dtype=np.float32)),
        "iscrowd": pa.array([item["iscrowd"] != 0 for item in items], pa.bool_()),
        "segmentation": _rle_column(rles),
    }
    return list_column(_struct_column(columns), [len(group) for group in groups])


def _rle_column(rles: list[dict]) -> pa.StructArray:
    sizes = pa.array(np.array([rle["size"] for rle in rles], dtype=np.int32).reshape(-1))
    counts = pa.array([rle["counts"] for rle in rles], pa.string())
    return _struct_column({"size": list_column(sizes, [2] * len(rles)), "counts": counts})


def _expression_column(groups: list[list[dict]]) -> pa.ListArray:
    pairs = [(ref, sentence) for group in groups for ref in group for sentence in ref["sentences"]]
    ann_ids = [targets(ref) for ref, _ in pairs]
    flat = pa.array(list(chain.from_iterable(ann_ids)), pa.int64())
    columns = {
        "ref_id": pa.array([ref["ref_id"] for ref, _ in pairs], pa.int64()),
        "sent_id": pa.array([sentence["sent_id"] for _, sentence in pairs], pa.int64()),
        "sentence": pa.array([sentence["sent"] for _, sentence in pairs], pa.string()),
        "raw": pa.array([sentence["raw"] for _, sentence in pairs], pa.string()),
        "no_target": pa.array([not ids for ids in ann_ids], pa.bool_()),
        "ann_ids": list_column(flat, [len(ids) for ids in ann_ids]),
    }
    return list_column(_struct_column(columns), [sum(len(ref["sentences"]) for ref in group) for group in groups])


def _struct_column(columns: dict[str, pa.Array]) -> pa.StructArray:
    return pa.StructArray.from_arrays(list(columns.values()), names=list(columns))


def list_column(values: pa.Array, lengths: Sequence[int]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)

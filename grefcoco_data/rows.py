"""Rows: the two schemas, Arrow tables of image rows made from the annotations, and image rows as expression rows.

An image row holds an image once, with all its objects and all its sentences. An expression row holds one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import itemgetter

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features, Value

from grefcoco_data.annotation_json import without_garbage_collection
from grefcoco_data.annotations import Annotations, Problems, targets
from grefcoco_data.images import ImageFolder, ImageZip, read_image, without_orientation
from grefcoco_data.masks import MAX_PIXELS, merge_rles, rle_covers_image, to_rle
from grefcoco_data.pictures import RowImage, decode_image

ROWS_PER_GROUP = 100  # image rows of a row group

RLE = {"size": [Value("int32")], "counts": Value("string")}
BOX = datasets.Sequence(Value("float32"), length=4)
# `[...]` means `List(...)`; `datasets` before 4 does not have `List`.
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
# Column of an expression row -> field of its target objects.
TARGET_COLUMNS = {"category_ids": "category_id", "boxes": "bbox", "masks": "segmentation"}
IMAGE_FEATURES = Features({**IMAGE, "objects": [OBJECT], "expressions": [EXPRESSION]})
EXPRESSION_FEATURES = Features({**IMAGE, "image": RowImage(mode="RGB"), **EXPRESSION, **TARGETS})


def image_tables(
    annotations: Annotations,
    split: str,
    image_ids: Sequence[int],
    source: ImageFolder | ImageZip,
    problems: Problems,
    skip_bad_images: bool = False,
) -> Iterator[pa.Table]:
    """Image rows of `image_ids` as tables of up to `ROWS_PER_GROUP` rows with the schema of `IMAGE_FEATURES`.

    Image bytes are not changed, except that orientation tags are removed. What is wrong with polygons and images is
    added to `problems`.

    Raises:
        ValueError: an image is missing or bad and `skip_bad_images` is off.
    """
    for start in range(0, len(image_ids), ROWS_PER_GROUP):
        files = {}
        for image_id in image_ids[start : start + ROWS_PER_GROUP]:
            data = _read_or_note(source, annotations.images[image_id], problems, skip_bad_images)
            if data is not None:
                files[image_id] = data
        if files:
            yield _image_table(annotations, split, list(files), list(files.values()), problems)


def explode(batch: dict[str, list], columns: Sequence[str]) -> dict[str, list]:
    """Turn one image row, given as a batch of one, into one row per sentence; all share the decoded image.

    Args:
        batch: `objects`, `expressions`, `height` and `width` of the image row, and the columns that are asked for.
        columns: of `EXPRESSION_FEATURES`, or `objects`.
    """
    objects, expressions = batch["objects"][0], batch["expressions"][0]
    for name, (value,) in batch.items():
        if value is None or (name != "image" and _has_none(value)):
            raise ValueError(f"The rows cannot be used: the column {name} has a field without a value.")
    height, width = batch["height"][0], batch["width"][0]
    by_id = {item["ann_id"]: item for item in objects}
    if fault := _image_row_fault(objects, by_id, expressions, height, width):
        place = f"image {batch['image_id'][0]}" if "image_id" in batch else "an image"
        raise ValueError(f"The rows cannot be used: {place} {fault}.")
    targets_each = [[by_id[ann_id] for ann_id in expression["ann_ids"]] for expression in expressions]
    rows: dict[str, list] = {}
    for name in columns:
        if name == "image":
            rows[name] = [decode_image(batch["image"][0])] * len(expressions)
        elif name in batch:
            rows[name] = batch[name] * len(expressions)
        elif name == "mask":
            rows[name] = [
                merge_rles([o["segmentation"] for o in group], [o["iscrowd"] for o in group], height, width)
                for group in targets_each
            ]
        elif name in TARGET_COLUMNS:
            rows[name] = [[item[TARGET_COLUMNS[name]] for item in group] for group in targets_each]
        else:
            rows[name] = [expression[name] for expression in expressions]
    return rows


def _image_row_fault(
    objects: list[dict], by_id: dict[int, dict], expressions: list[dict], height: int, width: int
) -> str | None:
    """What would crash in C code or give the mask of something else; None when the image row can be used."""
    if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
        return "has a width and height that no image can have"
    counts = pa.array([item["segmentation"]["counts"] for item in objects], pa.string())
    covers = rle_covers_image(counts, np.full(len(objects), height * width))
    for item, covers_image in zip(objects, covers):
        if list(item["segmentation"]["size"]) != [height, width]:
            return f"has an RLE of another size than its image (object {item['ann_id']})"
        if not covers_image:
            return f"has an RLE that does not cover its image exactly or has empty runs (object {item['ann_id']})"
    if len(by_id) < len(objects):
        ids = [item["ann_id"] for item in objects]
        twice = next(ann_id for i, ann_id in enumerate(ids) if ann_id in ids[:i])
        return f"has two objects with one annotation id (object {twice})"
    wanted = (ann_id for expression in expressions for ann_id in expression["ann_ids"])
    unknown = next((ann_id for ann_id in wanted if ann_id not in by_id), None)
    return None if unknown is None else f"has no object {unknown}, which one of its sentences names"


def _has_none(value: object) -> bool:
    """Whether a value at any depth is None."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return value is None
    return any(map(_has_none, value))


def _read_or_note(
    source: ImageFolder | ImageZip, image: dict, problems: Problems, skip_bad_images: bool
) -> bytes | None:
    try:
        data = read_image(source, image)
    except ValueError as error:
        if not skip_bad_images:
            raise ValueError(
                f"{source.path}: {error}. Download it again, or build with --skip-bad-images to skip such images."
            ) from error
        problems.add("bad image, skipped with its sentences", error)
        return None
    upright = without_orientation(data)
    if upright is None:
        return data
    problems.add("orientation tag, which the masks ignore, removed from image", image["file_name"])
    return upright


@without_garbage_collection()
def _image_table(
    annotations: Annotations, split: str, image_ids: list[int], files: list[bytes], problems: Problems
) -> pa.Table:
    """Make each column for all rows at once, which is several times faster than row by row."""
    images = [annotations.images[image_id] for image_id in image_ids]
    names = [image["file_name"] for image in images]
    columns = [
        pa.StructArray.from_arrays([pa.array(files, pa.binary()), pa.array(names)], names=["bytes", "path"]),
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
    boxes = np.fromiter(chain.from_iterable(map(itemgetter("bbox"), items)), np.float32, 4 * len(items))
    columns = {
        "ann_id": _column(items, "id", pa.int64()),
        "category_id": _column(items, "category_id", pa.int32()),
        "bbox": pa.FixedSizeListArray.from_arrays(pa.array(boxes), 4),
        "area": pa.array(np.fromiter(map(itemgetter("area"), items), np.float32, len(items))),
        "iscrowd": pa.array([item["iscrowd"] != 0 for item in items], pa.bool_()),
        "segmentation": _rle_column(rles, sizes),
    }
    return list_column(_struct_column(columns), list(map(len, groups)))


def _rle_column(rles: list[dict], sizes: list[tuple[int, int]]) -> pa.StructArray:
    flat = pa.array(np.fromiter(chain.from_iterable(sizes), np.int32, 2 * len(sizes)))
    counts = _column(rles, "counts", pa.string())
    return _struct_column({"size": list_column(flat, [2] * len(sizes)), "counts": counts})


def _expression_column(groups: list[list[dict]]) -> pa.ListArray:
    refs = list(chain.from_iterable(groups))
    sentences = list(chain.from_iterable(map(itemgetter("sentences"), refs)))
    sentences_each = [len(ref["sentences"]) for ref in refs]
    ref_of_sentence = pa.array(np.repeat(np.arange(len(refs)), sentences_each))
    ids = list(map(targets, refs))  # of each ref
    ann_ids = list_column(pa.array(list(chain.from_iterable(ids)), pa.int64()), list(map(len, ids)))
    columns = {
        "ref_id": _column(refs, "ref_id", pa.int64()).take(ref_of_sentence),
        "sent_id": _column(sentences, "sent_id", pa.int64()),
        "sentence": _column(sentences, "sent", pa.string()),
        "raw": _column(sentences, "raw", pa.string()),
        "no_target": pa.array([not ref_ids for ref_ids in ids], pa.bool_()).take(ref_of_sentence),
        "ann_ids": ann_ids.take(ref_of_sentence),
    }
    ends = np.cumsum([0, *sentences_each])[np.cumsum([0, *map(len, groups)])]
    return list_column(_struct_column(columns), np.diff(ends))


def _column(records: list[dict], key: str, kind: pa.DataType) -> pa.Array:
    return pa.array(list(map(itemgetter(key), records)), kind)


def _struct_column(columns: dict[str, pa.Array]) -> pa.StructArray:
    return pa.StructArray.from_arrays(list(columns.values()), names=list(columns))


def list_column(values: pa.Array, lengths: Sequence[int]) -> pa.ListArray:
    """Arrow lists of these lengths, cut from `values` one after the other."""
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)

"""Expression rows as one Arrow table: every sentence of the image rows with the values of its targets.

Nothing is decoded, and the bytes of images are not copied. The table holds what its features declare, so that every
operation of `datasets` works on it as on any other table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features
from datasets.table import InMemoryTable

from grefcoco_data.masks import MAX_PIXELS, merge_rles, rle_covers_image
from grefcoco_data.pictures import shared_images
from grefcoco_data.rows import EXPRESSION, EXPRESSION_FEATURES, IMAGE_FEATURES, OBJECT, list_column

Step = tuple[str, tuple, dict]  # name, arguments and options of an operation of InMemoryTable

# `counts` are views here: a sentence holds all objects of its image, which would take 14 times the memory.
SHARED_OBJECT = OBJECT | {"segmentation": OBJECT["segmentation"] | {"counts": datasets.Value("string_view")}}
ALL_FEATURES = Features({**EXPRESSION_FEATURES, "objects": [SHARED_OBJECT]})


def expression_features(columns: Sequence[str]) -> Features:
    """Features of these columns of expression rows, in this order."""
    return Features({name: ALL_FEATURES[name] for name in columns})


def expression_table(images: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Turn image rows into expression rows with these columns.

    Args:
        images: with the schema of `IMAGE_FEATURES`; `image` can be missing when no column needs it.
        columns: of `ALL_FEATURES`.

    Raises:
        ValueError: the image rows contradict themselves; names the image.
    """
    sentences = _Sentences(images)
    arrays = [sentences.column(name) for name in columns]
    return pa.Table.from_arrays(arrays, schema=expression_features(columns).arrow_schema)


class ExpressionTable(InMemoryTable):
    """The table of expression rows. Another process makes it again from the image rows, which are on disk."""

    def __init__(self, images: datasets.table.Table, columns: Sequence[str], steps: tuple[Step, ...] = ()) -> None:
        self.images, self.made_columns, self.steps = images, list(columns), steps
        table = InMemoryTable(expression_table(images.table, columns))
        for name, arguments, options in steps:
            table = getattr(table, name)(*arguments, **options)
        super().__init__(table.table)

    def __getstate__(self) -> dict:
        return {"images": self.images, "columns": self.made_columns, "steps": self.steps}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["images"], state["columns"], state["steps"])

    def _after(self, name: str, arguments: tuple, options: dict) -> ExpressionTable:
        """The table after one more operation."""
        changed = type(self).__new__(type(self))
        changed.images, changed.made_columns = self.images, self.made_columns
        changed.steps = (*self.steps, (name, arguments, options))
        InMemoryTable.__init__(changed, getattr(InMemoryTable, name)(self, *arguments, **options).table)
        return changed

    def slice(self, *arguments: object, **options: object) -> ExpressionTable:
        return self._after("slice", arguments, options)

    def select(self, *arguments: object, **options: object) -> ExpressionTable:
        return self._after("select", arguments, options)

    def drop(self, *arguments: object, **options: object) -> ExpressionTable:
        return self._after("drop", arguments, options)

    def rename_columns(self, *arguments: object, **options: object) -> ExpressionTable:
        return self._after("rename_columns", arguments, options)

    def replace_schema_metadata(self, *arguments: object, **options: object) -> ExpressionTable:
        return self._after("replace_schema_metadata", arguments, options)


class _Sentences:
    """The flat objects and sentences of image rows, and which objects each sentence is about."""

    def __init__(self, images: pa.Table) -> None:
        small = [name for name in IMAGE_FEATURES if name != "image"]
        self.images = images
        self.table = images.select(small).combine_chunks()
        self.image_ids = self.table["image_id"].to_numpy()
        self.objects, self.expressions = (_flatten(self.table[name]) for name in ("objects", "expressions"))
        self.image_of_object, self.image_of_sentence = (
            pc.list_parent_indices(self.table[name]).combine_chunks().to_numpy() for name in ("objects", "expressions")
        )
        self.sizes = np.stack([self.table[name].to_numpy() for name in ("height", "width")], axis=1)  # (images, 2)
        self._check()
        ann_ids = self.expressions.field("ann_ids")
        self.targets_each = pc.list_value_length(ann_ids).to_numpy()
        self.positions = self._positions(ann_ids.flatten().to_numpy())

    def column(self, name: str) -> pa.Array | pa.ChunkedArray:
        """One column of the expression rows."""
        makers: dict[str, Callable[[], pa.Array | pa.ChunkedArray]] = {
            "image": lambda: shared_images(self.images["image"], self._sentences_each()),
            "category_ids": lambda: self._target_column(self.objects.field("category_id")),
            "boxes": lambda: self._target_column(self.objects.field("bbox")),
            "masks": lambda: self._target_column(self.objects.field("segmentation")),
            "mask": self._merged_masks,
            "objects": self._shared_objects,
        }
        if name in EXPRESSION:
            return self.expressions.field(name)
        return makers[name]() if name in makers else self.table[name].take(pa.array(self.image_of_sentence))

    def _check(self) -> None:
        """Refuse what would crash in C code or give the mask of something else."""
        outside = (self.sizes <= 0).any(axis=1) | (self.sizes.astype(np.int64).prod(axis=1) > MAX_PIXELS)
        self._refuse(outside, "has a width and height that no image can have")
        rles = self.objects.field("segmentation")
        lengths = pc.list_value_length(rles.field("size")).to_numpy(zero_copy_only=False)
        self._refuse_objects(lengths != 2, "an RLE without a size")
        sizes = rles.field("size").flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
        expected = self.sizes[self.image_of_object]
        self._refuse_objects((sizes != expected).any(axis=1), "an RLE of another size than its image")
        covers = rle_covers_image(rles.field("counts"), expected.astype(np.int64).prod(axis=1))
        self._refuse_objects(~covers, "an RLE that does not cover its image exactly")

    def _refuse_objects(self, is_bad: np.ndarray, fault: str) -> None:
        if is_bad.any():
            ann_id = self.objects.field("ann_id")[int(np.argmax(is_bad))]
            place = np.zeros(len(self.image_ids), bool)
            place[self.image_of_object[np.argmax(is_bad)]] = True
            self._refuse(place, f"has {fault} (object {ann_id})")

    def _refuse(self, is_bad: np.ndarray, fault: str) -> None:
        if is_bad.any():
            raise ValueError(f"The rows cannot be used: image {self.image_ids[np.argmax(is_bad)]} {fault}.")

    def _positions(self, ann_ids: np.ndarray) -> np.ndarray:
        """Position of each target among all objects, looked up by image and annotation id."""
        image_of_target = np.repeat(self.image_of_sentence, self.targets_each)
        distinct, numbers = np.unique(self.objects.field("ann_id").to_numpy(), return_inverse=True)
        keys = self.image_of_object * len(distinct) + numbers
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        duplicates = np.zeros(len(keys), bool)
        duplicates[order[1:]] = keys[1:] == keys[:-1]
        self._refuse_objects(duplicates, "two objects with one annotation id")
        number = np.searchsorted(distinct, ann_ids)
        is_known = number < len(distinct)
        is_known[is_known] = distinct[number[is_known]] == ann_ids[is_known]
        wanted = image_of_target * len(distinct) + number
        place = np.searchsorted(keys, wanted)
        is_known &= place < len(keys)
        is_known[is_known] = keys[place[is_known]] == wanted[is_known]
        if not is_known.all():
            first = np.argmin(is_known)
            image_id = self.image_ids[image_of_target[first]]
            raise ValueError(
                f"The rows cannot be used: image {image_id} has no object {ann_ids[first]}, "
                "which one of its sentences names."
            )
        return order[place]

    def _sentences_each(self) -> np.ndarray:
        """Number of sentences of each image."""
        return np.bincount(self.image_of_sentence, minlength=len(self.image_ids))

    def _target_column(self, values: pa.Array) -> pa.ListArray:
        return list_column(values.take(pa.array(self.positions)), self.targets_each)

    def _merged_masks(self) -> pa.StructArray:
        """The union of the targets of each sentence. Sentences with the same targets share one merging."""
        rles = self.objects.field("segmentation")
        crowd = self.objects.field("iscrowd").to_numpy(zero_copy_only=False)
        ends = np.cumsum(self.targets_each)
        chosen = np.zeros(len(ends), np.int64)  # number of the RLE: an object, or one of `merged` after them
        single = self.targets_each == 1
        chosen[single] = self.positions[ends[single] - 1]
        merged: list[str] = []
        number_of: dict[tuple[int, ...], int] = {}
        sizes = self.sizes[self.image_of_sentence].tolist()
        counts = rles.field("counts")
        for row in np.flatnonzero(~single).tolist():
            places = tuple(self.positions[ends[row] - self.targets_each[row] : ends[row]].tolist())
            height, width = sizes[row]
            key = places or (-height, -width)
            if key not in number_of:
                number_of[key] = len(counts) + len(merged)
                targets = [{"size": [height, width], "counts": counts[n].as_py()} for n in places]
                rle = merge_rles(targets, crowd[list(places)], height, width)
                merged.append(rle["counts"])
            chosen[row] = number_of[key]
        every = pa.concat_arrays([counts, pa.array(merged, pa.string())])
        flat = pa.array(self.sizes[self.image_of_sentence].astype(np.int32).ravel())
        arrays = [list_column(flat, [2] * len(sizes)), every.take(pa.array(chosen))]
        return pa.StructArray.from_arrays(arrays, names=["size", "counts"])

    def _shared_objects(self) -> pa.ChunkedArray:
        """All objects of the image of each sentence; a chunk per image shares the text of its RLEs."""
        kind = ALL_FEATURES.arrow_schema.field("objects").type
        firsts = np.searchsorted(self.image_of_object, np.arange(len(self.image_ids) + 1))
        chunks = []
        for image, count in enumerate(self._sentences_each().tolist()):
            if count:
                items = self.objects.slice(firsts[image], firsts[image + 1] - firsts[image])
                chunks.append(_repeated_list(items, count, kind))
        return pa.chunked_array(chunks, kind)


def _repeated_list(items: pa.StructArray, count: int, kind: pa.DataType) -> pa.ListArray:
    """The same list of objects `count` times."""
    number = len(items)
    items = items.cast(kind.value_type)  # copies the text of the RLEs once
    places = np.tile(np.arange(number, dtype=np.int64), count)
    fields = []
    for field in kind.value_type:
        values = items.field(field.name)
        if field.name == "segmentation":
            counts = values.field("counts")
            _, views, *texts = counts.buffers()
            views = np.frombuffer(views, np.int32).reshape(-1, 4)[counts.offset : counts.offset + number]
            buffers = [None, pa.py_buffer(np.tile(views, (count, 1))), *texts]
            arrays = [values.field("size").take(pa.array(places))]
            arrays.append(pa.Array.from_buffers(pa.string_view(), number * count, buffers))
            values = pa.StructArray.from_arrays(arrays, fields=list(field.type))
        else:
            values = values.take(pa.array(places))
        fields.append(values)
    values = pa.StructArray.from_arrays(fields, fields=list(kind.value_type))
    return list_column(values, [number] * count).cast(kind)


def _flatten(lists: pa.ChunkedArray) -> pa.Array:
    return pc.list_flatten(lists).combine_chunks()

"""Expression rows as one Arrow table: every sentence of the image rows with the values of its targets.

Nothing is decoded, and the bytes of images are not copied. The table holds what its features declare, so that every
operation of `datasets` works on it as on any other table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partialmethod

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features
from datasets.table import InMemoryTable, TableBlock

from grefcoco_data.masks import MAX_PIXELS, merge_rles, rle_covers_image
from grefcoco_data.rows import EXPRESSION, EXPRESSION_FEATURES, OBJECT, list_column

ALL_FEATURES = Features({**EXPRESSION_FEATURES, "objects": [OBJECT]})
Step = tuple[str, tuple, dict]  # name, arguments and options of an operation on a table


def expression_features(columns: Sequence[str]) -> Features:
    """Features of these columns of expression rows, in this order."""
    return Features({name: ALL_FEATURES[name] for name in columns})


def expression_table(images: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Turn image rows into expression rows with these columns.

    Args:
        images: with the schema of `IMAGE_FEATURES`; columns that no column needs can be missing, except `image_id`,
            `height`, `width`, `objects` and `expressions`.
        columns: of `ALL_FEATURES`.

    Raises:
        ValueError: the image rows contradict themselves; names the image.
    """
    sentences, schema = _Sentences(images), expression_features(columns).arrow_schema
    arrays = (sentences.column(name) for name in columns)
    arrays = [array if array.type == kind else array.cast(kind) for array, kind in zip(arrays, schema.types)]
    return pa.Table.from_arrays(arrays, schema=schema)


def check_image_rows(images: pa.Table) -> None:
    """Raises ValueError when image rows contradict themselves; names the image."""
    _Sentences(images)


class ExpressionTable(TableBlock):
    """The table of expression rows as `datasets` uses it.

    Columns of whole images (`image`, `objects`) have a chunk for each row: a part of a column of the image rows, which
    all sentences of an image share. The methods of `datasets` would make a batch of each chunk in advance, 1 GB for
    all of gRefCOCO; here rows are read chunk by chunk. Another process makes the table again from the image rows.
    """

    def __init__(self, images: datasets.table.Table, columns: Sequence[str], steps: Sequence[Step] = ()) -> None:
        stored = self._make(images, columns)
        for name, arguments, options in steps:
            stored = getattr(stored, name)(*arguments, **options)
        self._set(images, columns, steps, stored)

    @staticmethod
    def _make(images: datasets.table.Table, columns: Sequence[str]) -> pa.Table:
        return expression_table(images.table, columns)

    def _set(
        self, images: datasets.table.Table, columns: Sequence[str], steps: Sequence[Step], stored: pa.Table
    ) -> None:
        self.images, self.made_columns, self.steps, self.stored = images, tuple(columns), tuple(steps), stored
        self._schema = stored.schema
        self._batches: list[pa.RecordBatch] = []  # not used

    @property
    def table(self) -> pa.Table:
        """All rows."""
        return self.stored

    def __deepcopy__(self, memo: dict) -> ExpressionTable:
        return self  # nothing of it changes

    def __getstate__(self) -> dict:
        return {"images": self.images, "columns": self.made_columns, "steps": self.steps}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def fast_gather(self, indices: Sequence[int]) -> pa.Table:
        """The rows at these positions."""
        rows = pa.array(indices)
        columns = [
            pa.chunked_array([column.chunk(i) for i in indices], column.type)
            if _has_chunk_per_row(column)
            else column.take(rows)
            for column in self.stored.columns
        ]
        return pa.Table.from_arrays(columns, schema=self.stored.schema)

    def fast_slice(self, offset: int = 0, length: int | None = None) -> pa.Table:
        """`length` rows from `offset` on, or all."""
        stop = self.num_rows if length is None else min(offset + max(length, 0), self.num_rows)
        columns = [
            pa.chunked_array([column.chunk(i) for i in range(offset, stop)], column.type)
            if _has_chunk_per_row(column)
            else column.slice(offset, stop - offset)
            for column in self.stored.columns
        ]
        return pa.Table.from_arrays(columns, schema=self.stored.schema)

    def _after(self, name: str, *arguments: object, **options: object) -> ExpressionTable:
        """The table after one more operation, which changes no value."""
        table = type(self).__new__(type(self))
        changed = getattr(self.stored, name)(*arguments, **options)
        table._set(self.images, self.made_columns, (*self.steps, (name, arguments, options)), changed)
        return table

    def _plain(self, name: str, *arguments: object, **options: object) -> InMemoryTable:
        """The result of an operation that changes values, as a table without shared columns."""
        return getattr(InMemoryTable(self.table), name)(*arguments, **options)

    def cast(self, target_schema: pa.Schema, *arguments: object, **options: object) -> TableBlock:
        """The table with these types; where it has them already, as if only features change, with their metadata."""
        if self._schema.equals(target_schema):
            return self.replace_schema_metadata(target_schema.metadata)
        return self._plain("cast", target_schema, *arguments, **options)

    slice = partialmethod(_after, "slice")
    select = partialmethod(_after, "select")
    drop = partialmethod(_after, "drop")
    rename_columns = partialmethod(_after, "rename_columns")
    remove_column = partialmethod(_after, "remove_column")
    replace_schema_metadata = partialmethod(_after, "replace_schema_metadata")
    filter = partialmethod(_plain, "filter")
    flatten = partialmethod(_plain, "flatten")
    combine_chunks = partialmethod(_plain, "combine_chunks")
    add_column = partialmethod(_plain, "add_column")
    append_column = partialmethod(_plain, "append_column")
    set_column = partialmethod(_plain, "set_column")


def _has_chunk_per_row(column: pa.ChunkedArray) -> bool:
    return column.num_chunks == len(column) and column.num_chunks > 0


class _Sentences:
    """The flat objects and sentences of image rows, and which objects each sentence is about."""

    def __init__(self, images: pa.Table) -> None:
        self.images = images
        self.table = images.select([name for name in images.column_names if name != "image"]).combine_chunks()
        self._refuse_empty_values()
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
            "image": lambda: self._shared(self.images["image"]),
            "category_ids": lambda: self._target_column(self.objects.field("category_id")),
            "boxes": lambda: self._target_column(self.objects.field("bbox")),
            "masks": lambda: self._target_column(self.objects.field("segmentation")),
            "mask": self._merged_masks,
            "objects": lambda: self._shared(self.images["objects"]),
        }
        if name in EXPRESSION:
            return self.expressions.field(name)
        return makers[name]() if name in makers else self.table[name].take(pa.array(self.image_of_sentence))

    def _refuse_empty_values(self) -> None:
        """Refuse nulls, which no field may be, at any depth."""
        for name in self.images.column_names:
            column = self.images[name] if name == "image" else self.table[name]
            # the bytes or the path of an image may be missing, not both
            if any(chunk.null_count if name == "image" else _has_null(chunk) for chunk in column.chunks):
                raise ValueError(f"The rows cannot be used: the column {name} has a field without a value.")

    def _check(self) -> None:
        """Refuse what would crash in C code or give the mask of something else."""
        outside = (self.sizes <= 0).any(axis=1) | (self.sizes.astype(np.int64).prod(axis=1) > MAX_PIXELS)
        self._refuse(outside, "has a width and height that no image can have")
        rles = self.objects.field("segmentation")
        lengths = pc.list_value_length(rles.field("size")).to_numpy(zero_copy_only=False)
        self._refuse_objects(lengths != 2, "an RLE of another size than its image")
        sizes = rles.field("size").flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
        expected = self.sizes[self.image_of_object]
        self._refuse_objects((sizes != expected).any(axis=1), "an RLE of another size than its image")
        covers = rle_covers_image(rles.field("counts"), expected.astype(np.int64).prod(axis=1))
        self._refuse_objects(~covers, "an RLE that does not cover its image exactly or has empty runs")

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
        distinct, numbers = np.unique(self.positions, return_inverse=True)  # only objects that are targets
        counts = self.objects.field("segmentation").field("counts").take(pa.array(distinct))
        crowd = self.objects.field("iscrowd").take(pa.array(distinct)).to_pylist()
        sizes, texts, targets = self.sizes[self.image_of_sentence], counts.to_pylist(), numbers.tolist()
        ends = np.cumsum(self.targets_each)
        chosen = np.zeros(len(ends), np.int64)  # number of the RLE: a target, or one of `merged` after them
        single = self.targets_each == 1
        chosen[single] = numbers[ends[single] - 1]
        merged: list[str] = []
        number_of: dict[tuple[int, ...], int] = {}
        rows = np.flatnonzero(~single)
        columns = (values[rows].tolist() for values in (ends, self.targets_each, sizes))
        for row, stop, length, (height, width) in zip(rows.tolist(), *columns):
            places = sorted(targets[stop - length : stop])
            key = tuple(places) or (-height, -width)
            if key not in number_of:
                number_of[key] = len(counts) + len(merged)
                rles = [{"size": [height, width], "counts": texts[n]} for n in places]
                merged.append(merge_rles(rles, [crowd[n] for n in places], height, width)["counts"])
            chosen[row] = number_of[key]
        every = pa.concat_arrays([counts, pa.array(merged, pa.string())])
        del merged, number_of, texts, targets
        flat = pa.array(sizes.astype(np.int32).ravel())
        arrays = [list_column(flat, [2] * len(sizes)), every.take(pa.array(chosen))]
        return pa.StructArray.from_arrays(arrays, names=["size", "counts"])

    def _shared(self, stored: pa.ChunkedArray) -> pa.ChunkedArray:
        """A column of the image rows for each sentence: chunks of one row, which point to the stored values."""
        each = iter(self._sentences_each().tolist())
        chunks = [
            row for chunk in stored.chunks for i in range(len(chunk)) for row in [chunk.slice(i, 1)] * next(each)
        ]
        return pa.chunked_array(chunks, stored.type)


def _has_null(array: pa.Array) -> bool:
    """Whether a value at any depth is null."""
    if array.null_count:
        return True
    if pa.types.is_struct(array.type):
        return any(map(_has_null, array.flatten()))
    is_list = pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)
    return is_list and _has_null(array.flatten())


def _flatten(lists: pa.ChunkedArray) -> pa.Array:
    return pc.list_flatten(lists).combine_chunks()

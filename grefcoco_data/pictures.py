"""Pictures of expression rows: decoded to RGB as they are stored, and stored once for all sentences of an image."""

from __future__ import annotations

import io
import weakref
from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

INLINE = 12  # bytes; Arrow keeps values up to this length in the view itself


@dataclass
class RowImage(datasets.Image):
    """The feature `Image(mode="RGB")` with shared storage: rows of one image hold its bytes once in memory.

    The storage is Arrow's `binary_view`, which points to the bytes. Saved features name the plain `datasets.Image`.
    Rows that are decoded while another row of the same bytes is in use get the same PIL object.
    """

    mode: str | None = "RGB"
    pa_type: ClassVar[pa.DataType] = pa.struct({"bytes": pa.binary_view(), "path": pa.string()})

    def decode_example(self, value: dict | Image.Image, token_per_repo_id: dict | None = None) -> Image.Image:
        """Decode a stored `{"bytes", "path"}`; a picture is returned as it is."""
        if not isinstance(value, dict):
            return value
        if value["bytes"] is None:
            return super().decode_example(value, token_per_repo_id)
        return decode_image(value)

    def cast_storage(self, storage: pa.Array) -> pa.StructArray:
        """Storage of another image feature as views."""
        return storage if storage.type == self.pa_type else super().cast_storage(storage)

    def embed_storage(self, storage: pa.StructArray, *args: object, **options: object) -> pa.StructArray:
        """The storage with the bytes of files that are only named."""
        return storage if not storage.field("bytes").null_count else super().embed_storage(storage, *args, **options)


class _DecodedImages:
    """Decoded pictures that are in use somewhere, by their file's bytes, and the last one.

    A picture that its user has changed is not given to another row: Pillow replaces the pixels of a read-only picture
    by a copy before it changes them, and clears the flag.
    """

    def __init__(self) -> None:
        self.pictures: weakref.WeakValueDictionary[bytes, Image.Image] = weakref.WeakValueDictionary()
        self.last: Image.Image | None = None

    def get(self, data: bytes) -> Image.Image | None:
        picture = self.pictures.get(data)
        return picture if picture is not None and picture.readonly else None

    def add(self, data: bytes, picture: Image.Image) -> None:
        picture.readonly = 1
        self.pictures[data] = self.last = picture


_decoded = _DecodedImages()


def decode_image(stored: dict) -> Image.Image:
    """Decode a stored `{"bytes", "path"}` to RGB without metadata.

    Orientation tags (EXIF, XMP) are ignored and dropped, because the masks ignore them.
    """
    picture = _decoded.get(stored["bytes"])
    if picture is None:
        picture = _decode(stored["bytes"])
        _decoded.add(stored["bytes"], picture)
    return picture


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    image = to_rgb(image)
    image.format = None  # `datasets` would store a changed picture as JPEG again, with loss
    image.info = {}
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; an RGB image is returned itself.

    Grey values of 16 bits are divided by 256, floats 0..1 are multiplied by 255: Pillow's own conversion makes such
    images white or black.

    Raises:
        ValueError: floats outside of 0..255.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode.startswith("I;16") or (image.mode == "I" and high > 255):
            values = values.clip(0, 65_535) // 256
        elif not (low >= 0 and high <= 255):
            raise ValueError(f"an image of mode {image.mode} has values {low}..{high}; expected 0..1 or 0..255")
        elif image.mode == "F" and high <= 1:
            values = values * np.float32(255)
        image = Image.fromarray(np.rint(values).astype(np.uint8))
    return image.convert("RGB")


def shared_images(stored: pa.ChunkedArray, counts: np.ndarray) -> pa.ChunkedArray:
    """The image column of expression rows: image i `counts[i]` times, without a copy of its bytes.

    Each image is a chunk of its own, whose buffer holds its bytes alone: any part of the column that is written or
    sent to another process takes these bytes along.
    """
    chunks, start = [], 0
    for chunk in stored.chunks:
        chunks += _shared_chunks(chunk, counts[start : start + len(chunk)].tolist())
        start += len(chunk)
    return pa.chunked_array(chunks, RowImage.pa_type)


def _shared_chunks(chunk: pa.StructArray, counts: list[int]) -> list[pa.StructArray]:
    files, paths = chunk.field("bytes").cast(pa.binary()), chunk.field("path").cast(pa.string())
    _, offsets, content = files.buffers()
    ends = np.frombuffer(offsets, np.int32)[files.offset : files.offset + len(files) + 1].tolist()
    is_null = files.is_null().to_pylist()
    arrays = []
    for i, count in enumerate(counts):
        if count:
            data = content.slice(ends[i], ends[i + 1] - ends[i]) if content else b""
            column = pa.nulls(count, pa.binary_view()) if is_null[i] else _views(data, count)
            names = paths.take(pa.array([i] * count))
            arrays.append(pa.StructArray.from_arrays([column, names], names=["bytes", "path"]))
    return arrays


def _views(data: pa.Buffer | bytes, count: int) -> pa.Array:
    """The same bytes `count` times."""
    length = len(data)
    if length <= INLINE:
        return pa.array([bytes(data)] * count, pa.binary_view())
    view = np.array([length, 0, 0, 0], np.int32)  # length, first 4 bytes, number of the buffer, offset in the buffer
    view[1:2] = np.frombuffer(data[:4], np.int32)
    views = pa.py_buffer(np.tile(view, count))
    return pa.Array.from_buffers(pa.binary_view(), count, [None, views, data])

"""Pictures of expression rows: decoded to RGB as they are stored, once for all rows that are in use."""

from __future__ import annotations

import io
import weakref

import datasets
import numpy as np
from PIL import Image

TAIL = 64  # bytes


class RowImage(datasets.Image):
    """The feature `datasets.Image`, decoded as the masks need it; saved features name the plain one."""

    def decode_example(self, value: dict | Image.Image, token_per_repo_id: dict | None = None) -> Image.Image:
        """Decode a stored `{"bytes", "path"}`; a picture is returned as it is."""
        if not isinstance(value, dict):
            return value
        if value["bytes"] is None or not self.decode:
            return super().decode_example(value, token_per_repo_id)
        return decode_image(value)


class _DecodedImages:
    """Decoded pictures that are in use somewhere, and the last one, by their file's bytes.

    A picture that its user has changed is not given to another row: Pillow replaces the pixels of a read-only picture
    by a copy before it changes them, and clears the flag.
    """

    def __init__(self) -> None:
        self.pictures: weakref.WeakValueDictionary[tuple[int, bytes], Image.Image] = weakref.WeakValueDictionary()
        self.last: Image.Image | None = None

    def get(self, data: bytes) -> Image.Image:
        """The picture in the file `data`."""
        key = len(data), data[-TAIL:]  # a hash of all bytes would take longer than the comparison
        picture = self.pictures.get(key)
        if picture is None or not picture.readonly or picture.file_bytes != data:
            picture = _decode(data)
            picture.readonly, picture.file_bytes = 1, data
            self.pictures[key] = self.last = picture
        return picture


_decoded = _DecodedImages()


def decode_image(stored: dict) -> Image.Image:
    """Decode a stored `{"bytes", "path"}` to RGB without metadata.

    Orientation tags (EXIF, XMP) are ignored and dropped, because the masks ignore them.
    """
    return _decoded.get(stored["bytes"])


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

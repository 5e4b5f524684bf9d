"""Images to VLT's letterboxed squares, resized as OpenCV does."""

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict

from .image_inputs import ReferringImageProcessor

GREY = 0.5  # of the padding
CUBIC = -0.75  # OpenCV's parameter of bicubic interpolation
FIXED_POINT = 11  # bits of OpenCV's interpolation weights


class VltImageProcessor(ReferringImageProcessor):
    """Resizes an image into the middle of a grey square, values 0..1. No other resampling and scale is possible."""

    size = {"height": 416, "width": 416}
    resample = PILImageResampling.BICUBIC
    do_normalize = False

    def _preprocess(
        self, images: list[Image.Image], size: SizeDict, return_tensors: str | None, **kwargs: object
    ) -> BatchFeature:
        """pixel_values (images, 3, size, size)."""
        pixel_values = np.full((len(images), 3, size["height"], size["width"]), GREY, dtype=np.float32)
        for image, canvas in zip(images, pixel_values, strict=True):
            rows, columns = letterbox((image.height, image.width), canvas.shape[-1])
            box = canvas[:, rows, columns]
            box[:] = resize_bicubic(np.asarray(image), box.shape[1:]).transpose(2, 0, 1) / np.float32(255)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize a 0/1 mask (H, W) as its image is, then take every second pixel: (size / 2, size / 2), 0..1.

        As published, pixels at an edge lie between 0 and 1.
        """
        canvas = np.zeros((self.size["height"], self.size["width"]), dtype=np.float32)
        rows, columns = letterbox(mask.shape, canvas.shape[-1])
        box = canvas[rows, columns]
        box[:] = resize_bicubic(mask[..., None] * np.uint8(255), box.shape)[..., 0] / np.float32(255)
        return canvas[::2, ::2]


def letterbox(original: tuple[int, int], side: int) -> tuple[slice, slice]:
    """Rows and columns of a square of `side` pixels that an image of (height, width) fills."""
    scale = min(side / length for length in original)
    lengths = [max(1, int(length * scale)) for length in original]
    rows, columns = (slice((side - n) // 2, (side - n) // 2 + n) for n in lengths)
    return rows, columns


def resize_bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, channels) uint8 to (height, width), as cv2.resize with INTER_CUBIC: without anti-aliasing."""
    x = np.moveaxis(_interpolate(np.moveaxis(image.astype(np.int32), 1, 0), size[1]), 1, 0)
    x = _interpolate(x, size[0])
    half = 1 << (2 * FIXED_POINT - 1)  # round to nearest
    return np.clip((x + half) >> (2 * FIXED_POINT), 0, 255).astype(np.uint8)


def _interpolate(x: np.ndarray, length: int) -> np.ndarray:
    """Resize the first axis of an int32 array; values grow by 2 ** FIXED_POINT."""
    place = (np.arange(length) + 0.5) * (len(x) / length) - 0.5
    start = np.floor(place).astype(int)
    t = (place - start).astype(np.float32)
    weights = [_far(t + 1), _near(t), _near(1 - t)]
    weights.append(1 - sum(weights))
    total = np.zeros((length, *x.shape[1:]), dtype=np.int32)
    for offset, weight in zip((-1, 0, 1, 2), weights):
        fixed = np.rint(weight * (1 << FIXED_POINT)).astype(np.int32)
        total += fixed[:, None, None] * x[np.clip(start + offset, 0, len(x) - 1)]  # the edge is repeated
    return total


def _near(d: np.ndarray) -> np.ndarray:
    """Weight of a pixel at a distance of 0 to 1."""
    return ((CUBIC + 2) * d - (CUBIC + 3)) * d * d + 1


def _far(d: np.ndarray) -> np.ndarray:
    """Weight of a pixel at a distance of 1 to 2."""
    return ((CUBIC * d - 5 * CUBIC) * d + 8 * CUBIC) * d - 4 * CUBIC


VltImageProcessor.register_for_auto_class("AutoImageProcessor")

"""Images to normalised pixel values of one size: squashed to it, as published, or letterboxed."""

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict

from .image_inputs import ReferringImageProcessor, scale_and_shift, write_pixels


class RelaImageProcessor(ReferringImageProcessor):
    """Resizes to `size` and normalises.

    `size={"height": 480, "width": 480}` squashes, as published; `size={"longest_edge": 480}` keeps the ratio and pads
    the right or the bottom of the square with the mean colour.
    """

    size = {"height": 480, "width": 480}

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None,
        **kwargs: object,
    ) -> BatchFeature:
        """pixel_values (images, 3, height, width)."""
        scale, shift = scale_and_shift(rescale_factor if do_rescale else 1.0, image_mean, image_std, do_normalize)
        pixel_values = []
        for image in images:
            inner, outer = image_sizes((image.height, image.width), size) if do_resize else ((image.size[::-1],) * 2)
            resized = image if image.size == inner[::-1] else image.resize(inner[::-1], resample)
            canvas = np.zeros((3, *outer), dtype=np.float32)
            write_pixels(resized, scale, shift, canvas)
            pixel_values.append(canvas)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize a 0/1 mask (H, W) as its image is: a pixel is 1 where at least half of its area is 1."""
        inner, outer = image_sizes(mask.shape, self.size)
        canvas = np.zeros(outer, dtype=np.uint8)
        if mask.shape != inner:
            enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(inner[::-1], Image.Resampling.BILINEAR)
            mask = np.asarray(enlarged) >= 128
        canvas[: inner[0], : inner[1]] = mask
        return canvas


def image_sizes(original: tuple[int, int], size: SizeDict | dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the resized image, and of the canvas whose top left it fills, by the setting `size`."""
    if size["height"] is not None:
        target = (size["height"], size["width"])
        return target, target
    edge = size["longest_edge"]
    if edge is None:
        raise ValueError(
            f'size={dict(size)} given to RelaImageProcessor: use {{"height": H, "width": W}} or {{"longest_edge": L}}'
        )
    height, width = (max(1, round(side * edge / max(original))) for side in original)
    return (height, width), (edge, edge)


RelaImageProcessor.register_for_auto_class("AutoImageProcessor")

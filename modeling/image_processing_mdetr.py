"""Images of any size and mode to one normalised, padded batch for MDETR."""

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict

from .image_inputs import ReferringImageProcessor, scale_and_shift, write_pixels


class MdetrImageProcessor(ReferringImageProcessor):
    """Resizes the shorter side to 800 pixels, or less where the longer side would exceed 1333; then pads the batch.

    Source: `resize` of the original transforms.py and `NestedTensor`.
    """

    size = {"shortest_edge": 800, "longest_edge": 1333}
    model_input_names = ["pixel_values", "pixel_mask"]

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
        """pixel_values (images, 3, height, width); pixel_mask (images, height, width), 0 on padding, else 1."""
        if do_resize:
            sizes = [resized_size((x.height, x.width), size.shortest_edge, size.longest_edge) for x in images]
            images = [x.resize(inner[::-1], resample) for x, inner in zip(images, sizes, strict=True)]
        scale, shift = scale_and_shift(rescale_factor if do_rescale else 1.0, image_mean, image_std, do_normalize)
        height, width = max(x.height for x in images), max(x.width for x in images)
        pixel_values = np.zeros((len(images), 3, height, width), dtype=np.float32)
        pixel_mask = np.zeros((len(images), height, width), dtype=np.int64)
        for image, canvas, mask in zip(images, pixel_values, pixel_mask, strict=True):
            write_pixels(image, scale, shift, canvas)
            mask[: image.height, : image.width] = 1
        return BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, tensor_type=return_tensors)


def resized_size(original: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) in pixels with the shorter side at `shortest`, unless the longer would then exceed `longest`."""
    short, long = sorted(original)
    if long / short * shortest > longest:
        shortest = max(1, round(longest * short / long))
    return tuple(shortest if side == short else int(shortest * side / short) for side in original)


MdetrImageProcessor.register_for_auto_class("AutoImageProcessor")

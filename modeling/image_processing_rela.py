"""Images in any shape or mode to normalised pixel values, squashed to a square as published or letterboxed."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict


class RelaImageProcessor(PilBackend):
    """Resizes to `size` and normalises.

    `size={"height": 480, "width": 480}` squashes, as published; `size={"longest_edge": 480}` keeps the ratio and fills
    the right or the bottom of the square with the mean colour. PIL images are turned upright by their EXIF tag.
    """

    size = {"height": 480, "width": 480}
    resample = PILImageResampling.BILINEAR
    image_mean = (123.675 / 255, 116.28 / 255, 103.53 / 255)
    image_std = (58.395 / 255, 57.12 / 255, 57.375 / 255)
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        """A flat list of images; grey arrays get the channel axis that transformers expects."""
        flat = isinstance(images, list | tuple)
        if flat and not images:
            raise ValueError("an empty list of images given to RelaImageProcessor: pass at least one")
        images = [_with_channels(image) for image in images] if flat else _with_channels(images)
        return super()._prepare_images_structure(images, expected_ndims)

    def process_image(self, image: ImageInput, **kwargs: object) -> Image.Image:
        """One image of any kind to an upright RGB one.

        Args:
            image: PIL in any mode; or array or tensor (H, W, 1 | 3 | 4) or channels first, integers of 0..255, floats
                of 0..1 or booleans.

        Raises:
            ValueError: for an array of another type, range or shape.
        """
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow itself cuts the 16 bits at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGB")
        array = _as_array(image)
        if array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
            array = np.moveaxis(array, 0, -1)
        if array.shape[2] not in (1, 3, 4):
            raise ValueError(
                f"image of shape {array.shape} given to RelaImageProcessor: pass (H, W, channels) or (channels, H, W) "
                "with 1, 3 or 4 channels"
            )
        array = array[..., 0] if array.shape[2] == 1 else array
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")

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
        """(H, W) 0/1 -> the processed size: a pixel is target where at least half of its area is."""
        inner, outer = image_sizes(mask.shape, self.size)
        canvas = np.zeros(outer, dtype=np.uint8)
        if mask.shape != inner:
            enlarged = Image.fromarray(mask.astype(np.uint8) * 255).resize(inner[::-1], Image.Resampling.BILINEAR)
            mask = np.asarray(enlarged) >= 128
        canvas[: inner[0], : inner[1]] = mask
        return canvas


def scale_and_shift(
    rescale_factor: float, mean: Sequence[float], std: Sequence[float], do_normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rescaling and normalising as one multiplication and one addition per channel, (3, 1, 1) each."""
    mean, std = (mean, std) if do_normalize else ((0.0,) * 3, (1.0,) * 3)
    scale, shift = [rescale_factor / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return tuple(np.asarray(x, dtype=np.float32)[:, None, None] for x in (scale, shift))


def write_pixels(image: Image.Image, scale: np.ndarray, shift: np.ndarray, canvas: np.ndarray) -> None:
    """Scaled and shifted pixels of an RGB image into the top left of `canvas`, (3, height, width)."""
    pixels = np.asarray(image).transpose(2, 0, 1)
    np.add(pixels * scale, shift, out=canvas[:, : image.height, : image.width])


def image_sizes(original: tuple[int, int], size: SizeDict | dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) that the image takes, and that of the canvas it lies on, top left, for a `size` setting."""
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


def _as_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """uint8 of any array or tensor whose numbers can only mean one thing."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    low, high = (image.min(), image.max()) if image.size else (np.nan, np.nan)
    if image.dtype.kind in "bf" and low >= 0 and high <= 1:
        return (image * np.float32(255)).round().astype(np.uint8)
    if image.dtype.kind not in "iu" or low < 0 or high > 255 or not image.size:
        raise ValueError(
            f"{image.dtype} image of shape {image.shape} and values {low}..{high} given to RelaImageProcessor: pass "
            "integers of 0..255 or floats of 0..1"
        )
    return image.astype(np.uint8)


def _with_channels(image: ImageInput) -> ImageInput:
    return image[..., None] if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 2 else image


RelaImageProcessor.register_for_auto_class("AutoImageProcessor")

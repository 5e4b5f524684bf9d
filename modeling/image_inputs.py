"""Images of any kind to upright RGB, and RGB to normalised pixel values: shared by all image processors here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling, load_image

Images = ImageInput | str | Path | Sequence[ImageInput | str | Path]
MOST_SIDE = 8192  # pixels; a damaged setting must not allocate


class ReferringImageProcessor(PilBackend):
    """Base of the image processors: reads images of any mode, type and channel order.

    An image is a path, a URL, a PIL image, an array or a tensor. PIL images are rotated by their EXIF orientation.
    Subclasses resize and normalise in `_preprocess`.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = (123.675 / 255, 116.28 / 255, 103.53 / 255)
    image_std = (58.395 / 255, 57.12 / 255, 57.375 / 255)
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        sides = [side for side in dict(self.size).values() if side is not None]
        if not all(isinstance(side, int) and 0 < side <= MOST_SIDE for side in sides):
            raise ValueError(f"size={dict(self.size)} given to {type(self).__name__}: choose sides up to {MOST_SIDE}")

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> ImageInput:
        """A flat list of images; grey arrays get the channel axis that transformers expects."""
        is_list = isinstance(images, list | tuple)
        if is_list and not images:
            raise ValueError(f"an empty list of images given to {type(self).__name__}: pass at least one")
        if is_list:
            flat = [image for item in images for image in (item if isinstance(item, list | tuple) else [item])]
            images = [_with_channels(read_image(image)) for image in flat]
        else:
            images = _with_channels(read_image(images))
        return super()._prepare_images_structure(images, expected_ndims)

    def _preprocess_image_like_inputs(self, images: ImageInput, *args: object, **kwargs: object) -> BatchFeature:
        """As the parent. `do_rescale=False` says that floats are 0..1 already; `process_image` makes them 0..255."""
        if not kwargs["do_rescale"]:
            are_floats = [_is_float(image) for image in (images if isinstance(images, list | tuple) else [images])]
            if any(are_floats) and not all(are_floats):
                raise ValueError("do_rescale=False for images of floats and of integers: pass images of one kind")
            kwargs["do_rescale"] = any(are_floats)
        return super()._preprocess_image_like_inputs(images, *args, **kwargs)

    def process_image(self, image: ImageInput, **kwargs: object) -> Image.Image:
        """Convert one image of any kind to an upright RGB image.

        Args:
            image: PIL in any mode; or an array or tensor, (H, W, 1 | 3 | 4) or channels first, integers 0..255, floats
                0..1 or booleans.

        Raises:
            ValueError: for an array of another type, range or shape, and for a PIL image of floats outside of 0..255.
        """
        if isinstance(image, Image.Image):
            return to_rgb(ImageOps.exif_transpose(image))
        array = self._as_uint8(image)
        if array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
            array = np.moveaxis(array, 0, -1)  # channels first -> channels last
        if array.shape[2] not in (1, 3, 4):
            raise ValueError(
                f"image of shape {array.shape} given to {type(self).__name__}: pass (H, W, channels) or "
                "(channels, H, W) with 1, 3 or 4 channels"
            )
        array = array[..., 0] if array.shape[2] == 1 else array
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")

    def normalize_pixels(self, pixels: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Rescale and normalise resized uint8 images on their device, as `preprocess` does.

        Args:
            pixels: (images, 3, height, width) uint8.
            pixel_mask: (images, height, width), 0 on padding, which stays 0; None without padding.

        Returns:
            fp32, equal to the image processor's own values: on a CPU bit for bit.
        """
        factor = self.rescale_factor if self.do_rescale else 1.0
        scale, shift = (
            torch.from_numpy(x).to(pixels.device, non_blocking=True)
            for x in scale_and_shift(factor, self.image_mean, self.image_std, self.do_normalize)
        )
        normalized = pixels.float().mul_(scale).add_(shift)
        return normalized if pixel_mask is None else normalized.mul_(pixel_mask[:, None])

    def _as_uint8(self, image: np.ndarray | torch.Tensor) -> np.ndarray:
        """uint8 of any array or tensor whose type and range are unambiguous."""
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        low, high = (image.min(), image.max()) if image.size else (np.nan, np.nan)
        if image.dtype.kind in "bf" and low >= 0 and high <= 1:
            return (image * np.float32(255)).round().astype(np.uint8)
        if image.dtype.kind not in "iu" or low < 0 or high > 255 or not image.size:
            raise ValueError(
                f"{image.dtype} image of shape {image.shape} and values {low}..{high} given to {type(self).__name__}: "
                "pass integers 0..255 or floats 0..1"
            )
        return image.astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB, by the rules of grefcoco_data/pictures.py; an RGB image is returned itself.

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
            raise ValueError(f"an image of mode {image.mode} has values {low}..{high}; pass 0..1 or 0..255")
        elif image.mode == "F" and high <= 1:
            values = values * np.float32(255)
        image = Image.fromarray(np.rint(values).astype(np.uint8))
    return image.convert("RGB")


def read_image(image: ImageInput | str | Path) -> ImageInput:
    """The image of a path or a URL, or the image itself.

    Raises:
        ValueError: for None, another object, and a path or URL without a picture.
    """
    if isinstance(image, Image.Image | np.ndarray | torch.Tensor):
        return image
    if not isinstance(image, str | Path):
        raise ValueError(
            f"an image is of the type {type(image).__name__}: pass a path, a URL, a PIL image or an array"
        )
    try:
        is_remote = str(image).startswith(("http://", "https://", "data:image/"))
        return load_image(str(image)) if is_remote else Image.open(image)
    except Exception as error:  # of the network or of Pillow
        raise ValueError(f"{str(image)[:200]} cannot be read as a picture: {error}") from error


def scale_and_shift(
    rescale_factor: float, mean: Sequence[float], std: Sequence[float], do_normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rescaling and normalising as one multiplication and one addition per channel: two arrays (3, 1, 1)."""
    mean, std = (mean, std) if do_normalize else ((0.0,) * 3, (1.0,) * 3)
    scale, shift = [rescale_factor / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return tuple(np.asarray(x, dtype=np.float32)[:, None, None] for x in (scale, shift))


def write_pixels(image: Image.Image, scale: np.ndarray, shift: np.ndarray, canvas: np.ndarray) -> None:
    """Write the scaled and shifted pixels of an RGB image into the top left of `canvas`, (3, height, width)."""
    pixels = np.asarray(image).transpose(2, 0, 1)
    np.add(pixels * scale, shift, out=canvas[:, : image.height, : image.width])


def _with_channels(image: ImageInput) -> ImageInput:
    return image[..., None] if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 2 else image


def _is_float(image: ImageInput) -> bool:
    is_tensor = isinstance(image, torch.Tensor)
    return image.is_floating_point() if is_tensor else isinstance(image, np.ndarray) and image.dtype.kind == "f"

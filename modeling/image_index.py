"""Several sentences about one image: `image_index` holds for each sentence the position of its image."""

from collections.abc import Sequence

import torch
from torch import nn


def per_sentence(x: torch.Tensor, image_index: torch.Tensor | None) -> torch.Tensor:
    """(images, ...) -> (sentences, ...); None means that sentence i is about image i."""
    return x if image_index is None else x.index_select(0, image_index)


def pair_sentences(sentences: int, images: int, image_index: Sequence[int] | None) -> Sequence[int] | None:
    """The position of each sentence's image; None where sentence i is about image i.

    Args:
        sentences: number of sentences.
        images: number of images.
        image_index: as the user gave it; None pairs them in order, or all with the only image.

    Raises:
        ValueError: when sentences and images cannot be paired.
    """
    if image_index is None and sentences == images:
        return None
    if image_index is None and images == 1:
        return [0] * sentences
    if image_index is None:
        raise ValueError(f"{sentences} sentences for {images} images: pass image_index, or lists of sentences")
    if len(image_index) != sentences or not all(0 <= i < images for i in image_index):
        raise ValueError(
            f"image_index={list(image_index)} for {sentences} sentences and {images} images: pass one position of "
            f"0..{images - 1} per sentence"
        )
    return image_index


def refuse_data_parallel(model: nn.Module) -> None:
    """Raises ValueError in a replica that `nn.DataParallel` made: it has no parameters and cuts batches blindly."""
    if getattr(model, "_is_replica", False):
        raise ValueError(
            f"{type(model).__name__} does not run in nn.DataParallel, which Trainer uses where a process sees several "
            "GPUs: start one process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0"
        )


def check_image_index(sentences: int, images: int, image_index: torch.Tensor | None) -> None:
    """Raises ValueError for more or fewer sentences than images without an `image_index`."""
    if image_index is None and sentences != images:
        raise ValueError(
            f"{sentences} sentences in input_ids and {images} images in pixel_values: pass image_index, the position "
            "of each sentence's image"
        )

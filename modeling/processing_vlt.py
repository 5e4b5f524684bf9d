"""VLT's processor: images and sentences to model inputs, rows to batches, and outputs to masks."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, NoReturn

import numpy as np
import torch
from torch.nn.functional import interpolate

from .configuration_vlt import VltConfig
from .image_processing_vlt import VltImageProcessor, letterbox
from .masks import decode_mask, encode_mask
from .referring_processor import (
    BASE_COLUMNS,
    Batch,
    Outputs,
    ReferringProcessor,
    check_rows,
    check_sizes,
    group_by_image,
    measuring_labels,
    repeat_images,
)
from .tokenization_vlt import VltTokenizer

MASK_THRESHOLD = 0.35  # published


class VltProcessor(ReferringProcessor):
    """Image processor and word vectors in one; see `ReferringProcessor`.

    Args:
        image_processor: letterboxes.
        tokenizer: holds the word vectors, which are saved with the processor.
        max_words: of a sentence; shorter ones are padded with zeros, which the model reads as words.
        no_target_threshold: see `ReferringProcessor`; without effect, VLT's no-target scores are 0.
    """

    output_names: ClassVar[tuple[str, ...]] = ("pred_masks",)

    def __init__(
        self,
        image_processor: VltImageProcessor,
        tokenizer: VltTokenizer,
        max_words: int = 15,
        no_target_threshold: float = 0.5,
        **kwargs: object,
    ) -> None:
        super().__init__(image_processor, tokenizer, no_target_threshold)
        self.max_words = max_words

    def _tokenize(self, sentences: list[str], max_length: int | None) -> dict[str, np.ndarray]:
        vectors = self.tokenizer.word_vectors(sentences, self.max_words)  # the model's layers fix their number
        vectors[:, self.max_words if max_length is None else max_length :] = 0
        return {"word_vectors": vectors}

    def collator(
        self,
        config: VltConfig | None = None,
        text_column: str = "sentence",
        category_ids: Sequence[int] = (),
        training: bool = False,
        share_images: bool = False,
        uint8_pixels: bool = False,
    ) -> "VltCollator":
        """See `ReferringProcessor`; batches are the same in training, and pixels are never uint8: images are
        letterboxed. `category_ids` are not used."""
        return VltCollator(self, text_column, share_images)

    def columns(self, training: bool, config: VltConfig | None = None) -> list[str]:
        """See `ReferringProcessor`."""
        return [*BASE_COLUMNS, "mask", *([] if training else ["boxes"])]

    def no_target_scores(self, outputs: Outputs) -> torch.Tensor:
        """(B,) zeros: VLT cannot say that a sentence has no target."""
        return outputs["pred_masks"].new_zeros(len(outputs["pred_masks"]), dtype=torch.float32)

    def mask_logits(self, outputs: Outputs) -> torch.Tensor:
        """(B, size / 2, size / 2) fp32 of the letterboxed image, 0 at the published threshold 0.35."""
        return outputs["pred_masks"][:, 0].float() - torch.tensor(MASK_THRESHOLD).logit().item()

    def post_process_referring_segmentation(
        self,
        outputs: Outputs,
        threshold: float = MASK_THRESHOLD,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float | None = None,
        return_rle: bool = False,
    ) -> list[dict[str, object]]:
        """See `ReferringProcessor`. As published, probabilities are resized; "no_target" is always False."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: choose a probability, 0 to 1")
        masks = outputs["pred_masks"].float().sigmoid()
        masks = interpolate(masks, scale_factor=2, mode="bilinear")  # (B, 1, size, size)
        side = masks.shape[-1]
        sizes = [(side, side)] * len(masks) if target_sizes is None else check_sizes(target_sizes, len(masks))
        results = []
        for mask, size in zip(masks, sizes, strict=True):
            rows, columns = letterbox(size, side)
            mask = interpolate(mask[None, :, rows, columns], size, mode="bilinear")[0, 0] > threshold
            answer = encode_mask(mask.cpu().numpy()) if return_rle else mask
            results.append({"mask": answer, "no_target": False, "no_target_score": 0.0})
        return results

    def post_process_referring_detection(self, outputs: Outputs, *args: object, **kwargs: object) -> NoReturn:
        """Raises ValueError: VLT has no boxes."""
        raise ValueError("VLT answers with masks; use post_process_referring_segmentation")


class VltCollator:
    """Expression rows of `grefcoco.load` to a batch; an image is processed once for all rows about it.

    Args:
        processor: makes the model inputs.
        text_column: "sentence", as published, or "raw".
        share_images: see `ReferringProcessor.collator`.
    """

    def __init__(self, processor: VltProcessor, text_column: str = "sentence", share_images: bool = True) -> None:
        self.processor = processor
        self.text_column = text_column
        self.share_images = share_images

    def __call__(self, rows: Sequence[dict]) -> Batch:
        """Batch of `VltModel.forward` inputs with `labels`: those of `measuring_labels` and "masks" (B, h, w) 0..1.

        Masks are those of the letterboxed image at half its side; a mask of zeros where a sentence has no target.
        """
        check_rows(rows)
        images, image_index = group_by_image(rows)
        batch = self.processor(
            images=[row["image"] for row in images],
            text=[row[self.text_column] for row in rows],
            image_index=image_index,
        )
        masks = [self.processor.image_processor.resize_mask(decode_mask(row["mask"])) for row in rows]
        batch = {**batch, "labels": {"masks": torch.from_numpy(np.stack(masks)), **measuring_labels(rows)}}
        return batch if self.share_images else repeat_images(batch)


def new_processor(config: VltConfig, tokenizer: VltTokenizer) -> VltProcessor:
    """The processor of a model with this configuration.

    Raises:
        ValueError: for word vectors of another size than the model reads.
    """
    if tokenizer.words and tokenizer.vectors.shape[1] != config.word_size:
        raise ValueError(f"word vectors of {tokenizer.vectors.shape[1]} values: this model reads {config.word_size}")
    size = {"height": config.image_size, "width": config.image_size}
    return VltProcessor(VltImageProcessor(size=size), tokenizer, max_words=config.max_words)


VltProcessor.register_for_auto_class("AutoProcessor")

"""Images and sentences to model inputs, expression rows to training batches, and model outputs back to masks."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import ImageInput

from .image_processing_rela import RelaImageProcessor, image_sizes


class RelaProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: resizes and normalises.
        tokenizer: BERT's, or any whose padding id is 0.
        max_length: tokens per sentence, always padded to.
        keep_end_token: when a sentence is too long, give its last place to the end token; published: it is just cut.
    """

    def __init__(
        self,
        image_processor: RelaImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 20,
        keep_end_token: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.max_length = max_length
        self.keep_end_token = keep_end_token

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        image_index: Sequence[int] | None = None,
        return_tensors: str = "pt",
        **kwargs: object,
    ) -> BatchFeature:
        """Model inputs; the image work is done once per image.

        Args:
            images: one image or a list, in any form `RelaImageProcessor` takes; None for text alone.
            text: a sentence, a list of them, or for each image a list of its sentences; None for images alone.
            image_index: for a flat list of sentences, the position of each one's image; None pairs them in order, or
                all with the only image.
            return_tensors: "pt" or "np".

        Returns:
            pixel_values (images, 3, height, width); input_ids and attention_mask (sentences, max_length); image_index
            (sentences,), where sentences and images are not one to one.

        Raises:
            ValueError: when sentences and images cannot be paired.
        """
        inputs = BatchFeature()
        if images is not None:
            inputs.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        if text is not None:
            sentences = [text] if isinstance(text, str) else list(text)
            if sentences and not isinstance(sentences[0], str):
                image_index = [i for i, group in enumerate(sentences) for _ in group]
                sentences = [sentence for group in sentences for sentence in group]
            inputs.update(self._tokenize(sentences))
            if images is not None:
                image_index = _pair(len(sentences), len(inputs["pixel_values"]), image_index)
                inputs.update({} if image_index is None else {"image_index": np.asarray(image_index, dtype=np.int64)})
        return inputs.convert_to_tensors(return_tensors)

    def _tokenize(self, sentences: list[str]) -> dict[str, np.ndarray]:
        ids = np.zeros((len(sentences), self.max_length), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, tokens in enumerate(self.tokenizer(sentences, verbose=False)["input_ids"] if sentences else []):
            cut = tokens[: self.max_length]
            if self.keep_end_token:
                cut[-1] = tokens[-1]
            ids[i, : len(cut)], mask[i, : len(cut)] = cut, 1
        return {"input_ids": ids, "attention_mask": mask}

    def post_process_referring_segmentation(
        self,
        outputs: object,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = 0.5,
        no_target_threshold: float = 0.5,
        return_rle: bool = False,
    ) -> list[dict[str, object]]:
        """Masks at the size of the originals and the verdict whether the sentence refers to anything.

        At the default thresholds both are the published rule, the larger of two logits.

        Args:
            outputs: `RelaOutput` of B sentences.
            target_sizes: B (height, width) in pixels; None for the processed size.
            threshold: a pixel is target when its probability is greater.
            no_target_threshold: a sentence has no target when its probability of that is greater.
            return_rle: give COCO run lengths {"size": [h, w], "counts": str} instead of tensors.

        Returns:
            for each sentence {"mask": (height, width) bool or RLE, "no_target": bool, "no_target_score": 0..1}. The
            mask is the mask head's own, whatever the verdict.

        Raises:
            ValueError: when there are not as many sizes as sentences.
        """
        margins = (outputs.pred_masks[:, 1] - outputs.pred_masks[:, 0]).float()
        scores = outputs.no_target_logits.float().softmax(-1)[:, 1].tolist()
        canvas = tuple(4 * side for side in margins.shape[-2:])
        sizes = [canvas] * len(margins) if target_sizes is None else [tuple(map(int, size)) for size in target_sizes]
        if len(sizes) != len(margins):
            raise ValueError(f"{len(sizes)} target_sizes for {len(margins)} sentences: pass one (height, width) each")
        results = []
        for margin, size, score in zip(margins, sizes, scores, strict=True):
            mask = self._enlarge(margin, size, canvas).sigmoid() > threshold
            results.append(
                {
                    "mask": encode_mask(mask.cpu().numpy()) if return_rle else mask,
                    "no_target": score > no_target_threshold,
                    "no_target_score": score,
                }
            )
        return results

    def _enlarge(self, margin: torch.Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> torch.Tensor:
        """Stride-4 logits (h, w) to `size`, leaving out what the image processor filled up."""
        if self.image_processor.size["height"] is None and size != canvas:
            margin = _resize(margin, canvas)
            inner, _ = image_sizes(size, self.image_processor.size)
            margin = margin[: inner[0], : inner[1]]
        return _resize(margin, size)


class RelaCollator:
    """Expression rows of `grefcoco.load` to a training batch; rows about the same image share its pixels.

    Args:
        processor: makes the model inputs.
        category_ids: data set ids of the categories to supervise, index 1 first; empty for none.
        text_column: "sentence", or "raw" for the published input.
    """

    def __init__(
        self, processor: RelaProcessor, category_ids: Sequence[int] = (), text_column: str = "sentence"
    ) -> None:
        self.processor = processor
        self.category_index = {category: i + 1 for i, category in enumerate(category_ids)}
        self.text_column = text_column

    def __call__(self, rows: Sequence[dict]) -> dict[str, object]:
        """Batch of `RelaModel.forward` inputs with `labels`: "masks" (B, H, W) uint8, "no_target" (B,) bool, "sent_id"
        (B,), -1 where rows have none, and with `category_ids` "categories" (images, H, W) int64, 0 for none and -100
        for crowds."""
        first = {}
        for row in rows:
            first.setdefault(row["image_id"], row)
        places = {image_id: i for i, image_id in enumerate(first)}
        batch = self.processor(
            images=[row["image"] for row in first.values()],
            text=[row[self.text_column] for row in rows],
            image_index=[places[row["image_id"]] for row in rows],
        )
        shape = tuple(batch["pixel_values"].shape[-2:])
        masks = np.stack([self._mask(row, shape) for row in rows])
        labels = {
            "masks": torch.from_numpy(masks),
            "no_target": torch.tensor([bool(row["no_target"]) for row in rows]),
            "sent_id": torch.tensor([row.get("sent_id", -1) for row in rows]),
        }
        if self.category_index:
            categories = np.stack([self._categories(row["objects"], shape) for row in first.values()])
            labels["categories"] = torch.from_numpy(categories)
        return {**batch, "labels": labels}

    def _mask(self, row: dict, shape: tuple[int, int]) -> np.ndarray:
        if row["no_target"]:
            return np.zeros(shape, dtype=np.uint8)
        return self.processor.image_processor.resize_mask(decode_mask(row["mask"]))

    def _categories(self, objects: Sequence[dict], shape: tuple[int, int]) -> np.ndarray:
        """Category index per pixel, larger objects below smaller ones."""
        indices = np.zeros(shape, dtype=np.int64)
        for item in sorted(objects, key=lambda item: -item["area"]):
            mask = self.processor.image_processor.resize_mask(decode_mask(item["segmentation"]))
            indices[mask == 1] = -100 if item["iscrowd"] else self.category_index[item["category_id"]]
        return indices


def decode_mask(rle: dict) -> np.ndarray:
    """COCO run lengths {"size": [h, w], "counts": str or bytes} -> (h, w) uint8."""
    return coco_mask.decode({"size": list(rle["size"]), "counts": rle["counts"]})


def encode_mask(mask: np.ndarray) -> dict[str, object]:
    """(h, w) bool -> COCO run lengths {"size": [h, w], "counts": str}."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}


def _pair(sentences: int, images: int, image_index: Sequence[int] | None) -> Sequence[int] | None:
    """The image of each sentence, None for one each."""
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


def _resize(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


RelaProcessor.register_for_auto_class("AutoProcessor")

"""ReLA's processor: images and sentences to model inputs, rows to batches, and outputs to masks and boxes."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .boxes import cxcywh_to_xyxy
from .configuration_rela import RelaConfig
from .device_tensors import upload
from .image_processing_rela import RelaImageProcessor, image_sizes
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


class RelaProcessor(ReferringProcessor):
    """Image processor and tokenizer in one; see `ReferringProcessor`.

    Args:
        image_processor: resizes and normalises.
        tokenizer: that of the text encoder. One that makes no attention mask, such as SigLIP's, belongs to an encoder
            that reads padding as words: its mask is 1 everywhere.
        max_length: tokens per sentence, or the tokenizer's own limit if that is lower; shorter sentences are padded.
        keep_end_token: whether the last place of a sentence that is too long is the end token; published: it is cut.
        no_target_threshold: see `ReferringProcessor`; at 0.5 the verdict is the larger of two logits, as published.
    """

    output_names: ClassVar[tuple[str, ...]] = ("pred_masks", "no_target_logits", "pred_boxes", "pred_scores")

    def __init__(
        self,
        image_processor: RelaImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 20,
        keep_end_token: bool = False,
        no_target_threshold: float = 0.5,
        **kwargs: object,
    ) -> None:
        super().__init__(image_processor, tokenizer, no_target_threshold)
        self.max_length = max_length
        self.keep_end_token = keep_end_token

    def _tokenize(self, sentences: list[str], max_length: int | None) -> dict[str, np.ndarray]:
        length = min(self.max_length, self.tokenizer.model_max_length, max_length or self.max_length)
        ids = np.full((len(sentences), length), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        reads_padding = "attention_mask" not in self.tokenizer.model_input_names
        mask = np.full_like(ids, reads_padding)
        for i, tokens in enumerate(self.tokenizer(sentences, verbose=False)["input_ids"]):
            cut = tokens[:length]
            if self.keep_end_token:
                cut[-1] = tokens[-1]
            ids[i, : len(cut)], mask[i, : len(cut)] = cut, 1
        return {"input_ids": ids, "attention_mask": mask}

    def collator(
        self,
        config: RelaConfig | None = None,
        text_column: str = "sentence",
        category_ids: Sequence[int] = (),
        training: bool = False,
        share_images: bool = False,
        uint8_pixels: bool = False,
    ) -> "RelaCollator":
        """See `ReferringProcessor`. Objects are labelled where the model has an instance branch."""
        instances = None if config is None else bool(config.num_instance_queries)
        return RelaCollator(self, category_ids, text_column, training and instances, share_images, uint8_pixels)

    def columns(self, training: bool, config: RelaConfig | None = None) -> list[str]:
        """See `ReferringProcessor`. In training, objects are read for the instance branch and the category head."""
        if not training or config is None:
            return [*BASE_COLUMNS, "mask", "boxes", "objects"]
        objects = config.num_instance_queries or config.num_categories
        return [*BASE_COLUMNS, "mask", *(["objects"] if objects else [])]

    def no_target_scores(self, outputs: Outputs) -> torch.Tensor:
        """(B,) 0..1, the probability of "no target"."""
        return outputs["no_target_logits"].float().softmax(-1)[:, 1]

    def mask_logits(self, outputs: Outputs) -> torch.Tensor:
        """(B, height / 4, width / 4) fp32, the target's logit minus the background's."""
        masks = outputs["pred_masks"].float()
        return masks[:, 1] - masks[:, 0]

    def post_process_referring_segmentation(
        self,
        outputs: Outputs,
        threshold: float = 0.5,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float | None = None,
        return_rle: bool = False,
    ) -> list[dict[str, object]]:
        """See `ReferringProcessor`. At the default thresholds the rule is the published one, the larger logit."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: choose a probability, 0 to 1")
        limit = torch.tensor(threshold, dtype=torch.float64).logit().item()  # exactly 0 at 0.5
        canvas, sizes = _sizes(outputs, target_sizes)
        results = []
        for logits, size, verdict in zip(
            self.mask_logits(outputs), sizes, self._verdicts(outputs, no_target_threshold), strict=True
        ):
            mask = self._enlarge(logits, size, canvas) > limit
            results.append({"mask": encode_mask(mask.cpu().numpy()) if return_rle else mask, **verdict})
        return results

    def post_process_referring_detection(
        self,
        outputs: Outputs,
        threshold: float = 0.7,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float | None = None,
        return_masks: bool = False,
    ) -> list[dict[str, object]]:
        """See `ReferringProcessor`; for models with an instance branch.

        A sentence without target has no box. A sentence with a target has none where no score reaches `threshold`.

        Args:
            outputs: of the model, for B sentences.
            threshold: boxes that score at least this are given.
            target_sizes: B (height, width) in pixels; None for the processed size.
            no_target_threshold: see `ReferringProcessor`.
            return_masks: also give the mask of each box, which costs more than all else.

        Returns:
            boxes are in pixels and inside the image, best first; with `return_masks` also "masks", a list of n RLE
            {"size": [h, w], "counts": str}.
        """
        if "pred_boxes" not in outputs:
            raise ValueError("the model has no instance branch, so no boxes: build it with num_instance_queries > 0")
        canvas, sizes = _sizes(outputs, target_sizes)
        # All sentences together: the numbers come from the device once for a batch, not several times for a sentence.
        scores, order = outputs["pred_scores"].float().sort(dim=1, descending=True)
        boxes = outputs["pred_boxes"].float().take_along_dim(order[..., None], dim=1)
        boxes = self._pixel_boxes(boxes, sizes, canvas)
        counts = (scores.double() >= threshold).sum(1).tolist()
        verdicts, results = self._verdicts(outputs, no_target_threshold), []
        for b, (size, count, verdict) in enumerate(zip(sizes, counts, verdicts, strict=True)):
            count = 0 if verdict["no_target"] else count
            result = {"boxes": boxes[b, :count], "scores": scores[b, :count], **verdict}
            if return_masks:
                chosen = outputs["instance_masks"][b].index_select(0, order[b, :count])
                masks = [self._enlarge(x.float(), size, canvas) > 0 for x in chosen]
                result["masks"] = [encode_mask(mask.cpu().numpy()) for mask in masks]
            results.append(result)
        return results

    def _verdicts(self, outputs: Outputs, no_target_threshold: float | None) -> list[dict[str, object]]:
        """The entries "no_target" and "no_target_score" of each sentence's answer."""
        limit = self.no_target_threshold if no_target_threshold is None else no_target_threshold
        scores = self.no_target_scores(outputs).tolist()
        return [{"no_target": score > limit, "no_target_score": score} for score in scores]

    def _pixel_boxes(self, boxes: torch.Tensor, sizes: list[tuple[int, int]], canvas: tuple[int, int]) -> torch.Tensor:
        """(B, n, 4) cxcywh relative to the processed images -> x0, y0, x1, y1 in pixels of the originals, inside."""
        scales, limits = [], []
        for size in sizes:
            inner, outer = (canvas, canvas) if size == canvas else image_sizes(size, self.image_processor.size)
            height, width = (side * out / part for side, out, part in zip(size, outer, inner, strict=True))
            scales.append([width, height] * 2)
            limits.append(size[::-1] * 2)
        scales, limits = (upload(numbers, boxes.device, boxes.dtype)[:, None] for numbers in (scales, limits))
        return torch.minimum(cxcywh_to_xyxy(boxes * scales).clamp(min=0), limits)

    def _enlarge(self, logits: torch.Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> torch.Tensor:
        """Stride-4 logits (h, w) at `size`, without the padding of a letterboxed image."""
        if self.image_processor.size["height"] is None and size != canvas:
            logits = _resize(logits, canvas)
            inner, _ = image_sizes(size, self.image_processor.size)
            logits = logits[: inner[0], : inner[1]]
        return _resize(logits, size)


class RelaCollator:
    """Expression rows of `grefcoco.load` to a batch; an image is processed once for all rows about it.

    Args:
        processor: makes the model inputs.
        category_ids: data set ids of the categories to label per pixel, index 1 first; empty for none.
        text_column: "sentence", or "raw" for the published input.
        instances: whether to label the objects of the images for the instance branch; None where rows hold objects.
            The objects are those of the column "objects"; where rows have none, the targets of all sentences of the
            batch about the image.
        share_images, uint8_pixels: see `ReferringProcessor.collator`.
    """

    def __init__(
        self,
        processor: RelaProcessor,
        category_ids: Sequence[int] = (),
        text_column: str = "sentence",
        instances: bool | None = False,
        share_images: bool = True,
        uint8_pixels: bool = False,
    ) -> None:
        self.processor = processor
        self.uint8_pixels = uint8_pixels
        self.instances = instances
        self.share_images = share_images
        self.category_index = {category: i + 1 for i, category in enumerate(category_ids)}
        self.text_column = text_column

    def __call__(self, rows: Sequence[dict]) -> Batch:
        """Batch of `RelaModel.forward` inputs with `labels`: those of `measuring_labels` and "masks" (B, H, W) uint8.

        With `category_ids` also "categories" (images, H, W) int64, 0 for none and -100 for crowds. With `instances`
        also N objects an image, padded with zeros: "object_boxes" (images, N, 4) cxcywh relative to the processed
        image, "object_masks" (images, N, H / 4, W / 4) uint8, "num_objects" (images,), "targets" (B, N) bool.

        Raises:
            ValueError: for an object whose category is not among `category_ids`.
        """
        check_rows(rows)
        images, image_index = group_by_image(rows)
        batch = self.processor.inputs_of_rows(rows, images, image_index, self.text_column, self.uint8_pixels)
        shape = tuple(batch["pixel_values"].shape[-2:])
        masks = np.stack([self._mask(row, shape) for row in rows])
        labels = {"masks": torch.from_numpy(masks), **measuring_labels(rows)}
        instances = self.instances
        if instances is None:
            instances = all("objects" in row or {"boxes", "masks"} <= row.keys() for row in rows)
        if self.category_index or instances:
            objects = [self._objects(rows, row) for row in images]
            # An object's mask is resized once for both the categories and the instances.
            resize = self.processor.image_processor.resize_mask
            masks = [[resize(decode_mask(item["segmentation"])) for item in items] for items in objects]
            if self.category_index:
                categories = [self._categories(*image, shape) for image in zip(images, objects, masks, strict=True)]
                labels["categories"] = torch.from_numpy(np.stack(categories))
            if instances:
                labels |= self._instances(rows, images, objects, masks, shape)
        batch = {**batch, "labels": labels}
        return batch if self.share_images else repeat_images(batch)

    def _mask(self, row: dict, shape: tuple[int, int]) -> np.ndarray:
        if row["no_target"]:
            return np.zeros(shape, dtype=np.uint8)
        return self.processor.image_processor.resize_mask(decode_mask(row["mask"]))

    def _categories(
        self, row: dict, objects: Sequence[dict], masks: Sequence[np.ndarray], shape: tuple[int, int]
    ) -> np.ndarray:
        """Category index per pixel; smaller objects are drawn over larger ones."""
        indices = np.zeros(shape, dtype=np.int64)
        for item, mask in sorted(zip(objects, masks, strict=True), key=lambda pair: -pair[0]["area"]):
            if item["category_id"] not in self.category_index:
                raise ValueError(
                    f"category {item['category_id']} of an object in image {row['image_id']} is not among the "
                    f"{len(self.category_index)} category_ids of the collator: pass the ids of all splits in use"
                )
            indices[mask == 1] = -100 if item["iscrowd"] else self.category_index[item["category_id"]]
        return indices

    def _objects(self, rows: Sequence[dict], row: dict) -> Sequence[dict]:
        """The objects of a row's image: its own list, or the targets of all sentences about it."""
        if "objects" in row or self.category_index:
            return row["objects"]
        targets = {}
        for other in rows:
            if other["image_id"] == row["image_id"]:
                for ann_id, box, mask in zip(other["ann_ids"], other["boxes"], other["masks"], strict=True):
                    targets[ann_id] = {"ann_id": ann_id, "bbox": box, "segmentation": mask}
        return list(targets.values())

    def _instances(
        self,
        rows: Sequence[dict],
        images: Sequence[dict],
        objects: Sequence[Sequence[dict]],
        masks: Sequence[Sequence[np.ndarray]],
        shape: tuple[int, int],
    ) -> dict[str, torch.Tensor]:
        """The labels of the instance branch."""
        most = max(1, *map(len, objects))
        boxes = np.zeros((len(images), most, 4), dtype=np.float32)
        small = np.zeros((len(images), most, *(-(-side // 4) for side in shape)), dtype=np.uint8)
        positions = {}
        for i, (row, items) in enumerate(zip(images, objects, strict=True)):
            inner, outer = image_sizes((row["height"], row["width"]), self.processor.image_processor.size)
            scale = [inner[1] / row["width"] / outer[1], inner[0] / row["height"] / outer[0]] * 2
            for j, item in enumerate(items):
                x, y, width, height = item["bbox"]
                boxes[i, j] = np.multiply([x + width / 2, y + height / 2, width, height], scale)
                small[i, j] = _quarter(masks[i][j])
                positions[row["image_id"], item["ann_id"]] = j
        targets = np.zeros((len(rows), most), dtype=bool)
        for b, row in enumerate(rows):
            targets[b, [positions[row["image_id"], ann_id] for ann_id in row["ann_ids"]]] = True
        return {
            "object_boxes": torch.from_numpy(boxes),
            "object_masks": torch.from_numpy(small),
            "num_objects": torch.tensor([len(items) for items in objects]),
            "targets": torch.from_numpy(targets),
        }


def _quarter(mask: np.ndarray) -> np.ndarray:
    """(h, w) 0/1 -> (h / 4, w / 4) bool: whether at least half of each 4 x 4 cell is 1."""
    height, width = (-(-side // 4) * 4 for side in mask.shape)
    padded = np.zeros((height, width), dtype=np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.reshape(height // 4, 4, width // 4, 4).sum((1, 3)) >= 8


def _sizes(
    outputs: Outputs, target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """(height, width) of the processed image, and of the answer to each sentence."""
    masks = outputs["pred_masks"]
    canvas = tuple(4 * side for side in masks.shape[-2:])
    return canvas, [canvas] * len(masks) if target_sizes is None else check_sizes(target_sizes, len(masks))


def _resize(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


RelaProcessor.register_for_auto_class("AutoProcessor")

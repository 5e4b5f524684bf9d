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
        canvas, sizes = _sizes(outputs.pred_masks, target_sizes)
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

    def post_process_referring_detection(
        self,
        outputs: object,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = 0.7,
        no_target_threshold: float = 0.5,
    ) -> list[dict[str, object]]:
        """Boxes, scores and masks of the objects each sentence refers to, for models with an instance branch.

        The verdict is that of `post_process_referring_segmentation`, and where it is "none" there is no box. A
        sentence with a target can be without boxes: none scored enough.

        Args:
            outputs: `RelaOutput` of B sentences.
            target_sizes: B (height, width) in pixels; None for the processed size.
            threshold: objects that score at least this are kept; 0.7 is GREC's published one.
            no_target_threshold: a sentence has no target when its probability of that is greater.

        Returns:
            for each sentence {"boxes": (n, 4) x0, y0, x1, y1 in pixels, "scores": (n,) 0..1, best first, "masks": list
            of n RLE {"size": [h, w], "counts": str}, "no_target": bool, "no_target_score": 0..1}.

        Raises:
            ValueError: when the model has no instance branch, or there are not as many sizes as sentences.
        """
        canvas, sizes = _sizes(outputs.pred_masks, target_sizes)
        no_target = outputs.no_target_logits.float().softmax(-1)[:, 1].tolist()
        found = self._detections(outputs, threshold, canvas, sizes, no_target_threshold)
        results = []
        for b, (size, none_score, (kept, answer)) in enumerate(zip(sizes, no_target, found, strict=True)):
            masks = [self._enlarge(mask.float(), size, canvas) > 0 for mask in outputs.instance_masks[b, kept]]
            results.append(
                {
                    **answer,
                    "masks": [encode_mask(mask.cpu().numpy()) for mask in masks],
                    "no_target": none_score > no_target_threshold,
                    "no_target_score": none_score,
                }
            )
        return results

    def post_process_grec(
        self,
        outputs: object,
        threshold: float = 0.7,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float = 0.5,
    ) -> list[dict[str, torch.Tensor]]:
        """As `post_process_referring_detection`, boxes and scores alone: what the GREC metric takes.

        Returns:
            for each sentence {"boxes": (n, 4) x0, y0, x1, y1 in pixels, "scores": (n,) 0..1}, best first.
        """
        canvas, sizes = _sizes(outputs.pred_masks, target_sizes)
        found = self._detections(outputs, threshold, canvas, sizes, no_target_threshold)
        return [answer for _, answer in found]

    def _detections(
        self,
        outputs: object,
        threshold: float,
        canvas: tuple[int, int],
        sizes: Sequence[tuple[int, int]],
        no_target_threshold: float,
    ) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """For each sentence the queries that are kept, best first, and their boxes and scores."""
        if "pred_boxes" not in outputs:
            raise ValueError("the model has no instance branch, so no boxes: build it with num_instance_queries > 0")
        some = outputs.no_target_logits.float().softmax(-1)[:, 1].double() <= no_target_threshold
        found = []
        for b, size in enumerate(sizes):
            scores, order = outputs.pred_scores[b].float().sort(descending=True)
            kept = order[(scores.double() >= threshold) & some[b]]
            boxes = self._pixels(outputs.pred_boxes[b, kept].float(), size, canvas)
            found.append((kept, {"boxes": boxes, "scores": scores[: len(kept)]}))
        return found

    def _pixels(self, boxes: torch.Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> torch.Tensor:
        """cxcywh relative to the processed image -> x0, y0, x1, y1 in pixels of the original, inside it."""
        inner, outer = (canvas, canvas) if size == canvas else image_sizes(size, self.image_processor.size)
        height, width = (side * out / part for side, out, part in zip(size, outer, inner, strict=True))
        centre, side = (boxes * boxes.new_tensor([width, height] * 2)).split(2, dim=-1)
        limit = boxes.new_tensor(size[::-1])
        return torch.cat([(centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, limit)], dim=-1)

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
        instances: label the images' objects for the instance branch. They are those of the column `objects`; where
            rows have none, all that the batch's sentences about the image refer to.
    """

    def __init__(
        self,
        processor: RelaProcessor,
        category_ids: Sequence[int] = (),
        text_column: str = "sentence",
        instances: bool = False,
    ) -> None:
        self.processor = processor
        self.instances = instances
        self.category_index = {category: i + 1 for i, category in enumerate(category_ids)}
        self.text_column = text_column

    def __call__(self, rows: Sequence[dict]) -> dict[str, object]:
        """Batch of `RelaModel.forward` inputs with `labels`: "masks" (B, H, W) uint8, "no_target" (B,) bool, "sent_id"
        (B,), -1 where rows have none, and those of `detection_labels`. With `category_ids` also "categories" (images,
        H, W) int64, 0 for none and -100 for crowds. With `instances` also N objects an image, padded with zeros:
        "object_boxes" (images, N, 4) cxcywh relative to the processed image, "object_masks" (images, N, H / 4, W / 4)
        uint8, "num_objects" (images,), "targets" (B, N) bool."""
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
            **detection_labels(rows),
        }
        wanted = first.values() if self.category_index or self.instances else ()
        objects = [self._objects(rows, row) for row in wanted]
        # an object's mask serves both the categories and the instances
        resize = self.processor.image_processor.resize_mask
        masks = [[resize(decode_mask(item["segmentation"])) for item in items] for items in objects]
        if self.category_index:
            categories = [self._categories(*pair, shape) for pair in zip(objects, masks, strict=True)]
            labels["categories"] = torch.from_numpy(np.stack(categories))
        if self.instances:
            labels |= self._instances(rows, list(first.values()), objects, masks, shape)
        return {**batch, "labels": labels}

    def _mask(self, row: dict, shape: tuple[int, int]) -> np.ndarray:
        if row["no_target"]:
            return np.zeros(shape, dtype=np.uint8)
        return self.processor.image_processor.resize_mask(decode_mask(row["mask"]))

    def _categories(self, objects: Sequence[dict], masks: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        """Category index per pixel, larger objects below smaller ones."""
        indices = np.zeros(shape, dtype=np.int64)
        for item, mask in sorted(zip(objects, masks, strict=True), key=lambda pair: -pair[0]["area"]):
            indices[mask == 1] = -100 if item["iscrowd"] else self.category_index[item["category_id"]]
        return indices

    def _objects(self, rows: Sequence[dict], row: dict) -> Sequence[dict]:
        """The objects of a row's image: its own list, or all targets of the sentences about it."""
        if "objects" in row or self.category_index:
            return row["objects"]
        found = {}
        for other in rows:
            if other["image_id"] == row["image_id"]:
                for ann_id, box, mask in zip(other["ann_ids"], other["boxes"], other["masks"], strict=True):
                    found[ann_id] = {"ann_id": ann_id, "bbox": box, "segmentation": mask}
        return list(found.values())

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
        places = {}
        for i, (row, items) in enumerate(zip(images, objects, strict=True)):
            inner, outer = image_sizes((row["height"], row["width"]), self.processor.image_processor.size)
            scale = [inner[1] / row["width"] / outer[1], inner[0] / row["height"] / outer[0]] * 2
            for j, item in enumerate(items):
                x, y, width, height = item["bbox"]
                boxes[i, j] = np.multiply([x + width / 2, y + height / 2, width, height], scale)
                small[i, j] = _quarter(masks[i][j])
                places[row["image_id"], item["ann_id"]] = j
        targets = np.zeros((len(rows), most), dtype=bool)
        for b, row in enumerate(rows):
            targets[b, [places[row["image_id"], ann_id] for ann_id in row["ann_ids"]]] = True
        return {
            "object_boxes": torch.from_numpy(boxes),
            "object_masks": torch.from_numpy(small),
            "num_objects": torch.tensor([len(items) for items in objects]),
            "targets": torch.from_numpy(targets),
        }


def detection_labels(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """What boxes are measured by, where rows have boxes: "sizes" (B, 2), height and width in pixels; "target_boxes"
    (B, N, 4), x0, y0, x1, y1 in pixels, filled up with -100, which is also what Trainer fills labels up with."""
    if not all("boxes" in row for row in rows):
        return {}
    boxes = torch.full((len(rows), max(1, *(len(row["boxes"]) for row in rows)), 4), -100.0)
    for b, row in enumerate(rows):
        low, extent = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4).split(2, dim=1)
        boxes[b, : len(low)] = torch.cat([low, low + extent], dim=1)
    return {"sizes": torch.tensor([[row["height"], row["width"]] for row in rows]), "target_boxes": boxes}


def _quarter(mask: np.ndarray) -> np.ndarray:
    """(h, w) 0/1 -> (h / 4, w / 4): 1 where at least half of the area is."""
    height, width = (-(-side // 4) * 4 for side in mask.shape)
    padded = np.zeros((height, width), dtype=np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.reshape(height // 4, 4, width // 4, 4).sum((1, 3)) >= 8


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


def _sizes(
    pred_masks: torch.Tensor, target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """(height, width) of the processed image, and of each sentence's answer."""
    canvas = tuple(4 * side for side in pred_masks.shape[-2:])
    if target_sizes is None:
        return canvas, [canvas] * len(pred_masks)
    sizes = [tuple(map(int, size)) for size in target_sizes]
    if len(sizes) != len(pred_masks):
        raise ValueError(f"{len(sizes)} target_sizes for {len(pred_masks)} sentences: pass one (height, width) each")
    return canvas, sizes


def _resize(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


RelaProcessor.register_for_auto_class("AutoProcessor")

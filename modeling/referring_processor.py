"""What every family of models offers beside its network: inputs, training batches, answers and scores.

processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
outputs = model(**processor(images=[image], text=["all red shapes"], return_tensors="pt"))
processor.post_process_referring_detection(outputs, target_sizes=[(480, 640)])
Trainer(model, arguments, processor.collator(model.config, training=True), ...)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .boxes import xywh_to_xyxy
from .image_index import pair_sentences
from .image_inputs import Images, ReferringImageProcessor
from .trainer_metrics import TrainerMetrics

BASE_COLUMNS = ["image", "image_id", "width", "height", "sent_id", "sentence", "raw", "no_target", "ann_ids"]
# tensors of a batch and of its labels with one entry an image; all others have one a sentence
IMAGE_TENSORS = {"pixel_values", "pixel_mask", "categories", "object_boxes", "object_masks", "num_objects"}
NEEDED_COLUMNS = ("image", "image_id", "width", "height", "sentence", "no_target", "ann_ids")
BOX_PADDING = -100.0  # also the value with which Trainer pads labels

Outputs = Mapping[str, torch.Tensor]  # of a model, or a dictionary of its tensors
Batch = dict[str, object]
Collator = Callable[[Sequence[dict]], Batch]


class ReferringProcessor(ProcessorMixin):
    """Base of the processors: an image processor and a tokenizer that pair images with sentences.

    Args:
        image_processor: of the family.
        tokenizer: of the family.
        no_target_threshold: a sentence has no target when its no-target score is greater. Saved with the processor, so
            that a calibrated value stays with the model; the default of all post-processing.

    Raises:
        ValueError: for a threshold outside of 0..1.
    """

    output_names: ClassVar[tuple[str, ...]] = ()
    """Names of the outputs that Trainer gathers, in their order."""

    def __init__(
        self,
        image_processor: ReferringImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        no_target_threshold: float = 0.5,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        if not 0 <= no_target_threshold <= 1:
            raise ValueError(f"no_target_threshold={no_target_threshold}: choose a probability, 0 to 1")
        self.no_target_threshold = no_target_threshold

    def __call__(
        self,
        images: Images | None = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        image_index: Sequence[int] | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        truncation: bool | str = True,
        max_length: int | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Model inputs; each image is processed once.

        Args:
            images: one image or a list, of any kind that `ReferringImageProcessor` reads; None for text alone.
            text: a sentence, a list of them, or for each image a list of its sentences; None for images alone.
            image_index: for a flat list of sentences, the position of each one's image; None pairs them in order, or
                all with the only image.
            return_tensors: "pt" or "np".
            padding: sentences are always padded to one length, as their family needs it.
            truncation: sentences are always cut where they are too long for the model.
            max_length: cut at fewer tokens (VLT: words) than the processor's own limit.
            **kwargs: settings of the image processor.

        Returns:
            the image processor's tensors; input_ids and attention_mask (sentences, tokens); image_index (sentences,),
            where sentences and images are not one to one.

        Raises:
            ValueError: for an image or a sentence that cannot be read, no sentences, or neither images nor text; when
                sentences and images cannot be paired; for `padding` or `truncation` switched off.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text: pass at least one of them")
        if padding in (False, "do_not_pad") or truncation in (False, "do_not_truncate"):
            raise ValueError("padding and truncation cannot be switched off: sentences become one tensor")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: choose 1 or more")
        inputs = BatchFeature()
        if images is not None:
            inputs.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        if text is not None:
            sentences, groups = flat_sentences(text)
            image_index = image_index if groups is None else groups
            inputs.update(self._tokenize(sentences, max_length))
            if images is not None:
                image_index = pair_sentences(len(sentences), len(inputs["pixel_values"]), image_index)
                inputs.update({} if image_index is None else {"image_index": np.asarray(image_index, dtype=np.int64)})
        return inputs.convert_to_tensors(return_tensors)

    def _tokenize(self, sentences: list[str], max_length: int | None) -> dict[str, np.ndarray]:
        """input_ids and attention_mask (sentences, tokens); `max_length` only ever lowers the processor's own."""
        raise NotImplementedError

    def collator(
        self,
        config: PreTrainedConfig | None = None,
        text_column: str = "sentence",
        category_ids: Sequence[int] = (),
        training: bool = False,
        share_images: bool = False,
        uint8_pixels: bool = False,
    ) -> Collator:
        """A function from expression rows of `grefcoco.load` to a batch with labels; an image is processed once.

        By default every tensor of a batch has one entry a sentence, so that Accelerate can cut and join batches, and
        so that the loss does not depend on how sentences are divided among processes.

        Args:
            config: of the model, to label only what it learns; None labels all that the rows allow.
            text_column: "sentence", or "raw" for the sentence before it was cleaned.
            category_ids: the data set's category ids for families that learn categories per pixel, index 1 first.
            training: whether to add the labels of the losses to those of measuring (see `measuring_labels`).
            share_images: sentences of one batch about one image share its pixels and its objects' labels, found by
                `image_index`. Faster; only for loops that never cut a batch.
            uint8_pixels: give resized images as uint8, a quarter of the bytes, for loops that call `normalize` after
                the copy to the device. Letterboxed images, whose padding is a colour between two integers, and images
                that are no PIL images stay normalised.
        """
        raise NotImplementedError

    def normalize(self, batch: Batch) -> Batch:
        """A batch with normalised pixels, where those of a collator with `uint8_pixels` are not yet."""
        pixels = batch["pixel_values"]
        if pixels.dtype != torch.uint8:
            return batch
        return {**batch, "pixel_values": self.image_processor.normalize_pixels(pixels, batch.get("pixel_mask"))}

    def inputs_of_rows(
        self,
        rows: Sequence[dict],
        images: Sequence[dict],
        image_index: list[int],
        text_column: str,
        uint8_pixels: bool,
    ) -> Batch:
        """The model inputs of a collator's rows; see `group_by_image` and `collator`."""
        pictures, text = [row["image"] for row in images], [row[text_column] for row in rows]
        size = self.image_processor.size
        uint8_pixels = uint8_pixels and (size["height"] is not None or size["shortest_edge"] is not None)
        uint8_pixels = uint8_pixels and all(isinstance(picture, Image.Image) for picture in pictures)
        settings = {"do_rescale": False, "do_normalize": False} if uint8_pixels else {}
        batch = self(images=pictures, text=text, image_index=image_index, **settings)
        return {**batch, "pixel_values": batch["pixel_values"].to(torch.uint8)} if uint8_pixels else batch

    def columns(self, training: bool, config: PreTrainedConfig | None = None) -> list[str]:
        """The columns of expression rows that `collator` reads, with the same `training` and `config`."""
        raise NotImplementedError

    def no_target_scores(self, outputs: Outputs) -> torch.Tensor:
        """(B,) 0..1, how likely each sentence has no target."""
        raise NotImplementedError

    def mask_logits(self, outputs: Outputs) -> torch.Tensor:
        """(B, h, w) fp32 at the model's own resolution, above 0 on the target.

        Raises:
            ValueError: when the family has no masks.
        """
        raise NotImplementedError

    def post_process_referring_segmentation(
        self,
        outputs: Outputs,
        threshold: float = 0.5,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float | None = None,
        return_rle: bool = False,
    ) -> list[dict[str, object]]:
        """Masks at the size of the original images, and whether each sentence has no target.

        Args:
            outputs: of the model, for B sentences.
            threshold: a pixel is target when its probability is greater.
            target_sizes: B (height, width) in pixels; None for the processed size.
            no_target_threshold: a sentence has no target when its score is greater; None for the processor's own.
            return_rle: give COCO run lengths {"size": [h, w], "counts": str} instead of tensors.

        Returns:
            for each sentence {"mask": (height, width) bool or RLE, "no_target": bool, "no_target_score": 0..1}. The
            mask is independent of `no_target`.

        Raises:
            ValueError: when the family has no masks, or sizes and sentences differ in number.
        """
        raise NotImplementedError

    def post_process_referring_detection(
        self,
        outputs: Outputs,
        threshold: float = 0.7,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float | None = None,
    ) -> list[dict[str, object]]:
        """Boxes and scores of the targets of each sentence.

        Args:
            outputs: of the model, for B sentences.
            threshold: boxes that score at least this are given; 0.7 is that of the published GREC evaluation.
            target_sizes: B (height, width) in pixels.
            no_target_threshold: a sentence has no target when its score is greater; None for the processor's own.

        Returns:
            for each sentence {"boxes": (n, 4) x0, y0, x1, y1, "scores": (n,) 0..1, "no_target": bool,
            "no_target_score": 0..1}.

        Raises:
            ValueError: when the model has no boxes, or sizes and sentences differ in number.
        """
        raise NotImplementedError

    def trainer_metrics(self, gres: object | None = None, grec: object | None = None) -> TrainerMetrics:
        """Scores for Trainer by the GRES and GREC metrics, as `evaluate.load` gives them."""
        return TrainerMetrics(self, gres, grec)


def flat_sentences(text: str | Sequence[str] | Sequence[Sequence[str]]) -> tuple[list[str], list[int] | None]:
    """All sentences, and the position of each one's image where `text` is a list for each image.

    Raises:
        ValueError: for no sentences, and for anything that is no text or cannot be written as UTF-8.
    """
    sentences = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else [text]
    groups = None
    if sentences and all(isinstance(group, list | tuple) for group in sentences):
        groups = [i for i, group in enumerate(sentences) for _ in group]
        sentences = [sentence for group in sentences for sentence in group]
    if not sentences:
        raise ValueError("no sentences in text: pass at least one")
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise ValueError(f"sentence {i} is {sentence!r}, not a text: pass strings")
        if any("\ud800" <= character <= "\udfff" for character in sentence):
            raise ValueError(f"sentence {i}, {sentence!r}, holds half of a character (a surrogate): remove it")
    return sentences, groups


def measuring_labels(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The labels of B rows that every collator gives, for `TrainerMetrics`.

    "no_target" (B,) bool; "sent_id", -1 where rows have none, "image_id", "num_targets" and "num_words" (B,) int64;
    "sizes" (B, 2), height and width of the image in pixels; where rows have boxes "target_boxes" (B, N, 4), x0, y0,
    x1, y1 in pixels, padded with -100.
    """
    labels = {
        "no_target": torch.tensor([bool(row["no_target"]) for row in rows]),
        "sent_id": torch.tensor([row.get("sent_id", -1) for row in rows]),
        "image_id": torch.tensor([row["image_id"] for row in rows]),
        "num_targets": torch.tensor([len(row["ann_ids"]) for row in rows]),
        "num_words": torch.tensor([len(row["sentence"].split()) for row in rows]),
        "sizes": torch.tensor([[row["height"], row["width"]] for row in rows]),
    }
    if all("boxes" in row for row in rows):
        boxes = torch.full((len(rows), max(1, *(len(row["boxes"]) for row in rows)), 4), BOX_PADDING)
        for b, row in enumerate(rows):
            boxes[b, : len(row["boxes"])] = xywh_to_xyxy(torch.tensor(row["boxes"], dtype=torch.float32).view(-1, 4))
        labels["target_boxes"] = boxes
    return labels


def repeat_images(batch: Batch) -> Batch:
    """A batch with one entry a sentence instead of an image in every tensor, without "image_index"."""
    image_index = batch.pop("image_index", None)
    if image_index is None:
        return batch
    for tensors in (batch, batch["labels"]):
        for name in IMAGE_TENSORS & tensors.keys():
            tensors[name] = tensors[name].index_select(0, image_index)
    return batch


def check_rows(rows: Sequence[dict]) -> None:
    """Raises ValueError for no rows, and for a row without a column that every collator reads."""
    if not rows:
        raise ValueError("no rows given to the collator: pass expression rows of grefcoco.load")
    for i, row in enumerate(rows):
        if missing := [name for name in NEEDED_COLUMNS if name not in row]:
            raise ValueError(f"row {i} has no column {missing[0]!r}: pass expression rows of grefcoco.load")


def group_by_image(rows: Sequence[dict]) -> tuple[list[dict], list[int]]:
    """The first row of each picture, and for each row the position of its picture among them.

    Rows share a picture when they have one image id and the same picture object, or equal pixels: image ids of two
    data sets can be equal, and a user can change the picture of one row.
    """
    first_rows, image_index = [], []
    of_image_id: dict[int, list[int]] = {}  # positions in `first_rows`
    for row in rows:
        positions = of_image_id.setdefault(row["image_id"], [])
        same = (i for i in positions if _is_same_picture(first_rows[i]["image"], row["image"]))
        if (position := next(same, None)) is None:
            position = len(first_rows)
            positions.append(position)
            first_rows.append(row)
        image_index.append(position)
    return first_rows, image_index


def _is_same_picture(first: object, second: object) -> bool:
    return first is second or (isinstance(first, Image.Image) and first == second)


def check_sizes(target_sizes: Iterable[tuple[int, int]] | torch.Tensor, sentences: int) -> list[tuple[int, int]]:
    """The sizes as a list of (height, width).

    Raises:
        ValueError: where there is not one for each sentence, or one is not two numbers of at least 1.
    """
    if isinstance(target_sizes, torch.Tensor):
        target_sizes = target_sizes.tolist()  # one copy from the device
    sizes = [tuple(map(int, size)) for size in target_sizes]
    if len(sizes) != sentences:
        raise ValueError(f"{len(sizes)} target_sizes for {sentences} sentences: pass one (height, width) each")
    for size in sizes:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"target size {size}: pass (height, width) in pixels, at least 1 each")
    return sizes

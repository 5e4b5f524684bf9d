"""Models of other projects on the rows of this one: one class a family, loaded by transformers' auto classes.

    predictor = load_peer("IDEA-Research/grounding-dino-tiny")
    answers = predictor(rows)  # expression rows of grefcoco.load

Detectors give their best 100 boxes whatever they score: only the metric cuts. The part of a network that looks at the
image alone (`vision`) runs once for all sentences of an image in a batch. SAM 3 needs torchvision, for its processor,
and OWLv2 needs scipy; the others need neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torch.nn.functional import interpolate, normalize
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPSegForImageSegmentation,
)
from transformers.image_transforms import center_to_corners_format
from transformers.modeling_outputs import ModelOutput

from grefcoco_data.masks import empty_rle, encode_mask
from modeling.referring_processor import group_by_image
from scoring.answers import Answer, read_text
from scoring.grammars import prompt
from scoring.prediction import Predictor, processes, revision

MOST_BOXES = 100  # of a sentence
NEW_TOKENS = 256
BOXES_AT_ONCE = 64  # for which masks are made

Detections = list[tuple[torch.Tensor, torch.Tensor]]  # for each sentence boxes (n, 4) xyxy 0..1 or pixels, scores (n,)


class Peer:
    """A model that answers the sentences of expression rows; a subclass for each family.

    Args:
        checkpoint: model folder or Hub id.

    Attributes:
        auto: the class that loads the model.
        vision: name of the module that looks at the image alone.
        token_options: for the tokenizer.
        threshold: the family's own, for the boxes that are made into masks.
        grammar: in which it writes boxes; None where it has a box head.
    """

    auto: ClassVar[type] = AutoModelForZeroShotObjectDetection
    vision: ClassVar[str]
    token_options: ClassVar[dict[str, object]] = {"padding": True, "truncation": True}
    threshold: ClassVar[float] = 0.3
    grammar: ClassVar[str | None] = None
    columns: ClassVar[list[str]] = ["image", "image_id", "width", "height", "sent_id", "sentence"]

    def __init__(self, checkpoint: str) -> None:
        self.load_inputs(checkpoint)
        self.model = self.auto.from_pretrained(checkpoint).eval().to(processes().device)
        self.origin: dict[str, object] = {"revision": revision(self.model)}

    def load_inputs(self, checkpoint: str) -> None:
        """Load what makes the inputs. A processor as a whole may need torchvision where its parts do not."""
        try:
            self.image_processor = AutoImageProcessor.from_pretrained(checkpoint)
        except ValueError as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{checkpoint}: its images are processed by torchvision, install it ({reason})") from None
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    @torch.inference_mode()
    def __call__(self, rows: list[dict]) -> list[Answer]:
        """The answers to expression rows, in their order."""
        first_rows, index = group_by_image(rows)
        images = [row["image"].convert("RGB") for row in first_rows]
        inputs = self.inputs(images, [row["sentence"] for row in rows], index)
        inputs = send_to_device(inputs, self.model.device)
        with once_per_image(self.model.get_submodule(self.vision), index):
            return self.answers(inputs, rows)

    def inputs(self, images: list[Image.Image], sentences: list[str], index: list[int]) -> dict[str, torch.Tensor]:
        """Model inputs of B sentences; `index` (B,) is the position of each one's image."""
        pixels = self.image_processor(images, return_tensors="pt")
        pixels = {name: pixels[name][index] for name in ("pixel_values", "pixel_mask") if name in pixels}
        return pixels | self.tokens([self.words(sentence) for sentence in sentences])

    def words(self, sentence: str) -> str:
        """The sentence as the family wants it."""
        return sentence

    def tokens(self, sentences: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(sentences, return_tensors="pt", **self.token_options))

    def answers(self, inputs: dict[str, torch.Tensor], rows: list[dict]) -> list[Answer]:
        """The answers to B rows."""
        detections = self.detections(self.model(**inputs), rows)
        return [box_answer(row, *detection) for row, detection in zip(rows, detections, strict=True)]

    def detections(self, outputs: ModelOutput, rows: list[dict]) -> Detections:
        """Boxes in pixels of the image, x0, y0, x1, y1, and scores."""
        raise NotImplementedError


# ---- detectors ---------------------------------------------------------------------------------------------------


class GroundingDino(Peer):
    """Grounding DINO, MM Grounding DINO and LLMDet. A box scores as the best of its words."""

    vision = "model.backbone"
    threshold = 0.25

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.token_options = {**self.token_options, "max_length": self.model.config.max_text_len}

    def __call__(self, rows: list[dict]) -> list[Answer]:
        """The answers to expression rows, an image at a time: padding to a common size would change the scores."""
        index = group_by_image(rows)[1]
        answers: dict[int, Answer] = {}
        for image in sorted(set(index)):
            places = [place for place, other in enumerate(index) if other == image]
            answers |= zip(places, super().__call__([rows[place] for place in places]))
        return [answers[place] for place in range(len(rows))]

    def words(self, sentence: str) -> str:
        # the network separates phrases at dots and question marks; a phrase ends with one dot
        return " ".join(sentence.lower().replace(".", " ").replace("?", " ").split()) + "."

    def detections(self, outputs: ModelOutput, rows: list[dict]) -> Detections:
        scores = outputs.logits.sigmoid().amax(-1)  # (B, queries, tokens) -> (B, queries)
        return list(zip(_boxes_in_pixels(outputs.pred_boxes, _sizes(rows)), scores))


class Owl(Peer):
    """OWL-ViT and OWLv2; a sentence of more than 16 tokens is cut."""

    vision = "owlvit.vision_model"
    threshold = 0.1

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        length = self.model.config.text_config.max_position_embeddings
        self.token_options = {"padding": "max_length", "truncation": True, "max_length": length}

    def detections(self, outputs: ModelOutput, rows: list[dict]) -> Detections:
        scores = outputs.logits.sigmoid().amax(-1)  # (B, patches, 1) -> (B, patches)
        return list(zip(self.boxes(outputs.pred_boxes, rows), scores))

    def boxes(self, boxes: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        """(B, n, 4) cxcywh, 0..1 of what the model gets, in pixels of the image."""
        return _boxes_in_pixels(boxes, _sizes(rows))


class Owlv2(Owl):
    """OWLv2, which pads images to squares, on the right or below."""

    vision = "owlv2.vision_model"

    def boxes(self, boxes: torch.Tensor, rows: list[dict]) -> torch.Tensor:
        return _boxes_in_pixels(boxes, [(max(row["width"], row["height"]),) * 2 for row in rows])


class OmdetTurbo(Peer):
    """OmDet-Turbo; of boxes that overlap by more than half, the best is kept, as its processor does by torchvision."""

    vision = "vision_backbone"
    token_options: ClassVar[dict[str, object]] = {"padding": "max_length", "truncation": True, "max_length": 77}

    def tokens(self, sentences: list[str]) -> dict[str, torch.Tensor]:
        texts = {"classes": sentences, "tasks": [f"Detect {sentence}." for sentence in sentences]}
        encoded = {name: super(OmdetTurbo, self).tokens(text) for name, text in texts.items()}
        keys = ("input_ids", "attention_mask")
        tokens = {f"{name}_{key}": values[key] for name, values in encoded.items() for key in keys}
        return tokens | {"classes_structure": torch.ones(len(sentences), dtype=torch.long)}

    def detections(self, outputs: ModelOutput, rows: list[dict]) -> Detections:
        scores = outputs.decoder_class_logits.sigmoid().amax(-1)  # (B, queries, 1) -> (B, queries)
        boxes = _boxes_in_pixels(outputs.decoder_coord_logits, _sizes(rows))
        return [_without_overlaps(*detection) for detection in zip(boxes, scores)]


# ---- masks from text ---------------------------------------------------------------------------------------------


class ClipSeg(Peer):
    """CLIPSeg: a mask without instances; none where the probability is low in all pixels."""

    auto = CLIPSegForImageSegmentation
    vision = "clip.vision_model"

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        length = self.model.config.text_config.max_position_embeddings
        self.token_options = {**self.token_options, "max_length": length}

    def answers(self, inputs: dict[str, torch.Tensor], rows: list[dict]) -> list[Answer]:
        logits = self.model(**inputs).logits
        logits = logits.view(len(rows), 1, *logits.shape[-2:])  # (B, 1, h, w)
        return [mask_answer(row, logit, 1 - logit.max().sigmoid().item()) for row, logit in zip(rows, logits)]


class Sam3(Peer):
    """SAM 3: boxes of all queries, and the masks of those above the threshold (or of the best) as one mask."""

    auto = AutoModel
    vision = "vision_encoder"
    token_options: ClassVar[dict[str, object]] = {"padding": "max_length", "truncation": True, "max_length": 32}

    def answers(self, inputs: dict[str, torch.Tensor], rows: list[dict]) -> list[Answer]:
        outputs = self.model(**inputs)
        presence = outputs.presence_logits.sigmoid()  # (B, 1)
        answers = []
        for i, row in enumerate(rows):
            scores = outputs.pred_logits[i].sigmoid() * presence[i]  # (queries,)
            answer = mask_answer(row, outputs.pred_masks[i][_chosen(scores, self.threshold)], 1 - scores.max().item())
            boxes = outputs.pred_boxes[i] * torch.tensor([row["width"], row["height"]] * 2, device=scores.device)
            answer.boxes, answer.scores = _best_boxes(boxes, scores, row)
            answers.append(answer)
        return answers


# ---- language models ---------------------------------------------------------------------------------------------


class Writer(Peer):
    """A language model of transformers that writes boxes in its own grammar, by greedy decoding."""

    auto = AutoModelForImageTextToText
    image_token: ClassVar[str] = ""  # before the request
    padding_side: ClassVar[str] = "left"  # the answer goes on where the request ends

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        self.origin |= {"grammar": self.grammar, "prompt": self.image_token + prompt(self.grammar, "{sentence}")}

    def load_inputs(self, checkpoint: str) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.processor.tokenizer.padding_side = self.padding_side

    def inputs(self, images: list[Image.Image], sentences: list[str], index: list[int]) -> BatchFeature:
        texts = [self.image_token + prompt(self.grammar, sentence) for sentence in sentences]
        return self.processor(text=texts, images=[images[i] for i in index], padding=True, return_tensors="pt")

    def answers(self, inputs: BatchFeature, rows: list[dict]) -> list[Answer]:
        tokens = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=False)
        texts = [text.replace(self.processor.tokenizer.pad_token, "") for text in texts]
        return [read_text(self.grammar, text, row) for text, row in zip(texts, rows, strict=True)]


class Florence2(Writer):
    grammar = "florence2"
    vision = "model.vision_tower"
    padding_side = "right"  # of its encoder, which counts positions from the left


class Kosmos2(Writer):
    """Kosmos-2, a sentence at a time: it counts padding as positions when it generates."""

    grammar = "kosmos2"

    @torch.inference_mode()
    def __call__(self, rows: list[dict]) -> list[Answer]:
        first_rows, index = group_by_image(rows)
        images = [row["image"].convert("RGB") for row in first_rows]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        features = self.model.vision_model(pixels.to(self.model.device))[0]
        features = normalize(self.model.vision_model.model.post_layernorm(features), dim=-1)
        embeddings = self.model.image_to_text_projection(features)[0]
        answers = []
        for row, image in zip(rows, index):
            inputs = send_to_device(self.inputs(images, [row["sentence"]], [image]), self.model.device)
            inputs["image_embeds"] = embeddings[image : image + 1]
            del inputs["pixel_values"]
            answers += self.answers(inputs, [row])
        return answers


class PaliGemma(Writer):
    grammar = "paligemma"
    vision = "model.vision_tower"
    image_token = "<image>"


FAMILIES: dict[str, type[Peer]] = {  # by model_type
    "grounding-dino": GroundingDino,
    "mm-grounding-dino": GroundingDino,
    "omdet-turbo": OmdetTurbo,
    "owlvit": Owl,
    "owlv2": Owlv2,
    "clipseg": ClipSeg,
    "sam3": Sam3,
    "florence2": Florence2,
    "kosmos-2": Kosmos2,
    "paligemma": PaliGemma,
}


class Segmenter:
    """A SAM that makes boxes into masks.

    Args:
        checkpoint: a model of AutoModelForMaskGeneration.
    """

    def __init__(self, checkpoint: str) -> None:
        self.model = AutoModelForMaskGeneration.from_pretrained(checkpoint).eval().to(processes().device)
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        """Bool masks (n, height, width) of boxes (n, 4) x0, y0, x1, y1 in pixels; boxes without area are points."""
        masks = [np.zeros((0, image.height, image.width), bool)]
        for start in range(0, len(boxes), BOXES_AT_ONCE):
            prompts = _prompts(boxes[start : start + BOXES_AT_ONCE])
            inputs = self.processor(images=image.convert("RGB"), return_tensors="pt", **prompts)
            outputs = self.model(**send_to_device(inputs, self.model.device), multimask_output=False)
            sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
            whole = self.processor.post_process_masks(outputs.pred_masks.float().cpu(), *sizes)[0]
            masks.append(whole[:, 0].numpy().astype(bool))  # (boxes, 1, height, width)
        return np.concatenate(masks)


class Segmented:
    """A predictor of boxes whose boxes are made into masks, all boxes of an image at once.

    The mask of a sentence covers the boxes above the threshold, or the best one; the probability of "none" is that
    the best one is wrong.

    Args:
        predictor: gives boxes.
        segmenter: makes masks.
        threshold: least score of a box.
    """

    def __init__(self, predictor: Predictor, segmenter: Segmenter, threshold: float) -> None:
        self.predictor, self.segmenter, self.threshold = predictor, segmenter, threshold
        self.columns = predictor.columns
        segmenter_revision = revision(segmenter.model)
        self.origin = {
            **predictor.origin,
            "segmenter_revision": segmenter_revision,
            "segmenter_box_threshold": threshold,
        }

    def __call__(self, rows: list[dict]) -> list[Answer]:
        answers = self.predictor(rows)
        first_rows, index = group_by_image(rows)
        for i, row in enumerate(first_rows):
            own = [answer for answer, image in zip(answers, index) if image == i]
            boxes = [_chosen_boxes(answer, self.threshold) for answer in own]
            masks = self.segmenter(row["image"], np.concatenate(boxes))
            for answer, part in zip(own, np.split(masks, np.cumsum([len(part) for part in boxes])[:-1])):
                answer.mask = encode_mask(part.any(0)) if len(part) else empty_rle(row["height"], row["width"])
                answer.no_target = 0.0 if answer.unreadable else round(1 - max(answer.scores, default=0.0), 6)
        return answers


# ---- parts -------------------------------------------------------------------------------------------------------


def load_peer(checkpoint: str, model_type: str) -> Peer:
    """The predictor of a model folder or Hub id.

    Raises:
        ValueError: a family that has no class here.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"{checkpoint} is a {model_type} model; this command loads {', '.join(FAMILIES)}. "
            "Serve a language model by vLLM, SGLang or `transformers serve`, and give its URL and --grammar"
        )
    return FAMILIES[model_type](checkpoint)


@contextmanager
def once_per_image(module: nn.Module, index: Sequence[int]) -> Iterator[None]:
    """Let a module compute each image once within the block.

    Args:
        module: gets and returns tensors whose first dimension is the B sentences.
        index: (B,) the position of each sentence's image among the images.
    """
    first = [index.index(image) for image in range(len(set(index)))]  # the first sentence of each image
    if len(first) == len(index):
        yield
        return

    def cut(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return recursively_apply(lambda x: x[first] if len(x) == len(index) else x, (args, kwargs))

    def repeat(_: nn.Module, args: tuple, output: object) -> object:
        return recursively_apply(lambda x: x[index] if len(x) == len(first) else x, output)

    hooks = [module.register_forward_pre_hook(cut, with_kwargs=True), module.register_forward_hook(repeat)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def box_answer(row: dict, boxes: torch.Tensor, scores: torch.Tensor) -> Answer:
    """The best `MOST_BOXES` boxes (n, 4), pixels, as an answer."""
    answer = Answer(row["sent_id"])
    answer.boxes, answer.scores = _best_boxes(boxes, scores, row)
    return answer


def mask_answer(row: dict, logits: torch.Tensor, no_target: float) -> Answer:
    """Masks (k, h, w) as one mask of the image's size."""
    size = (row["height"], row["width"])
    probabilities = interpolate(logits.float().sigmoid()[None], size, mode="bilinear", align_corners=False)[0]
    mask = (probabilities > 0.5).any(0)
    return Answer(row["sent_id"], encode_mask(mask.cpu().numpy()), no_target=no_target)


def _best_boxes(boxes: torch.Tensor, scores: torch.Tensor, row: dict) -> tuple[list[list[float]], list[float]]:
    """Boxes clipped to the image and scores, best first, to 0.01 pixels and a millionth."""
    best = scores.topk(min(MOST_BOXES, len(scores)))
    boxes = boxes[best.indices].double().cpu().numpy().clip(0, [row["width"], row["height"]] * 2)
    return boxes.round(2).tolist(), best.values.double().cpu().numpy().round(6).tolist()


def _boxes_in_pixels(boxes: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """(B, n, 4) cxcywh, 0..1, to x0, y0, x1, y1 in pixels of images of B (width, height)."""
    return center_to_corners_format(boxes) * torch.tensor(sizes, device=boxes.device).repeat(1, 2)[:, None]


def _sizes(rows: list[dict]) -> list[tuple[int, int]]:
    """(width, height) of the image of each row."""
    return [(row["width"], row["height"]) for row in rows]


def _without_overlaps(
    boxes: torch.Tensor, scores: torch.Tensor, most: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-maximum suppression: boxes (n, 4) x0, y0, x1, y1 that no better box overlaps by an IoU above `most`."""
    order = scores.argsort(descending=True, stable=True)
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)[order].double().cpu().numpy()
    overlaps = coco_mask.iou(xywh, xywh, [0] * len(xywh)) > most
    kept: list[int] = []
    for place in range(len(order)):
        if not overlaps[place, kept].any():
            kept.append(place)
    return boxes[order[kept]], scores[order[kept]]


def _chosen(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """(n,) bool: the scores of at least `threshold`, or the best one."""
    return (scores >= threshold) | (scores == scores.max()) & (scores.max() < threshold)


def _chosen_boxes(answer: Answer, threshold: float) -> np.ndarray:
    """(n, 4) the boxes that are made into masks."""
    if not answer.boxes:
        return np.zeros((0, 4), np.float32)
    return np.asarray(answer.boxes, np.float32)[_chosen(torch.tensor(answer.scores), threshold).numpy()]


def _prompts(boxes: np.ndarray) -> dict[str, list]:
    """What a SAM is asked for: boxes, or points where no box has an area."""
    if (boxes[:, :2] == boxes[:, 2:]).all():
        return {"input_points": [[[box[:2].tolist()] for box in boxes]], "input_labels": [[[1]] * len(boxes)]}
    return {"input_boxes": [boxes.tolist()]}

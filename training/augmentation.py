"""Augmentation of training rows: flips, colours, scales, and hard negatives (sentences made untrue of their image).

Functions take and return expression rows as `grefcoco.load` gives them (with `objects`); they do not change their
arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageEnhance

from grefcoco_data.masks import decode_mask, empty_rle, encode_mask

COLOURS = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray", "grey"]
# "left" and "right" as sides; "right" as an adverb is kept ("right behind her", but not "on the right behind her")
SIDE = re.compile(
    r"(?P<adverb>(?<!the )(?<!far )(?<!on )(?<!top )(?<!bottom )\bright (?:behind|above|below|under|next|in front)\b)"
    r"|\b(?P<side>left|right)(?=\b|most|side|hand)",
    re.IGNORECASE,
)
FILL = (124, 116, 104)  # the mean colour that models subtract, for pixels outside the image


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a run; everything is off by default, as published.

    Args:
        hard_negatives: share of the sentences with a target that become no-target sentences: by another colour word,
            or by a sentence about categories that the image does not have.
        flip: probability that an image is mirrored; "left" and "right" are exchanged in its sentences.
        colour: brightness, contrast and saturation are multiplied by a factor of 1 - colour to 1 + colour.
        scale: images are scaled by a factor of 1 - scale to 1 + scale; no object is cut off.
    """

    hard_negatives: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"augmentation: {field.name} is {value!r}; it must be a number from 0 to 1")

    @property
    def active(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def __call__(self, rows: Sequence[dict], donors: Donors, seed: int, epoch: int) -> list[dict]:
        """Augmented copies of rows; random numbers depend on (seed, epoch, image or sentence), never on the batch."""
        images: dict[int, _View] = {}
        augmented = []
        for row in rows:
            if row["image_id"] not in images:
                random = np.random.default_rng((seed, epoch, row["image_id"] & 0xFFFFFFFF))
                images[row["image_id"]] = _View(row, self, random)
            row = images[row["image_id"]].apply(row)
            random = np.random.default_rng((seed, epoch, row["sent_id"] & 0xFFFFFFFF, 1))
            if not row["no_target"] and random.random() < self.hard_negatives:
                row = hard_negative(row, donors, random) or row
            augmented.append(row)
        return augmented


class Donors:
    """Sentences that can replace another image's sentence, with the categories they are about.

    Args:
        sentences, raw: of every expression.
        category_ids: the categories of its targets; expressions without any are never used.
        image_ids: the image it is about: a sentence that an image already has may be true of it.
    """

    def __init__(
        self, sentences: Sequence[str], raw: Sequence[str], category_ids: Sequence[Sequence[int]], image_ids: Sequence
    ) -> None:
        self.sentences, self.raw, self.category_ids = sentences, raw, category_ids
        self.sentences_of: dict[int, set[str]] = {}  # by image id
        for image_id, sentence in zip(image_ids, sentences):
            self.sentences_of.setdefault(image_id, set()).add(sentence)

    def draw(self, present: set[int], random: np.random.Generator, tries: int = 30) -> tuple[str, str] | None:
        """(sentence, raw) about categories none of which is `present`; None when `tries` draws give none."""
        for index in random.integers(len(self.sentences), size=tries).tolist():
            categories = self.category_ids[index]
            if len(categories) and present.isdisjoint(categories):
                return self.sentences[index], self.raw[index]
        return None


def hard_negative(row: dict, donors: Donors, random: np.random.Generator) -> dict | None:
    """The row with a sentence that refers to nothing in its image, or None when there is no such sentence.

    A sentence with another colour is the harder kind, but may be true of an object without annotation. A sentence
    about absent categories is untrue as far as the annotations are complete.
    """
    present = {item["category_id"] for item in row["objects"]}
    swapped = swap_colour(row["sentence"], random) if random.random() < 0.5 else None
    if swapped is not None and swapped not in donors.sentences_of.get(row["image_id"], ()):
        sentence, raw = swapped, swapped
    elif (pair := donors.draw(present, random)) is not None:
        sentence, raw = pair
    else:
        return None
    no_targets = {name: [] for name in ("ann_ids", "category_ids", "boxes", "masks") if name in row}
    no_targets |= {"mask": empty_rle(row["height"], row["width"]), "no_target": True}
    return {**row, **no_targets, "sentence": sentence, "raw": raw}


def swap_colour(sentence: str, random: np.random.Generator) -> str | None:
    """The sentence with one of its colour words replaced by another; None when it has no colour word."""
    words = sentence.split(" ")
    places = [i for i, word in enumerate(words) if word.strip(".,").lower() in COLOURS]
    if not places:
        return None
    place = int(random.choice(places))
    old = words[place].strip(".,")
    named = {word.strip(".,").lower() for word in words} | ({"gray", "grey"} if "gr" in old.lower() else set())
    new = str(random.choice([colour for colour in COLOURS[:-1] if colour not in named]))
    words[place] = words[place].replace(old, new)
    return " ".join(words)


def swap_sides(sentence: str) -> str:
    """The sentence for the mirrored image: "left" and "right" exchanged, upper and lower case kept."""

    def other(match: re.Match) -> str:
        if match["adverb"]:
            return match["adverb"]
        new = "right" if match["side"].lower() == "left" else "left"
        return new.upper() if match["side"].isupper() else new.capitalize() if match["side"][0].isupper() else new

    return SIDE.sub(other, sentence)


class _View:
    """One image in one epoch: mirrored or not, its colours, its scale and its position on the canvas."""

    def __init__(self, row: dict, options: Augmentation, random: np.random.Generator) -> None:
        self.size = row["width"], row["height"]
        self.mirrored = random.random() < options.flip
        self.colours = random.uniform(1 - options.colour, 1 + options.colour, 3) if options.colour else None
        # pixel x of the image lies at scale * x + shift on the canvas, which has the image's size
        self.scale, self.shift = 1.0, (0, 0)
        if options.scale:
            self._place(row, random.uniform(1 - options.scale, 1 + options.scale), random.random(2))
        self.image = self._picture(row["image"])
        self.objects = [self._object(item) for item in row["objects"]]
        self.by_id = {item["ann_id"]: item for item in self.objects}

    def _place(self, row: dict, scale: float, place: np.ndarray) -> None:
        """Draw a shift that keeps every object whole; reduce `scale` where no shift does."""
        boxes = np.array([item["bbox"] for item in row["objects"]], dtype=float).reshape(-1, 4)
        size = np.array(self.size, dtype=float)
        low = boxes[:, :2].min(0, initial=np.inf).clip(0, size)
        high = (boxes[:, :2] + boxes[:, 2:]).max(0, initial=0.0).clip(0, size)
        if not len(boxes):
            low, high = size / 2, size / 2
        scale = min(scale, *(size / np.maximum(high - low, 1))) if scale > 1 else scale
        least, most = np.sort([np.maximum(size - scale * size, -scale * low), np.minimum(0, size - scale * high)], 0)
        if scale <= 1:
            least, most = np.zeros(2), size - scale * size
        self.scale, self.shift = scale, tuple(np.round(least + place * (most - least)).astype(int).tolist())

    def _picture(self, image: Image.Image) -> Image.Image:
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colours is not None:
            for enhancer, factor in zip(
                (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), self.colours
            ):
                image = enhancer(image).enhance(factor)
        return image if self.scale == 1.0 else self._on_canvas(image, Image.Resampling.BILINEAR, FILL)

    def _on_canvas(self, image: Image.Image, resample: Image.Resampling, fill: tuple[int, ...] | int) -> Image.Image:
        (width, height), (left, top) = self.size, self.shift
        if self.mirrored:
            left = width - round(self.scale * width) - left
        resized = image.resize((round(self.scale * width), round(self.scale * height)), resample)
        canvas = Image.new(image.mode, self.size, fill)
        canvas.paste(resized, (left, top))
        return canvas

    def mask(self, rle: dict) -> np.ndarray:
        """(height, width) uint8 of a mask in the view."""
        mask = decode_mask(rle)
        mask = mask[:, ::-1] if self.mirrored else mask
        if self.scale == 1.0:
            return mask
        grey = self._on_canvas(Image.fromarray(np.ascontiguousarray(mask) * 255), Image.Resampling.BILINEAR, 0)
        return (np.asarray(grey) >= 128).astype(np.uint8)

    @property
    def changes_place(self) -> bool:
        return self.mirrored or self.scale != 1.0

    def _object(self, item: dict) -> dict:
        if not self.changes_place:
            return item
        x, y, w, h = item["bbox"]
        (left, top), width = self.shift, self.size[0]
        x = width - x - w if self.mirrored else x
        left = width - round(self.scale * width) - left if self.mirrored else left
        box = [self.scale * x + left, self.scale * y + top, self.scale * w, self.scale * h]
        mask = encode_mask(self.mask(item["segmentation"]))
        return {**item, "bbox": box, "segmentation": mask, "area": item["area"] * self.scale**2}

    def apply(self, row: dict) -> dict:
        """The row with the view's image, objects, boxes, masks and sentence."""
        row = {**row, "image": self.image}
        if not self.changes_place:
            return row
        targets = [self.by_id[ann_id] for ann_id in row["ann_ids"]]
        if self.mirrored:
            row |= {"sentence": swap_sides(row["sentence"]), "raw": swap_sides(row["raw"])}
        return row | {
            "objects": self.objects,
            "boxes": [item["bbox"] for item in targets],
            "masks": [item["segmentation"] for item in targets],
            "mask": encode_mask(self.mask(row["mask"])),
        }

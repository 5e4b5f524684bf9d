"""Referring expressions about synthetic scenes, with their targets.

An expression starts as a meaning. A meaning is a `Phrase`, an `AllExcept` or a `Pair`, built from nouns (`Kind`,
`Half`, `Extreme`, `Relation`, `Between`). `find_matches` (nouns) and `find_targets` (meanings) compute the targets
from the visible objects. A no-target sentence is a meaning without targets. A meaning that people could read in two
ways raises `AmbiguousError` and is not used. `draw_words` (nouns) and `draw_sentence` (meanings) choose one of
several wordings, in lower case and without punctuation. `paraphrase` says a sentence in words that none of them uses.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SYNONYMS = {  # of words and of their plurals; longer entries first
    "as well as": ("plus", "together with"),
    "everything except": ("everything apart from", "anything besides"),
    "everything but": ("everything apart from", "anything besides"),
    "higher than": ("over",),
    "lower than": ("under", "beneath"),
    "in between": ("amid", "in the middle of"),
    "between": ("amid", "in the middle of"),
    "above": ("over",),
    "below": ("under", "beneath", "underneath"),
    "except": ("apart from", "besides"),
    "biggest": ("hugest", "most massive"),
    "largest": ("hugest", "most massive"),
    "smallest": ("littlest", "most minute"),
    "tiniest": ("littlest", "most minute"),
    "topmost": ("uppermost",),
    "highest": ("uppermost",),
    "lowest": ("bottommost",),
    "every": ("each",),
    "circle": ("disc", "disk"),
    "square": ("block", "cube"),
    "star": ("asterisk", "pentagram"),
    "triangle": ("pyramid", "wedge"),
    "ring": ("hoop", "loop"),
    "shape": ("figure", "form"),
    "object": ("item", "figure"),
    "thing": ("item", "form"),
    "red": ("crimson", "scarlet"),
    "green": ("emerald", "lime"),
    "blue": ("azure", "navy"),
    "yellow": ("golden", "lemon"),
    "purple": ("violet", "lilac"),
    "white": ("ivory", "snowy"),
    "big": ("huge", "giant"),
    "large": ("huge", "giant"),
    "small": ("tiny", "mini"),
    "little": ("tiny", "mini"),
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

# Limits as fractions of the image side, if no other unit is given. A value between two limits is ambiguous.
OFFSET_LIMITS = (0.0, 0.08)  # "left of", "above": distance between the two centres in that direction
HALF_LIMITS = (0.45, 0.55)  # centre of an object: end of the left (upper) half, start of the right (lower) half
SIZE_LIMITS = (0.175, 0.195)  # longest side: maximum of a small object, minimum of a big object
END_MARGIN = 0.2  # "between": minimum distance from both ends, as a fraction of the line between them
LINE_LIMITS = (0.12, 0.3)  # "between": distance from the line
MIN_LEAD = 0.06  # "leftmost": minimum distance to the next object
MIN_SIZE_RATIO = 1.2  # "biggest": minimum ratio of its longest side to that of the next object


class AmbiguousError(Exception):
    """The meaning is ambiguous in this scene: people could choose different targets."""


@dataclass(frozen=True)
class VisibleObject:
    """The visible part of one object: centre and longest side of its box, as fractions of the image side."""

    shape: str
    colour: str
    x: float
    y: float
    extent: float

    @property
    def size(self) -> str:
        return "big" if self.extent >= SIZE_LIMITS[1] else "small"

    @classmethod
    def from_box(cls, shape: str, colour: str, box: Sequence[float], image_size: int) -> VisibleObject:
        """Make the object from its box (xywh, pixels) in a square image with sides of `image_size` pixels."""
        left, top, width, height = box
        x, y = (left + width / 2) / image_size, (top + height / 2) / image_size
        return cls(shape, colour, x, y, max(width, height) / image_size)


@dataclass(frozen=True)
class Kind:
    """Objects with a shape, colour and size; None means any: "red circle", "big shape"."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def find_matches(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`; raise `AmbiguousError` if the size of one is neither big nor small."""
        matches = {
            i for i, obj in enumerate(objects) if self.shape in (None, obj.shape) and self.colour in (None, obj.colour)
        }
        if self.size is None:
            return matches
        if any(SIZE_LIMITS[0] < objects[i].extent < SIZE_LIMITS[1] for i in matches):
            raise AmbiguousError
        return {i for i in matches if objects[i].size == self.size}

    def draw_words(self, rng: random.Random, plural: bool) -> str:
        size = rng.choice({"big": ("big", "large"), "small": ("small", "little"), None: ("",)}[self.size])
        noun = (self.shape or rng.choice(("shape", "object", "thing"))) + "s" * plural
        if self.colour and rng.random() < 0.1:
            return f"{size} {noun} in {self.colour}".lstrip()
        return " ".join(filter(None, (size, self.colour, noun)))


@dataclass(frozen=True)
class Half:
    """Objects of a kind in one half of the image: "circles on the left"."""

    kind: Kind
    side: str

    def find_matches(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`; raise `AmbiguousError` if one of the kind is near the middle."""
        horizontal = self.side in ("left", "right")
        centres = {i: objects[i].x if horizontal else objects[i].y for i in self.kind.find_matches(objects)}
        if any(HALF_LIMITS[0] < centre < HALF_LIMITS[1] for centre in centres.values()):
            raise AmbiguousError
        first_half = self.side in ("left", "top")
        return {i for i, centre in centres.items() if (centre <= HALF_LIMITS[0]) == first_half}

    def draw_words(self, rng: random.Random, plural: bool) -> str:
        on = "on" if self.side in ("left", "right") else "at"
        place = rng.choice((f"{on} the {self.side}", f"{on} the {self.side}", f"in the {self.side} half"))
        return f"{self.kind.draw_words(rng, plural)} {place}"


EXTREMES = {
    "left": ("leftmost {}", "{} farthest to the left"),
    "right": ("rightmost {}", "{} farthest to the right"),
    "top": ("topmost {}", "highest {}"),
    "bottom": ("lowest {}", "{} closest to the bottom"),
    "big": ("biggest {}", "largest {}"),
    "small": ("smallest {}", "tiniest {}"),
}


@dataclass(frozen=True)
class Extreme:
    """The first object of a kind in one order: "leftmost square", "biggest shape"."""

    kind: Kind
    end: str

    def find_matches(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return one index, or none without objects of the kind; raise `AmbiguousError` if the second is too close."""
        # A difference of 1 between two ranks is the minimum lead.
        rank = {
            "left": lambda obj: -obj.x / MIN_LEAD,
            "right": lambda obj: obj.x / MIN_LEAD,
            "top": lambda obj: -obj.y / MIN_LEAD,
            "bottom": lambda obj: obj.y / MIN_LEAD,
            "big": lambda obj: math.log(obj.extent, MIN_SIZE_RATIO),
            "small": lambda obj: -math.log(obj.extent, MIN_SIZE_RATIO),
        }[self.end]
        ranked = sorted(((rank(objects[i]), i) for i in self.kind.find_matches(objects)), reverse=True)
        if len(ranked) > 1 and ranked[0][0] - ranked[1][0] < 1:
            raise AmbiguousError
        return {i for _, i in ranked[:1]}

    def draw_words(self, rng: random.Random, plural: bool) -> str:
        return rng.choice(EXTREMES[self.end]).format(self.kind.draw_words(rng, plural))


@dataclass(frozen=True)
class Relation:
    """Objects of a kind in a spatial relation to one other object: "circle left of the star"."""

    kind: Kind
    relation: str
    other: Phrase

    def find_matches(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`; raise `AmbiguousError` if two are too close in that direction."""
        matches = set()
        for j in self.other.find_targets(objects):
            for i in exclude(self.kind.find_matches(objects), {j}):
                dx, dy = objects[j].x - objects[i].x, objects[j].y - objects[i].y
                offset = {"left": dx, "right": -dx, "above": dy, "below": -dy}[self.relation]
                if OFFSET_LIMITS[0] < offset < OFFSET_LIMITS[1]:
                    raise AmbiguousError
                if offset >= OFFSET_LIMITS[1]:
                    matches.add(i)
        return matches

    def draw_words(self, rng: random.Random, plural: bool) -> str:
        link = {
            "left": ("left of", "to the left of"),
            "right": ("right of", "to the right of"),
            "above": ("above", "higher than"),
            "below": ("below", "lower than"),
        }[self.relation]
        return f"{self.kind.draw_words(rng, plural)} {rng.choice(link)} the {self.other.noun.draw_words(rng, False)}"


@dataclass(frozen=True)
class Between:
    """Objects of a kind between two other objects: "square between the star and the blue circle"."""

    kind: Kind
    first: Phrase
    second: Phrase

    def find_matches(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`; raise `AmbiguousError` if an object is only roughly between the ends."""
        ends = sorted(self.first.find_targets(objects) | self.second.find_targets(objects))
        if len(ends) < 2:
            raise AmbiguousError
        a, b = (objects[i] for i in ends)
        length = math.dist((a.x, a.y), (b.x, b.y)) + 1e-9
        matches = set()
        for i in exclude(self.kind.find_matches(objects), set(ends)):
            dx, dy = objects[i].x - a.x, objects[i].y - a.y
            # Position along the line (0 at a, 1 at b) and distance from the line.
            along = (dx * (b.x - a.x) + dy * (b.y - a.y)) / length**2
            distance = abs(dx * (b.y - a.y) - dy * (b.x - a.x)) / length
            if END_MARGIN <= along <= 1 - END_MARGIN and distance <= LINE_LIMITS[0]:
                matches.add(i)
            elif 0 < along < 1 and distance < LINE_LIMITS[1]:
                raise AmbiguousError
        return matches

    def draw_words(self, rng: random.Random, plural: bool) -> str:
        ends = [f"the {end.noun.draw_words(rng, False)}" for end in (self.first, self.second)]
        rng.shuffle(ends)
        return f"{self.kind.draw_words(rng, plural)} {rng.choice(('between', 'in between'))} {' and '.join(ends)}"


def exclude(matches: set[int], others: set[int]) -> set[int]:
    """Return `matches` without `others`; raise `AmbiguousError` if nothing is left ("the star left of the star")."""
    if matches and matches <= others:
        raise AmbiguousError
    return matches - others


Noun = Kind | Half | Extreme | Relation | Between


@dataclass(frozen=True)
class Phrase:
    """A noun with a number: 1 is one object, 2 and more are an exact number, 0 is all objects (at least two)."""

    noun: Noun
    number: int = 1

    def find_targets(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`, empty for no target; raise `AmbiguousError` if the number is different."""
        targets = self.noun.find_matches(objects)
        if targets and (len(targets) < 2 if self.number == 0 else len(targets) != self.number):
            raise AmbiguousError
        return targets

    def draw_sentence(self, rng: random.Random) -> str:
        if self.number == 1:
            return rng.choice(("the ", "the ", "")) + self.noun.draw_words(rng, False)
        if self.number == 0 and rng.random() < 0.25:
            return "every " + self.noun.draw_words(rng, False)
        count = (
            ["all ", "all the ", "the "]
            if self.number == 0
            else [f"the {NUMBERS[self.number]} ", NUMBERS[self.number] + " "]
        )
        if self.number == 2:
            count.append("both ")
        return rng.choice(count) + self.noun.draw_words(rng, True)


@dataclass(frozen=True)
class AllExcept:
    """All objects except some: "everything except the star"."""

    exception: Phrase

    def find_targets(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`; raise `AmbiguousError` if no object or every object is an exception."""
        exceptions = self.exception.find_targets(objects)
        if not 0 < len(exceptions) < len(objects):
            raise AmbiguousError
        return set(range(len(objects))) - exceptions

    def draw_sentence(self, rng: random.Random) -> str:
        start = rng.choice(("everything except", "everything but", "all shapes except", "all objects but"))
        return f"{start} the {self.exception.noun.draw_words(rng, self.exception.number != 1)}"


@dataclass(frozen=True)
class Pair:
    """Two phrases joined by "and": "the blue star and the red square"."""

    first: Phrase
    second: Phrase

    def find_targets(self, objects: Sequence[VisibleObject]) -> set[int]:
        """Return indices into `objects`; raise `AmbiguousError` if a phrase has no target or both share a target."""
        parts = [self.first.find_targets(objects), self.second.find_targets(objects)]
        if not all(parts) or parts[0] & parts[1]:
            raise AmbiguousError
        return parts[0] | parts[1]

    def draw_sentence(self, rng: random.Random) -> str:
        article = rng.choice(("the ", "the ", ""))
        nouns = (self.first.noun.draw_words(rng, False), self.second.noun.draw_words(rng, False))
        return rng.choice((" and ", " and ", " as well as ")).join(article + noun for noun in nouns)


Meaning = Phrase | AllExcept | Pair


def paraphrase(rng: random.Random, sentence: str) -> str:
    """Say a sentence with other words for shapes, colours, sizes and places, which no other sentence has."""
    pattern = rf"\b({'|'.join(SYNONYMS)})(s?)\b"
    return re.sub(pattern, lambda match: rng.choice(SYNONYMS[match[1]]) + match[2], sentence)


# -------------------------------------------------------------------------------------------------- random meanings

AttributeSets = tuple[tuple[str, ...], ...]  # the sets of attributes that a kind may name together


def refer_by_attributes(
    rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets
) -> Meaning:
    return add_number(rng, draw_kind(rng, objects, attribute_sets), objects)


def refer_by_swapped_attributes(
    rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets
) -> Meaning:
    """Take each attribute from a random object: each one occurs in the scene, but often not on the same object."""
    names = rng.choice([names for names in attribute_sets if len(names) > 1])
    return add_number(rng, Kind(**{name: attribute_value(rng.choice(objects), name) for name in names}), objects)


def refer_by_random_colour(
    rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets
) -> Meaning:
    """Combine a shape of the scene with any colour: some scenes have no attributes to swap."""
    return add_number(rng, Kind(rng.choice(objects).shape, rng.choice(COLOURS)), objects)


def refer_by_position(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Meaning:
    return Phrase(Extreme(draw_shared_kind(rng, objects), rng.choice(("left", "right", "top", "bottom"))))


def refer_by_size(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Meaning:
    return Phrase(Extreme(draw_shared_kind(rng, objects), rng.choice(("big", "small"))))


def refer_by_half(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Meaning:
    kind = rng.choice((Kind(), draw_kind(rng, objects, attribute_sets)))
    return add_number(rng, Half(kind, rng.choice(("left", "right", "top", "bottom"))), objects)


def refer_by_relation(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Meaning:
    kinds = (Kind(), draw_kind(rng, objects, attribute_sets), draw_kind(rng, objects, attribute_sets))
    kind, relation = rng.choice(kinds), rng.choice(("left", "right", "above", "below"))
    return add_number(rng, Relation(kind, relation, Phrase(draw_kind(rng, objects, attribute_sets))), objects)


def refer_between(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Meaning:
    kind = rng.choice((Kind(), draw_kind(rng, objects, attribute_sets)))
    ends = [Phrase(draw_kind(rng, objects, attribute_sets)) for _ in range(2)]
    return add_number(rng, Between(kind, *ends), objects)


def refer_to_all_except(
    rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets
) -> Meaning:
    kind = draw_kind(rng, objects, attribute_sets)
    return AllExcept(Phrase(kind, 0 if len(kind.find_matches(objects)) > 1 else 1))


def refer_to_pair(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Meaning:
    return Pair(Phrase(draw_kind(rng, objects, attribute_sets)), Phrase(draw_kind(rng, objects, attribute_sets)))


def draw_kind(rng: random.Random, objects: Sequence[VisibleObject], attribute_sets: AttributeSets) -> Kind:
    """Draw a kind that matches at least one object and names the attributes of one set."""
    obj = rng.choice(objects)
    return Kind(**{name: attribute_value(obj, name) for name in rng.choice(attribute_sets)})


def attribute_value(obj: VisibleObject, name: str) -> str:
    return {"shape": obj.shape, "colour": obj.colour, "size": obj.size}[name]


def draw_shared_kind(rng: random.Random, objects: Sequence[VisibleObject]) -> Kind:
    """Draw a kind; raise `AmbiguousError` if it matches one object only: people do not say "leftmost" of one star."""
    obj = rng.choice(objects)
    kind = rng.choice((Kind(), Kind(obj.shape), Kind(colour=obj.colour)))
    if len(kind.find_matches(objects)) < 2:
        raise AmbiguousError
    return kind


def add_number(rng: random.Random, noun: Noun, objects: Sequence[VisibleObject]) -> Phrase:
    """Add a number that agrees with the matches of the noun; a noun without matches is singular in most cases."""
    count = len(noun.find_matches(objects))
    return Phrase(noun, rng.choice({0: (1, 1, 1, 0), 1: (1,)}.get(count, (0, count))))


DrawMeaning = Callable[[random.Random, Sequence[VisibleObject], AttributeSets], Meaning]


@dataclass(frozen=True)
class SentenceRules:
    """The sentences of a level: the attribute sets, and functions that draw a meaning, by number of targets.

    A function that is listed twice is chosen twice as often.
    """

    attribute_sets: AttributeSets
    none: tuple[DrawMeaning, ...]
    single: tuple[DrawMeaning, ...]
    multi: tuple[DrawMeaning, ...]


EASY_ATTRIBUTE_SETS = (("shape", "colour"), ("shape", "colour"), ("shape",), ("colour",))
SENTENCE_RULES = {
    "easy": SentenceRules(
        attribute_sets=EASY_ATTRIBUTE_SETS,
        none=(
            refer_by_swapped_attributes,
            refer_by_swapped_attributes,
            refer_by_swapped_attributes,
            refer_by_random_colour,
        ),
        single=(refer_by_attributes, refer_by_attributes, refer_by_attributes, refer_by_position),
        multi=(refer_by_attributes, refer_by_attributes, refer_to_pair, refer_to_all_except, refer_by_half),
    ),
    "full": SentenceRules(
        attribute_sets=(*EASY_ATTRIBUTE_SETS, ("shape", "size"), ("colour", "size")),
        none=(
            refer_by_swapped_attributes,
            refer_by_swapped_attributes,
            refer_by_random_colour,
            refer_by_half,
            refer_by_relation,
            refer_by_relation,
        ),
        single=(
            refer_by_attributes,
            refer_by_attributes,
            refer_by_position,
            refer_by_size,
            refer_by_half,
            refer_by_relation,
            refer_by_relation,
            refer_between,
        ),
        multi=(
            refer_by_attributes,
            refer_by_attributes,
            refer_to_pair,
            refer_to_pair,
            refer_to_all_except,
            refer_by_half,
            refer_by_half,
            refer_by_relation,
        ),
    ),
}


@dataclass(frozen=True)
class Expression:
    """One meaning, its sentences and its targets (indices of objects, ascending; empty: no target)."""

    meaning: Meaning
    sentences: tuple[str, ...]
    targets: tuple[int, ...]


def draw_expressions(
    rng: random.Random, objects: Sequence[VisibleObject], rules: SentenceRules, no_target: float
) -> Iterator[Expression]:
    """Draw three to five expressions of one to three sentences each; no sentence occurs twice in a scene."""
    used_sentences: set[str] = set()
    # Share of single targets among expressions with a target, as in gRefCOCO's train split: 120,624 to 69,580.
    single = (1 - no_target) * 0.637
    shares = (no_target, single, 1 - no_target - single)
    for _ in range(rng.randint(3, 5)):
        count, functions = rng.choices(((0, rules.none), (1, rules.single), (2, rules.multi)), shares)[0]
        for meaning, targets in draw_meanings(rng, objects, functions, rules.attribute_sets):
            wordings = dict.fromkeys(meaning.draw_sentence(rng) for _ in range(9))
            new_sentences = [sentence for sentence in wordings if sentence not in used_sentences]
            if min(len(targets), 2) == count and new_sentences:
                sentences = tuple(new_sentences[: rng.randint(1, 3)])
                used_sentences.update(sentences)
                yield Expression(meaning, sentences, targets)
                break


def draw_meanings(
    rng: random.Random,
    objects: Sequence[VisibleObject],
    functions: Sequence[DrawMeaning],
    attribute_sets: AttributeSets,
) -> Iterator[tuple[Meaning, tuple[int, ...]]]:
    """Draw unambiguous meanings with their targets; each function has 12 attempts, so that rare meanings occur."""
    for draw_meaning in rng.choices(functions, k=12):
        for _ in range(12):
            try:
                meaning = draw_meaning(rng, objects, attribute_sets)
                targets = tuple(sorted(meaning.find_targets(objects)))
            except AmbiguousError:
                continue
            yield meaning, targets

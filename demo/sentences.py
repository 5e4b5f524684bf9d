"""What is said about made scenes: sentences that start as meanings, whose targets are found among the visible things.

A meaning is `The`, `Except` or `Both` over nouns (`Kind`, `Side`, `Extreme`, `Relation`, `Between`). Its `find` is the
one judge of truth: a no-target sentence is one for which it finds nothing, and a meaning that a person could dispute
(`Unclear`) is never said. Its `words` draw one of several ways to say it, lower case and without punctuation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

# Truth with a margin, in parts of the image's side: what lies between the two limits is Unclear.
BESIDE = (0.0, 0.08)  # left of, above: how far the centres lie apart
HALF = (0.45, 0.55)  # where the left (upper) half ends and the right (lower) one begins, for centres
SIZE = (0.175, 0.195)  # longest side of a small thing at most, of a big thing at least
ALONG, ASIDE = 0.2, (0.12, 0.3)  # between: how far from either end (parts of the distance) and from the line
LEAD = 0.06  # how far the leftmost thing lies before the next one
GROWTH = 1.2  # how many times longer the biggest thing is than the next one


class Unclear(Exception):
    """The scene does not settle what the words mean: a person could answer one way or another."""


@dataclass(frozen=True)
class Thing:
    """What can be seen of one object: its words, centre and longest side of its visible box (parts of the side)."""

    shape: str
    colour: str
    x: float
    y: float
    extent: float

    @property
    def size(self) -> str:
        return "big" if self.extent >= SIZE[1] else "small"

    @classmethod
    def from_box(cls, shape: str, colour: str, box: Sequence[float], side: int) -> Thing:
        """The thing inside `box` (xywh, pixels) of a square image of `side` pixels."""
        left, top, width, height = box
        return cls(shape, colour, (left + width / 2) / side, (top + height / 2) / side, max(width, height) / side)


@dataclass(frozen=True)
class Kind:
    """Things by shape, colour and size; None leaves that open: "red circle", "big shape"."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; raises `Unclear` where a size is neither big nor small."""
        found = {i for i, t in enumerate(things) if self.shape in (None, t.shape) and self.colour in (None, t.colour)}
        if self.size is None:
            return found
        if any(SIZE[0] < things[i].extent < SIZE[1] for i in found):
            raise Unclear
        return {i for i in found if things[i].size == self.size}

    def words(self, rng: random.Random, plural: bool) -> str:
        size = rng.choice({"big": ("big", "large"), "small": ("small", "little"), None: ("",)}[self.size])
        noun = (self.shape or rng.choice(("shape", "object", "thing"))) + "s" * plural
        if self.colour and rng.random() < 0.1:
            return f"{size} {noun} in {self.colour}".lstrip()
        return " ".join(filter(None, (size, self.colour, noun)))


@dataclass(frozen=True)
class Side:
    """Those of a kind in one half of the image: "circles on the left"."""

    kind: Kind
    side: str

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; raises `Unclear` where one of the kind is near the middle."""
        place = {i: things[i].x if self.side in ("left", "right") else things[i].y for i in self.kind.find(things)}
        if any(HALF[0] < at < HALF[1] for at in place.values()):
            raise Unclear
        return {i for i, at in place.items() if (at <= HALF[0]) == (self.side in ("left", "top"))}

    def words(self, rng: random.Random, plural: bool) -> str:
        on = "on" if self.side in ("left", "right") else "at"
        place = rng.choice((f"{on} the {self.side}", f"{on} the {self.side}", f"in the {self.side} half"))
        return f"{self.kind.words(rng, plural)} {place}"


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
    """The one of a kind that goes farthest: "leftmost square", "biggest shape"."""

    kind: Kind
    end: str

    def find(self, things: Sequence[Thing]) -> set[int]:
        """One index, none if there is none of the kind; raises `Unclear` where the second comes close."""
        rank = {
            "left": lambda t: -t.x / LEAD,
            "right": lambda t: t.x / LEAD,
            "top": lambda t: -t.y / LEAD,
            "bottom": lambda t: t.y / LEAD,
            "big": lambda t: math.log(t.extent, GROWTH),
            "small": lambda t: -math.log(t.extent, GROWTH),
        }[self.end]
        ranked = sorted(((rank(things[i]), i) for i in self.kind.find(things)), reverse=True)
        if len(ranked) > 1 and ranked[0][0] - ranked[1][0] < 1:
            raise Unclear
        return {i for _, i in ranked[:1]}

    def words(self, rng: random.Random, plural: bool) -> str:
        return rng.choice(EXTREMES[self.end]).format(self.kind.words(rng, plural))


@dataclass(frozen=True)
class Relation:
    """Those of a kind that stand in a relation to one other thing: "circle left of the star"."""

    kind: Kind
    relation: str
    other: The

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; raises `Unclear` where the two are too near in that direction."""
        found = set()
        for j in self.other.find(things):
            for i in apart(self.kind.find(things), {j}):
                dx, dy = things[j].x - things[i].x, things[j].y - things[i].y
                ahead = {"left": dx, "right": -dx, "above": dy, "below": -dy}[self.relation]
                if BESIDE[0] < ahead < BESIDE[1]:
                    raise Unclear
                if ahead >= BESIDE[1]:
                    found.add(i)
        return found

    def words(self, rng: random.Random, plural: bool) -> str:
        link = {
            "left": ("left of", "to the left of"),
            "right": ("right of", "to the right of"),
            "above": ("above", "higher than"),
            "below": ("below", "lower than"),
        }[self.relation]
        return f"{self.kind.words(rng, plural)} {rng.choice(link)} the {self.other.noun.words(rng, False)}"


@dataclass(frozen=True)
class Between:
    """Those of a kind between two other things: "square between the star and the blue circle"."""

    kind: Kind
    first: The
    second: The

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; raises `Unclear` near the ends and at some distance from the connecting line."""
        ends = sorted(self.first.find(things) | self.second.find(things))
        if len(ends) < 2:
            raise Unclear
        a, b = (things[i] for i in ends)
        length = math.dist((a.x, a.y), (b.x, b.y)) + 1e-9
        found = set()
        for i in apart(self.kind.find(things), set(ends)):
            dx, dy = things[i].x - a.x, things[i].y - a.y
            along = (dx * (b.x - a.x) + dy * (b.y - a.y)) / length**2
            aside = abs(dx * (b.y - a.y) - dy * (b.x - a.x)) / length
            if ALONG <= along <= 1 - ALONG and aside <= ASIDE[0]:
                found.add(i)
            elif 0 < along < 1 and aside < ASIDE[1]:
                raise Unclear
        return found

    def words(self, rng: random.Random, plural: bool) -> str:
        ends = [f"the {end.noun.words(rng, False)}" for end in (self.first, self.second)]
        rng.shuffle(ends)
        return f"{self.kind.words(rng, plural)} {rng.choice(('between', 'in between'))} {' and '.join(ends)}"


def apart(found: set[int], others: set[int]) -> set[int]:
    """`found` without `others`; raises `Unclear` where only they are of the kind ("the star left of the star")."""
    if found and found <= others:
        raise Unclear
    return found - others


Noun = Kind | Side | Extreme | Relation | Between


@dataclass(frozen=True)
class The:
    """A noun as one thing (number 1), as exactly so many (2, 3, ...) or as all of them (0, at least two)."""

    noun: Noun
    number: int = 1

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; none at all is an answer (no target), any other wrong number is `Unclear`."""
        found = self.noun.find(things)
        if found and (len(found) < 2 if self.number == 0 else len(found) != self.number):
            raise Unclear
        return found

    def words(self, rng: random.Random) -> str:
        if self.number == 1:
            return rng.choice(("the ", "the ", "")) + self.noun.words(rng, False)
        if self.number == 0 and rng.random() < 0.25:
            return "every " + self.noun.words(rng, False)
        count = (
            ["all ", "all the ", "the "]
            if self.number == 0
            else [f"the {NUMBERS[self.number]} ", NUMBERS[self.number] + " "]
        )
        if self.number == 2:
            count.append("both ")
        return rng.choice(count) + self.noun.words(rng, True)


@dataclass(frozen=True)
class Except:
    """Everything but some: "everything except the star"."""

    rest: The

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; raises `Unclear` where nothing is excepted or nothing is left."""
        left_out = self.rest.find(things)
        if not 0 < len(left_out) < len(things):
            raise Unclear
        return set(range(len(things))) - left_out

    def words(self, rng: random.Random) -> str:
        start = rng.choice(("everything except", "everything but", "all shapes except", "all objects but"))
        return f"{start} the {self.rest.noun.words(rng, self.rest.number != 1)}"


@dataclass(frozen=True)
class Both:
    """Two things named one after the other: "the blue star and the red square"."""

    first: The
    second: The

    def find(self, things: Sequence[Thing]) -> set[int]:
        """Indices into `things`; raises `Unclear` where one of the two is missing or both are the same."""
        parts = [self.first.find(things), self.second.find(things)]
        if not all(parts) or parts[0] & parts[1]:
            raise Unclear
        return parts[0] | parts[1]

    def words(self, rng: random.Random) -> str:
        the = rng.choice(("the ", "the ", ""))
        nouns = (self.first.noun.words(rng, False), self.second.noun.words(rng, False))
        return rng.choice((" and ", " and ", " as well as ")).join(the + noun for noun in nouns)


Meaning = The | Except | Both


# ------------------------------------------------------------------------------------------- what is said of a scene

Forms = tuple[tuple[str, ...], ...]  # which attributes a kind may name together


def say_kind(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    return counted(rng, kind_of(rng, things, forms), things)


def say_swapped(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    """Each attribute from another thing: every word is true of the scene, all together of nothing in it."""
    form = rng.choice([form for form in forms if len(form) > 1])
    return counted(rng, Kind(**{name: named(rng.choice(things), name) for name in form}), things)


def say_foreign(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    """Any colour with a shape of the scene: some scenes hold nothing that could be swapped."""
    return counted(rng, Kind(rng.choice(things).shape, rng.choice(COLOURS)), things)


def say_place(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    return The(Extreme(rivals(rng, things), rng.choice(("left", "right", "top", "bottom"))))


def say_size(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    return The(Extreme(rivals(rng, things), rng.choice(("big", "small"))))


def say_side(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    side = Side(rng.choice((Kind(), kind_of(rng, things, forms))), rng.choice(("left", "right", "top", "bottom")))
    return counted(rng, side, things)


def say_relation(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    kind = rng.choice((Kind(), kind_of(rng, things, forms), kind_of(rng, things, forms)))
    relation = rng.choice(("left", "right", "above", "below"))
    return counted(rng, Relation(kind, relation, The(kind_of(rng, things, forms))), things)


def say_between(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    kind = rng.choice((Kind(), kind_of(rng, things, forms)))
    ends = [The(kind_of(rng, things, forms)) for _ in range(2)]
    return counted(rng, Between(kind, *ends), things)


def say_except(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    kind = kind_of(rng, things, forms)
    return Except(The(kind, 0 if len(kind.find(things)) > 1 else 1))


def say_both(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Meaning:
    return Both(The(kind_of(rng, things, forms)), The(kind_of(rng, things, forms)))


def kind_of(rng: random.Random, things: Sequence[Thing], forms: Forms) -> Kind:
    """A kind that at least one thing is of, naming the attributes of one of `forms`."""
    thing = rng.choice(things)
    return Kind(**{name: named(thing, name) for name in rng.choice(forms)})


def named(thing: Thing, attribute: str) -> str:
    return {"shape": thing.shape, "colour": thing.colour, "size": thing.size}[attribute]


def rivals(rng: random.Random, things: Sequence[Thing]) -> Kind:
    """A kind of which there are several: "the leftmost star" of one star sounds odd."""
    thing = rng.choice(things)
    kind = rng.choice((Kind(), Kind(thing.shape), Kind(colour=thing.colour)))
    if len(kind.find(things)) < 2:
        raise Unclear
    return kind


def counted(rng: random.Random, noun: Noun, things: Sequence[Thing]) -> The:
    """The noun with a number that fits what it finds; a noun that finds nothing is mostly said of one thing."""
    count = len(noun.find(things))
    return The(noun, rng.choice({0: (1, 1, 1, 0), 1: (1,)}.get(count, (0, count))))


Saying = Callable[[random.Random, Sequence[Thing], Forms], Meaning]


@dataclass(frozen=True)
class Speech:
    """What a level says: the attributes named together and, for each number of targets, ways to come to a meaning."""

    forms: Forms
    none: tuple[Saying, ...]
    single: tuple[Saying, ...]
    multi: tuple[Saying, ...]


PLAIN = (("shape", "colour"), ("shape", "colour"), ("shape",), ("colour",))
SPEECHES = {
    "easy": Speech(
        forms=PLAIN,
        none=(say_swapped, say_swapped, say_swapped, say_foreign),
        single=(say_kind, say_kind, say_kind, say_place),
        multi=(say_kind, say_kind, say_both, say_except, say_side),
    ),
    "full": Speech(
        forms=(*PLAIN, ("shape", "size"), ("colour", "size")),
        none=(say_swapped, say_swapped, say_foreign, say_side, say_relation, say_relation),
        single=(say_kind, say_kind, say_place, say_size, say_side, say_relation, say_relation, say_between),
        multi=(say_kind, say_kind, say_both, say_both, say_except, say_side, say_side, say_relation),
    ),
}


@dataclass(frozen=True)
class Expression:
    """One meaning, the sentences that say it and the things it refers to (indices, ascending; empty: no target)."""

    meaning: Meaning
    sentences: tuple[str, ...]
    targets: tuple[int, ...]


def expressions(rng: random.Random, things: Sequence[Thing], speech: Speech, no_target: float) -> Iterator[Expression]:
    """Three to five meanings of a scene in one to three sentences each, no sentence twice."""
    said: set[str] = set()
    single = (1 - no_target) * 0.637  # of those with a target, as in the genuine train split: 120,624 to 69,580
    shares = (no_target, single, 1 - no_target - single)
    for _ in range(rng.randint(3, 5)):
        count, sayings = rng.choices(((0, speech.none), (1, speech.single), (2, speech.multi)), shares)[0]
        for meaning, targets in meanings(rng, things, sayings, speech.forms):
            fresh = [words for words in dict.fromkeys(meaning.words(rng) for _ in range(9)) if words not in said]
            if min(len(targets), 2) == count and fresh:
                sentences = tuple(fresh[: rng.randint(1, 3)])
                said.update(sentences)
                yield Expression(meaning, sentences, targets)
                break


def meanings(
    rng: random.Random, things: Sequence[Thing], sayings: Sequence[Saying], forms: Forms
) -> Iterator[tuple[Meaning, tuple[int, ...]]]:
    """Clear meanings with their targets; each saying is tried a dozen times, so that rare ones get their share."""
    for saying in rng.choices(sayings, k=12):
        for _ in range(12):
            try:
                meaning = saying(rng, things, forms)
                targets = tuple(sorted(meaning.find(things)))
            except Unclear:
                continue
            yield meaning, targets

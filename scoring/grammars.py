r"""Grammars: how language models write boxes, one entry a family; written, read, and asked for.

    text = format_answer("qwen3", [[10, 20, 50, 60]], "the red car", width=640, height=480)
    boxes, outcome = parse("qwen3", text, width=640, height=480)

A grammar is named by the caller, never guessed from the numbers. An answer is read as one of three outcomes:

    "boxes"       at least one whole box; exchanged corners are put in order, boxes are clipped to the image
    "none"        the model says that nothing matches, in the form of its grammar or in words
    "unreadable"  everything else, such as an answer that was cut off; it is not a rejection
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

Box = Sequence[float]  # x0, y0, x1, y1

PATCH = 28  # pixels; Qwen2.5-VL resizes images to multiples of it
QWEN_PIXELS = (4 * PATCH * PATCH, 16384 * PATCH * PATCH)  # least and most, in its processor's default
KOSMOS_CELLS = 32  # a side of the grid of Kosmos-2


class Parsed(NamedTuple):
    """Boxes (x0, y0, x1, y1 in pixels of the image), and "boxes", "none" or "unreadable"."""

    boxes: list[list[float]]
    outcome: str


@dataclass(frozen=True)
class Grammar:
    """How one family writes boxes.

    Attributes:
        prompt: the request; `{sentence}` stands for the sentence.
        box: template of one box, with {x0}, {y0}, {x1}, {y1}, {sentence} and {label} (the sentence as a JSON string).
        pattern: matches one written box, with groups x0, y0, x1, y1 (points: x0 and y0).
        separator: between boxes.
        answer: template of an answer, with {boxes} and {sentence}.
        none: template of the answer "none".
        own_none: matches a whole answer "none" in a form that no other family shares.
        steps: the written number of the right or lower border; None for pixels of the image that the model gets.
        digits: decimal places of written numbers.
        limit: the greatest written number; None for `steps`.
        shift: of the centre of a step, 0.5 where a number stands for an interval.
    """

    prompt: str
    box: str
    pattern: str
    separator: str = ", "
    answer: str = "{boxes}"
    none: str = "None"
    own_none: str = r"(?!)"
    steps: int | None = 1000
    digits: int = 0
    limit: int | None = None
    shift: float = 0.0

    def written_size(self, width: int, height: int) -> tuple[int, int]:
        """The numbers that are written for the right and the lower border of an image (pixels)."""
        return (self.steps, self.steps) if self.steps else qwen_size(width, height)

    def write_box(self, box: Box, sentence: str, width: int, height: int) -> str:
        """A box (pixels) in the numbers of the grammar."""
        sides = self.written_size(width, height) * 2
        values = [x / size * side - self.shift for x, size, side in zip(box, (width, height) * 2, sides)]
        values = [round(min(max(v, 0), self.limit or side), self.digits or None) for v, side in zip(values, sides)]
        return self.box.format(**dict(zip(CORNERS, values)), label=json.dumps(sentence), sentence=sentence)

    def read_box(self, match: re.Match, width: int, height: int) -> list[float]:
        """The box (pixels) of a match of `pattern`; a point is a box without area."""
        groups = match.groupdict()
        values = [float(groups.get(name) or groups[name.replace("1", "0")]) for name in CORNERS]
        sides = self.written_size(width, height) * 2
        return [(v + self.shift) / side * size for v, side, size in zip(values, sides, (width, height) * 2)]


class PointGrammar(Grammar):
    """Points instead of boxes: the centre of each box."""

    def write_box(self, box: Box, sentence: str, width: int, height: int) -> str:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        return super().write_box((x, y, x, y), sentence, width, height)


class KosmosGrammar(Grammar):
    """Boxes as the cells of their upper left and lower right corner, in a grid of 32 x 32 over the image."""

    def write_box(self, box: Box, sentence: str, width: int, height: int) -> str:
        cells = [
            min(max(int(x / size * KOSMOS_CELLS), 0), KOSMOS_CELLS - 1) for x, size in zip(box, (width, height) * 2)
        ]
        first, last = (cells[y] * KOSMOS_CELLS + cells[y - 1] for y in (1, 3))
        return self.box.format(first=first, last=last)

    def read_box(self, match: re.Match, width: int, height: int) -> list[float]:
        (y0, x0), (y1, x1) = (divmod(int(match[name]), KOSMOS_CELLS) for name in ("first", "last"))
        # the centres of both cells; a box in one row or column of cells is given its full cells
        before, after = (0, 1) if x0 == x1 or y0 == y1 else (0.5, 0.5)
        cells = (x0 + before, y0 + before, x1 + after, y1 + after)
        return [cell / KOSMOS_CELLS * size for cell, size in zip(cells, (width, height) * 2)]


def parse(grammar: str, text: str | None, width: int, height: int) -> Parsed:
    """Read the answer of a language model.

    Args:
        grammar: a key of `GRAMMARS`.
        text: the raw answer; None is unreadable.
        width, height: of the image, in pixels.

    Raises:
        ValueError: a grammar that does not exist.
    """
    rules = named(grammar)
    text = None if text is None else _final_answer(unicodedata.normalize("NFKC", text))
    if text is None:
        return Parsed([], "unreadable")
    # a sentence may hold numbers in brackets; one that was cut off goes on to the end of the text
    numbers = re.sub(REPEATED_SENTENCE.replace("END", "|$"), "", text, flags=re.DOTALL)
    numbers = re.sub(CORNER_PAIRS, r"\g<start>\g<first>,\g<last>", numbers)
    boxes = [rules.read_box(match, width, height) for match in re.finditer(rules.pattern, numbers)]
    if boxes := [_in_image(box, width, height) for box in boxes if all(map(math.isfinite, box))]:
        return Parsed(boxes, "boxes")
    words = re.sub(REPEATED_SENTENCE.replace("END", ""), "", text, flags=re.DOTALL).strip().replace("\u2019", "'")
    if re.search(NONE_FORMS, words, re.IGNORECASE) or re.fullmatch(rules.own_none, words):
        return Parsed([], "none")
    may_be_cut_off = re.search(r"[\[{<]|\(\d|\d,", words)  # the beginning of a box
    is_refused = re.search(REFUSAL_WORDS, words, re.IGNORECASE)
    says_none = not may_be_cut_off and not is_refused and re.search(NONE_WORDS, words, re.IGNORECASE)
    return Parsed([], "none" if says_none else "unreadable")


def format_answer(grammar: str, boxes: Sequence[Box], sentence: str, width: int, height: int) -> str:
    """Write boxes (x0, y0, x1, y1 in pixels of the image) as the grammar has it; no boxes are its "none"."""
    rules = named(grammar)
    if not len(boxes):
        return rules.none.format(sentence=sentence)
    written = [rules.write_box(box, sentence, width, height) for box in boxes]
    return rules.answer.format(boxes=rules.separator.join(written), sentence=sentence)


def prompt(grammar: str, sentence: str) -> str:
    """The request for the boxes of a sentence."""
    return named(grammar).prompt.format(sentence=sentence)


def sent_size(grammar: str, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels at which an image is sent: multiples of 28 where a model answers in pixels."""
    return (width, height) if named(grammar).steps else qwen_size(width, height)


def resize(image: Image.Image, grammar: str) -> Image.Image:
    """The image in RGB at its `sent_size`."""
    size = sent_size(grammar, *image.size)
    return image.convert("RGB") if size == image.size else image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def qwen_size(width: int, height: int) -> tuple[int, int]:
    """Width and height to which Qwen2.5-VL's processor resizes an image; it leaves images of this size alone."""
    least, most = QWEN_PIXELS
    sides = [max(PATCH, round(side / PATCH) * PATCH) for side in (width, height)]
    if not least <= sides[0] * sides[1] <= most:
        is_large = sides[0] * sides[1] > most
        scale = math.sqrt((most if is_large else least) / (width * height))
        whole = math.floor if is_large else math.ceil
        sides = [max(PATCH, whole(side * scale / PATCH) * PATCH) for side in (width, height)]
    return sides[0], sides[1]


def named(grammar: str) -> Grammar:
    """The grammar of a name; raises ValueError with the names there are."""
    if grammar not in GRAMMARS:
        raise ValueError(f"grammar is {grammar!r}; choose one of {', '.join(GRAMMARS)}")
    return GRAMMARS[grammar]


def _final_answer(text: str) -> str | None:
    """The text after the last thought, or what it marks as the answer; None when a thought was cut off."""
    text = re.split(f"</{THOUGHT}>", text)[-1]
    if re.search(f"<{THOUGHT}>", text):
        return None
    marked = [
        match for match in re.finditer(MARKED_ANSWER, text, re.DOTALL) if match["content"].strip() or match["end"]
    ]
    text = "\n".join(match["content"].strip() or "[]" for match in marked) or text
    return re.sub(SPECIAL_TOKENS, "", text).strip()


def _in_image(box: Box, width: int, height: int) -> list[float]:
    """The box clipped to the image, with its corners in order."""
    xs, ys = ([min(max(x, 0.0), float(size)) for x in box[i::2]] for i, size in enumerate((width, height)))
    return [min(xs), min(ys), max(xs), max(ys)]


# ---- the table ---------------------------------------------------------------------------------------------------

CORNERS = ("x0", "y0", "x1", "y1")
THOUGHT = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
MARKED_ANSWER = r"(?:<answer>|<\|begin_of_box\|>)(?P<content>.*?)(?P<end></answer>|<\|end_of_box\|>|$)"
SPECIAL_TOKENS = r"<\|(?:im_end|endoftext|eot_id|end_of_box)\|>|</?s>|<eos>|<bos>|<pad>|<end_of_turn>"
CORNER_PAIRS = (
    r"""(?P<start>box\w{0,9}["']\s*:\s*\[)\s*\[(?P<first>[^][,]*,[^][,]*)\]\s*,\s*\[(?P<last>[^][,]*,[^][,]*)\]"""
)
# END stands for another way in which a repeated sentence can end
REPEATED_SENTENCE = (
    r"<ref>.*?(?:</ref>END)|<\|object_ref_start\|>.*?(?:<\|object_ref_end\|>END)|<phrase>.*?(?:</phrase>END)"
    r"""|(?P<mark>["'])(?:label|name|text|sentence|phrase|caption|description|category|class|reason\w*|mask)(?P=mark)"""
    r"""\s*:\s*(?P<quote>["']).*?(?:(?P=quote)(?=\s*[,}\]])END)|\balt\s*=\s*"[^"]*(?:"END)"""
)
NONE_FORMS = (
    r"""\[\s*(?:\{\s*\}|["']?(?:none|null)["']?)?\s*\]|^(?:```\w*)?\s*(?:\{\s*\}|null)"""
    r"""|["']\s*:\s*(?:null|none|(?P<quote>["'])(?:none|null|n/a)(?P=quote))"""
    r"|<box>\s*(?:none)?\s*</box>|<\|box_start\|>\s*(?:none)?\s*<\|box_end\|>"
)
REFUSAL_WORDS = r"(?:\bcan't|\bcannot|\bcan not|\bunable to|\bnot able to) (?:view|access|open|process|analy[sz]e)\b"
_THE_IMAGE = r"(?:(?:any|an?|the|this|that|your) )?(?:image|picture|photo)"
NONE_WORDS = (
    r"(?<!with )(?<!wearing )(?<!holding )(?<!doing )\b(?:none|null|nothing)\b"
    r"|^no\W*$|^n/?a\W*$|\bnot applicable\b|\btotal of (?:0|zero)\b"
    r"|\bno (?:\w+ )?(?:such|match\w*|objects?|targets?|instances?|boxes|box|bounding|regions?|results?)\b"
    r"|(?:^|[.:;,!?\n]\s*)no (?!image|picture|photo|doubt|question|idea|way|problem|longer)(?:[\w'-]+ ){1,8}?"
    r"(?:is|are|was|were|can be|could be|exists?|appears?|match(?:es)?|fits?|found|visible|present|in (?:the|this))\b"
    r"|\bthere(?:'s| is| are|'re) no (?!image|picture|photo|way|doubt|question|information)"
    r"|\bthere (?:isn't|aren't|is not|are not)\b"
    r"|(?:\bnot|n't) (?:present|found|visible|exist|appear|contain|show|include|match|refer|correspond|depict)\b"
    r"|(?:\bnot|n't) in (?:the|this) (?:image|picture|photo)\b"
    r"|(?:\bnot|n't|\bcannot|\bunable to|\bnot able to) (?:see|find|locate|detect|spot) "
    rf"(?!{_THE_IMAGE})(?:any|an?|the)\b"
    r"|\b(?:is|are) (?:absent|missing)\b(?! (?:an?|the|his|her|its|their)\b)"
)
_QUOTE = r"""(?:["']\s*)?"""
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_N = rf"\s*{_QUOTE}(?P<{{}}>{_NUMBER})\s*{_QUOTE}"  # one written number; some models write it as a string


def _numbers(template: str, names: Sequence[str] = CORNERS) -> str:
    """A pattern from a template in which `N` stands for the next of the named numbers."""
    parts = template.split("N")
    return "".join(part + _N.format(name) for part, name in zip(parts, names)) + parts[-1]


_LIST_OF_FOUR = r"""[\[("']N,N,N,N(?:,\s*)?[\])"']"""
_LIST = _numbers(_LIST_OF_FOUR)
_CELL = r"0\d{3}|10[01]\d|102[0-3]"
_KEYED = "".join(
    rf"""(?=[^{{}}]*["']{key}["']\s*:{_N.format(name)}[,}}])"""
    for key, name in zip(("x_min", "y_min", "x_max", "y_max"), CORNERS)
)
_ASK = 'Locate every object that this sentence refers to: "{sentence}". '


def _json_grammar(key: str, order: str, **fields: object) -> Grammar:
    names = order.split(", ")
    ask = f'Answer with a JSON list of {{{{"{key}": [{order}], "label": "..."}}}}, and with [] where there is none.'
    box = f'{{{{"{key}": [{", ".join(f"{{{name}}}" for name in names)}], "label": {{label}}}}}}'
    forms = {"answer": "```json\n[{boxes}]\n```", "none": "```json\n[]\n```"}
    return Grammar(prompt=_ASK + ask, box=box, pattern=_numbers(_LIST_OF_FOUR, names), **forms, **fields)


GRAMMARS: dict[str, Grammar] = {
    "qwen2": Grammar(
        prompt="Locate every <|object_ref_start|>{sentence}<|object_ref_end|> by boxes. Answer None if there is none.",
        box="<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>",
        pattern=_numbers(r"\(N,N\)\s*,\s*\(N,N\)"),
        separator="",
        answer="<|object_ref_start|>{sentence}<|object_ref_end|>{boxes}",
    ),
    "qwen2.5": _json_grammar("bbox_2d", "x0, y0, x1, y1", steps=None),
    "qwen3": _json_grammar("bbox_2d", "x0, y0, x1, y1"),
    "internvl": Grammar(
        prompt="Please provide the bounding box coordinates of the regions this sentence describes: "
        "<ref>{sentence}</ref>. Answer None if there are none.",
        box="[{x0}, {y0}, {x1}, {y1}]",
        pattern=_LIST,
        answer="<ref>{sentence}</ref><box>[{boxes}]</box>",
    ),
    "glm": Grammar(
        prompt=_ASK + "Answer with their boxes as [[x0, y0, x1, y1]], 0 to 1000, and with [] where there is none.",
        box="[{x0}, {y0}, {x1}, {y1}]",
        pattern=_LIST,
        answer="<|begin_of_box|>[{boxes}]<|end_of_box|>",
        none="<|begin_of_box|>[]<|end_of_box|>",
    ),
    "gemini": _json_grammar("box_2d", "y0, x0, y1, x1"),
    "paligemma": Grammar(
        prompt="detect {sentence}",
        box="<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}> {sentence}",
        pattern=r"<loc(?P<y0>\d{4})>\s*<loc(?P<x0>\d{4})>\s*<loc(?P<y1>\d{4})>\s*<loc(?P<x1>\d{4})>",
        separator=" ; ",
        none="",
        own_none="",
        steps=1024,
        limit=1023,
    ),
    "florence2": Grammar(
        prompt="<OPEN_VOCABULARY_DETECTION>{sentence}",
        box="<loc_{x0}><loc_{y0}><loc_{x1}><loc_{y1}>",
        pattern=r"<loc_(?P<x0>\d+)>\s*<loc_(?P<y0>\d+)>\s*<loc_(?P<x1>\d+)>\s*<loc_(?P<y1>\d+)>",
        separator="",
        answer="{sentence}{boxes}",
        none="",
        own_none="[^<]*",
        limit=999,
        shift=0.5,
    ),
    "kosmos2": KosmosGrammar(
        prompt="<grounding><phrase>{sentence}</phrase>",
        box="<patch_index_{first:04d}><patch_index_{last:04d}>",
        pattern=rf"<patch_index_(?P<first>{_CELL})>\s*<patch_index_(?P<last>{_CELL})>",
        separator="</delimiter_of_multi_objects/>",
        answer="<phrase>{sentence}</phrase><object>{boxes}</object>",
        none="<phrase>{sentence}</phrase>",
        own_none="(?:<grounding>)?[^<]*",
    ),
    "rex-omni": Grammar(
        prompt="Detect {sentence}. Output the bounding box coordinates in [x0, y0, x1, y1] format.",
        box="<{x0}><{y0}><{x1}><{y1}>",
        pattern=r"<(?P<x0>\d{1,3})>\s*<(?P<y0>\d{1,3})>\s*<(?P<x1>\d{1,3})>\s*<(?P<y1>\d{1,3})>",
        separator=",",
        answer="<|object_ref_start|>{sentence}<|object_ref_end|><|box_start|>{boxes}<|box_end|>",
        none="<|object_ref_start|>{sentence}<|object_ref_end|><|box_start|>None<|box_end|>",
        steps=999,
    ),
    "molmo": PointGrammar(
        prompt='Point to every "{sentence}". Say that there are none if there are none.',
        box='<point x="{x0}" y="{y0}">point</point>',
        pattern=r"""\bx(?P<number>\d*)\s*=\s*["']\s*(?P<x0>\d+(?:\.\d+)?)\s*%?\s*["']\s*"""
        r"""y(?P=number)\s*=\s*["']\s*(?P<y0>\d+(?:\.\d+)?)\s*%?\s*["']""",
        separator=" ",
        none="There are none.",
        steps=100,
        digits=1,
    ),
    "moondream": Grammar(
        prompt="{sentence}",
        box='{{"x_min": {x0}, "y_min": {y0}, "x_max": {x1}, "y_max": {y1}}}',
        pattern=rf"\{{{_KEYED}[^{{}}]*\}}",
        answer='{{"objects": [{boxes}]}}',
        none='{{"objects": []}}',
        steps=1,
        digits=4,
    ),
    "llava": Grammar(
        prompt=_ASK + "Answer with boxes [x0, y0, x1, y1] in 0 to 1, and with None where there is none.",
        box="[{x0}, {y0}, {x1}, {y1}]",
        pattern=_LIST,
        steps=1,
        digits=3,
    ),
}

"""The words of a sentence that name its targets: in MDETR's training each box points at them.

With spaCy and its small English model installed, they are the nouns at the root of its parse. Otherwise by a rule: the
last word before the first modifier (a preposition, "wearing", a comma, ...) that is not a place, and the same in each
part after an "and"; after a modifier such a part must begin with an article: "the two PEOPLE on the left and a DOG".
Where neither gives a noun, the whole sentence.
"""

import importlib
import re
from collections.abc import Callable
from functools import cache

Span = tuple[int, int]

_MODIFIER = re.compile(
    r"in|on|at|of|with|without|by|near|next|to|from|under|over|above|below|behind|beside|between|among|against|inside"
    r"|outside|around|along|across|that|which|who|whose|where|closest|nearest|farthest|furthest|except|not|but|for|is"
    r"|are|was|were|has|have|wearing|holding|sitting|standing|facing|looking|riding|walking|carrying|second|third|\W"
)
_ARTICLE = re.compile(r"an?|the|all|both|two|three|four|five|his|her|their|any|every|\d+")
_PLACE = re.compile(
    r"left|right|top|bottom|middle|cent(er|re)|front|back|far|upper|lower|side|corner|first|last|everything|anything|nothing"
)


def root_nouns(sentence: str) -> list[Span]:
    """The (start, end) character spans of the words that name the targets; empty only for an empty sentence."""
    parse = _parser()
    spans = nouns_by_rule(sentence) if parse is None else nouns_of_parse(parse(sentence))
    return spans or ([(0, len(sentence))] if sentence else [])


def nouns_by_rule(sentence: str) -> list[Span]:
    """The nouns by the rule of this module."""
    words = [(match[0].lower(), match.span()) for match in re.finditer(r"[\w'-]+|[^\w\s]", sentence)]
    followers = [*(word for word, _ in words), ""][1:]
    # `in_head`: before the first modifier, where the next noun names a target
    nouns, noun, in_head = [], None, True
    for (word, span), follower in zip(words, followers, strict=True):
        if word in ("and", "&"):
            nouns.append(noun)
            noun, in_head = None, in_head or _ARTICLE.fullmatch(follower) is not None
        elif _MODIFIER.fullmatch(word):
            in_head = False
        elif in_head and not _ARTICLE.fullmatch(word) and not _PLACE.fullmatch(word):
            noun = span
    return [span for span in (*nouns, noun) if span]


def nouns_of_parse(doc: "Doc") -> list[Span]:  # noqa: F821 (spaCy's, which need not be installed)
    """Of each sentence the root, or the subjects of a root that is no noun, with the nouns joined to them by "and"."""
    nouns = []
    for sentence in doc.sents:
        root = sentence.root
        heads = [root] if root.pos_ in _NOUNS else [child for child in root.children if child.dep_.startswith("nsubj")]
        nouns += [token for head in heads for token in (head, *head.conjuncts) if token.pos_ in _NOUNS]
    return sorted({(token.idx, token.idx + len(token.text)) for token in nouns})


@cache
def _parser() -> Callable[[str], object] | None:
    # Not an import statement: for code loaded from the Hub, transformers requires every imported package.
    try:
        return importlib.import_module("spacy").load("en_core_web_sm")
    except (ImportError, OSError):
        return None


_NOUNS = {"NOUN", "PROPN", "PRON"}

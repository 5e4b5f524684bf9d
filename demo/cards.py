"""The answers on the page: one card a sentence, with the marked picture, the scores and the downloads, as HTML."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as rle_masks

Colour = tuple[int, int, int]
CSS = """
.tools {margin: 0 0 .75rem; font-size: .9rem}
.tools a, .card a {margin: 0 !important; padding: 0 !important; color: inherit !important}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1rem}
.card {margin: 0; border: 1px solid var(--border-color-primary); border-radius: 12px; overflow: hidden;
  background: var(--block-background-fill)}
.card figcaption {padding: .75rem .9rem 1rem; border-top: 4px solid var(--ink)}
.card.none figcaption {border-top-color: var(--border-color-primary)}
.card p {margin: 0; overflow-wrap: anywhere}
.card .sentence {font-weight: 600; margin-bottom: .35rem}
.card .score, .card .objects, .card .download {font-size: .85rem; color: var(--body-text-color-subdued);
  margin-top: .6rem}
.card .warning {font-size: .85rem; margin-top: .6rem; padding: .4rem .6rem; border-radius: 8px;
  border: 1px solid var(--border-color-primary); border-left: 4px solid #d97706}
.view {position: relative; display: block; width: 100%; padding: 0; border: 0; background: none; cursor: zoom-in}
.view img {display: block; width: 100%; max-height: 22rem; object-fit: contain; margin: 0}
.view .marked, .view svg {position: absolute; inset: 0; width: 100%; height: 100%; max-height: none}
.view rect {fill: none; vector-effect: non-scaling-stroke}
.view text {font-family: system-ui, sans-serif; font-weight: 700; paint-order: stroke; stroke: #fff}
.view:focus-visible {outline: 3px solid var(--color-accent); outline-offset: -3px}
.hide-masks .marked, .hide-boxes .view svg {display: none !important}
.zoomed .view {position: fixed; inset: 0; z-index: 1000; height: 100%; background: rgb(0 0 0 / .9); cursor: zoom-out}
.zoomed .view img {height: 100%; max-height: none}
.meter {position: relative; height: 6px; margin-top: .4rem; border-radius: 3px;
  background: var(--border-color-primary)}
.meter i {position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: var(--body-text-color-subdued)}
.meter b {position: absolute; top: -4px; width: 2px; height: 14px; background: var(--body-text-color)}
.empty {padding: 3rem 1rem; text-align: center; color: var(--body-text-color-subdued);
  border: 1px dashed var(--body-text-color-subdued); border-radius: 12px}
"""
ENLARGE = "this.closest('.card').classList.toggle('zoomed')"


@dataclass(frozen=True)
class SentenceCard:
    """The answer for one sentence, with the pictures as data URLs."""

    sentence: str
    marked_url: str  # the picture with the mask; of a model without masks the picture alone
    plain_url: str  # the picture alone
    mask_share: float | None  # fraction of the pixels, 0..1; None: the model gives no masks
    no_target_score: float  # probability, 0..1
    colour: Colour
    boxes: tuple[tuple[float, ...], ...] | None = None  # xyxy, pixels; None: the model gives no boxes
    scores: tuple[float, ...] = ()  # of the boxes, 0..1
    size: tuple[int, int] = (1, 1)  # width, height of the picture, pixels
    mask_url: str = ""  # black and white, for download
    unknown_words: tuple[str, ...] = ()
    answer: dict[str, object] | None = None  # of the pipeline, plain JSON


def make_card(
    picture: Image.Image,
    plain_url: str,
    answer: dict[str, object],
    colour: Colour,
    unknown_words: tuple[str, ...] = (),
) -> SentenceCard:
    """Make the card of one answer of the pipeline with `return_rle=True`."""
    mask = rle_masks.decode(answer["mask"]).astype(bool) if "mask" in answer else None
    has_mask = mask is not None
    return SentenceCard(
        sentence=answer["sentence"],
        marked_url=data_url(draw_mask(picture, mask, colour)) if has_mask else plain_url,
        plain_url=plain_url,
        mask_share=float(mask.mean()) if has_mask else None,
        no_target_score=answer["no_target_score"],
        colour=colour,
        boxes=tuple(map(tuple, answer["boxes"])) if "boxes" in answer else None,
        scores=tuple(answer.get("scores", ())),
        size=picture.size,
        mask_url=data_url(Image.fromarray(mask), "PNG") if has_mask else "",
        unknown_words=unknown_words,
        answer=answer,
    )


def draw_mask(picture: Image.Image, mask: np.ndarray, colour: Colour) -> Image.Image:
    """Return the picture with the mask (height, width) bool in colour, an outline, and the rest darker."""
    pixels = np.asarray(picture, np.float32)
    grey = pixels.mean(2, keepdims=True)
    marked = np.where(mask[..., None], 0.6 * pixels + 0.4 * np.float32(colour), 0.45 * grey + 0.25 * pixels)
    line = outline(picture.size)
    inner, outer = dilate(mask, line), dilate(mask, 2 * line)
    marked[outer & ~inner] = 255
    marked[inner & ~mask] = colour
    return Image.fromarray(marked.astype(np.uint8))


def outline(size: tuple[int, int]) -> int:
    """Width of each of the two lines around a mask, in pixels."""
    return max(1, max(size) // 250)


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Extend the mask by `pixels` in each direction."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def data_url(picture: Image.Image, kind: str = "WEBP") -> str:
    """Encode the picture as a data URL."""
    buffer = BytesIO()
    picture.save(buffer, kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def cards_html(cards: Sequence[SentenceCard], threshold: float) -> str:
    """Return the cards as HTML; `threshold` (0..1) decides which sentences have no target."""
    answers = json.dumps([card.answer for card in cards])
    link = f"data:application/json;base64,{base64.b64encode(answers.encode()).decode()}"
    body = "".join(card_html(card, threshold) for card in cards)
    return (
        f'<p class="tools"><a download="answers.json" href="{link}">Download the answers (JSON)</a></p>'
        f'<div class="cards" aria-live="polite">{body}</div>'
    )


def card_html(card: SentenceCard, threshold: float) -> str:
    """Return one card as HTML: picture, decision, objects, and a bar of the no-target probability."""
    sentence, score = html.escape(card.sentence), card.no_target_score
    no_target = score > threshold
    label = f"Probability of no target {score:.2f}, threshold {threshold:.2f}"
    objects = ", ".join(f"{number:.2f}" for number in card.scores)
    unknown = ", ".join(map(html.escape, card.unknown_words))
    parts = [
        f'<p class="sentence">{sentence}</p><p class="verdict">{verdict(card, no_target)}</p>',
        f'<p class="objects">Scores of the objects: {objects}</p>' if objects and not no_target else "",
        f'<p class="warning">The model does not know: {unknown}. Its answer may be wrong.</p>' if unknown else "",
        f'<p class="score">Probability of no target: {score:.2f}</p>',
        f'<div class="meter" role="img" aria-label="{label}"><i style="width: {score:.1%}"></i>'
        f'<b style="left: {threshold:.1%}"></b></div>',
        f'<p class="download"><a download="mask.png" href="{card.mask_url}">Download the mask (PNG)</a></p>'
        if card.mask_url and not no_target
        else "",
    ]
    return (
        f'<figure class="card {"none" if no_target else "found"}" style="--ink: rgb{card.colour}">'
        f"{view_html(card, no_target)}<figcaption>{''.join(parts)}</figcaption></figure>"
    )


def verdict(card: SentenceCard, no_target: bool) -> str:
    """The decision in words, as HTML."""
    if no_target:
        return "<b>None here</b>"
    parts = []
    if card.mask_share:
        share = f"{card.mask_share:.1%}" if card.mask_share >= 0.001 else "less than 0.1%"
        parts.append(f"{share} of the picture")
    if card.boxes:
        parts.append(f"{len(card.boxes)} box{'es' * (len(card.boxes) != 1)}")
    return f"<b>Found</b>, {', '.join(parts)}" if parts else "<b>Unsure</b>: a target is likely, but nothing is marked"


def view_html(card: SentenceCard, no_target: bool) -> str:
    """The picture as a button that enlarges it, with the mask and the boxes in layers of their own."""
    sentence = html.escape(card.sentence)
    alt = "the picture without marks" if no_target else f"the picture with “{sentence}” marked"
    layers = f'<img class="plain" src="{card.plain_url}" alt="{alt}">'
    if not no_target and card.mask_share is not None:
        layers += f'<img class="marked" src="{card.marked_url}" alt="">'
    if not no_target and card.boxes:
        layers += boxes_svg(card)
    label = f"Enlarge or shrink: {alt}"
    return f'<button type="button" class="view" aria-label="{label}" onclick="{ENLARGE}">{layers}</button>'


def boxes_svg(card: SentenceCard) -> str:
    """The boxes with their scores, drawn outside the outline of a mask that touches them."""
    (width, height), gap = card.size, 2 * outline(card.size) + 1
    ink, letter = "#{:02x}{:02x}{:02x}".format(*card.colour), max(width, height) / 26
    shapes = []
    for (x0, y0, x1, y1), score in zip(card.boxes, card.scores, strict=True):
        place = (
            f'x="{x0 - gap:.1f}" y="{y0 - gap:.1f}" width="{x1 - x0 + 2 * gap:.1f}" height="{y1 - y0 + 2 * gap:.1f}"'
        )
        shapes.append(f'<rect {place} stroke="#fff" stroke-width="4"/><rect {place} stroke="{ink}" stroke-width="2"/>')
        top = y0 - gap - 0.3 * letter
        baseline = top if top > letter else min(y1 + gap + letter, height - 0.3 * letter)
        shapes.append(
            f'<text x="{max(x0 - gap, 0):.1f}" y="{baseline:.1f}" font-size="{letter:.1f}" fill="{ink}" '
            f'stroke-width="{letter / 5:.1f}">{score:.2f}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(shapes)}</svg>'

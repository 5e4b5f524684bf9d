"""A web page for a model: the user gives a picture and sentences, the page marks the targets of each sentence.

    python demo/app.py --model runs/demo/checkpoint          # a checkpoint folder, or a Hub id
    python demo/app.py --model ME/rela --push-to-hub ME/try  # upload the page as a Space

The model runs once for a picture and its sentences. The threshold slider does not run the model again.
"""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image, ImageDraw, ImageFilter
from transformers import Pipeline, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's import path has only its own folder

from demo.scenes import make_scene
from grefcoco_data.arguments import ArgumentParser

MAX_SIDE, MAX_SENTENCES = 1024, 12  # limits of one request: longest side in pixels, sentences
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
EXAMPLES = (2, 10, 23)  # scenes with sentences of one target, of several, and of none
SPACE_FILES = ("demo/app.py", "demo/scenes.py", "demo/sentences.py")
SPACE_FILES += ("grefcoco_data/__init__.py", "grefcoco_data/arguments.py")
SPACE_REQUIREMENTS = "numpy\npillow\npycocotools\ntorch>=2.11\ntqdm\ntransformers>=5.17\n"
SPACE_APP = 'from demo.app import main\n\nraise SystemExit(main(["--model", "{model}"]))\n'
SPACE_CARD = """---
title: What does the sentence mean?
emoji: 🔎
colorFrom: indigo
colorTo: green
sdk: gradio
sdk_version: {version}
app_file: app.py
models:
- {model}
---

This page marks the objects that a sentence refers to in a picture: one, several or none. The model is
[{model}](https://huggingface.co/{model}).
"""
CSS = """
.gradio-container {width: 100%; max-width: 1120px !important; margin: 0 auto !important}
.introduction h1 {font-size: 1.75rem; font-weight: 650; margin: .5rem 0 .25rem}
.introduction p {color: var(--body-text-color-subdued); max-width: 62ch}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1rem}
.card {margin: 0; border: 1px solid var(--border-color-primary); border-radius: 12px; overflow: hidden;
  background: var(--block-background-fill)}
.card img {display: block; width: 100%; max-height: 22rem; object-fit: contain; margin: 0}
.card figcaption {padding: .75rem .9rem 1rem; border-top: 4px solid var(--ink)}
.card.none figcaption {border-top-color: var(--border-color-primary)}
.card p {margin: 0; overflow-wrap: anywhere}
.card .sentence {font-weight: 600; margin-bottom: .35rem}
.card .score {font-size: .85rem; color: var(--body-text-color-subdued); margin-top: .6rem}
.meter {position: relative; height: 6px; margin-top: .4rem; border-radius: 3px;
  background: var(--border-color-primary)}
.meter i {position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: var(--body-text-color-subdued)}
.meter b {position: absolute; top: -4px; width: 2px; height: 14px; background: var(--body-text-color)}
.empty {padding: 3rem 1rem; text-align: center; color: var(--body-text-color-subdued);
  border: 1px dashed var(--body-text-color-subdued); border-radius: 12px}
#examples button:focus-visible {outline: 3px solid var(--color-accent); outline-offset: 2px}
"""
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"]).set(
    body_text_color_subdued="*neutral_600",  # the greys of the theme have too little contrast
    body_text_color_subdued_dark="*neutral_300",
    block_border_width="1px",
    block_border_width_dark="1px",
    input_border_color="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
)
LABEL_EXAMPLES = """() => document.querySelectorAll("#examples button").forEach(
  (button, index) => button.setAttribute("aria-label", `Example ${index + 1}`))"""  # for screen readers
LAUNCH_OPTIONS = {"css": CSS, "theme": THEME, "footer_links": []}
TITLE = "What does the sentence mean?"
INTRODUCTION = (
    f"<h1>{TITLE}</h1><p>A sentence can refer to one object, to several, or to none. "
    "The model marks the objects of each sentence in the picture, or answers that there are none.</p>"
)
EMPTY_RESULT = '<p class="empty">Choose a picture, write one or more sentences, and press Find.</p>'


@dataclass(frozen=True)
class SentenceCard:
    """The answer for one sentence, with the pictures as data URLs."""

    sentence: str
    marked_url: str  # the picture with mask and boxes
    plain_url: str  # the picture alone
    mask_share: float  # fraction of the pixels, 0..1
    no_target_score: float  # probability, 0..1
    colour: tuple[int, int, int]
    num_boxes: int | None = None  # None: the model gives no boxes


def make_page(segment: Pipeline) -> gr.Blocks:
    """Make the page for a referring-segmentation pipeline."""

    def find(picture: Image.Image | None, text: str, threshold: float) -> tuple[list[SentenceCard], str]:
        cards = run_model(segment, picture, text)
        return cards, cards_html(cards, threshold)

    examples = [make_example(index) for index in EXAMPLES]
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        cards = gr.State([])
        gr.HTML(INTRODUCTION, elem_classes="introduction")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = add_picture_input()
                gallery = add_gallery([scene for scene, _ in examples])
                text = add_sentence_input()
                button = gr.Button("Find", variant="primary", elem_id="find")
                threshold = add_threshold_slider(segment.processor.no_target_threshold)
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(EMPTY_RESULT, elem_id="result")
        page.load(None, js=LABEL_EXAMPLES)
        event = {"fn": find, "inputs": [picture, text, threshold], "outputs": [cards, result]}
        gr.on([button.click, text.submit], **event, show_progress_on=result)
        gallery.click(examples.__getitem__, gallery, [picture, text]).success(**event, show_progress_on=result)
        threshold.change(cards_html, [cards, threshold], result, show_progress="hidden", queue=False)
    return page


def add_picture_input() -> gr.Image:
    """Add the input of the picture; it becomes empty if a file cannot be read."""
    picture = gr.Image(type="pil", sources=["upload", "clipboard"], label="Picture", height=300, elem_id="picture")
    # Changed on this instance: for a subclass, Gradio writes a stub file next to the source.
    picture.preprocess = read_with_message(picture.preprocess)
    picture.upload(lambda picture: None, picture, None).failure(lambda: None, None, picture)
    return picture


def add_gallery(pictures: Sequence[Image.Image]) -> gr.Dataset:
    return gr.Dataset(
        components=[gr.Image(render=False, type="pil")],
        samples=[[picture] for picture in pictures],
        type="index",
        label="Examples",
        elem_id="examples",
    )


def add_sentence_input() -> gr.Textbox:
    return gr.Textbox(
        label="Sentences, one per line",
        info="Shift + Enter works like the Find button.",
        placeholder="all red circles\nthe square on the left",
        lines=3,
        max_lines=MAX_SENTENCES,
        elem_id="sentences",
    )


def add_threshold_slider(no_target_threshold: float) -> gr.Slider:
    return gr.Slider(
        0,
        1,
        value=no_target_threshold,
        step=0.01,
        label="No-target threshold",
        info="A sentence gets no mask if its probability of no target is above this value.",
        elem_id="threshold",
    )


def read_with_message(
    read: Callable[[ImageData | None], Image.Image | None],
) -> Callable[[ImageData | None], Image.Image | None]:
    """Wrap the `preprocess` of an image input: an unreadable file gives a message on the page."""

    def preprocess(payload: ImageData | None) -> Image.Image | None:
        try:
            return read(payload)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = payload.orig_name or "This file"
            message = f"{name} cannot be read as a picture. Try a JPEG, PNG or WebP file."
            raise gr.Error(message, print_exception=False) from error

    return preprocess


def run_model(segment: Pipeline, picture: Image.Image | None, text: str) -> list[SentenceCard]:
    """Run the model once for a picture and the sentences in `text`, one per line.

    Raises:
        gr.Error: no picture, no sentence, or more than `MAX_SENTENCES` sentences. The page shows the message.
    """
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if picture is None:
        raise gr.Error("Choose a picture or an example first.", title="No picture", print_exception=False)
    if not sentences:
        raise gr.Error("Write at least one sentence, one per line.", title="No sentence", print_exception=False)
    if len(sentences) > MAX_SENTENCES:
        message = f"You wrote {len(sentences)} sentences. The maximum is {MAX_SENTENCES}."
        raise gr.Error(message, title="Too many sentences", print_exception=False)
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    plain_url = data_url(picture)
    answers = segment(picture, text=sentences)
    return [
        make_card(picture, plain_url, answer, COLOURS[index % len(COLOURS)]) for index, answer in enumerate(answers)
    ]


def make_card(
    picture: Image.Image, plain_url: str, answer: dict[str, object], colour: tuple[int, int, int]
) -> SentenceCard:
    """Make the card of one answer of the pipeline."""
    mask = np.asarray(answer["mask"])
    boxes = np.asarray(answer["boxes"]).tolist() if "boxes" in answer else None
    return SentenceCard(
        sentence=answer["sentence"],
        marked_url=data_url(draw_boxes(draw_mask(picture, mask, colour), boxes or (), colour)),
        plain_url=plain_url,
        mask_share=float(mask.mean()),
        no_target_score=answer["no_target_score"],
        colour=colour,
        num_boxes=None if boxes is None else len(boxes),
    )


def draw_mask(picture: Image.Image, mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """Return the picture with the mask (height, width) bool in colour, an outline, and the rest darker."""
    pixels = np.asarray(picture, np.float32)
    grey = pixels.mean(2, keepdims=True)
    marked = np.where(mask[..., None], 0.6 * pixels + 0.4 * np.float32(colour), 0.45 * grey + 0.25 * pixels)
    line = max(1, max(picture.size) // 250)
    inner, outer = dilate(mask, line), dilate(mask, 2 * line)
    marked[outer & ~inner] = 255
    marked[inner & ~mask] = colour
    return Image.fromarray(marked.astype(np.uint8))


def draw_boxes(picture: Image.Image, boxes: Sequence[Sequence[float]], colour: tuple[int, int, int]) -> Image.Image:
    """Draw boxes (xyxy, pixels) on the picture, in place: a coloured line between two white lines."""
    pen, line = ImageDraw.Draw(picture), max(1, max(picture.size) // 250)
    for box in boxes:
        x0, y0, x1, y1 = map(round, box)
        for inset, ink, width in ((0, (255, 255, 255), 3 * line), (line, colour, line)):
            if x1 - x0 > 2 * inset and y1 - y0 > 2 * inset:
                pen.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=ink, width=width)
    return picture


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Extend the mask by `pixels` in each direction."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def data_url(picture: Image.Image) -> str:
    """Encode the picture as a WebP data URL."""
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def cards_html(cards: Sequence[SentenceCard], threshold: float) -> str:
    """Return the cards as HTML; `threshold` (0..1) decides which sentences have no target."""
    if not cards:
        return EMPTY_RESULT
    return f'<div class="cards" aria-live="polite">{"".join(card_html(card, threshold) for card in cards)}</div>'


def card_html(card: SentenceCard, threshold: float) -> str:
    """Return one card as HTML: picture, decision, and a bar of the no-target probability with the threshold."""
    sentence, no_target, score = html.escape(card.sentence), card.no_target_score > threshold, card.no_target_score
    boxes = "" if card.num_boxes is None else f", {card.num_boxes} box{'es' * (card.num_boxes != 1)}"
    verdict = "<b>None here</b>" if no_target else f"<b>Found</b>, {card.mask_share:.1%} of the picture{boxes}"
    alt = "the picture without marks" if no_target else f"the picture with “{sentence}” marked"
    label = f"Probability of no target {score:.2f}, threshold {threshold:.2f}"
    return (
        f'<figure class="card {"none" if no_target else "found"}" style="--ink: rgb{card.colour}">'
        f'<img src="{card.plain_url if no_target else card.marked_url}" alt="{alt}"><figcaption>'
        f'<p class="sentence">{sentence}</p><p class="verdict">{verdict}</p>'
        f'<p class="score">Probability of no target: {score:.2f}</p>'
        f'<div class="meter" role="img" aria-label="{label}"><i style="width: {score:.1%}"></i>'
        f'<b style="left: {threshold:.1%}"></b></div></figcaption></figure>'
    )


def make_example(index: int) -> list[Image.Image | str]:
    """Make a synthetic scene and three sentences: one with one target, one with several, one with none."""
    scene = make_scene("easy", 0, "testB", index, size=256, no_target=0.3)
    sentences = {min(len(expression.targets), 2): expression.sentences[0] for expression in scene.expressions}
    return [Image.fromarray(scene.image), "\n".join(sentences[num_targets] for num_targets in (1, 2, 0))]


def check_model(model: str, for_space: bool) -> None:
    """Check the --model argument before any work starts.

    Raises:
        ValueError: `model` is neither a folder nor a Hub id, or it is a folder and the page is for a Space.
    """
    is_folder = Path(model).is_dir()
    if not is_folder and model.count("/") != 1:
        raise ValueError(f"--model {model} is neither a folder nor a Hub id OWNER/NAME. `make demo` trains a model.")
    if is_folder and for_space:
        raise ValueError(
            f"--model {model} is a folder. A Space cannot read it: push the model to the Hub and give its Hub id."
        )


def push_space(model: str, space: str) -> None:
    """Upload the page as a Space for `model`, a Hub id."""
    root, api = Path(__file__).resolve().parents[1], HfApi()
    contents = {name: (root / name).read_bytes() for name in SPACE_FILES}
    contents["app.py"] = SPACE_APP.format(model=model).encode()
    contents["requirements.txt"] = SPACE_REQUIREMENTS.encode()
    contents["README.md"] = SPACE_CARD.format(model=model, version=gr.__version__).encode()
    api.create_repo(space, repo_type="space", space_sdk="gradio", exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api.create_commit(space, operations, commit_message=f"Page for {model}", repo_type="space")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default="runs/demo/checkpoint", help="checkpoint folder or Hub id (default runs/demo/checkpoint)"
    )
    parser.add_argument("--port", type=int, help="port (default: the first free port from 7860)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the page as a Space and exit")
    options = parser.parse_args(arguments)
    try:
        check_model(options.model, for_space=bool(options.push_to_hub))
        if options.push_to_hub:
            push_space(options.model, options.push_to_hub)
            return 0
        segment = pipeline("referring-segmentation", options.model, trust_remote_code=True)
    except (OSError, ValueError, KeyError, HTTPError) as error:
        print(f"demo/app.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    make_page(segment).launch(server_port=options.port, **LAUNCH_OPTIONS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

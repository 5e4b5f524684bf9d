"""A page to try a model on: a picture, sentences, and what each of them refers to, or that it refers to nothing.

    python demo/app.py --model runs/demo/checkpoint          # a checkpoint folder, or a Hub id
    python demo/app.py --model ME/rela --push-to-hub ME/try  # the same page as a Space

The model runs once for a picture and its sentences; the threshold of "nothing here" only judges its answers again.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks beside the script only

from demo.scenes import make_scene

MAX_SIDE, MAX_SENTENCES = 1024, 12  # what one visitor may ask for at a time, in pixels and lines
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
EXAMPLES = (2, 10, 23)  # scenes whose sentences have one target, several, and none
SPACE_FILES = ("demo/app.py", "demo/scenes.py", "demo/sentences.py")
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

Marks whatever a sentence refers to in a picture, one thing, several or none, with
[{model}](https://huggingface.co/{model}).
"""
CSS = """
.gradio-container {width: 100%; max-width: 1120px !important; margin: 0 auto !important}
.opening h1 {font-size: 1.75rem; font-weight: 650; margin: .5rem 0 .25rem}
.opening p {color: var(--body-text-color-subdued); max-width: 62ch}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1rem}
.card {margin: 0; border: 1px solid var(--border-color-primary); border-radius: 12px; overflow: hidden;
  background: var(--block-background-fill)}
.card img {display: block; width: 100%; max-height: 22rem; object-fit: contain; margin: 0}
.card figcaption {padding: .75rem .9rem 1rem; border-top: 4px solid var(--ink)}
.card.none figcaption {border-top-color: var(--border-color-primary)}
.card p {margin: 0; overflow-wrap: anywhere}
.card .said {font-weight: 600; margin-bottom: .35rem}
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
    body_text_color_subdued="*neutral_600",  # the theme's own greys are too pale to read
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
NAME_EXAMPLES = """() => document.querySelectorAll("#examples button").forEach(
  (button, index) => button.setAttribute("aria-label", `Example ${index + 1}`))"""  # for those who hear the page
LOOK = {"css": CSS, "theme": THEME, "footer_links": []}  # arguments of `launch`
NOTHING_YET = '<p class="empty">Choose a picture, write a sentence or a few, and press Find.</p>'


@dataclass(frozen=True)
class Answer:
    """What the page keeps of a sentence: pictures as data URLs, the share of marked pixels, P(no target) in 0..1, the
    number of boxes (None where the model gives none)."""

    sentence: str
    marked: str
    plain: str
    share: float
    score: float
    colour: tuple[int, int, int]
    boxes: int | None = None


def make_page(segment: Pipeline) -> gr.Blocks:
    """The page around a referring-segmentation pipeline."""

    def find(picture: Image.Image | None, lines: str, threshold: float) -> tuple[list[Answer], str]:
        answers = ask(segment, picture, lines)
        return answers, show(answers, threshold)

    with gr.Blocks(title="What does the sentence mean?", analytics_enabled=False) as page:
        answers = gr.State([])
        gr.HTML(
            "<h1>What does the sentence mean?</h1><p>One thing in the picture, several, or nothing that is there: "
            "the model marks what each sentence refers to, and says when that is none.</p>",
            elem_classes="opening",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    type="pil", sources=["upload", "clipboard"], label="Picture", height=300, elem_id="picture"
                )
                examples = [example(index) for index in EXAMPLES]
                shelf = gr.Dataset(
                    components=[gr.Image(render=False, type="pil")],
                    samples=[[scene] for scene, _ in examples],
                    type="index",
                    label="Examples",
                    elem_id="examples",
                )
                lines = gr.Textbox(
                    label="Sentences, one a line",
                    info="Shift + Enter finds, too.",
                    placeholder="all red circles\nthe square on the left",
                    lines=3,
                    max_lines=MAX_SENTENCES,
                    elem_id="sentences",
                )
                button = gr.Button("Find", variant="primary", elem_id="find")
                threshold = gr.Slider(
                    0,
                    1,
                    value=0.5,
                    step=0.01,
                    label="Threshold of “none here”",
                    info="A sentence whose probability of none is above it gets no mask.",
                    elem_id="threshold",
                )
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(NOTHING_YET, elem_id="result")
        # Gradio writes a stub file beside the source of a subclass, so the one instance is changed instead.
        picture.preprocess = kindly(picture.preprocess)
        picture.upload(lambda picture: None, picture, None).failure(lambda: None, None, picture)
        page.load(None, js=NAME_EXAMPLES)
        asked = {"fn": find, "inputs": [picture, lines, threshold], "outputs": [answers, result]}
        gr.on([button.click, lines.submit], **asked, show_progress_on=result)
        shelf.click(examples.__getitem__, shelf, [picture, lines]).success(**asked, show_progress_on=result)
        threshold.change(show, [answers, threshold], result, show_progress="hidden", queue=False)
    return page


def kindly(read: Callable[[ImageData | None], Image.Image | None]) -> Callable[[ImageData | None], Image.Image | None]:
    """An image input's `preprocess` that says so when a file is no picture."""

    def read_kindly(payload: ImageData | None) -> Image.Image | None:
        try:
            return read(payload)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = payload.orig_name or "This file"
            message = f"{name} cannot be read as a picture. Try a JPEG, PNG or WebP file."
            raise gr.Error(message, print_exception=False) from error

    return read_kindly


def ask(segment: Pipeline, picture: Image.Image | None, lines: str) -> list[Answer]:
    """Run the model once for a picture and the sentences in `lines`.

    Raises:
        gr.Error: no picture, no sentence, or more sentences than `MAX_SENTENCES`; shown on the page.
    """
    sentences = [line.strip() for line in lines.splitlines() if line.strip()]
    if picture is None:
        raise gr.Error("Choose a picture first, or one of the examples.", title="No picture", print_exception=False)
    if not sentences:
        raise gr.Error("Write what to look for, one sentence a line.", title="No sentence", print_exception=False)
    if len(sentences) > MAX_SENTENCES:
        message = f"{len(sentences)} sentences are too many at a time; {MAX_SENTENCES} fit."
        raise gr.Error(message, title="Too many sentences", print_exception=False)
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    plain = data_url(picture)
    found = []
    for number, answer in enumerate(segment(picture, text=sentences)):
        mask, colour = np.asarray(answer["mask"]), COLOURS[number % len(COLOURS)]
        boxes = np.asarray(answer["boxes"]).tolist() if "boxes" in answer else None
        marked = data_url(draw_boxes(overlay(picture, mask, colour), boxes or (), colour))
        share, number = float(mask.mean()), None if boxes is None else len(boxes)
        found.append(Answer(answer["sentence"], marked, plain, share, answer["no_target_score"], colour, number))
    return found


def overlay(picture: Image.Image, mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """The picture with the mask (height, width) bool tinted and outlined in colour and white, and all else dimmed."""
    pixels = np.asarray(picture, np.float32)
    grey = pixels.mean(2, keepdims=True)
    shown = np.where(mask[..., None], 0.6 * pixels + 0.4 * np.float32(colour), 0.45 * grey + 0.25 * pixels)
    line = max(1, max(picture.size) // 250)
    inner, outer = grow(mask, line), grow(mask, 2 * line)
    shown[outer & ~inner] = 255
    shown[inner & ~mask] = colour
    return Image.fromarray(shown.astype(np.uint8))


def draw_boxes(picture: Image.Image, boxes: Sequence[Sequence[float]], colour: tuple[int, int, int]) -> Image.Image:
    """The picture with boxes (x0, y0, x1, y1 in pixels) drawn on it, in colour between two white lines."""
    pen, line = ImageDraw.Draw(picture), max(1, max(picture.size) // 250)
    for box in boxes:
        x0, y0, x1, y1 = map(round, box)
        for inset, ink, width in ((0, (255, 255, 255), 3 * line), (line, colour, line)):
            if x1 - x0 > 2 * inset and y1 - y0 > 2 * inset:
                pen.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=ink, width=width)
    return picture


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask, and `pixels` more in each direction."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def data_url(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def show(answers: Sequence[Answer], threshold: float) -> str:
    """The answers as HTML, judged by the threshold (0..1) of no target; the model isn't asked again."""
    if not answers:
        return NOTHING_YET
    return f'<div class="cards" aria-live="polite">{"".join(card(answer, threshold) for answer in answers)}</div>'


def card(answer: Answer, threshold: float) -> str:
    """One sentence: the picture, the verdict, the probability of none as a bar with the threshold on it."""
    sentence, none = html.escape(answer.sentence), answer.score > threshold
    boxes = "" if answer.boxes is None else f", {answer.boxes} box{'es' * (answer.boxes != 1)}"
    verdict = "<b>None here</b>" if none else f"<b>Found</b>, {answer.share:.1%} of the picture{boxes}"
    seen = "the plain picture" if none else f"the picture with “{sentence}” marked"
    label = f"Probability of none {answer.score:.2f}, threshold {threshold:.2f}"
    return (
        f'<figure class="card {"none" if none else "found"}" style="--ink: rgb{answer.colour}">'
        f'<img src="{answer.plain if none else answer.marked}" alt="{seen}"><figcaption>'
        f'<p class="said">{sentence}</p><p class="verdict">{verdict}</p>'
        f'<p class="score">Probability of none: {answer.score:.2f}</p>'
        f'<div class="meter" role="img" aria-label="{label}"><i style="width: {answer.score:.1%}"></i>'
        f'<b style="left: {threshold:.1%}"></b></div></figcaption></figure>'
    )


def example(index: int) -> list[Image.Image | str]:
    """A made scene, and things said of it: one of one target, one of several, one of none."""
    scene = make_scene("easy", 0, "testB", index, size=256, no_target=0.3)
    said = {min(len(expression.targets), 2): expression.sentences[0] for expression in scene.expressions}
    return [Image.fromarray(scene.picture), "\n".join(said[number] for number in (1, 2, 0))]


def check_model(model: str, shared: bool) -> None:
    """Refuse early what would fail late.

    Raises:
        ValueError: neither a folder nor the form of a Hub id; a folder, where others must reach the model.
    """
    folder = Path(model).is_dir()
    if not folder and model.count("/") != 1:
        raise ValueError(f"--model {model} is neither a folder here nor a Hub id, OWNER/NAME; `make demo` trains one.")
    if folder and shared:
        raise ValueError(f"--model {model} is a folder, which no Space can see; push the model and name its Hub id.")


def push(model: str, space: str) -> None:
    """Upload the page as a Space that shows `model`, a Hub id."""
    root, api = Path(__file__).resolve().parents[1], HfApi()
    contents = {name: (root / name).read_bytes() for name in SPACE_FILES}
    contents["app.py"] = SPACE_APP.format(model=model).encode()
    contents["requirements.txt"] = SPACE_REQUIREMENTS.encode()
    contents["README.md"] = SPACE_CARD.format(model=model, version=gr.__version__).encode()
    api.create_repo(space, repo_type="space", space_sdk="gradio", exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api.create_commit(space, operations, commit_message=f"A page for {model}", repo_type="space")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="runs/demo/checkpoint", help="checkpoint folder or Hub id")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on, when not given")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="make a Space of this page instead of showing it")
    options = parser.parse_args(arguments)
    try:
        check_model(options.model, shared=bool(options.push_to_hub))
        if options.push_to_hub:
            push(options.model, options.push_to_hub)
            return 0
        segment = pipeline("referring-segmentation", options.model, trust_remote_code=True)
    except (OSError, ValueError, KeyError, HTTPError) as error:
        print(f"demo/app.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    make_page(segment).launch(server_port=options.port, **LOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())

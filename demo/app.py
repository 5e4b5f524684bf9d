"""A web page for a model: the user gives a picture and sentences, the page marks the targets of each sentence.

    python demo/app.py --model runs/demo/checkpoint          # a checkpoint folder, or a Hub id
    python demo/app.py --model ME/rela --push-to-hub ME/try  # upload the page as a Space

The model runs once for a picture and its sentences. The threshold slider does not run the model again.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import SafetensorError
from transformers import Pipeline, PreTrainedConfig, PreTrainedTokenizerBase, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's import path has only its own folder

from demo import cards as result_cards
from demo.cards import SentenceCard, data_url, make_card
from demo.scenes import make_scene
from grefcoco_data.arguments import ArgumentParser, one_line

MAX_SIDE, MAX_SENTENCES, MAX_CHARACTERS = 1024, 12, 200  # of one request: pixels, sentences, and of each sentence
MAX_FILE_SIZE, KEEP_FILES = "20mb", 3600  # of an upload; seconds
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
EXAMPLES = (2, 10, 23)  # scenes with sentences of one target, of several, and of none
SPACE_FILES = ("demo/app.py", "demo/cards.py", "demo/scenes.py", "demo/sentences.py")
SPACE_FILES += ("grefcoco_data/__init__.py", "grefcoco_data/arguments.py")
SPACE_REQUIREMENTS = "numpy\npillow\npycocotools\ntorch>=2.11\ntqdm\ntransformers>=5.18\n"
SPACE_APP = 'from demo.app import main\n\nraise SystemExit(main(["--model", "{model}", "--trust-remote-code"]))\n'
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
.introduction p {color: var(--body-text-color-subdued); max-width: 62ch; margin: .25rem 0}
.introduction .model {font-size: .9rem; overflow-wrap: anywhere}
.introduction summary {cursor: pointer}
#result, #result .html-container {padding: 0 !important; scroll-margin-top: 1rem}
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
ESCAPE = """() => document.addEventListener("keydown", event => {
  if (event.key === "Escape") document.querySelectorAll(".zoomed").forEach(card => card.classList.remove("zoomed"))
})"""
SCROLL = """() => { const result = document.querySelector("#result"), top = result.getBoundingClientRect().top
  if (top > innerHeight / 2 || top < 0) result.scrollIntoView({block: "start", behavior: "smooth"}) }"""
SHOW = """shown => { for (const layer of ["masks", "boxes"])
  document.body.classList.toggle("hide-" + layer, !shown.includes(layer)) }"""
LAUNCH_OPTIONS = {
    "css": CSS + result_cards.CSS,
    "theme": THEME,
    "footer_links": ["api"],
    "max_file_size": MAX_FILE_SIZE,
    "state_session_capacity": 200,  # sessions whose cards stay in memory
}
TITLE = "What does the sentence mean?"
INTRODUCTION = (
    f"<h1>{TITLE}</h1><p>A sentence can refer to one object, to several, or to none. "
    "The model marks the objects of each sentence in the picture, or answers that there are none.</p>"
)
NO_DATA = "its card does not name its training data"
EMPTY_RESULT = '<p class="empty">Choose a picture, write one or more sentences, and press Find.</p>'
BUSY_RESULT = '<p class="empty">The model looks for the targets …</p>'


def make_page(segment: Pipeline, about: str = "") -> gr.Blocks:
    """Make the page for a referring-segmentation pipeline; `about` is HTML that describes the model."""

    def find(
        picture: Image.Image | None, text: str, threshold: float
    ) -> tuple[list[SentenceCard], str, list[dict[str, object]]]:
        cards = run_model(segment, picture, text)
        return cards, cards_html(cards, threshold), [card.answer for card in cards]

    examples = [make_example(index) for index in EXAMPLES]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEEP_FILES, KEEP_FILES)) as page:
        cards = gr.State([])
        gr.HTML(INTRODUCTION + about, elem_classes="introduction")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = add_picture_input()
                gallery = add_gallery([scene for scene, _ in examples])
                text = add_sentence_input()
                button = gr.Button("Find", variant="primary", elem_id="find")
                shown = add_layer_choice()
                threshold = add_threshold_slider(segment.processor.no_target_threshold)
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(EMPTY_RESULT, elem_id="result")
                answers = gr.JSON(visible=False)  # what the API gives
        page.load(None, js=LABEL_EXAMPLES)
        page.load(None, js=ESCAPE)

        def add_search(start: Callable[..., gr.events.Dependency], visibility: str = "private") -> None:
            """Let an event start a search; the button is off and the old cards are gone until it ends."""
            started = start(begin, None, [button, cards, result], **SILENT)
            search = started.then(
                find,
                [picture, text, threshold],
                [cards, result, answers],
                show_progress_on=result,
                api_name="find",
                api_visibility=visibility,
            )
            search.failure(lambda: (ready(), *clear()), None, [button, cards, result], **SILENT)
            search.success(ready, None, button, js=SCROLL, **SILENT)

        add_search(button.click, "public")
        add_search(text.submit)
        chosen = gallery.click(examples.__getitem__, gallery, [picture, text], api_visibility="private")
        add_search(chosen.success)
        unreadable = picture.upload(lambda picture: clear(), picture, [cards, result], **{**SILENT, "queue": True})
        unreadable.failure(lambda: (None, *clear()), None, [picture, cards, result], **SILENT)
        picture.clear(clear, None, [cards, result], **SILENT)
        threshold.change(cards_html, [cards, threshold], result, **SILENT)
        shown.change(None, shown, None, js=SHOW)
    return page


SILENT = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def begin() -> tuple[gr.Button, list[SentenceCard], str]:
    """The page while the model runs."""
    return gr.Button("Finding …", interactive=False), [], BUSY_RESULT


def ready() -> gr.Button:
    """The button after a search."""
    return gr.Button("Find", interactive=True)


def clear() -> tuple[list[SentenceCard], str]:
    """The result before a search."""
    return [], EMPTY_RESULT


def cards_html(cards: Sequence[SentenceCard], threshold: float) -> str:
    """Return the cards as HTML, or how to begin."""
    return result_cards.cards_html(cards, threshold) if cards else EMPTY_RESULT


def add_picture_input() -> gr.Image:
    """Add the input of the picture; a file that cannot be read gives a message."""
    picture = gr.Image(type="pil", sources=["upload", "clipboard"], label="Picture", height=300, elem_id="picture")
    # Changed on this instance: for a subclass, Gradio writes a stub file next to the source.
    picture.preprocess = read_with_message(picture.preprocess)
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
        max_length=MAX_SENTENCES * (MAX_CHARACTERS + 1),
        elem_id="sentences",
    )


def add_layer_choice() -> gr.CheckboxGroup:
    choices = [("Masks", "masks"), ("Boxes", "boxes")]
    return gr.CheckboxGroup(choices, value=["masks", "boxes"], label="Show", elem_id="layers")


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
            name = html.escape((payload.orig_name or "This file")[-80:])  # messages are HTML
            message = f"{name} cannot be read as a picture. Try a JPEG, PNG or WebP file."
            raise refusal("No picture in this file", message) from error

    return preprocess


def run_model(segment: Pipeline, picture: Image.Image | None, text: str) -> list[SentenceCard]:
    """Run the model once for a picture and the sentences in `text`, one per line.

    Raises:
        gr.Error: no picture, no sentence, or sentences beyond the limits. The page shows the message.
    """
    if picture is None:
        raise refusal("No picture", "Choose a picture or an example first.")
    sentences = read_sentences(text)
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    plain_url = data_url(picture)
    answers = segment(picture, text=sentences, return_rle=True)
    return [
        make_card(picture, plain_url, answer, COLOURS[i % len(COLOURS)], unknown_words(segment, answer["sentence"]))
        for i, answer in enumerate(answers)
    ]


def refusal(title: str, message: str) -> gr.Error:
    """A message on the page; the message repeats the title, which Gradio's browser part does not show."""
    return gr.Error(f"<b>{title}.</b> {message}", title=title, print_exception=False)


def read_sentences(text: str) -> list[str]:
    """The sentences in `text`, one per line.

    Raises:
        gr.Error: see `run_model`.
    """
    too_long = f"Write at most {MAX_SENTENCES} sentences of at most {MAX_CHARACTERS} characters."
    if len(text) > 2 * MAX_SENTENCES * MAX_CHARACTERS:  # before any work on it
        raise refusal("Too much text", too_long)
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise refusal("No sentence", "Write at least one sentence, one per line.")
    if len(sentences) > MAX_SENTENCES:
        message = f"You wrote {len(sentences)} sentences. The maximum is {MAX_SENTENCES}."
        raise refusal("Too many sentences", message)
    if max(map(len, sentences)) > MAX_CHARACTERS:
        raise refusal("A sentence is too long", too_long)
    return sentences


def unknown_words(segment: Pipeline, sentence: str) -> tuple[str, ...]:
    """The words of a sentence that the model's tokenizer does not know."""
    tokenizer = getattr(segment.processor, "tokenizer", None)
    if tokenizer is None:
        return ()
    unknown = unknown_id(tokenizer)
    words = []
    for word in dict.fromkeys(re.findall(r"\w+", sentence)):
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if unknown in pieces or len(pieces) == len(word) > 2:  # spelled letter by letter
            words.append(word)
    return tuple(words)


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a word that is not in the vocabulary; word vectors have none, and use the one after the last."""
    return tokenizer.vocab_size if tokenizer.unk_token_id is None else tokenizer.unk_token_id


def describe(segment: Pipeline, name: str) -> str:
    """What the model is, what it was trained on and which words it knows, as HTML."""
    tokenizer, config = segment.processor.tokenizer, segment.model.config
    shown = "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name  # not the folders of the server
    words = sorted(word for word in tokenizer.get_vocab() if len(word) > 1 and word.isalpha())
    parts = [
        f"Model: <b>{html.escape(shown)}</b> ({html.escape(config.model_type)}, "
        f"{segment.model.num_parameters() / 1e6:.1f} million parameters), {trained_on(name)}."
    ]
    if len(words) < 500:
        listed = html.escape(", ".join(words))
        parts.append(f"<details><summary>It knows {len(words)} words only.</summary>{listed}</details>")
    else:
        parts.append(f"Its vocabulary has {tokenizer.vocab_size:,} entries.")
    return f'<div class="model"><p>{" ".join(parts)}</p></div>'


def trained_on(name: str) -> str:
    """What the card of a model says about its training data, as HTML."""
    try:
        card = ModelCard.load(Path(name) / "README.md" if Path(name).is_dir() else name, ignore_metadata_errors=True)
    except (OSError, ValueError, HTTPError):
        return NO_DATA
    names = card.data.datasets or re.findall("^Trained on `([^`]+)`", card.text, re.MULTILINE)
    names = [names] if isinstance(names, str) else names
    return f"trained on {html.escape(', '.join(names))}" if names else NO_DATA


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


def load_pipeline(model: str, trust_remote_code: bool) -> Pipeline:
    """The pipeline of a model of this project by our classes; with consent, by the model's own Python files.

    Raises:
        ValueError: a model of another project without consent.
    """
    if trust_remote_code:
        return pipeline("referring-segmentation", model, trust_remote_code=True)
    from modeling.pipeline_referring import ReferringPipeline  # a Space has neither of the two modules
    from training.families import FAMILIES, load_checkpoint

    model_type = PreTrainedConfig.get_config_dict(model)[0].get("model_type")
    if model_type is None:
        raise ValueError(f"--model {model} has no config.json that names a model_type. `make demo` trains a model.")
    if model_type not in FAMILIES:
        raise ValueError(
            f"--model {model} is a {model_type} model, which this project has no classes for: measure it with "
            "`python -m scoring predict`. --trust-remote-code runs the Python files that come with it."
        )
    network, processor = load_checkpoint(model)
    return ReferringPipeline(model=network, processor=processor)


def port_number(text: str) -> int:
    """A port as argparse reads it."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not a port: choose 1 to 65535")
    return int(text)


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
    parser.add_argument("--port", type=port_number, help="port (default: the first free port from 7860)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the page as a Space and exit")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python files of a model that is not of this project"
    )
    options = parser.parse_args(arguments)
    try:
        check_model(options.model, for_space=bool(options.push_to_hub))
        if options.push_to_hub:
            push_space(options.model, options.push_to_hub)
            return 0
        segment = load_pipeline(options.model, options.trust_remote_code)
        make_page(segment, describe(segment, options.model)).launch(server_port=options.port, **LAUNCH_OPTIONS)
    except (OSError, ValueError, KeyError, RuntimeError, HTTPError, SafetensorError) as error:
        print(f"demo/app.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

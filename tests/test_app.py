"""The page of demo/app.py: its functions, the page in a browser, and the page as a Space."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.masks import decode_mask, encode_mask
from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator
from tests import tiny_peers
from tests.hub_server import Hub
from tests.tiny_rela import BETTER_LOSS, expression_rows, tiny_config, tiny_processor
from tests.tiny_vlt import tiny_processor as tiny_vlt_processor

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")
SCENE = expression_rows()[0]["image"]  # a red square at x 4..24, y 8..28; a blue one at x 36..56, y 30..50


@pytest.fixture(scope="module", autouse=True)
def page_modules() -> None:
    """Import the page with the first of its tests: it takes seconds, and the other test process can do without."""
    global app, gr, result_cards
    gr = pytest.importorskip("gradio")
    from demo import app
    from demo import cards as result_cards


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny model on four sentences until it answers them correctly (two seconds)."""
    torch.manual_seed(0)
    model, processor = RelaModel(tiny_config(**BETTER_LOSS)), tiny_processor()
    batch, optimizer = RelaCollator(processor)(expression_rows()), torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def answer_of(**parts: object) -> Callable[..., list[dict]]:
    """A pipeline that gives one answer with an empty mask and these parts."""

    def segment(picture: Image.Image, text: list[str], return_rle: bool) -> list[dict]:
        empty = encode_mask(np.zeros((picture.height, picture.width), np.uint8))
        return [{"sentence": text[0], "mask": empty, "no_target_score": 0.1, **parts}]

    segment.processor = SimpleNamespace()
    return segment


@pytest.mark.slow
def test_boxes_are_drawn_outside_outlines_and_counted_where_the_model_gives_them() -> None:
    (card,) = app.run_model(answer_of(boxes=[[8.0, 8.0, 40.0, 48.0]], scores=[0.876]), SCENE, "a box")
    text = result_cards.card_html(card, 0.5)
    assert 'x="5.0" y="5.0" width="38.0" height="46.0"' in text, "3 pixels outside: an outline has two lines"
    assert ">0.88</text>" in text and "Scores of the objects: 0.88" in text
    assert "Found</b>, 1 box<" in text and "<svg" not in result_cards.card_html(card, 0.05)
    assert "box" not in result_cards.card_html(result_cards.SentenceCard("a", "", "", 0.1, 0.1, (0, 0, 0)), 0.5)


def test_a_card_never_says_found_where_nothing_is_marked() -> None:
    for parts in ({}, {"boxes": [], "scores": []}):
        (card,) = app.run_model(answer_of(**parts), SCENE, "a box")
        text = result_cards.verdict(card, no_target=False)
        assert "Unsure" in text and "Found" not in text and "%" not in text and "box" not in text
    small = result_cards.SentenceCard("a", "", "", 0.0004, 0.1, (0, 0, 0))
    assert "less than 0.1% of the picture" in result_cards.card_html(small, 0.5)


def test_a_model_with_boxes_alone_gets_cards() -> None:
    def segment(picture: Image.Image, text: list[str], return_rle: bool) -> list[dict]:
        return [{"sentence": text[0], "no_target_score": 0.1, "boxes": [[8.0, 8.0, 40.0, 48.0]], "scores": [0.9]}]

    segment.processor = SimpleNamespace()
    (card,) = app.run_model(segment, SCENE, "a box")
    text = result_cards.card_html(card, 0.5)
    assert "<svg" in text and 'class="marked"' not in text and "mask.png" not in text


@pytest.mark.slow
def test_downloads_hold_the_mask_and_the_answers(segment: "CountingPipeline") -> None:
    (card,) = app.run_model(segment, SCENE, "the blue square")
    text = app.cards_html([card], 0.5)
    links = dict(re.findall(r'download="([^"]+)" href="([^"]+)"', text))
    (answer,) = json.loads(base64.b64decode(links["answers.json"].partition(",")[2]))
    assert answer["sentence"] == "the blue square" and answer["mask"]["size"] == [64, 64]
    mask = np.asarray(picture_of(links["mask.png"]))
    assert (mask == decode_mask(answer["mask"]).astype(bool)).all() and mask.mean() == card.mask_share


def test_words_that_the_tokenizer_does_not_know_are_named(segment: "CountingPipeline", tmp_path: Path) -> None:
    (card,) = app.run_model(segment, SCENE, "the blue <b>elephant")
    assert card.unknown_words == ("b", "elephant")
    assert "The model does not know: b, elephant" in result_cards.card_html(card, 0.5)
    assert "does not know" not in result_cards.card_html(app.run_model(segment, SCENE, "the blue square")[0], 0.5)
    words = SimpleNamespace(processor=tiny_vlt_processor(tmp_path))
    assert app.unknown_words(words, "the red elephant") == ("elephant",)


def test_the_page_names_the_model_its_training_and_its_words(segment: "CountingPipeline", tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\ntags: []\n---\n# m\n\nTrained on `easy`, revision `1`, with this recipe:\n"
    )
    text = app.describe(segment, str(tmp_path))
    assert (
        str(tmp_path) not in text
        and tmp_path.name in text
        and "(rela, " in text
        and "trained on easy." in text
        and "elephant" not in text
    )
    assert "It knows 12 words only" in text and "squares" in text
    assert "does not name its training data" in app.describe(segment, str(tmp_path / "none"))


class CountingPipeline:
    """A pipeline that counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.segment, self.runs = app.load_pipeline(str(folder), trust_remote_code=False), 0
        self.processor, self.model = self.segment.processor, self.segment.model
        self.wait = threading.Event()  # set unless a test holds the runs
        self.wait.set()

    def __call__(self, picture: Image.Image, text: list[str], return_rle: bool) -> list[dict]:
        self.runs += 1
        assert self.wait.wait(60)
        return self.segment(picture, text=text, return_rle=return_rle)


@pytest.fixture(scope="module")
def segment(checkpoint: Path) -> CountingPipeline:
    return CountingPipeline(checkpoint)


def test_only_the_mask_is_marked() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[30:50, 36:56] = True
    before, after = np.asarray(SCENE, float), np.asarray(result_cards.draw_mask(SCENE, mask, (213, 94, 0)), float)
    outside = ~result_cards.dilate(mask, 2)
    assert (after[outside].mean(1) < before[outside].mean(1)).all(), "pixels outside the mask are darker"
    assert np.abs(after[mask] - (0.6 * before[mask] + 0.4 * np.array([213, 94, 0]))).max() < 1
    assert (after[result_cards.dilate(mask, 1) & ~mask] == (213, 94, 0)).all()
    assert (
        result_cards.dilate(mask, 1).sum() == 22 * 22
        and not result_cards.dilate(np.zeros((5, 5), dtype=bool), 1).any()
    )


def test_threshold_changes_the_verdict() -> None:
    cards = [result_cards.SentenceCard("<b>it</b>", "marked", "plain", 0.25, 0.4, (1, 2, 3))]
    target, no_target = app.cards_html(cards, 0.5), app.cards_html(cards, 0.3)
    assert "Found" in target and 'src="marked"' in target and "25.0% of the picture" in target
    assert "None here" in no_target and 'src="plain"' in no_target and "marked" not in no_target
    assert "&lt;b&gt;it&lt;/b&gt;" in target and "<b>it" not in target
    assert "Found" in app.cards_html(cards, 0.4), "no target is a score above the threshold, as in the processor"


@pytest.mark.parametrize("no_target_threshold", [0.35, 0.62])
def test_threshold_slider_starts_at_the_threshold_of_the_model(no_target_threshold: float) -> None:
    page = app.make_page(SimpleNamespace(processor=SimpleNamespace(no_target_threshold=no_target_threshold)))
    (slider,) = [block for block in page.blocks.values() if block.elem_id == "threshold"]
    assert slider.value == no_target_threshold


@pytest.mark.slow
def test_model_runs_once_on_a_picture_of_limited_size(segment: CountingPipeline) -> None:
    runs = segment.runs
    cards = app.run_model(segment, SCENE.resize((3000, 1500)), " the blue square \n\nthe green square\n")
    assert segment.runs == runs + 1 and [card.sentence for card in cards] == ["the blue square", "the green square"]
    assert picture_of(cards[0].marked_url).size == (1024, 512)
    assert cards[0].plain_url == cards[1].plain_url and cards[0].colour != cards[1].colour


@pytest.mark.parametrize(
    ("picture", "text", "title"),
    [
        (None, "it", "No picture"),
        (SCENE, " \n", "No sentence"),
        (SCENE, "it\n" * 13, "Too many sentences"),
        (SCENE, "w" * 201, "A sentence is too long"),
        (SCENE, "w" * 12_000_000, "Too much text"),
    ],
)
def test_missing_or_long_inputs_give_a_message(
    segment: CountingPipeline, picture: Image.Image | None, text: str, title: str
) -> None:
    with pytest.raises(gr.Error) as error:
        app.run_model(segment, picture, text)
    assert error.value.title == title


def test_examples_have_sentences_of_one_target_several_and_none() -> None:
    for index in app.EXAMPLES:
        scene, text = app.make_example(index)
        assert scene.size == (256, 256) and len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [([], "config.json"), (["--push-to-hub", "me/try"], "A Space cannot read it")],
    ids=["folder without a model", "folder for a Space"],
)
def test_an_unusable_model_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], word: str
) -> None:
    assert app.main(["--model", str(tmp_path), *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(tmp_path) in line and word in line


def test_code_that_comes_with_a_model_needs_consent(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "canary", "auto_map": {"AutoConfig": "canary.Config", "AutoModel": "canary.Model"}})
    )
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('it ran')\n")
    assert app.main(["--model", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "canary model" in line and "--trust-remote-code" in line
    assert not (tmp_path / "ran").exists()
    assert app.main(["--model", str(tmp_path), "--trust-remote-code"]) == 2
    assert "it ran" in capsys.readouterr().err and (tmp_path / "ran").exists()


@pytest.mark.parametrize("options", [[], ["--trust-remote-code"]])
def test_models_of_other_projects_give_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, options: list[str]
) -> None:
    tiny_peers.save(tmp_path, "grounding-dino")
    capfd.readouterr()
    assert app.main(["--model", str(tmp_path), *options]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "is a grounding-dino model" in line and "`python -m scoring predict`" in line


@pytest.mark.parametrize("port", ["0", "65536", "-1", "many", "9" * 5000])
def test_a_port_out_of_range_gives_one_line(port: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        app.main(["--port", port])
    line = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and "choose 1 to 65535" in line and len(line) < 200


def test_a_busy_port_gives_one_line(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert app.main(["--model", str(checkpoint), "--port", port]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("demo/app.py: ") and port in lines[-1]


def test_a_missing_model_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert app.main(["--model", str(tmp_path / "runs" / "demo")]) == 2
    assert "neither a folder nor a Hub id" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context()  # one for all tests: the page's scripts are compiled once
        browser.close()


@pytest.fixture(scope="module")
def address(segment: CountingPipeline) -> Iterator[str]:
    page = app.make_page(segment)
    yield page.launch(prevent_thread_lock=True, quiet=True, server_port=free_port(), **app.LAUNCH_OPTIONS)[1]
    page.close(verbose=False)


@pytest.fixture
def tab(browser: object, address: str) -> Iterator[object]:
    tab = browser.new_page()
    tab.set_default_timeout(20_000)
    hosts, errors = set(), []
    tab.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    tab.on("pageerror", lambda error: errors.append(error))  # a function: playwright sets attributes on it
    tab.goto(address)
    tab.wait_for_selector("#find")
    yield tab
    tab.close()
    assert hosts <= {"127.0.0.1", "localhost", None} and not errors, (
        "the page loads nothing from other hosts and has no script errors"
    )


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    SCENE.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def upload(tab: object, path: Path) -> None:
    tab.set_input_files("#picture input[type=file]", str(path))
    tab.wait_for_selector("#picture img")


def find_sentences(tab: object, *sentences: str) -> list[str]:
    """Type the sentences and press Find; return the source of the upper picture of each card."""
    tab.fill("#sentences textarea", "\n".join(sentences))
    tab.click("#find")
    tab.wait_for_function("text => document.querySelector('#result')?.innerText.includes(text)", arg=sentences[-1])
    return [card.query_selector_all("img")[-1].get_attribute("src") for card in tab.query_selector_all(".card")]


def card_boxes(tab: object) -> list[dict]:
    """The boxes of the cards at one moment, once their layout is settled; the page may still scroll."""
    measure = "all => all.map(card => card.getBoundingClientRect().toJSON())"
    before: list[float] = []
    for _ in range(50):
        boxes = tab.eval_on_selector_all(".card", measure)
        offsets = [box["y"] - boxes[0]["y"] for box in boxes]
        if offsets == before:
            break
        before = offsets
        tab.wait_for_timeout(100)
    return boxes


def picture_of(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_page_marks_a_target_and_reports_no_target(tab: object, scene: Path) -> None:
    upload(tab, scene)
    marked, plain = find_sentences(tab, "the blue square", "the green square")
    verdicts = [verdict.inner_text() for verdict in tab.query_selector_all(".verdict")]
    assert verdicts[0].startswith("Found, 9.8%") and verdicts[1] == "None here"  # 20 * 20 of 64 * 64 pixels
    pixels = np.asarray(picture_of(marked), float)
    inside, outside = pixels[34:46, 40:52].mean((0, 1)), pixels[12:24, 8:20].mean((0, 1))
    assert inside[0] > 80 > outside[1], "the blue square is coloured, the red one darker"
    assert np.abs(np.asarray(picture_of(plain), float) - np.asarray(SCENE)).mean() < 6
    assert find_sentences(tab, "the red square")[0] != marked


@pytest.mark.slow
def test_slider_does_not_run_the_model_again(tab: object, scene: Path, segment: CountingPipeline) -> None:
    upload(tab, scene)
    find_sentences(tab, "the blue square", "the green square")
    runs = segment.runs
    slider = tab.locator("#threshold input[type=range]")
    for key, counts in (("Home", (0, 2)), ("End", (2, 0))):
        slider.press(key)
        tab.wait_for_function(
            "([found, none]) => document.querySelectorAll('.card.found').length === found"
            " && document.querySelectorAll('.card.none').length === none",
            arg=counts,
        )
    assert segment.runs == runs


@pytest.mark.slow
def test_an_unreadable_file_gives_a_message(tab: object, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("This is text, not a picture.")
    tab.set_input_files("#picture input[type=file]", str(tmp_path / "letter.png"))
    tab.get_by_text("letter.png cannot be read as a picture").wait_for()
    tab.wait_for_selector("#picture img", state="detached")
    tab.click("#find")
    tab.get_by_text("Choose a picture or an example first").wait_for()
    assert not tab.query_selector_all(".card")
    upload(tab, scene)
    assert find_sentences(tab, "the blue square"), "the page still works"


@pytest.mark.slow
def test_page_works_with_the_keyboard_alone(tab: object) -> None:
    tab.get_by_role("button", name="Example 1").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".card")
    assert len(tab.query_selector_all(".card")) == 3
    order = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        order.append(tab.evaluate("document.activeElement.closest('[id]')?.id"))
    assert [name for name in order if name in ("sentences", "find", "threshold")][:2] == ["sentences", "find"]
    tab.locator("#sentences textarea").focus()
    tab.keyboard.press("Control+A")
    tab.keyboard.type("all squares")
    tab.keyboard.press("Shift+Enter")
    tab.wait_for_function("() => document.querySelectorAll('.card').length === 1")


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_page_fits_the_screen(tab: object, scene: Path, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 700})
    upload(tab, scene)
    find_sentences(tab, "the blue square", "w" * 80)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    clipped = "element => element.scrollWidth > element.clientWidth"
    assert not any(tab.eval_on_selector_all(".card p", f"all => all.map({clipped})")), "a long word is cut off"
    boxes = card_boxes(tab)
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280), "cards are side by side only on a wide screen"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_results_are_on_the_screen_and_level_with_the_inputs(
    tab: object, scene: Path, width: int, height: int
) -> None:
    tab.set_viewport_size({"width": width, "height": height})
    upload(tab, scene)
    find_sentences(tab, "the blue square", "the green square")
    tab.wait_for_function(f"() => document.querySelector('.card').getBoundingClientRect().top < {height // 2}")
    if width == 1280:
        tops = [tab.query_selector(name).bounding_box()["y"] for name in ("#picture", "#result .tools")]
        assert abs(tops[0] - tops[1]) < 8


@pytest.mark.slow
def test_a_new_picture_or_an_error_clears_the_old_cards(tab: object, scene: Path, tmp_path: Path) -> None:
    upload(tab, scene)
    find_sentences(tab, "the blue square")
    tab.fill("#sentences textarea", "")
    tab.click("#find")
    tab.get_by_text("Write at least one sentence").wait_for()
    tab.wait_for_selector(".card", state="detached")
    find_sentences(tab, "the blue square")
    tab.click("#picture [aria-label='Remove Image']")
    tab.wait_for_selector(".card", state="detached")


@pytest.mark.slow
def test_find_is_off_while_the_model_runs(tab: object, scene: Path, segment: CountingPipeline) -> None:
    upload(tab, scene)
    tab.fill("#sentences textarea", "the blue square")
    segment.wait.clear()
    try:
        tab.click("#find")
        tab.wait_for_selector("#find[disabled]")
        tab.get_by_text("The model looks for the targets").wait_for()
    finally:
        segment.wait.set()
    tab.wait_for_selector("#find:not([disabled])")
    tab.wait_for_selector(".card")


@pytest.mark.slow
def test_masks_and_boxes_can_be_hidden_and_a_picture_enlarged(tab: object, scene: Path) -> None:
    upload(tab, scene)
    find_sentences(tab, "the blue square")
    marked = tab.locator(".card .marked")
    assert marked.is_visible()
    tab.locator("#layers").get_by_label("Masks").uncheck()
    marked.wait_for(state="hidden")
    tab.locator("#layers").get_by_label("Masks").check()
    marked.wait_for()
    tab.click(".card .view")
    assert tab.query_selector(".card .view").bounding_box()["height"] > 600
    tab.keyboard.press("Escape")
    assert tab.query_selector(".card .view").bounding_box()["height"] < 600


@pytest.mark.slow
def test_names_of_files_are_shown_as_text(tab: object, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    path.write_text("no picture")
    tab.set_input_files("#picture input[type=file]", str(path))
    tab.get_by_text("cannot be read as a picture").wait_for()
    assert not tab.query_selector_all("img[src=x]")
    assert tab.get_by_text("No picture in this file.").is_visible()


@pytest.mark.slow
def test_files_that_are_too_large_are_refused(tab: object, address: str, tmp_path: Path) -> None:
    large = b"x" * (21 << 20)
    (tmp_path / "large.png").write_bytes(large)
    done = subprocess.run(
        ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "-F", f"files=@{tmp_path / 'large.png'}",
         f"{address}gradio_api/upload"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "413"


@pytest.mark.slow
def test_uploads_are_deleted(
    segment: CountingPipeline, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    monkeypatch.setattr(app, "KEEP_FILES", 5)
    page = app.make_page(segment)
    address = page.launch(prevent_thread_lock=True, quiet=True, server_port=free_port(), **app.LAUNCH_OPTIONS)[1]
    try:
        command = ["curl", "-s", "-F", f"files=@{scene}", f"{address}gradio_api/upload"]
        (place,) = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
        assert Path(place).is_file() and Path(place).is_relative_to(tmp_path / "files")
        deadline = time.monotonic() + 60
        while Path(place).exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not Path(place).exists()
    finally:
        page.close(verbose=False)


@pytest.mark.slow
def test_a_hundred_requests_at_once_are_answered(address: str, scene: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    picture, start = handle_file(scene), time.monotonic()
    jobs = [client.submit(picture, "the blue square\nthe green square", 0.5, api_name="/find") for _ in range(100)]
    answers = [job.result(timeout=60)[-1] for job in jobs]
    assert [answer["sentence"] for answer in answers[0]] == ["the blue square", "the green square"]
    assert all(answer == answers[0] for answer in answers) and time.monotonic() - start < 30


# ------------------------------------------------------------------------------------------------------- as a Space


@pytest.mark.slow
def test_pushed_space_runs_with_a_pushed_model(checkpoint: Path, tmp_path: Path) -> None:
    upload_model = "import sys; from huggingface_hub import HfApi as A; A().create_repo('me/rela'); "
    upload_model += "A().upload_folder(repo_id='me/rela', folder_path=sys.argv[1])"
    with Hub(tmp_path / "hub", {"hf_me": "me"}) as hub:
        assert hub.python(tmp_path / "author", "-c", upload_model, checkpoint, token="hf_me").returncode == 0
        options = ["--model", "me/rela", "--push-to-hub", "me/try"]
        hub.fail("POST", "/repos/create")
        failed = hub.python(tmp_path / "author", ROOT / "demo" / "app.py", *options, token="hf_me")
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        pushed = hub.python(tmp_path / "author", ROOT / "demo" / "app.py", *options, token="hf_me")
        assert pushed.returncode == 0, pushed.stderr
        repo, space = hub.repository("space", "me/try"), tmp_path / "space"
        for name, file in repo.files("main").items():
            (space / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo.blobs / file["oid"], space / name)
        assert "app_file: app.py" in (space / "README.md").read_text()
        port = free_port()
        variables = hub.environment(space, None) | {"GRADIO_SERVER_PORT": str(port)}
        server = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=variables, stderr=subprocess.PIPE)
        try:
            assert "What does the sentence mean?" in wait_for(f"http://127.0.0.1:{port}", server)
        finally:
            server.kill()
            server.communicate()


def wait_for(url: str, server: subprocess.Popen) -> str:
    for _ in range(240):
        assert server.poll() is None, server.stderr.read()
        try:
            return urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)

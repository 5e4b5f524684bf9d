"""Grammars: truth written and read in each, three outcomes, cut-off answers, equality with transformers' readers."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
from transformers.models.kosmos2.processing_kosmos2 import (
    clean_text_and_extract_entities_with_bboxes,
    patch_index_to_coordinate,
)

from scoring.grammars import GRAMMARS, format_answer, parse, prompt, qwen_size, resize
from scoring.measurement import GREC

WIDTH, HEIGHT = 640, 480
BOXES = [[16, 48, 320, 240], [320, 96, 624, 432]]
FIRST = [16, 48, 320, 240]
AREAS = [name for name in GRAMMARS if name != "molmo"]
WORDS = [name for name in GRAMMARS if name not in ("paligemma", "florence2", "kosmos2")]  # "none" in words


def sentences(number: int = 300) -> list[list[list[float]]]:
    """True boxes of sentences with 0 to 3 targets."""
    random_numbers = np.random.default_rng(0)
    start, size = random_numbers.uniform(0, 0.5, (number, 3, 2)), random_numbers.uniform(0.2, 0.5, (number, 3, 2))
    boxes = np.concatenate([start, start + size], -1) * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return [list(map(list, some[: i % 4])) for i, some in enumerate(boxes.round(1).tolist())]


def scores(answers: list[list[list[float]]]) -> dict[str, float]:
    accumulator = GREC.accumulator()
    for answer, truth in zip(answers, sentences()):
        accumulator.add(prediction={"boxes": answer, "scores": [1.0] * len(answer)}, reference={"boxes": truth})
    return accumulator.compute()


@pytest.mark.parametrize("grammar", AREAS)
def test_truth_written_and_read_scores_fully(grammar):
    texts = [format_answer(grammar, truth, "the 2 red [cars]", WIDTH, HEIGHT) for truth in sentences()]
    read = [parse(grammar, text, WIDTH, HEIGHT) for text in texts]
    assert [answer.outcome for answer in read] == ["boxes" if truth else "none" for truth in sentences()]
    assert scores([answer.boxes for answer in read])["F1_score"] == 1
    swapped = [parse(grammar, text, HEIGHT, WIDTH).boxes for text in texts]
    swapped = [[[y0, x0, y1, x1] for x0, y0, x1, y1 in boxes] for boxes in swapped]
    result = scores(swapped)
    assert result["F1_score"] < 0.45 and result["N_acc"] == 1


@pytest.mark.parametrize(
    ("grammar", "text", "box"),
    [
        ("qwen2", "<|object_ref_start|>a car<|object_ref_end|><|box_start|>(25,100),(500,500)<|box_end|>", FIRST),
        ("qwen2", "(25,100),(500,500)", FIRST),
        ("qwen2.5", '```json\n[{"bbox_2d": [16, 48, 322, 238], "label": "car"}]\n```', [15.9, 48.4, 320, 240]),
        ("qwen3", '[{"bbox_2d": [25, 100, 500, 500], "label": "car"}]', FIRST),
        ("qwen3", '```json\n[\n\t{"label": "car", "bbox_2d": [25, 100, 500, 500]}\n]\n```', FIRST),
        ("internvl", "<ref>a car</ref><box>[[25, 100, 500, 500]]</box>", FIRST),
        ("glm", "The car is at <|begin_of_box|>[[25,100,500,500]]<|end_of_box|>.", FIRST),
        ("gemini", '[{"box_2d": [100, 25, 500, 500], "label": "car"}]', FIRST),
        ("paligemma", "<loc0102><loc0026><loc0512><loc0512> car", [16.25, 47.8, 320, 240]),
        ("florence2", "</s><s>car<loc_25><loc_100><loc_500><loc_500></s>", [16.3, 48.2, 320.3, 240.2]),
        (
            "kosmos2",
            "<phrase>a car</phrase><object><patch_index_0096><patch_index_0496></object>",
            [10, 52.5, 330, 232.5],
        ),
        ("rex-omni", "<|object_ref_start|>car<|object_ref_end|><|box_start|><25><100><500><500><|box_end|>", FIRST),
        ("molmo", '<point x="2.5" y="10.0" alt="car">car</point>', [16, 48, 16, 48]),
        ("molmo", '<points x1="2.5" y1="10.0" alt="cars">cars</points>', [16, 48, 16, 48]),
        ("moondream", '{"objects": [{"x_max": 0.5, "x_min": 0.025, "y_min": 0.1, "y_max": 0.5}]}', FIRST),
        ("llava", "[0.025, 0.1, 0.5, 0.5]", FIRST),
        ("llava", "[.025, .1, .5, .5]", FIRST),
        ("qwen3", "<think>maybe [1, 2, 3, 4]?</think>[25, 100, 500, 500]", FIRST),
        ("qwen3", "maybe [1, 2, 3, 4]?</think>[25, 100, 500, 500]<|im_end|>", FIRST),
        ("qwen3", "[500, 500, 25, 100]", FIRST),
        ("qwen3", "[-10, 100, 500, 1200]", [0, 48, 320, 480]),
        ("qwen3", '[{"bbox_2d": ["25", "100", "500", "500"]}]', FIRST),
        ("qwen3", '[{"bbox_2d": "25, 100, 500, 500"}]', FIRST),
        ("qwen3", '[{"bbox_2d": [[25, 100], [500, 500]]}]', FIRST),
        ("qwen3", '[{"bbox_2d": [25, 100, 500, 500,], "label": "car",},]', FIRST),
        ("qwen3", "[2.5e1, +100.0, 500, 500]", FIRST),
        ("qwen3", "\uff3b25\uff0c100\uff0c500\uff0c500\uff3d", FIRST),
        ("qwen3", "<thinking>[1, 2, 3, 4]</thinking>[25, 100, 500, 500]", FIRST),
        ("qwen3", "Not [1, 2, 3, 4]. <answer>[25, 100, 500, 500]</answer>", FIRST),
        ("glm", "Not [1, 2, 3, 4]. <|begin_of_box|>[[25,100,500,500]]<|end_of_box|>", FIRST),
        ("paligemma", "<loc0102> <loc0026> <loc0512> <loc0512> car", [16.25, 47.8, 320, 240]),
        ("rex-omni", "<|box_start|><25> <100> <500> <500><|box_end|>", FIRST),
        ("molmo", "<point x='2.5%' y='10.0%' alt='car'>car</point>", [16, 48, 16, 48]),
        ("moondream", '{"objects": [{"x_min": "0.025", "x_max": 5e-1, "y_min": 0.1, "y_max": 0.5}]}', FIRST),
        # numbers in the repeated sentence are not a box
        ("qwen3", '[{"bbox_2d": [25, 100, 500, 500], "label": "plate [1, 2, 3, 4]"}]', FIRST),
        ("qwen3", '[{"label": "a "plate" [1, 2, 3, 4]", "bbox_2d": [25, 100, 500, 500]}]', FIRST),
        ("qwen3", '[{"bbox_2d": [25, 100, 500, 500], "label": "plate [1, 2, 3, 4]', FIRST),
        ("gemini", '[{"box_2d": [100, 25, 500, 500], "mask": "data:image/png;base64,[1,2,3,4]"}]', FIRST),
        (
            "qwen2",
            "<|object_ref_start|>(1,2),(3,4)<|object_ref_end|><|box_start|>(25,100),(500,500)<|box_end|>",
            FIRST,
        ),
        ("internvl", "<ref>plate [1,2,3,4]</ref><box>[[25, 100, 500, 500]]</box>", FIRST),
        ("rex-omni", "<|object_ref_start|><1><2><3><4><|object_ref_end|><|box_start|><25><100><500><500>", FIRST),
        ("molmo", """<point x="2.5" y="10.0" alt="x='5' y='6'">""", [16, 48, 16, 48]),
    ],
)
def test_a_box_is_read(grammar, text, box):
    boxes, outcome = parse(grammar, text, WIDTH, HEIGHT)
    assert outcome == "boxes"
    np.testing.assert_allclose(boxes, [box], atol=0.7)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("qwen3", "[]"),
        ("qwen3", "```json\n[]\n```"),
        ("qwen2.5", "{}"),
        ("qwen3", '[{"bbox_2d": null, "label": "red car"}]'),
        ("qwen3", "<think>is there [1, 2, 3, 4]? no.</think>There are no red cars in the image."),
        ("internvl", "<ref>a car</ref><box>[]</box>"),
        ("internvl", "<ref>a [1] car</ref> is not present."),
        ("glm", "<|begin_of_box|>[]<|end_of_box|>"),
        ("paligemma", ""),
        ("paligemma", "<eos>"),
        ("florence2", "</s><s>a car</s>"),
        ("kosmos2", "<grounding><phrase>a car</phrase></s>"),
        ("rex-omni", "<|object_ref_start|>car<|object_ref_end|><|box_start|>None<|box_end|>"),
        ("moondream", '{"objects": []}'),
        ("glm", "<|begin_of_box|><|end_of_box|>"),
        ("molmo", "Counting the cars shows a total of 0."),
        *(("qwen3", text) for text in ("[null]", "[None]", '["none"]', "[{}]", "N/A", "no", '{"answer": "none"}')),
        *(("qwen3", f'[{{"bbox_2d": {none}, "label": "car"}}]') for none in ("None", '"null"', "[]", '"N/A"')),
        ("qwen3", "<answer>none</answer>"),
        ("qwen3", "No man in a red shirt is visible."),
        ("qwen3", "I could not find the red car in this image."),
        ("qwen3", "I was unable to find a red car."),
        ("qwen3", "There isn\u2019t a red car."),
        ("qwen3", "The sentence doesn't match any object."),
        ("qwen3", "The red car is missing from the image."),
        *((grammar, "None") for grammar in WORDS),
        *((grammar, "There is no such object.") for grammar in WORDS),
        *((grammar, "I don't see a red car here.") for grammar in WORDS),
    ],
)
def test_a_rejection_is_read(grammar, text):
    assert parse(grammar, text, WIDTH, HEIGHT) == ([], "none")


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        *((grammar, text) for grammar in WORDS for text in ("", "It is the man on the left.", "I cannot help.")),
        ("qwen3", None),
        ("qwen3", '[{"bbox_2d": [25, 100, 50'),
        ("qwen3", "<think>there is no such car"),
        ("qwen3", "There is no image attached."),
        ("qwen3", "No image was given."),
        ("qwen3", "I can't see the image, so there is no answer from me: I cannot view pictures."),
        ("qwen3", "The man with no hat is on the left."),
        ("qwen3", "He is the one with nothing in his hands."),
        ("qwen3", "No doubt, it is the man on the left."),
        ("qwen3", "<thinking>[25, 100, 500, 500]"),
        ("qwen3", "<answer>"),
        ("qwen3", "[25, 100, 500, 500, 30, 40, 50, 60]"),
        ("qwen3", '[{"points": [[25, 100], [500, 500]]}]'),
        ("glm", "<|begin_of_box|>"),
        ("qwen3", "[25, 100, 500]"),
        ("qwen3", f"[{'9' * 400}, 1, 2, 3]"),
        ("qwen2", "<|object_ref_start|>there is no car<|object_ref_end|><|box_start|>(25,10"),
        ("qwen2", "(25,100),(5"),
        ("internvl", "<ref>there is no car</ref><box>[[25, 1"),
        ("internvl", "<ref>there is no"),
        ("paligemma", "<loc0102><loc0026><loc05"),
        ("paligemma", "a car"),
        ("florence2", "a car<loc_25><loc_100>"),
        ("kosmos2", "<phrase>a car</phrase><object><patch_index_0096>"),
        ("kosmos2", "<phrase>a car</phrase><object><patch_index_9999><patch_index_9999></object>"),
        ("moondream", '{"objects": [{"x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.45'),
    ],
)
def test_anything_else_is_unreadable(grammar, text):
    assert parse(grammar, text, WIDTH, HEIGHT) == ([], "unreadable")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(AREAS), st.integers(1, 3), st.integers(0, 200), st.sampled_from(["a car", "there is no car"]))
def test_a_cut_off_answer_keeps_its_first_boxes(grammar, number, end, sentence):
    truth = [[40.0 * i, 30.0, 40.0 * i + 60, 200.0] for i in range(number)]
    text = format_answer(grammar, truth, sentence, WIDTH, HEIGHT)
    whole, cut = parse(grammar, text, WIDTH, HEIGHT), parse(grammar, text[:end], WIDTH, HEIGHT)
    assert whole.outcome == "boxes" and cut.boxes == whole.boxes[: len(cut.boxes)]
    if "<" in text[:end] or "[" in text[:end] or "{" in text[:end]:  # the sentence alone can be a whole "none"
        is_closed = grammar in ("florence2", "kosmos2") and text[:end].endswith("</phrase>")
        assert is_closed or cut.outcome != "none"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(GRAMMARS)), st.text() | st.text("[](){}<>,0123456789. \"loc_xyn|patch_index'", max_size=60)
)
def test_any_text_has_an_outcome_and_boxes_of_the_image(grammar, text):
    boxes, outcome = parse(grammar, text, WIDTH, HEIGHT)
    assert outcome in ("boxes", "none", "unreadable") and bool(boxes) == (outcome == "boxes")
    assert all(0 <= x0 <= x1 <= WIDTH and 0 <= y0 <= y1 <= HEIGHT for x0, y0, x1, y1 in boxes)
    assert parse(grammar, f"{text}<think>{text}", WIDTH, HEIGHT).outcome == "unreadable"


def test_florence_is_read_as_by_transformers():
    processor = Florence2PostProcessor(config={}, tokenizer=_NoTokens())
    numbers = random.Random(0)
    for _ in range(300):
        bins = [[numbers.randrange(1000) for _ in range(2)] for _ in range(2 * numbers.randrange(1, 5))]
        boxes = [sorted(xs) + sorted(ys) for xs, ys in zip(bins[::2], bins[1::2])]
        boxes = [[x0, y0, x1, y1] for x0, x1, y0, y1 in boxes]
        text = "the man" + "".join(f"<loc_{number}>" for box in boxes for number in box)
        own = parse("florence2", text, WIDTH, HEIGHT).boxes
        theirs = processor.parse_description_with_bboxes_from_text_and_spans(text, (WIDTH, HEIGHT))
        theirs = [instance["bbox"] for instance in theirs]
        np.testing.assert_array_equal(np.floor(own), theirs)  # theirs are cut to whole pixels


class _NoTokens:
    all_special_tokens: list[str] = []


def test_kosmos_is_read_as_by_transformers():
    numbers = random.Random(0)
    for _ in range(300):
        corners = [(numbers.randrange(1024), numbers.randrange(1024)) for _ in range(numbers.randrange(1, 4))]
        pairs = [f"<patch_index_{first:04d}><patch_index_{last:04d}>" for first, last in corners]
        text = f"<phrase>a car</phrase><object>{'</delimiter_of_multi_objects/>'.join(pairs)}</object>"
        own = parse("kosmos2", text, 32, 64).boxes
        _, ((_, _, theirs),) = clean_text_and_extract_entities_with_bboxes(text)
        assert theirs == [patch_index_to_coordinate(*pair, 32) for pair in corners]
        theirs = np.array(theirs) * [32, 64, 32, 64]
        theirs = np.concatenate([np.minimum(*np.split(theirs, 2, 1)), np.maximum(*np.split(theirs, 2, 1))], 1)
        np.testing.assert_allclose(own, theirs, atol=1e-9)


def test_images_are_sent_at_sizes_that_qwen_leaves_alone():
    assert qwen_size(640, 480) == (644, 476) and qwen_size(427, 640) == (420, 644)
    for width, height in [(20, 20), (9000, 9000), (64, 48), (5000, 40)]:
        size = qwen_size(width, height)
        assert qwen_size(*size) == size and not size[0] % 28 and not size[1] % 28
    image = Image.new("L", (640, 480))
    assert resize(image, "qwen2.5").size == (644, 476) and resize(image, "qwen3").size == (640, 480)
    assert resize(image, "qwen3").mode == "RGB"


def test_sentences_are_taken_literally():
    for grammar in GRAMMARS:
        assert "the {x0} {car}" in prompt(grammar, "the {x0} {car}")
        assert parse(grammar, format_answer(grammar, BOXES, 'a {x} "car"', WIDTH, HEIGHT), WIDTH, HEIGHT).boxes


def test_an_unknown_grammar_is_named():
    with pytest.raises(ValueError, match="grammar is 'qwen9'; choose one of qwen2, "):
        parse("qwen9", "", 1, 1)

"""MDETR's processor: sizes, padding, which words a box points at, training batches, and boxes back in pixels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

import grefcoco
from modeling.configuration_mdetr import MdetrConfig
from modeling.image_processing_mdetr import MdetrImageProcessor, resized_size
from modeling.modeling_mdetr import MdetrOutput
from modeling.processing_mdetr import MdetrCollator, relative_boxes
from modeling.root_noun_mdetr import nouns_by_rule, nouns_of_parse, root_nouns
from tests.tiny_grefcoco import write_genuine
from tests.tiny_mdetr import expression_rows, tiny_processor


@pytest.mark.parametrize(
    ("original", "resized"),
    [
        ((480, 640), (800, 1066)),  # int, not rounded: 1066.67
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((300, 640), (625, 1333)),  # the longer side binds
        ((640, 300), (1333, 625)),
        ((500, 500), (800, 800)),
        ((800, 1000), (800, 1000)),
    ],
)
def test_sizes_follow_the_published_rule(original: tuple[int, int], resized: tuple[int, int]) -> None:
    assert resized_size(original, 800, 1333) == resized


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_keep_within_both_edges(height: int, width: int) -> None:
    sides, ratio = resized_size((height, width), 800, 1333), max(height, width) / min(height, width)
    assert 1 <= min(sides) <= 800 and max(sides) <= 1333 + ratio, "the shorter side is rounded first"
    assert min(sides) == 800 or max(sides) >= 1333 - ratio
    assert resized_size((width, height), 800, 1333) == sides[::-1]


def test_images_are_normalised_and_padded_right_and_below() -> None:
    processor = MdetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 60})
    white, grey = Image.new("RGB", (80, 80), (255, 255, 255)), np.full((40, 80), 124, dtype=np.uint8)
    batch = processor([white, grey], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 40, 60)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 40, 30 * 60]
    assert batch["pixel_mask"][0, :, :40].all() and batch["pixel_mask"][1, :30].all()
    assert (batch["pixel_values"] * (1 - batch["pixel_mask"])[:, None] == 0).all()
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch["pixel_values"][0, :, 7, 9], expected, atol=1e-5, rtol=1e-5)
    alone = processor(white, return_tensors="pt")
    torch.testing.assert_close(alone["pixel_values"][0], batch["pixel_values"][0, :, :, :40])
    assert processor(white, do_resize=False)["pixel_values"].shape == (1, 3, 80, 80)


def test_processor_is_the_same_after_saving(tmp_path: Path) -> None:
    processor, rows = tiny_processor(), expression_rows()
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    images, text = [rows[0]["image"], rows[2]["image"]], [["the red square", "left"], ["all squares on the left"]]
    before, after = processor(images=images, text=text), again(images=images, text=text)
    assert (
        before.keys() == {"pixel_values", "pixel_mask", "input_ids", "attention_mask", "image_index"} == after.keys()
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["image_index"].tolist() == [0, 0, 1]
    assert before["attention_mask"].sum(1).tolist() == [5, 3, 7], "each with <s> and </s>"
    assert (before["input_ids"][before["attention_mask"] == 0] == 1).all(), "RoBERTa's padding"


def test_long_sentences_are_cut_to_the_positions() -> None:
    texts = tiny_processor()(text="red " * 400)
    assert texts["input_ids"].shape == (1, 256)
    assert texts["input_ids"][0, -1] == 2, "the end token stays"


def test_positive_map_moves_inwards_to_tokens_and_leaves_out_blanks() -> None:
    processor, sentence = tiny_processor(), "the red  square"

    def tokens(*spans: tuple[int, int]) -> dict[int, float]:
        found = processor.positive_map(sentence, spans)
        return {int(i): round(float(found[i]), 3) for i in found.nonzero()}

    assert tokens((4, 7)) == {2: 1}
    assert tokens((3, 9)) == {2: 1}, "blanks on both sides"
    assert tokens((0, 3), (9, 15)) == {1: 0.5, 3: 0.5}
    assert tokens((0, 15)) == {1: 0.333, 2: 0.333, 3: 0.333}
    assert tokens((6, 9)) == tokens((5, 6)) == {2: 1}, "a part of a word is the word"
    assert tokens() == {}


@pytest.mark.parametrize(
    ("sentence", "nouns"),
    [
        ("the man on left", ["man"]),
        ("two people in front of the red table and a dog", ["people", "dog"]),
        ("Red umbrella, far right", ["umbrella"]),
        ("man left", ["man"]),
        ("left man and right woman", ["man", "woman"]),
        ("man in red and blue shirt", ["man"]),
        ("the boy's hat & the girl", ["hat", "girl"]),
        ("everything except the cat", ["everything except the cat"]),
        ("second from left", ["second from left"]),
        ("", []),
        ("and", ["and"]),
    ],
)
def test_root_nouns_by_rule(sentence: str, nouns: list[str]) -> None:
    spans = nouns_by_rule(sentence) or ([(0, len(sentence))] if sentence else [])
    assert [sentence[start:end] for start, end in spans] == nouns


@given(st.text(max_size=60))
def test_any_sentence_has_root_nouns_inside_it(sentence: str) -> None:
    spans = root_nouns(sentence)
    assert all(0 <= start < end <= len(sentence) for start, end in spans)
    assert spans == sorted(spans) and (spans or not sentence)


def token(
    text: str, idx: int, pos: str, dep: str = "", children: tuple = (), conjuncts: tuple = ()
) -> SimpleNamespace:
    return SimpleNamespace(text=text, idx=idx, pos_=pos, dep_=dep, children=children, conjuncts=conjuncts)


def test_root_nouns_of_a_parse() -> None:
    dog = token("dog", 12, "NOUN")  # "the man and dog" / "the man sits"
    noun_root = token("man", 4, "NOUN", conjuncts=(dog, token("left", 30, "ADJ")))
    verb_root = token("sits", 8, "VERB", children=(token("man", 4, "NOUN", "nsubj"), token("mat", 20, "NOUN", "dobj")))
    assert nouns_of_parse(SimpleNamespace(sents=[SimpleNamespace(root=noun_root)])) == [(4, 7), (12, 15)]
    assert nouns_of_parse(SimpleNamespace(sents=[SimpleNamespace(root=verb_root)])) == [(4, 7)]
    assert nouns_of_parse(SimpleNamespace(sents=[SimpleNamespace(root=token("left", 0, "ADV"))])) == []


def test_batch_has_relative_boxes_maps_and_counts() -> None:
    batch = MdetrCollator(tiny_processor())(expression_rows())
    labels = batch["labels"]
    assert batch["image_index"].tolist() == [0, 0, 1, 1] and len(batch["pixel_values"]) == 2
    assert labels["num_targets"].tolist() == labels["num_boxes"].tolist() == [1, 0, 2, 1]
    assert labels["is_final"].tolist() == [[1, 0], [0, 0], [1, 1], [1, 0]], "all boxes are what the sentence is about"
    assert labels["boxes"].shape == (4, 2, 4) and labels["positive_map"].shape == (4, 2, MdetrConfig().num_positions)
    torch.testing.assert_close(labels["boxes"][0, 0], torch.tensor([48 / 64, 42 / 64, 24 / 64, 24 / 64]))
    torch.testing.assert_close(labels["boxes"][2, 1], torch.tensor([72 / 96, 16 / 64, 24 / 96, 24 / 64]))
    assert labels["positive_map"][0, 0].argmax() == 3, "the blue SQUARE, behind <s>"
    assert labels["positive_map"][2, 0, 3] == labels["positive_map"][2, 1, 3] == pytest.approx(1, abs=1e-5)
    assert not labels["positive_map"][1].any()


def test_crowds_and_boxes_without_area_are_no_targets() -> None:
    row = expression_rows()[2] | {"ann_ids": [7, 8, 9], "boxes": [[-10, 0, 20, 30], [5, 5, 10, 10], [70, 3, 0, 8]]}
    row["objects"] = [{"ann_id": i, "iscrowd": i == 8} for i in (7, 8, 9)]
    torch.testing.assert_close(relative_boxes(row), torch.tensor([[5 / 96, 15 / 64, 10 / 96, 30 / 64]]))
    assert relative_boxes({**row, "ann_ids": [], "boxes": []}).shape == (0, 4)


def test_rows_of_the_data_set_make_batches(tmp_path: Path) -> None:
    folder, out = write_genuine(tmp_path / "genuine"), tmp_path / "built"
    grefcoco.build(folder, folder / "train2014", out)
    rows = grefcoco.load(out, split="train", columns=tiny_processor().columns(training=True))
    batch = tiny_processor().collator(training=True, share_images=True)(rows.__getitems__(list(range(len(rows)))))
    crowds = [sum(ann_id % 10 == 3 for ann_id in row["ann_ids"]) for row in rows]
    counts = [len(row["ann_ids"]) - crowd for row, crowd in zip(rows, crowds)]
    assert batch["labels"]["num_boxes"].tolist() == counts and max(crowds) == 1 and {0, 1, 2} <= {*counts}
    assert len(batch["pixel_values"]) == len({row["image_id"] for row in rows}) < len(rows)


def outputs_of(scores: list[float], **changes: torch.Tensor) -> MdetrOutput:
    """One sentence with queries of these scores; the boxes are the middle quarter of the image."""
    scores = torch.tensor([scores], dtype=torch.float64)
    logits = torch.stack([scores.log(), (1 - scores).log()], dim=-1)
    return MdetrOutput(logits=logits, pred_boxes=torch.full((*scores.shape, 4), 0.5), **changes)


def test_boxes_in_pixels_at_or_above_the_threshold() -> None:
    processor = tiny_processor()
    (result,) = processor.post_process_referring_detection(
        outputs_of([0.9, 0.2, 0.71, 0.69]), target_sizes=torch.tensor([[480, 640]])
    )
    assert result["boxes"].tolist() == [[160, 120, 480, 360]] * 2
    assert result["scores"].tolist() == pytest.approx([0.9, 0.71])
    (result,) = processor.post_process_referring_detection(outputs_of([0.9, 0.2]), threshold=0.95)
    assert result["boxes"].shape == (0, 4) and result["scores"].shape == (0,)
    (result,) = processor.post_process_referring_detection(outputs_of([0.9]))
    assert result["boxes"].tolist() == [[0.25, 0.25, 0.75, 0.75]]
    with pytest.raises(ValueError, match="2 target_sizes for 1 sentences"):
        processor.post_process_referring_detection(outputs_of([0.9]), target_sizes=[(4, 4), (5, 5)])


def test_threshold_is_not_rounded_to_the_scores_precision() -> None:
    processor, outputs = tiny_processor(), outputs_of([0.7])
    score = processor.post_process_referring_detection(outputs, threshold=0.0)[0]["scores"].item()
    assert len(processor.post_process_referring_detection(outputs, threshold=score)[0]["boxes"]) == 1
    assert len(processor.post_process_referring_detection(outputs, threshold=score + 1e-9)[0]["boxes"]) == 0


def test_final_head_gives_a_second_score() -> None:
    final = torch.tensor([[[0.0], [10.0], [10.0]]])
    (result,) = tiny_processor().post_process_referring_detection(outputs_of([0.99, 0.2, 0.9], pred_isfinal=final))
    assert result["scores"].tolist() == pytest.approx([0.99, 0.9])
    assert result["scores_refexp"].tolist() == pytest.approx([0.495, 0.9], abs=1e-3)


def test_configuration_names_what_contradicts() -> None:
    for changes, message in (
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"hidden_size": 64, "num_attention_heads": 7}, "num_attention_heads=7"),
        ({"depths": [3, 4]}, r"depths=\[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MdetrConfig(**changes)
    assert MdetrConfig().text_config.max_position_embeddings == 514

"""Conversations and rewards for TRL: the oracle, what the metric gives, and TRL's own trainers on a tiny model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import grefcoco
import scoring
from grefcoco_data.masks import decode_mask, xywh_to_xyxy
from scoring import rewards
from scoring.grammars import GRAMMARS, format_answer
from tests import tiny_peers
from tests.tiny_grefcoco import write_genuine

FUNCTIONS = [rewards.grammar_obeyed, rewards.f1, rewards.none_answered, rewards.mask_iou]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    genuine = write_genuine(folder / "genuine")
    grefcoco.build(genuine, genuine / "train2014", folder / "built")
    return folder / "built"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_peers.save(tmp_path_factory.mktemp("llava"), "llava")


def columns(rows: list[dict]) -> dict[str, list]:
    """The columns as TRL passes them to a reward."""
    names = [name for name in rows[0] if name not in ("prompt", "completion")]
    return {name: [row[name] for row in rows] for name in names}


def reward(function, rows: list[dict], completions: list) -> list[float]:
    return function(prompts=[row["prompt"] for row in rows], completions=completions, **columns(rows))


def test_rows_are_conversations(dataset):
    source = grefcoco.load(dataset, split="val")
    rows = scoring.messages(source, grammar="qwen3")
    assert len(rows) == len(source)
    for row, plain in zip(rows, source, strict=True):
        assert [turn["role"] for turn in row["prompt"] + row["completion"]] == ["user", "assistant"]
        boxes = xywh_to_xyxy(plain["boxes"]).tolist()
        answer = format_answer("qwen3", boxes, plain["sentence"], plain["width"], plain["height"])
        assert row["completion"][0]["content"] == answer and plain["sentence"] in row["prompt"][0]["content"]
        assert row["images"][0].size == (64, 48) and "image" not in row
    assert scoring.messages(source, grammar="qwen2.5")[0]["images"][0].size == (56, 56)
    with pytest.raises(ValueError, match="choose one of"):
        scoring.messages(source, grammar="qwen")


def test_a_stream_gives_the_same_conversations(dataset):
    rows = scoring.messages(grefcoco.load(dataset, split="val"), grammar="gemini")
    stream = scoring.messages(grefcoco.load(dataset, split="val", streaming=True), grammar="gemini")
    for row, streamed in zip(rows, stream, strict=True):
        assert list(row["images"][0].getdata()) == list(streamed["images"][0].getdata())
        assert {**row, "images": 0} == {**streamed, "images": 0}


@pytest.mark.parametrize("grammar", sorted(set(GRAMMARS) - {"molmo"}))
def test_truth_gets_the_full_reward(dataset, grammar):
    rows = list(scoring.messages(grefcoco.load(dataset, split="val"), grammar=grammar))
    for function in FUNCTIONS[:3]:
        assert reward(function, rows, [row["completion"] for row in rows]) == [1.0] * len(rows), function.__name__
    ious = reward(rewards.mask_iou, rows, [row["completion"] for row in rows])
    assert min(ious) > (0.5 if grammar == "kosmos2" else 0.9)


def test_other_answers_get_what_the_metric_gives(dataset):
    rows = list(scoring.messages(grefcoco.load(dataset, split="val"), grammar="qwen3"))
    none = [float(row["no_target"]) for row in rows]
    assert 0 < sum(none) < len(none)
    for function in FUNCTIONS[1:]:
        assert reward(function, rows, ["[]"] * len(rows)) == none
    for text, obeyed in (("[]", 1.0), ("[[1, 2, 3, 4]]", 1.0), ("well", 0.0), ("[[1, 2, 3", 0.0)):
        assert reward(rewards.grammar_obeyed, rows, [text] * len(rows)) == [obeyed] * len(rows)
    for function in FUNCTIONS:
        assert reward(function, rows, ["well"] * len(rows)) == [0.0] * len(rows)
    boxes = [[[y0, x0, y1, x1] for x0, y0, x1, y1 in xywh_to_xyxy(row["boxes"]).tolist()] for row in rows]
    texts = [format_answer("qwen3", own, "", row["width"], row["height"]) for own, row in zip(boxes, rows)]
    swapped = reward(rewards.f1, rows, texts)
    assert sum(swapped) < 0.8 * len(rows) and all(value == 1 for value, is_none in zip(swapped, none) if is_none)
    two = next(row for row in rows if len(row["boxes"]) == 2)
    half = format_answer("qwen3", xywh_to_xyxy(two["boxes"]).tolist()[:1], "", 64, 48)
    assert reward(rewards.f1, [two], [half]) == pytest.approx([2 / 3])


def test_masks_of_a_segmenter_are_held_against_the_true_mask(dataset):
    row = next(row for row in grefcoco.load(dataset, split="val") if not row["no_target"])
    (conversation,) = list(scoring.messages(grefcoco.load(dataset, split="val").select([0]), grammar="qwen3"))
    conversation |= {name: row[name] for name in ("boxes", "mask", "no_target", "width", "height")}
    truth = decode_mask(row["mask"]).astype(bool)
    text = format_answer("qwen3", xywh_to_xyxy(row["boxes"]).tolist(), "", 64, 48)
    perfect = rewards.MaskIou(lambda image, boxes: truth[None])
    assert reward(perfect, [conversation], [text]) == [1.0] and perfect.__name__ == "mask_iou"
    assert reward(rewards.MaskIou(lambda image, boxes: ~truth[None]), [conversation], [text]) == [0.0]


def test_completions_may_be_parts():
    row = {"prompt": "", "grammar": "qwen3", "width": 10, "height": 10, "boxes": [[0, 0, 5, 5]], "no_target": False}
    text = [
        {"role": "assistant", "content": [{"type": "text", "text": "[0, 0, "}, {"type": "text", "text": "500, 500]"}]}
    ]
    assert reward(rewards.f1, [row], [text]) == [1.0]


@pytest.mark.parametrize("streaming", [False, True])
def test_trls_trainer_tunes_on_the_rows(dataset, model, tmp_path, streaming):
    trl = pytest.importorskip("trl")
    rows = scoring.messages(grefcoco.load(dataset, split="train", streaming=streaming), grammar="llava")
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], max_length=None, use_cpu=True,
        remove_unused_columns=False, save_strategy="no", logging_steps=1, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    tuned = AutoModelForImageTextToText.from_pretrained(model)
    before = tuned.lm_head.weight.detach().clone()
    trainer = trl.SFTTrainer(
        tuned, arguments, train_dataset=rows, processing_class=AutoProcessor.from_pretrained(model)
    )
    trainer.train()
    assert trainer.state.global_step == 2 and not torch.equal(before, tuned.lm_head.weight)


def test_trls_trainer_calls_the_rewards(dataset, model, tmp_path):
    trl = pytest.importorskip("trl")
    rows = scoring.messages(grefcoco.load(dataset, split="train"), grammar="llava")
    arguments = trl.GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=8,
        report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no", logging_steps=1, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    tuned = AutoModelForImageTextToText.from_pretrained(model)
    processor = AutoProcessor.from_pretrained(model)
    trainer = trl.GRPOTrainer(tuned, FUNCTIONS, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    logged = trainer.state.log_history[0]
    for function in FUNCTIONS:
        assert 0 <= logged[f"rewards/{function.__name__}/mean"] <= 1

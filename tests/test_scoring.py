"""`python -m scoring`: answers of a checkpoint into a file, a file of answers and a data set into scores."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grefcoco
from grefcoco_data.masks import encode_mask
from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaProcessor
from scoring import prediction
from scoring.__main__ import main
from scoring.answers import Answer, parse_answer, read_answers
from scoring.measurement import COLUMNS, Measurement, reliability
from tests import tiny_mdetr
from tests.tiny_grefcoco import write_genuine
from tests.tiny_rela import INSTANCES, tiny_config, tiny_processor
from tests.tiny_training import ROOT, train_here


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    genuine = write_genuine(folder / "genuine")
    grefcoco.build(genuine, genuine / "train2014", folder / "built")
    return folder / "built"


@pytest.fixture
def run(capsys):
    """Run a scoring command in this process; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def true_masks(dataset: Path, split: str) -> list[dict]:
    rows = grefcoco.load(dataset, split=split, columns=["sent_id", "mask", "no_target"])
    return [row | {"no_target": 0.9 if row["no_target"] else 0.2} for row in rows]


def true_boxes(dataset: Path, split: str) -> list[dict]:
    rows = grefcoco.load(dataset, split=split, columns=["sent_id", "boxes"])
    return [
        {"sent_id": row["sent_id"], "scores": [0.9] * len(row["boxes"])}
        | {"boxes": [[x, y, x + width, y + height] for x, y, width, height in row["boxes"]]}
        for row in rows
    ]


def test_masks_are_scored_by_gres(run, dataset, tmp_path):
    lines = true_masks(dataset, "val")
    answers = write(tmp_path / "val.jsonl", lines[::-1])
    held_out = write(tmp_path / "train.jsonl", true_masks(dataset, "train")[:9])
    options = ["--split", "val", "--resolution", 32, "--details", "--bootstrap", 20]
    options += ["--threshold-from", held_out, "--threshold_split", "train", "--out", tmp_path / "scores.json"]
    options += ["--curve", tmp_path / "curve.png", "--table", tmp_path / "table.csv"]
    code, out, err = run("score", answers, dataset, *options)
    assert code == 0, err
    scores = json.loads(out)
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"gres", "default", "origin"} and set(scores["default"]) == {"gres"}
    assert "threshold" not in scores["default"]["gres"] and scores["origin"]["split"] == "val"
    gres = scores["gres"]
    assert (gres["gIoU"], gres["N_acc"], gres["T_acc"]) == (100, 1, 1)
    assert 0.2 < gres["threshold"] < 0.9
    assert gres["groups"]["num_targets=0"]["samples"] == sum(line["no_target"] > 0.5 for line in lines)
    assert gres["intervals"]["gIoU"] == [100, 100]
    with (tmp_path / "table.csv").open() as file:
        assert {row["pixels"] for row in csv.DictReader(file)} == {"1024"}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_boxes_are_scored_by_grec(run, dataset, tmp_path):
    answers = write(tmp_path / "a.jsonl", true_boxes(dataset, "testA"))
    code, out, err = run("score", answers, dataset, "--split", "testA", "--ap", "pycocotools")
    assert code == 0, err
    scores = json.loads(out)
    assert set(scores) == {"grec", "origin"} and scores["grec"]["F1_score"] == 1
    assert scores["grec"]["AP"] == pytest.approx(1)


def test_masks_and_boxes_of_one_file_are_scored_by_both(run, dataset, tmp_path):
    lines = [mask | box for mask, box in zip(true_masks(dataset, "val"), true_boxes(dataset, "val"))]
    answers = write(tmp_path / "both.jsonl", lines)
    code, out, err = run("score", answers, dataset, "--split", "val", "--table", tmp_path / "t.csv")
    assert code == 0, err
    scores = json.loads(out)
    assert scores["gres"]["gIoU"] == 100 and scores["grec"]["F1_score"] == 1
    assert {path.name for path in tmp_path.glob("*.csv")} == {"t-gres.csv", "t-grec.csv"}


def test_a_mask_without_probability_is_rejected_when_it_is_empty(run, dataset, tmp_path):
    lines = [{"sent_id": line["sent_id"], "mask": line["mask"]} for line in true_masks(dataset, "val")]
    code, out, err = run("score", write(tmp_path / "a.jsonl", lines), dataset, "--split", "val")
    assert code == 0, err
    assert json.loads(out)["gres"]["N_acc"] == 1 == json.loads(out)["gres"]["T_acc"]


def test_compat_applies_to_the_task_that_has_it(run, dataset, tmp_path):
    lines = [mask | box for mask, box in zip(true_masks(dataset, "val"), true_boxes(dataset, "val"))]
    for line in lines:
        line["no_target"] = 1.0
    answers = write(tmp_path / "both.jsonl", lines)
    code, out, err = run("score", answers, dataset, "--split", "val", "--compat", "lisa")
    assert code == 0, err
    assert json.loads(out)["gres"]["T_acc"] == 1, "lisa rejects by the mask, not by the probability"
    assert json.loads(out)["grec"]["F1_score"] == 1


def test_a_chosen_threshold_is_saved_with_the_model(run, dataset, tmp_path):
    """The calibrated value becomes the default of all post-processing."""
    tiny_processor().save_pretrained(tmp_path / "model")
    answers = write(tmp_path / "val.jsonl", true_masks(dataset, "val"))
    held_out = write(tmp_path / "train.jsonl", true_masks(dataset, "train"))
    options = ["score", answers, dataset, "--split", "val", "--save_threshold", tmp_path / "model"]
    code, _, err = run(*options)
    assert code == 2 and "--save-threshold needs --threshold-from" in err
    code, out, err = run(*options, "--threshold-from", held_out, "--threshold-split", "train")
    assert code == 0, err
    chosen = json.loads(out)["gres"]["threshold"]
    processor = RelaProcessor.from_pretrained(tmp_path / "model")
    assert 0.2 < chosen < 0.9 and processor.no_target_threshold == chosen
    boxes = write(tmp_path / "boxes.jsonl", true_boxes(dataset, "train"))
    code, _, err = run(*options, "--threshold-from", boxes, "--threshold-split", "train")
    assert code == 2 and "has no masks" in err
    options[-1] = tmp_path
    code, _, err = run(*options, "--threshold-from", held_out, "--threshold-split", "train")
    assert code == 2 and "has no no_target_threshold" in err


def test_a_threshold_of_the_reported_split_is_refused(run, dataset, tmp_path):
    answers = write(tmp_path / "val.jsonl", true_masks(dataset, "val"))
    options = ["--threshold-from", answers, "--threshold-split", "val", "--table", tmp_path / "table.csv"]
    code, _, err = run("score", answers, dataset, "--split", "val", *options)
    assert code == 2 and err.count("\n") == 1
    assert "was chosen on" in err
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize("keys", [("mask", "no_target"), ("boxes", "scores")], ids=["masks", "boxes"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: lines[1:], "1 are missing"),
        (lambda lines: [*lines, {**lines[0], "sent_id": -5}], "sentence -5 is not of this split"),
        (lambda lines: [*lines, {"sent_id": "1"}], "is no answer"),
        (lambda lines: [*lines, 7], "is no answer"),
        (lambda lines: [{**lines[0], "no_target": 3}], "line 1 is no answer"),
        (lambda lines: [{**lines[0], "boxes": [[1, 2, 3]], "scores": [1]}], "line 1 is no answer"),
        (lambda lines: [{**lines[0], "scores": None, "boxes": []}], "boxes and scores belong together"),
        (lambda lines: [{**lines[0], "probability": 1}], "unknown key 'probability'"),
        (lambda lines: [], "neither masks nor boxes"),
    ],
)
def test_bad_answers_are_one_line(run, dataset, tmp_path, keys, spoil, message):
    lines = [mask | box for mask, box in zip(true_masks(dataset, "val"), true_boxes(dataset, "val"))]
    lines = [{name: line[name] for name in ("sent_id", *keys)} for line in lines]
    code, out, err = run("score", write(tmp_path / "bad.jsonl", spoil(lines)), dataset, "--split", "val")
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compat", "nobody"], "--compat is 'nobody'"),
        (["--threshold-split", "train"], "belong together"),
        (["--threshold", "0.5", "--threshold-from", "x", "--threshold-split", "train"], "exclude each other"),
        (["--split", "test"], "test"),
    ],
)
def test_bad_options_are_one_line(run, dataset, tmp_path, options, message):
    answers = write(tmp_path / "val.jsonl", true_masks(dataset, "val"))
    code, out, err = run("score", answers, dataset, "--split", "val", *options)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_command_is_a_module_of_the_repository(dataset, tmp_path):
    command = [sys.executable, "-m", "scoring", "score", "none.jsonl", dataset, "--split", "val"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scoring score: ") and "none.jsonl" in done.stderr and done.stderr.count("\n") == 1


# ---- answers of our own models


@pytest.fixture(scope="module", params=["rela", "mdetr"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A model without training whose boxes pass the threshold, with its processor."""
    torch.manual_seed(0)
    if request.param == "rela":
        model, processor = (
            RelaModel(tiny_config(**INSTANCES, merge_instances=True)),
            tiny_processor({"height": 48, "width": 64}),
        )
        torch.nn.init.constant_(model.instance_chooser.relevance[-1].bias, 3.0)
    else:
        model, processor = MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_predicted_answers_score_as_train_py_measures(run, checkpoint, dataset, tmp_path):
    code, out, err = run("predict", checkpoint, dataset, "--split", "val", "--out", tmp_path / "a.jsonl")
    assert code == 0, err
    code, out, err = run("score", tmp_path / "a.jsonl", dataset, "--split", "val")
    assert code == 0, err
    flags = ["--eval_only", "--checkpoint", checkpoint, "--dataset", dataset, "--report_to", "none"]
    assert train_here(*flags, "--output_dir", tmp_path / "out", "--per_device_train_batch_size", 8) == 0
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    scores = json.loads(out)
    assert scores["grec"] == measured["grec"] and scores["grec"]["T_acc"] > 0
    if "gres" in measured:
        # the processed size is the image's size here: masks are compared pixel by pixel in both
        assert scores["gres"] == pytest.approx(measured["gres"], abs=1e-9)


def test_a_stopped_prediction_continues_to_the_same_file(run, checkpoint, dataset, tmp_path, monkeypatch):
    options = ["predict", checkpoint, dataset, "--split", "train", "--batch-size", 4]
    assert run(*options, "--out", tmp_path / "whole.jsonl")[0] == 0
    answers_of, calls = prediction.answers_of, []

    def stop_at_third(*arguments: object) -> list[Answer]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answers_of(*arguments)

    monkeypatch.setattr(prediction, "answers_of", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(*options, "--out", tmp_path / "part.jsonl")
    monkeypatch.setattr(prediction, "answers_of", answers_of)
    assert not (tmp_path / "part.jsonl").exists()
    with (tmp_path / "part.jsonl.part").open("a") as file:
        file.write('{"sent_id": 1, "ma')
    code, _, err = run(*options[:-2], "--batch-size", 8, "--out", tmp_path / "part.jsonl")
    assert code == 2 and "was begun by another command" in err
    assert run(*options, "--out", tmp_path / "part.jsonl")[0] == 0
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "part.jsonl.part").exists()


def test_predict_refuses_bad_numbers(run, checkpoint, dataset, tmp_path):
    options = ["predict", checkpoint, dataset, "--split", "val", "--out", tmp_path / "a.jsonl"]
    code, _, err = run(*options, "--batch-size", 0)
    assert code == 2 and "--batch-size is 0" in err
    assert run(*options, "--sentences", 3)[0] == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


# ---- answers


def test_a_line_is_read_as_it_was_written():
    mask = encode_mask(np.eye(4, dtype=bool))
    answer = Answer(7, mask, [[0.0, 1.0, 2.0, 3.5]], [0.25], 0.125, "<box>", True)
    assert parse_answer(answer.to_json()) == answer
    assert json.loads(Answer(1, boxes=[], scores=[]).to_json()) == {"sent_id": 1, "boxes": [], "scores": []}


def test_an_answer_rejects_by_its_probability_or_by_its_boxes():
    mask = encode_mask(np.eye(4, dtype=bool))
    assert Answer(1, mask, no_target=0.6).rejects() and not Answer(1, mask, no_target=0.6).rejects(0.7)
    assert not Answer(1, mask, no_target=0.5).rejects()
    assert Answer(1, boxes=[[0, 0, 1, 1]], scores=[0.6]).rejects()
    assert not Answer(1, boxes=[[0, 0, 1, 1]], scores=[0.7]).rejects()


def test_a_long_file_is_scored_in_batches(dataset, tmp_path, monkeypatch):
    lines = true_masks(dataset, "train")
    sizes = []
    add_answers = Measurement.add_answers
    monkeypatch.setattr("scoring.measurement.BATCH", 5)
    monkeypatch.setattr(
        Measurement, "add_answers", lambda self, answers: (sizes.append(len(answers)), add_answers(self, answers))
    )
    assert main(["score", str(write(tmp_path / "a.jsonl", lines)), str(dataset), "--split", "train"]) == 0
    assert max(sizes) == 5 and sum(sizes) == len(lines)
    stream = read_answers(tmp_path / "a.jsonl", {line["sent_id"] for line in lines})
    assert next(stream).sent_id == lines[0]["sent_id"], "the file is read line by line"


def test_examples_are_of_different_images(scenes_dataset):
    rows = grefcoco.load(scenes_dataset, split="val", columns=COLUMNS)
    measurement = Measurement(rows)
    blank = encode_mask(np.zeros((64, 64), bool))
    masks = [row["mask"] if row["sent_id"] % 2 else blank for row in rows]  # every image has right and wrong answers
    answers = [Answer(row["sent_id"], mask=mask, no_target=0.3) for row, mask in zip(rows, masks)]
    measurement.add_answers(answers)
    examples = measurement.examples(2)
    assert [len(examples[name]) for name in ("best", "worst")] == [2, 2]
    images = [rows[place]["image_id"] for place in (*examples["best"], *examples["worst"])]
    assert len(set(images)) == 4
    assert all(rows[place]["sent_id"] % 2 for place in examples["best"])
    assert not any(rows[place]["sent_id"] % 2 for place in examples["worst"])
    assert examples["failures"] == [place for place, row in enumerate(rows) if row["no_target"]][:2]
    assert measurement.details()["calibration"]["ECE"] == pytest.approx(0.3 - np.mean(rows["no_target"]))
    by_box = Measurement(rows)
    by_box.add_answers([Answer(row["sent_id"], boxes=[[0, 0, 9, 9]], scores=[0.9], no_target=0.1) for row in rows])
    assert by_box.examples(2)["failures"] == examples["failures"]
    assert by_box.details()["calibration"]["points"][0]["probability"] == pytest.approx(0.1)


def test_reliability_is_the_frequency_of_each_part():
    probability, truth = np.array([0.0, 0.1, 0.12, 0.98, 1.0]), np.array([False, True, False, True, True])
    result = reliability(probability, truth)
    assert [point["samples"] for point in result["points"]] == [1, 2, 2]
    assert [point["frequency"] for point in result["points"]] == [0, 0.5, 1]
    assert result["ECE"] == pytest.approx((2 * (0.5 - 0.11) + 2 * 0.01) / 5)

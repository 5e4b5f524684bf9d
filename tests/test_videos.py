"""`python -m scoring videos`: PNGs, JSON and answers to frames give the numbers of the original evaluator."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from tiny_mevis import GOLDENS, write_mevis

import grefcoco
from grefcoco_data.masks import encode_mask
from grefcoco_data.video_rows import MAX_FRAMES, VIDEO_FEATURES, merged_masks
from modeling.modeling_rela import RelaModel
from scoring.__main__ import main
from tests.tiny_rela import INSTANCES, tiny_config, tiny_processor
from tests.tiny_training import train_here

EXPECTED = json.loads((GOLDENS / "expected.json").read_text())["original"]
PREDICTIONS = {name: entry for name, entry in json.loads((GOLDENS / "predictions.json").read_text()).items() if entry}
VIDEO, SENTENCE = "0ab4afe7fb46", "1"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    genuine = write_mevis(tmp_path_factory.mktemp("genuine"), ("valid_u", "valid"))
    grefcoco.build_videos(genuine, genuine / "built")
    return genuine / "built"


@pytest.fixture
def run(capsys, dataset):
    """Run the command in this process; returns exit code, stdout and stderr."""

    def call(answers: Path, *options: object, command: str = "videos", split: str = "valid_u") -> tuple[int, str, str]:
        capsys.readouterr()
        arguments = [command, answers, dataset, "--config", "mevis", "--split", split, *options]
        return main([str(argument) for argument in arguments]), *capsys.readouterr()

    return call


def video_rows(dataset: Path, split: str = "valid_u") -> list[dict]:
    columns = [name for name in VIDEO_FEATURES if name != "frames"]
    return list(grefcoco.load(dataset, config="mevis", split=split, layout="video", columns=columns))


@pytest.fixture
def submission(tmp_path) -> Path:
    """The golden predictions as PNGs; one video is missing, as it was for the original."""
    for video_id, sentences in PREDICTIONS.items():
        for exp_id, masks in sentences.items():
            folder = tmp_path / "submission" / video_id / exp_id
            folder.mkdir(parents=True)
            for frame, mask in enumerate(masks):
                Image.fromarray(coco.decode(mask) * 255).save(folder / f"{frame:05}.png")
    return tmp_path / "submission"


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


def as_json(folder: Path) -> Path:
    path = folder.with_suffix(".json")
    entries = {
        video_id: {exp_id: {"prediction_masks": masks} for exp_id, masks in sentences.items()}
        for video_id, sentences in PREDICTIONS.items()
    }
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("form", [lambda folder: folder, zipped, as_json])
def test_submissions_score_as_in_the_original(run, submission, tmp_path, form):
    code, out, err = run(form(submission), "--compat", "original", "--details", "--out", tmp_path / "scores.json")
    assert code == 0, err
    scores = json.loads(out)["jf"]
    for name in ("J", "F", "J&F"):
        assert scores[name] == pytest.approx(EXPECTED[name], rel=1e-15)
    assert scores["groups"]["num_targets=0"]["samples"] == 4
    assert json.loads((tmp_path / "scores.json").read_text())["jf"] == scores
    code, _, err = run(form(submission))
    assert code == 2 and "video fffff0000000 sentence 0 lacks 6 masks" in err and err.count("\n") == 1


def test_what_the_original_drops_silently_is_named(run, submission):
    """The original's score rises when a file is missing; `--compat original` gives its number."""
    path = submission / VIDEO / SENTENCE / "00003.png"
    whole = path.read_bytes()
    path.unlink()
    code, _, err = run(submission)
    assert code == 2 and f"video {VIDEO} sentence {SENTENCE} lacks the mask of frame 3" in err
    code, out, _ = run(submission, "--compat", "original")
    others = [value for name, value in EXPECTED["per_expression"].items() if name != f"{VIDEO}_{SENTENCE}"]
    assert json.loads(out)["jf"]["J"] == pytest.approx(np.mean(others, axis=0)[0], rel=1e-12)
    for content, fault in ((whole[:40], "is no PNG that can be read"), (b"", "is no PNG"), (png((9, 9)), "is 9 x 9")):
        path.write_bytes(content)
        code, _, err = run(submission)
        assert code == 2 and f"the mask {VIDEO}/{SENTENCE}/00003.png {fault}" in err


def png(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("L", size).save(data, format="PNG")
    return data.getvalue()


def true_answers(dataset: Path, score: float = 0.1) -> list[dict]:
    rows = grefcoco.load(dataset, config="mevis", split="valid_u", columns=["sent_id", "mask", "no_target"])
    return [{"sent_id": r["sent_id"], "mask": r["mask"], "no_target": 0.9 if r["no_target"] else score} for r in rows]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_true_masks_of_frames_are_right_in_any_order(run, dataset, tmp_path):
    lines = true_answers(dataset)
    for order in (lines, lines[::-1]):
        code, out, err = run(write(tmp_path / "a.jsonl", order), "--submission", tmp_path / "out.zip")
        assert code == 0, err
        scores = json.loads(out)["jf"]
        assert scores["J&F"] == scores["N_acc"] == 1
    # the submission holds the same masks, at the root of the zip
    code, out, err = run(tmp_path / "out.zip")
    assert code == 0 and json.loads(out)["jf"] == scores
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert f"{VIDEO}/0/00000.png" in archive.namelist()


def test_rules_of_none(run, dataset, tmp_path):
    """`frame` empties single frames, `mean` whole clips by the mean of their probabilities."""
    video = video_rows(dataset)[0]
    lines = true_answers(dataset)
    full = encode_mask(np.ones((video["height"], video["width"])))
    first = video["expressions"][0]["sent_id"]
    scores = iter([0.9, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    for line in lines:
        if line["sent_id"] // MAX_FRAMES == first:
            line |= {"mask": full, "no_target": next(scores)}
    empty_frames = {}
    for rule, threshold in (("frame", 0.5), ("mean", 0.5), ("mean", 0.4)):
        target = tmp_path / "out.zip"
        code, _, err = run(
            write(tmp_path / "a.jsonl", lines), "--none", rule, "--threshold", threshold, "--submission", target
        )
        assert code == 0, err
        with zipfile.ZipFile(target) as archive:
            names = [f"{video['video_id']}/0/{frame}.png" for frame in video["frame_names"]]
            masks = [np.array(Image.open(io.BytesIO(archive.read(name)))) for name in names]
        empty_frames[rule, threshold] = [not mask.any() for mask in masks]
    assert empty_frames["frame", 0.5] == [True] + [False] * 7
    assert empty_frames["mean", 0.5] == [False] * 8
    assert empty_frames["mean", 0.4] == [True] * 8


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda lines: lines.pop(3), "lacks the mask of frame"),
        (lambda lines: lines.append({"sent_id": 3, "mask": lines[0]["mask"]}), "3 is no sentence on a frame"),
        (lambda lines: lines.append({"sent_id": 20000000 * MAX_FRAMES}), "is no sentence on a frame"),
        (lambda lines: lines[5].pop("mask"), "line 6 has no mask"),
        (lambda lines: lines[5].update(sent_id="5"), "line 6 is no answer"),
        (
            lambda lines: next(line for line in lines if line["no_target"] < 0.5)["mask"].update(counts="1P"),
            "frame .* is no RLE string",
        ),
    ],
)
def test_broken_answers_are_named(run, dataset, tmp_path, edit, fault):
    lines = true_answers(dataset)
    edit(lines)
    code, _, err = run(write(tmp_path / "a.jsonl", lines))
    assert code == 2 and err.count("\n") == 1
    assert re.search(fault, err)


@pytest.mark.parametrize(
    ("content", "fault"),
    [("{}", "lacks 8 masks"), ("[]", "is neither"), ("x", "is neither"), ('{"a": {"0": []}}', "is neither")],
)
def test_broken_json_is_named(run, tmp_path, content, fault):
    (tmp_path / "a.json").write_text(content)
    code, _, err = run(tmp_path / "a.json")
    assert code == 2 and fault in err and err.count("\n") == 1
    assert run(tmp_path / "missing.json")[0] == 2


@pytest.mark.slow
def test_a_model_of_images_answers_videos(run, dataset, tmp_path):
    """From a checkpoint to a submission of a split whose masks are withheld, and to scores of one that has them."""
    model = RelaModel(tiny_config(**INSTANCES))
    model.save_pretrained(tmp_path / "model")
    tiny_processor({"height": 48, "width": 64}).save_pretrained(tmp_path / "model")
    for split in ("valid_u", "valid"):
        out = tmp_path / f"{split}.jsonl"
        code, _, err = run(tmp_path / "model", "--out", out, command="predict", split=split)
        assert code == 0, err
    code, out, err = run(tmp_path / "valid_u.jsonl", "--none", "mean", "--bootstrap", 10)
    assert code == 0, err
    scores = json.loads(out)["jf"]
    assert 0 < scores["J&F"] <= 1 and set(scores["intervals"]) >= {"J", "F", "J&F", "Final"}
    code, _, err = run(tmp_path / "valid.jsonl", split="valid")
    assert code == 2 and "are not published" in err
    code, out, err = run(tmp_path / "valid.jsonl", "--submission", tmp_path / "valid.zip", split="valid")
    assert code == 0 and "valid.zip is ready" in out, err
    rows = video_rows(dataset, "valid")
    with zipfile.ZipFile(tmp_path / "valid.zip") as archive:
        assert len(archive.namelist()) == sum(len(row["frame_names"]) * len(row["expressions"]) for row in rows)
    assert run(tmp_path / "valid.jsonl", "--submission", tmp_path / "valid.tar", split="valid")[0] == 2
    # frame by frame, the metric of images reads the same answers
    code, out, err = run(tmp_path / "valid_u.jsonl", "--resolution", 48, command="score")
    assert code == 0, err
    # train.py takes the folder of videos as it takes one of images
    flags = ["--eval_only", "--checkpoint", tmp_path / "model", "--dataset", dataset, "--split", "valid_u"]
    assert train_here(*flags, "--report_to", "none", "--output_dir", tmp_path / "run") == 0
    measured = json.loads((tmp_path / "run/metrics.json").read_text())["gres"]
    assert measured["always_empty/gIoU"] == json.loads(out)["gres"]["always_empty/gIoU"]


def test_references_are_the_union_of_all_targets(dataset):
    for row in video_rows(dataset):
        for expression in row["expressions"]:
            masks = merged_masks(row, expression)
            for frame, mask in enumerate(masks):
                expected = np.zeros((row["height"], row["width"]), bool)
                for item in row["objects"]:
                    if item["anno_id"] in expression["anno_ids"] and item["segmentations"][frame]:
                        expected |= coco.decode(item["segmentations"][frame]) > 0
                assert np.array_equal(coco.decode(mask) > 0, expected)

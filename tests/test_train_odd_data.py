"""Odd data sets: each is named by build and check, or trains and is measured to the end, with a whole report."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import grefcoco
from demo.scenes import write_scenes
from grefcoco_data.commands import main
from scoring.__main__ import main as score
from tests.test_grefcoco_damage import DAMAGE
from tests.tiny_training import tiny, train_here

Edit = Callable[[list[dict], dict], object]


def restart_sent_ids(refs: list[dict], instances: dict) -> None:
    numbers: dict[int, int] = {}
    for ref in refs:
        for sentence in ref["sentences"]:
            sentence["sent_id"] = numbers[ref["image_id"]] = numbers.get(ref["image_id"], -1) + 1
        ref["sent_ids"] = [sentence["sent_id"] for sentence in ref["sentences"]]


def move_image_ids(refs: list[dict], instances: dict) -> None:
    for record in (*refs, *instances["annotations"]):
        record["image_id"] += 2**40
    for image in instances["images"]:
        image["id"] += 2**40


def turn_boxes(refs: list[dict], instances: dict) -> None:
    """The corner on the other side: width and height below zero."""
    for item in instances["annotations"][::2]:
        x, y, width, height = item["bbox"]
        item["bbox"] = [x + width, y + height, -width, -height]


def add_targets(refs: list[dict], instances: dict) -> None:
    """One sentence of each split about 150 objects."""
    for split in ("train", "val"):
        ref = next(ref for ref in refs if ref["split"] == split and ref["ann_id"] != [-1])
        first = next(item for item in instances["annotations"] if item["id"] == ref["ann_id"][0])
        copies = [{**first, "id": 10**9 + first["id"] * 1_000 + number} for number in range(150)]
        instances["annotations"] += copies
        ref["ann_id"], ref["category_id"] = [item["id"] for item in copies], [first["category_id"]] * 150


def remove_targets(refs: list[dict], instances: dict) -> None:
    for ref in refs:
        if ref["split"] == "val":
            ref |= {"ann_id": [-1], "category_id": [-1], "no_target": True}


def repeat_targets(refs: list[dict], instances: dict) -> None:
    for ref in refs[::2]:
        if ref["ann_id"] != [-1]:
            ref["ann_id"], ref["category_id"] = ref["ann_id"] * 2, ref["category_id"] * 2


def nest_categories(refs: list[dict], instances: dict) -> None:
    for ref in refs:
        ref["category_id"] = [[category] for category in ref["category_id"]]


@pytest.fixture(scope="module")
def whole(scenes) -> Path:
    grefcoco.build(scenes, scenes / "train2014", scenes.parent / "whole")
    return scenes.parent / "whole"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_for_training_and_scores(whole, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    built, out = tmp_path / "built", tmp_path / "out"
    shutil.copytree(whole, built)
    DAMAGE[damage](built)
    (tmp_path / "answers.jsonl").write_text("")
    flags = ["--split", "val", "--out", str(tmp_path / "scores.json")]
    assert score(["score", str(tmp_path / "answers.jsonl"), str(built), *flags]) == 2  # also whole ones: no answers
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and len(message) < 1_000
    if damage not in ("another configuration", "categories as text"):  # which training does not read
        assert train_here(*tiny(built, out, max_train_steps=1)) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
        assert len(lines) == 1 and len(lines[0]) < 1_000 and not out.exists()


KINDS: dict[str, tuple[Edit, str]] = {
    "sentence ids that restart with each image": (restart_sent_ids, "duplicate sentence id"),
    "image ids of more than 31 bits": (move_image_ids, ""),
    "boxes of negative width": (turn_boxes, "box of negative width or height"),
    "150 targets": (add_targets, "more than 100 targets"),
    "no target in the whole split": (remove_targets, ""),
    "an annotation twice": (repeat_targets, "names an annotation twice"),
    "categories in lists": (nest_categories, "refs[0].category_id holds a value that is not an id"),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "scenes"
    write_scenes(folder, "easy", 0, {"train": 8, "val": 4, "testA": 1, "testB": 1}, size=64)
    return folder


# the pictures of a run with targets take most of the time
FAST = [kind for kind in KINDS if kind.startswith(("sentence ids", "categories"))]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in KINDS])
def test_odd_data_is_named_or_trains_to_the_end(scenes, tmp_path, capsys, kind):
    edit, problem = KINDS[kind]
    refs, instances = (json.loads((scenes / name).read_text()) for name in ("grefs(unc).json", "instances.json"))
    edit(refs, instances)
    genuine, built, out = (tmp_path / name for name in ("genuine", "built", "out"))
    genuine.mkdir()
    (genuine / "grefs(unc).json").write_text(json.dumps(refs))
    (genuine / "instances.json").write_text(json.dumps(instances))
    arguments = ["build", "--annotations", genuine, "--images", scenes / "train2014", "--out", built]
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    if code:
        assert code == 2 and problem in printed.err and main(["check", str(genuine)]) == 2
        return
    assert problem in printed.out and (problem or "problem" not in printed.out)
    for folder in (genuine, built):
        assert main(["check", str(folder)]) == 0
        assert problem in capsys.readouterr().out
    if problem == "duplicate sentence id":
        assert train_here(*tiny(built, out)) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: "))
        assert "sent_id" in line and not out.exists()
        (tmp_path / "answers.jsonl").write_text('{"sent_id": 0, "boxes": [], "scores": []}\n')
        assert score(["score", str(tmp_path / "answers.jsonl"), str(built), "--split", "val"]) == 2
        assert main(["show", str(built), "--split", "val", "--out", str(tmp_path / "page")]) == 0
        pictures = [Image.open(path).tobytes() for path in (tmp_path / "page").glob("*.png")]
        assert len(pictures) == min(20, len(grefcoco.load(built, split="val")))
        return
    code = train_here(*tiny(built, out, max_train_steps=2, per_device_train_batch_size=4), pictures=True)
    assert code == 0, capsys.readouterr().err
    page = (out / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert "learning_curve.png" in links and "predictions.png" in links
    assert {link for link in links if not (out / link).is_file()} == set()
    assert "best_and_worst.png" not in links or kind != "no target in the whole split"
    boxes = [box for row in grefcoco.load(built, split="train", columns=["boxes"]) for box in row["boxes"]]
    assert np.min(boxes) >= 0 and np.max(boxes) <= 64
    assert main(["show", str(built), "--split", "val", "--out", str(tmp_path / "page")]) == 0

"""Made scenes: deterministic, in the genuine format, and every sentence true of what the written files show."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from demo.scenes import LEVELS, RGB, SHAPES, box_of, lay_out, make_scene, outlines, run_lengths, write_scenes
from demo.sentences import Between, Both, Except, Extreme, Kind, Relation, Side, The, Thing, Unclear

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real" / "excerpts"
IMAGES = {"train": 60, "val": 12, "testA": 6, "testB": 6}


@pytest.fixture(scope="module", params=sorted(LEVELS))
def written(request, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("scenes") / request.param
    assert write_scenes(out, request.param, 3, IMAGES)
    return request.param, out


def refs_of(out: Path) -> list[dict]:
    return json.loads((out / "grefs(unc).json").read_text())


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------ the files as a whole


def test_equal_arguments_write_equal_bytes(written, tmp_path):
    level, out = written
    command = f"from demo.scenes import write_scenes; write_scenes('{tmp_path}/again', {level!r}, 3, {IMAGES})"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)  # another process hashes strings anew
    assert content(tmp_path / "again") == content(out)


def test_another_seed_writes_other_scenes(written):
    level, _ = written
    pictures = [make_scene(level, seed, "train", 0).picture for seed in (3, 4)]
    assert not np.array_equal(*pictures)


def test_fewer_images_are_a_prefix(written, tmp_path):
    level, out = written
    write_scenes(tmp_path / "few", level, 3, {"train": 5, "testB": 2})
    few, all_of = content(tmp_path / "few"), content(out)
    pictures = [name for name in few if name.endswith(".jpg")]
    assert len(pictures) == 7
    assert all(few[name] == all_of[name] for name in pictures)
    assert all(ref in refs_of(out) for ref in refs_of(tmp_path / "few"))
    annotations = json.loads(all_of["instances.json"])["annotations"]
    assert all(one in annotations for one in json.loads(few["instances.json"])["annotations"])


def test_counts_and_ids(written):
    _, out = written
    refs, coco = refs_of(out), COCO(str(out / "instances.json"))
    assert Counter(split for _, split in {(ref["image_id"], ref["split"]) for ref in refs}) == Counter(IMAGES)
    sent_ids = [sentence["sent_id"] for ref in refs for sentence in ref["sentences"]]
    assert len(set(sent_ids)) == len(sent_ids)
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    assert len(coco.anns) == len(coco.dataset["annotations"])
    assert len(list((out / "train2014").iterdir())) == len(coco.imgs) == sum(IMAGES.values())
    assert 6 < len(sent_ids) / len(coco.imgs) < 10


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_shares_are_near_the_genuine_train_split(level):
    shares = Counter()
    for index in range(250):
        for said in make_scene(level, 0, "train", index, 64).expressions:
            shares[min(len(said.targets), 2)] += len(said.sentences)
    near = {0: 0.091, 1: 0.576, 2: 0.332}
    assert {number: count / shares.total() for number, count in shares.items()} == pytest.approx(near, abs=0.04)


def test_no_target_share_can_be_raised(tmp_path):
    write_scenes(tmp_path / "out", "easy", 0, {"train": 30}, size=64, no_target=0.5)
    assert np.mean([ref["no_target"] for ref in refs_of(tmp_path / "out")]) == pytest.approx(0.5, abs=0.12)


@pytest.mark.skipif(not REAL.exists(), reason="the genuine excerpts are not here")
def test_keys_are_the_genuine_ones(written):
    _, out = written
    genuine_ref = json.loads((REAL / "grefcoco_ref135.json").read_text())
    genuine = json.loads((REAL / "refcoco_first_records.json").read_text())
    ref, instances = refs_of(out)[0], json.loads((out / "instances.json").read_text())
    assert ref.keys() == genuine_ref.keys()
    assert ref["sentences"][0].keys() == genuine_ref["sentences"][0].keys()
    assert instances["images"][0].keys() == genuine["image"].keys()
    assert instances["annotations"][0].keys() == genuine["annotation"].keys()


# ------------------------------------------------------------------------------------------------------- masks, boxes


def test_masks_fill_their_boxes_and_never_overlap(written):
    _, out = written
    coco = COCO(str(out / "instances.json"))
    for image in coco.imgs.values():
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image["id"]]]
        assert all(mask.shape == (image["height"], image["width"]) for mask in masks)
        assert np.sum(masks, axis=0).max() == 1
        for annotation, mask in zip(coco.imgToAnns[image["id"]], masks):
            assert mask.sum() == annotation["area"]
            assert box_of(mask.astype(bool)) == annotation["bbox"]


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_enough_of_everything_is_seen(level):
    rules, hidden = LEVELS[level], 0
    for seed in range(40):
        figures, masks = lay_out(random.Random(seed), rules, 96)
        assert rules.objects[0] <= len(figures) <= rules.objects[1]
        seen = [mask.sum() / (figure.distance < 0).sum() for figure, mask in zip(figures, masks)]
        assert min(seen) >= rules.seen
        hidden += min(seen) < 1
    assert hidden > 5


def test_full_scenes_have_polygons_holes_parts_and_crowds():
    seen = Counter()
    for index in range(60):
        scene = make_scene("full", 0, "train", index, 96)
        polygons = [outlines(mask) for mask in scene.masks]
        seen["hole"] += sum(polygon is None for polygon in polygons)
        seen["parts"] += sum(polygon is not None and len(polygon) > 1 for polygon in polygons)
        seen["whole"] += sum(polygon is not None and len(polygon) == 1 for polygon in polygons)
        seen["crowd"] += scene.crowd.any()
    assert min(seen[kind] for kind in ("hole", "parts", "whole", "crowd")) > 0


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))).filter(np.any))
def test_outlines_and_run_lengths_decode_to_the_mask(mask):
    h, w = mask.shape
    assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(run_lengths(mask), h, w)), mask)
    if (polygons := outlines(mask)) is not None:
        parts = coco_mask.decode(coco_mask.frPyObjects(polygons, h, w))  # (h, w, parts)
        assert np.array_equal(parts.sum(-1), mask)


@pytest.mark.parametrize(("middle", "holes"), [(True, False), (False, True)])
def test_a_hole_has_no_outline(middle, holes):
    mask = np.ones((3, 3), bool)
    mask[1, 1] = middle
    assert (outlines(mask) is None) == holes


# ----------------------------------------------------------------------------------------------- sentences, meanings


def things_in_files(out: Path, coco: COCO, image_id: int) -> dict[int, Thing]:
    """What the written files alone show: shape by category, colour by the JPEG's pixels, place and size by the box."""
    image = coco.imgs[image_id]
    pixels = np.asarray(Image.open(out / "train2014" / image["file_name"])).astype(float)
    things = {}
    for annotation in coco.imgToAnns[image_id]:
        if not annotation["iscrowd"]:
            mean = np.median(pixels[coco.annToMask(annotation) > 0], axis=0)
            colour = min(RGB, key=lambda name: np.abs(mean - RGB[name]).sum())
            shape = coco.cats[annotation["category_id"]]["name"]
            things[annotation["id"]] = Thing.from_box(shape, colour, annotation["bbox"], image["width"])
    return things


def test_every_meaning_finds_in_the_files_what_the_ref_names(written):
    level, out = written
    coco, checked = COCO(str(out / "instances.json")), Counter()
    for image_id, group in groupby(refs_of(out), key=lambda ref: ref["image_id"]):
        refs, things = list(group), things_in_files(out, coco, image_id)
        said = make_scene(level, 3, refs[0]["split"], (image_id - 1) // 4).expressions
        assert len(said) == len(refs)
        for one, ref in zip(said, refs):
            assert [sentence["sent"] for sentence in ref["sentences"]] == list(one.sentences)
            found = sorted(one.meaning.find(list(things.values())))
            assert [list(things)[i] for i in found] == ([] if ref["no_target"] else ref["ann_id"])
            checked[type(one.meaning).__name__] += 1
    assert set(checked) == {"The", "Except", "Both"}


def test_plain_words_hold_against_the_files(written):
    """A second judge that knows nothing of meanings: "[the] [colour] shape" must name exactly those of the files."""
    _, out = written
    coco, checked = COCO(str(out / "instances.json")), Counter()
    for ref in refs_of(out):
        for sentence in ref["sentences"]:
            words = [word for word in sentence["tokens"] if word != "the"]
            if words[-1] in SHAPES and (len(words) == 1 or (len(words) == 2 and words[0] in RGB)):
                things = things_in_files(out, coco, ref["image_id"])
                colours = set(words[:-1]) or set(RGB)
                named = [i for i, thing in things.items() if thing.shape == words[-1] and thing.colour in colours]
                assert (named or [-1]) == ref["ann_id"]
                checked[ref["no_target"]] += 1
    assert min(checked[True], checked[False]) > 3


def test_refs_agree_with_themselves(written):
    _, out = written
    refs, coco = refs_of(out), COCO(str(out / "instances.json"))
    said = Counter()
    for ref in refs:
        assert ref["no_target"] == (ref["ann_id"] == [-1]) == (ref["category_id"] == [-1])
        if not ref["no_target"]:
            targets = [coco.anns[ann_id] for ann_id in ref["ann_id"]]
            assert [target["category_id"] for target in targets] == ref["category_id"]
            assert all(target["image_id"] == ref["image_id"] and not target["iscrowd"] for target in targets)
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        for sentence in ref["sentences"]:
            assert sentence["sent"].split() == sentence["tokens"]
            assert sentence["sent"].replace(" ", "").isalpha() and sentence["sent"].islower()
            said[ref["image_id"], sentence["sent"]] += 1
    assert set(said.values()) == {1}
    assert any(sentence["raw"] != sentence["sent"] for ref in refs for sentence in ref["sentences"])
    suffixed = [ref for ref in refs if ref["file_name"] != coco.imgs[ref["image_id"]]["file_name"]]
    assert 0 < len(suffixed) < len(refs) / 2
    assert len({token for ref in refs for sentence in ref["sentences"] for token in sentence["tokens"]}) < 120


def test_easy_scenes_are_easy(written):
    level, out = written
    tokens = {token for ref in refs_of(out) for sentence in ref["sentences"] for token in sentence["tokens"]}
    harder = {"between", "above", "of", "biggest", "small", "ring", "triangle"}
    assert tokens & harder == (harder if level == "full" else set())


# Four things in a row, a red star to the left, and a small blue one above the last.
ROW = [
    Thing("star", "red", 0.1, 0.5, 0.2),
    Thing("circle", "blue", 0.35, 0.5, 0.2),
    Thing("square", "red", 0.6, 0.5, 0.3),
    Thing("circle", "red", 0.85, 0.5, 0.2),
    Thing("star", "blue", 0.85, 0.2, 0.1),
]
STAR, CIRCLE, SQUARE = Kind("star"), Kind("circle"), Kind("square")


@pytest.mark.parametrize(
    ("meaning", "targets"),
    [
        (The(SQUARE), {2}),
        (The(Kind("square", "blue")), set()),
        (The(STAR, 2), {0, 4}),
        (The(Kind(colour="red"), 0), {0, 2, 3}),
        (The(Kind("star", size="small")), {4}),
        (The(Side(CIRCLE, "left")), {1}),
        (The(Side(CIRCLE, "right")), {3}),
        (The(Side(Kind("star", "blue"), "top")), {4}),
        (The(Side(Kind("star", "blue"), "bottom")), set()),
        (The(Side(STAR, "bottom")), Unclear),
        (The(Extreme(CIRCLE, "right")), {3}),
        (The(Extreme(Kind(), "right")), Unclear),
        (The(Extreme(Kind(), "top")), {4}),
        (The(Extreme(Kind(), "big")), {2}),
        (The(Extreme(CIRCLE, "small")), Unclear),
        (The(Relation(CIRCLE, "left", The(SQUARE))), {1}),
        (The(Relation(STAR, "above", The(Kind("circle", "red")))), {4}),
        (The(Relation(SQUARE, "left", The(Kind("circle", "blue")))), set()),
        (The(Relation(SQUARE, "left", The(SQUARE))), Unclear),
        (The(Relation(SQUARE, "left", The(CIRCLE))), Unclear),
        (The(Between(CIRCLE, The(Kind("star", "red")), The(SQUARE))), {1}),
        (The(Between(SQUARE, The(Kind("star", "red")), The(Kind("circle", "blue")))), set()),
        (Except(The(STAR, 0)), {1, 2, 3}),
        (Except(The(Kind("ring"))), Unclear),
        (Both(The(SQUARE), The(Kind("star", "blue"))), {2, 4}),
        (Both(The(SQUARE), The(Kind("ring"))), Unclear),
        (The(STAR), Unclear),
        (The(STAR, 3), Unclear),
        (The(SQUARE, 0), Unclear),
    ],
    ids=repr,
)
def test_meanings(meaning, targets):
    if targets is Unclear:
        with pytest.raises(Unclear):
            meaning.find(ROW)
    else:
        assert meaning.find(ROW) == targets


@pytest.mark.parametrize(
    ("meaning", "sentence"),
    [
        (The(Kind("circle", "red")), "the red circle"),
        (The(Kind("star", size="big"), 2), "the two large stars"),
        (The(Extreme(SQUARE, "left")), "the leftmost square"),
        (The(Relation(CIRCLE, "left", The(STAR))), "circle left of the star"),
        (The(Between(SQUARE, The(STAR), The(CIRCLE))), "the square between the circle and the star"),
        (Except(The(STAR)), "everything except the star"),
        (Both(The(Kind("star", "blue")), The(Kind("square", "red"))), "the blue star and the red square"),
        (The(Side(CIRCLE, "left"), 0), "all circles on the left"),
    ],
)
def test_words(meaning, sentence):
    assert sentence in {meaning.words(random.Random(seed)) for seed in range(300)}


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "demo/scenes.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_line_writes_then_reuses_then_refuses(tmp_path):
    few = ("--train", 2, "--val", 1, "--testA", 1, "--testB", 1, "--size", 64)
    assert run(tmp_path / "out", *few).returncode == 0
    before = content(tmp_path / "out")
    again = run(tmp_path / "out", *few)
    assert (again.returncode, "reused" in again.stdout, again.stderr) == (0, True, "")
    other = run(tmp_path / "out", *few, "--seed", 1)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "remove it" in other.stderr
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--level", "hard"), ("--size", 8), ("--train", -1), ("--no-target", 1.5), ("--seed", "one")],
)
def test_bad_arguments_end_in_one_line(tmp_path, flag, value):
    ended = run(tmp_path / "out", flag, value)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert str(value) in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"level": "hard"}, "hard"),
        ({"images": {"dev": 1}}, "dev"),
        ({"images": {}}, "at least one"),
        ({"size": 9}, "9"),
    ],
)
def test_bad_parameters_are_named(tmp_path, changed, named):
    parameters = {"level": "easy", "seed": 0, "images": {"train": 1}, "size": 64, **changed}
    with pytest.raises(ValueError, match=named):
        write_scenes(tmp_path / "out", **parameters)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("demo.scenes.ref_records", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_scenes(tmp_path / "out", "easy", 0, {"train": 1}, size=64)
    assert not list(tmp_path.iterdir())

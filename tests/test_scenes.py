"""Synthetic scenes: deterministic, in the file format of gRefCOCO, with sentences that agree with the files."""

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

from demo.scenes import (
    LEVELS,
    RGB,
    SHAPES,
    make_scene,
    mask_to_box,
    mask_to_polygons,
    mask_to_rle,
    place_figures,
    write_scenes,
)
from demo.sentences import (
    SYNONYMS,
    AllExcept,
    AmbiguousError,
    Between,
    Extreme,
    Half,
    Kind,
    Pair,
    Phrase,
    Relation,
    VisibleObject,
)

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


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.slow
def test_equal_arguments_write_equal_bytes(written, tmp_path):
    level, out = written
    command = f"from demo.scenes import write_scenes; write_scenes('{tmp_path}/again', {level!r}, 3, {IMAGES})"
    subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, check=True
    )  # another process has another string hash seed
    assert content(tmp_path / "again") == content(out)


def test_another_seed_writes_other_scenes(written):
    level, _ = written
    images = [make_scene(level, seed, "train", 0).image for seed in (3, 4)]
    assert not np.array_equal(*images)


def test_fewer_images_are_a_prefix(written, tmp_path):
    level, out = written
    write_scenes(tmp_path / "few", level, 3, {"train": 5, "testB": 2})
    few, full = content(tmp_path / "few"), content(out)
    images = [name for name in few if name.endswith(".jpg")]
    assert len(images) == 7
    assert all(few[name] == full[name] for name in images)
    assert all(ref in refs_of(out) for ref in refs_of(tmp_path / "few"))
    annotations = json.loads(full["instances.json"])["annotations"]
    assert all(annotation in annotations for annotation in json.loads(few["instances.json"])["annotations"])


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


@pytest.mark.slow
@pytest.mark.parametrize("level", sorted(LEVELS))
def test_shares_are_close_to_the_real_train_split(level):
    shares = Counter()
    for index in range(250):
        for expression in make_scene(level, 0, "train", index, 64).expressions:
            shares[min(len(expression.targets), 2)] += len(expression.sentences)
    expected = {0: 0.091, 1: 0.576, 2: 0.332}
    assert {number: count / shares.total() for number, count in shares.items()} == pytest.approx(expected, abs=0.04)


def test_no_target_share_can_be_raised(tmp_path):
    write_scenes(tmp_path / "out", "easy", 0, {"train": 30}, size=64, no_target=0.5)
    assert np.mean([ref["no_target"] for ref in refs_of(tmp_path / "out")]) == pytest.approx(0.5, abs=0.12)


@pytest.mark.skipif(not REAL.exists(), reason="the excerpts of the real data are missing")
def test_keys_are_those_of_the_real_data(written):
    _, out = written
    real_ref = json.loads((REAL / "grefcoco_ref135.json").read_text())
    real = json.loads((REAL / "refcoco_first_records.json").read_text())
    ref, instances = refs_of(out)[0], json.loads((out / "instances.json").read_text())
    assert ref.keys() == real_ref.keys()
    assert ref["sentences"][0].keys() == real_ref["sentences"][0].keys()
    assert instances["images"][0].keys() == real["image"].keys()
    assert instances["annotations"][0].keys() == real["annotation"].keys()


# ------------------------------------------------------------------------------------------------------- masks, boxes


def test_masks_fill_their_boxes_and_do_not_overlap(written):
    _, out = written
    coco = COCO(str(out / "instances.json"))
    for image in coco.imgs.values():
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image["id"]]]
        assert all(mask.shape == (image["height"], image["width"]) for mask in masks)
        assert np.sum(masks, axis=0).max() == 1
        for annotation, mask in zip(coco.imgToAnns[image["id"]], masks):
            assert mask.sum() == annotation["area"]
            assert mask_to_box(mask.astype(bool)) == annotation["bbox"]


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_objects_are_visible_enough(level):
    rules, num_partly_hidden = LEVELS[level], 0
    for seed in range(40):
        figures, masks = place_figures(random.Random(seed), rules, 96)
        assert rules.objects[0] <= len(figures) <= rules.objects[1]
        visible = [mask.sum() / (figure.distance < 0).sum() for figure, mask in zip(figures, masks)]
        assert min(visible) >= rules.min_visible
        num_partly_hidden += min(visible) < 1
    assert num_partly_hidden > 5


def test_full_scenes_have_masks_with_holes_or_parts_and_crowds():
    counts = Counter()
    for index in range(60):
        scene = make_scene("full", 0, "train", index, 96)
        polygons = [mask_to_polygons(mask) for mask in scene.masks]
        counts["hole"] += sum(polygon is None for polygon in polygons)
        counts["parts"] += sum(polygon is not None and len(polygon) > 1 for polygon in polygons)
        counts["whole"] += sum(polygon is not None and len(polygon) == 1 for polygon in polygons)
        counts["crowd"] += scene.crowd.any()
    assert min(counts[name] for name in ("hole", "parts", "whole", "crowd")) > 0


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))).filter(np.any))
def test_polygons_and_rle_decode_to_the_mask(mask):
    h, w = mask.shape
    assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(mask_to_rle(mask), h, w)), mask)
    if (polygons := mask_to_polygons(mask)) is not None:
        parts = coco_mask.decode(coco_mask.frPyObjects(polygons, h, w))  # (h, w, parts)
        assert np.array_equal(parts.sum(-1), mask)


@pytest.mark.parametrize(("middle", "holes"), [(True, False), (False, True)])
def test_a_mask_with_a_hole_has_no_polygons(middle, holes):
    mask = np.ones((3, 3), bool)
    mask[1, 1] = middle
    assert (mask_to_polygons(mask) is None) == holes


# ----------------------------------------------------------------------------------------------- sentences, meanings


def objects_in_files(out: Path, coco: COCO, image_id: int) -> dict[int, VisibleObject]:
    """Read objects from the written files only: category, colour of the JPEG's pixels, place and size of the box."""
    image = coco.imgs[image_id]
    pixels = np.asarray(Image.open(out / "train2014" / image["file_name"])).astype(float)
    objects = {}
    for annotation in coco.imgToAnns[image_id]:
        if not annotation["iscrowd"]:
            median = np.median(pixels[coco.annToMask(annotation) > 0], axis=0)
            colour = min(RGB, key=lambda name: np.abs(median - RGB[name]).sum())
            shape = coco.cats[annotation["category_id"]]["name"]
            objects[annotation["id"]] = VisibleObject.from_box(shape, colour, annotation["bbox"], image["width"])
    return objects


def test_targets_computed_from_the_files_are_those_of_the_refs(written):
    level, out = written
    coco, checked = COCO(str(out / "instances.json")), Counter()
    for image_id, group in groupby(refs_of(out), key=lambda ref: ref["image_id"]):
        refs, objects = list(group), objects_in_files(out, coco, image_id)
        expressions = make_scene(level, 3, refs[0]["split"], (image_id - 1) // 4).expressions
        assert len(expressions) == len(refs)
        for expression, ref in zip(expressions, refs):
            assert [sentence["sent"] for sentence in ref["sentences"]] == list(expression.sentences)
            targets = sorted(expression.meaning.find_targets(list(objects.values())))
            assert [list(objects)[i] for i in targets] == ([] if ref["no_target"] else ref["ann_id"])
            checked[type(expression.meaning).__name__] += 1
    assert set(checked) == {"Phrase", "AllExcept", "Pair"}


def test_simple_sentences_agree_with_the_files(written):
    """Check sentences "[the] [colour] shape" without the code of the meanings: the files alone give the targets."""
    _, out = written
    coco, checked = COCO(str(out / "instances.json")), Counter()
    for ref in refs_of(out):
        for sentence in ref["sentences"]:
            words = [word for word in sentence["tokens"] if word != "the"]
            if words[-1] in SHAPES and (len(words) == 1 or (len(words) == 2 and words[0] in RGB)):
                objects = objects_in_files(out, coco, ref["image_id"])
                colours = set(words[:-1]) or set(RGB)
                targets = [i for i, obj in objects.items() if obj.shape == words[-1] and obj.colour in colours]
                assert (targets or [-1]) == ref["ann_id"]
                checked[ref["no_target"]] += 1
    assert min(checked[True], checked[False]) > 3


def test_refs_are_consistent(written):
    _, out = written
    refs, coco = refs_of(out), COCO(str(out / "instances.json"))
    sentence_counts = Counter()
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
            sentence_counts[ref["image_id"], sentence["sent"]] += 1
    assert set(sentence_counts.values()) == {1}
    assert any(sentence["raw"] != sentence["sent"] for ref in refs for sentence in ref["sentences"])
    suffixed = [ref for ref in refs if ref["file_name"] != coco.imgs[ref["image_id"]]["file_name"]]
    assert 0 < len(suffixed) < len(refs) / 2
    assert len({token for ref in refs for sentence in ref["sentences"] for token in sentence["tokens"]}) < 120


def test_only_full_scenes_have_difficult_words(written):
    level, out = written
    tokens = {token for ref in refs_of(out) for sentence in ref["sentences"] for token in sentence["tokens"]}
    difficult = {"between", "above", "of", "biggest", "small", "ring", "triangle"}
    assert tokens & difficult == (difficult if level == "full" else set())


def test_a_paraphrased_split_has_the_same_scenes_in_words_of_its_own(tmp_path):
    images = {"train": 30, "testB": 30}
    plain, other = tmp_path / "plain", tmp_path / "paraphrased"
    write_scenes(plain, "full", 0, images, size=64)
    write_scenes(other, "full", 0, images, size=64, paraphrased=["testB"])
    assert [ref for ref in refs_of(plain) if ref["split"] == "train"] == [
        ref for ref in refs_of(other) if ref["split"] == "train"
    ]
    pairs = [
        (first["sentences"][0]["sent"].split(), second["sentences"][0]["sent"].split())
        for first, second in zip(refs_of(plain), refs_of(other), strict=True)
        if first["split"] == "testB" and first["ann_id"] == second["ann_id"]
    ]
    assert len(pairs) > 60
    known = {token for ref in refs_of(plain) for sentence in ref["sentences"] for token in sentence["tokens"]}
    replaced = {word for entry in SYNONYMS if " " not in entry for word in (entry, entry + "s")}
    unseen = {token for _, words in pairs for token in words} - known
    assert len(unseen) > 20 and not replaced & {token for _, words in pairs for token in words}
    assert all(first != second for first, second in pairs if replaced & set(first))
    read = {(plain / "train2014" / name.name).read_bytes() == name.read_bytes() for name in other.glob("train2014/*")}
    assert read == {True}


# Four objects in a row, the first is a red star; and a small blue star above the last.
ROW = [
    VisibleObject("star", "red", 0.1, 0.5, 0.2),
    VisibleObject("circle", "blue", 0.35, 0.5, 0.2),
    VisibleObject("square", "red", 0.6, 0.5, 0.3),
    VisibleObject("circle", "red", 0.85, 0.5, 0.2),
    VisibleObject("star", "blue", 0.85, 0.2, 0.1),
]
STAR, CIRCLE, SQUARE = Kind("star"), Kind("circle"), Kind("square")


@pytest.mark.parametrize(
    ("meaning", "targets"),
    [
        (Phrase(SQUARE), {2}),
        (Phrase(Kind("square", "blue")), set()),
        (Phrase(STAR, 2), {0, 4}),
        (Phrase(Kind(colour="red"), 0), {0, 2, 3}),
        (Phrase(Kind("star", size="small")), {4}),
        (Phrase(Half(CIRCLE, "left")), {1}),
        (Phrase(Half(CIRCLE, "right")), {3}),
        (Phrase(Half(Kind("star", "blue"), "top")), {4}),
        (Phrase(Half(Kind("star", "blue"), "bottom")), set()),
        (Phrase(Half(STAR, "bottom")), AmbiguousError),
        (Phrase(Extreme(CIRCLE, "right")), {3}),
        (Phrase(Extreme(Kind(), "right")), AmbiguousError),
        (Phrase(Extreme(Kind(), "top")), {4}),
        (Phrase(Extreme(Kind(), "big")), {2}),
        (Phrase(Extreme(CIRCLE, "small")), AmbiguousError),
        (Phrase(Relation(CIRCLE, "left", Phrase(SQUARE))), {1}),
        (Phrase(Relation(STAR, "above", Phrase(Kind("circle", "red")))), {4}),
        (Phrase(Relation(SQUARE, "left", Phrase(Kind("circle", "blue")))), set()),
        (Phrase(Relation(SQUARE, "left", Phrase(SQUARE))), AmbiguousError),
        (Phrase(Relation(SQUARE, "left", Phrase(CIRCLE))), AmbiguousError),
        (Phrase(Between(CIRCLE, Phrase(Kind("star", "red")), Phrase(SQUARE))), {1}),
        (Phrase(Between(SQUARE, Phrase(Kind("star", "red")), Phrase(Kind("circle", "blue")))), set()),
        (AllExcept(Phrase(STAR, 0)), {1, 2, 3}),
        (AllExcept(Phrase(Kind("ring"))), AmbiguousError),
        (Pair(Phrase(SQUARE), Phrase(Kind("star", "blue"))), {2, 4}),
        (Pair(Phrase(SQUARE), Phrase(Kind("ring"))), AmbiguousError),
        (Phrase(STAR), AmbiguousError),
        (Phrase(STAR, 3), AmbiguousError),
        (Phrase(SQUARE, 0), AmbiguousError),
    ],
    ids=repr,
)
def test_targets_of_meanings(meaning, targets):
    if targets is AmbiguousError:
        with pytest.raises(AmbiguousError):
            meaning.find_targets(ROW)
    else:
        assert meaning.find_targets(ROW) == targets


@pytest.mark.parametrize(
    ("meaning", "sentence"),
    [
        (Phrase(Kind("circle", "red")), "the red circle"),
        (Phrase(Kind("star", size="big"), 2), "the two large stars"),
        (Phrase(Extreme(SQUARE, "left")), "the leftmost square"),
        (Phrase(Relation(CIRCLE, "left", Phrase(STAR))), "circle left of the star"),
        (Phrase(Between(SQUARE, Phrase(STAR), Phrase(CIRCLE))), "the square between the circle and the star"),
        (AllExcept(Phrase(STAR)), "everything except the star"),
        (Pair(Phrase(Kind("star", "blue")), Phrase(Kind("square", "red"))), "the blue star and the red square"),
        (Phrase(Half(CIRCLE, "left"), 0), "all circles on the left"),
    ],
)
def test_wordings_of_meanings(meaning, sentence):
    assert sentence in {meaning.draw_sentence(random.Random(seed)) for seed in range(300)}


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "demo/scenes.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_writes_then_reuses_then_rejects(tmp_path):
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
def test_bad_arguments_give_one_line(tmp_path, flag, value):
    result = run(tmp_path / "out", flag, value)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert str(value) in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"level": "hard"}, "hard"),
        ({"images": {"dev": 1}}, "dev"),
        ({"images": {}}, "at least one"),
        ({"size": 9}, "9"),
    ],
)
def test_bad_parameters_are_named(tmp_path, changed, word):
    parameters = {"level": "easy", "seed": 0, "images": {"train": 1}, "size": 64, **changed}
    with pytest.raises(ValueError, match=word):
        write_scenes(tmp_path / "out", **parameters)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_no_files(tmp_path, monkeypatch):
    def raise_disk_full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("demo.scenes.ref_records", raise_disk_full)
    with pytest.raises(OSError, match="no space"):
        write_scenes(tmp_path / "out", "easy", 0, {"train": 1}, size=64)
    assert not list(tmp_path.iterdir())

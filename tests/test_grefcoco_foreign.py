"""Parquet files that this project did not write: the same rows or the same one error, map-style and streamed."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import grefcoco
from grefcoco_data.masks import _decoded_counts, encode_mask, rle_covers_image
from tests.tiny_grefcoco import HEIGHT, WIDTH, write_genuine


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` names its cache by the name of the folder and the version in its card: no test may share it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def built(tmp_path) -> Path:
    genuine = write_genuine(tmp_path / "set")
    grefcoco.build(genuine, genuine / "train2014", tmp_path / "built")
    return tmp_path / "built"


def change_rows(built: Path, edit: Callable[[list[dict]], object]) -> None:
    """Edit the image rows of the only shard of val, with the same schema."""
    path = next((built / "data").glob("val-*"))
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def set_rle(**fields: object) -> Callable[[list[dict]], object]:
    return lambda rows: rows[1]["objects"][2]["segmentation"].update(fields)


FAULTS = {
    "an id of no object": (lambda x: x[1]["expressions"][0].update(ann_ids=[7]), "has no object 7"),
    "an id of another image": (
        lambda x: x[1]["expressions"][0].update(ann_ids=[x[0]["objects"][0]["ann_id"]]),
        "has no object",
    ),
    "one id twice": (lambda x: x[1]["objects"][1].update(ann_id=x[1]["objects"][0]["ann_id"]), "one annotation id"),
    "size 0": (set_rle(size=[0, 0]), "another size"),
    "a huge size": (set_rle(size=[10**6, 10**6]), "another size"),
    "no size": (set_rle(size=[]), "another size"),
    "a huge image": (lambda x: x[1].update(width=10**6, height=10**6), "no image can have"),
    "a negative image": (lambda x: x[1].update(width=-1), "no image can have"),
    "no sentence": (lambda x: x[1]["expressions"][0].update(sentence=None), "column expressions has a field without"),
    "no side of a box": (
        lambda x: x[1]["objects"][0].update(bbox=[1, 2, None, 4]),
        "column objects has a field without",
    ),
    "no image": (lambda x: x[1].update(image=None), "column image has a field without"),
    "no width": (lambda x: x[1].update(width=None), "column width has a field without"),
    "empty counts": (set_rle(counts=""), "does not cover"),
    "short counts": (set_rle(counts="11"), "does not cover"),
    "counts that go on": (set_rle(counts="Y" * 9), "does not cover"),
    "counts outside of the alphabet": (set_rle(counts="ab\u00e4"), "does not cover"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_contradict_themselves_are_one_error(built, fault):
    edit, message = FAULTS[fault]
    change_rows(built, edit)
    errors = []
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            list(grefcoco.load(built, split="val", streaming=streaming))
        errors.append(str(error.value))
    assert errors[0] == errors[1] and ("image" in errors[0] or "column" in errors[0])


def test_annotation_ids_can_be_unique_per_image_only(built):
    expected = [{**row, "ann_ids": None} for row in grefcoco.load(built, split="val").remove_columns("image")]

    def renumber(rows: list[dict]) -> None:
        for row in rows:
            number = {item["ann_id"]: i for i, item in enumerate(row["objects"])}
            for item in row["objects"]:
                item["ann_id"] = number[item["ann_id"]]
            for item in row["expressions"]:
                item["ann_ids"] = [number[ann_id] for ann_id in item["ann_ids"]]

    change_rows(built, renumber)
    (built / "README.md").write_text((built / "README.md").read_text().replace("version: 1.0.", "version: 1.1."))
    for streaming in (False, True):
        rows = list(grefcoco.load(built, split="val", streaming=streaming))
        assert [{**row, "ann_ids": None} for row in without_image(rows)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_an_orientation_tag_turns_neither_rows_nor_what_processors_make_of_them(built, streaming):
    def add_tag(rows: list[dict]) -> None:
        for row in rows:
            image, file = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), io.BytesIO()
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(file, format="PNG", exif=exif)
            row["image"]["bytes"] = file.getvalue()

    change_rows(built, add_tag)
    row = next(iter(grefcoco.load(built, split="val", streaming=streaming)))
    assert row["image"].size == (WIDTH, HEIGHT)
    for name in ("rela", "mdetr", "vlt"):
        module = pytest.importorskip(f"modeling.image_processing_{name}")
        processor = getattr(module, f"{name.capitalize()}ImageProcessor")()
        plain = Image.fromarray(np.asarray(row["image"]))
        pixels = [processor(image, return_tensors="np")["pixel_values"] for image in (row["image"], plain)]
        assert np.array_equal(*pixels)


def without_image(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "image"} for row in rows]


@pytest.mark.parametrize("block", [7, 1000, 1 << 18])
def test_all_rles_are_checked_as_one_is(monkeypatch, block):
    """The vectorised check against the plain one, on valid, damaged, cut and extended texts."""
    monkeypatch.setattr("grefcoco_data.masks.BLOCK", block)
    chance, numbers = random.Random(0), np.random.default_rng(0)
    texts, pixels = [], []
    for _ in range(3_000):
        height, width = chance.randint(1, 12), chance.randint(1, 12)
        text = encode_mask(numbers.random((height, width)) < chance.random())["counts"]
        place, damage = chance.randrange(len(text)), chance.random()
        if damage < 0.3:
            text = text[:place] + chr(chance.randint(40, 120)) + text[place + 1 :]
        elif damage < 0.4:
            text = text[:place]
        elif damage < 0.5:
            text += chr(chance.randint(48, 111)) * chance.randint(1, 9)
        texts.append(text)
        pixels.append(height * width + (chance.random() < 0.05))

    def covers(text: str, area: int) -> bool:
        counts = _decoded_counts(text)
        return bool(counts) and counts[0] >= 0 and all(n > 0 for n in counts[1:]) and sum(counts) == area

    expected = [covers(text, area) for text, area in zip(texts, pixels)]
    assert 1_000 < sum(expected) < 2_000
    assert rle_covers_image(pa.array(texts), np.array(pixels)).tolist() == expected
    assert rle_covers_image(pa.array(texts).slice(7, 900), np.array(pixels[7:907])).tolist() == expected[7:907]


def test_sizes_are_those_of_the_tiny_set(built):
    assert grefcoco.load(built, split="val", columns=["mask"])[0]["mask"]["size"] == [HEIGHT, WIDTH]

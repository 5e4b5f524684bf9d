"""Every operation of `datasets` on expression rows gives the rows that it gives on plain rows."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from PIL import Image

import grefcoco
from grefcoco_data import building
from tests.tiny_grefcoco import write_genuine

COLUMNS = [*grefcoco.EXPRESSION_FEATURES, "objects"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Images are stored as PNG, so that copies can be compared by pixel."""
    genuine = write_genuine(tmp_path_factory.mktemp("genuine") / "set")
    for path in (genuine / "train2014").iterdir():
        Image.open(path).copy().save(path, format="PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "shard_count", lambda num_images: min(4, num_images))
        grefcoco.build(genuine, genuine / "train2014", genuine.parent / "built")
    return genuine.parent / "built"


@pytest.fixture(scope="module")
def rows(built) -> Dataset:
    return grefcoco.load(built, split="train", columns=COLUMNS)


@pytest.fixture(scope="module")
def stream(built) -> IterableDataset:
    return grefcoco.load(built, split="train", columns=COLUMNS, streaming=True)


@pytest.fixture(scope="module")
def plain(rows) -> list[dict]:
    """The rows as simple values, the image as an array."""
    expected = [simple(row) for row in rows]
    assert len(expected) > 20 and {len(row["ann_ids"]) for row in expected} == {0, 1, 2}
    return expected


def simple(value: object) -> object:
    """Python values of rows in any format; images and their stored forms as lists of pixels."""
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("RGB")).tolist()
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return simple(Image.open(io.BytesIO(value["bytes"])))
    if isinstance(value, dict):
        return {name: simple(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [simple(item) for item in value]
    if isinstance(value, np.ndarray):
        return simple(value.tolist())
    if hasattr(value, "tolist"):
        return simple(value.tolist())
    return value


def same(row: dict) -> dict:
    return {**row}


def numbered(row: dict) -> dict:
    return {"words": len(row["sentence"].split())}


def has_target(row: dict) -> bool:
    return not row["no_target"]


def area(row: dict) -> dict:
    return {"area": row["image"].size[0] * row["height"]}


def without(rows: list[dict], name: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def targets_only(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["no_target"]]


def with_words(rows: list[dict]) -> list[dict]:
    return [{**row, "words": len(row["sentence"].split())} for row in rows]


Rows = Dataset | IterableDataset
BOTH: dict[str, tuple[Callable[[Rows], Rows], Callable[[list], list]]] = {
    "nothing": (lambda d: d, lambda e: e),
    "concatenate": (lambda d: datasets.concatenate_datasets([d, d]), lambda e: [*e, *e]),
    "interleave": (lambda d: datasets.interleave_datasets([d, d]), lambda e: [row for row in e for _ in range(2)]),
    "take, skip": (lambda d: d.skip(2).take(5), lambda e: e[2:7]),
    "repeat": (lambda d: d.take(3).repeat(2), lambda e: e[:3] * 2),
    "rename": (
        lambda d: d.rename_column("image", "picture").rename_column("picture", "image"),
        lambda e: [{**{k: v for k, v in row.items() if k != "image"}, "image": row["image"]} for row in e],
    ),
    "remove": (lambda d: d.remove_columns(["masks"]), lambda e: without(e, "masks")),
    "select columns": (
        lambda d: d.select_columns(["image", "mask"]),
        lambda e: [{"image": row["image"], "mask": row["mask"]} for row in e],
    ),
    "map all": (lambda d: d.map(same), lambda e: e),
    "map one": (lambda d: d.map(numbered), with_words),
    "map after map": (lambda d: d.map(same).map(numbered), with_words),
    "map the picture": (lambda d: d.map(area), lambda e: [{**row, "area": 64 * row["height"]} for row in e]),
    "filter": (lambda d: d.filter(has_target), targets_only),
    "filter, map": (lambda d: d.filter(has_target).map(same), targets_only),
    "cast": (lambda d: d.cast_column("image", datasets.Image(mode="RGB")), lambda e: e),
    "no decoding": (lambda d: d.cast_column("image", datasets.Image(decode=False)), lambda e: e),
    "numpy": (lambda d: d.with_format("numpy"), lambda e: e),
    "numpy and back": (lambda d: d.with_format("numpy").with_format(None), lambda e: e),
    "torch": (lambda d: d.with_format("torch"), lambda e: e),
    "shards": (
        lambda d: datasets.concatenate_datasets([d.shard(2, i, contiguous=True) for i in range(2)]),
        lambda e: e,
    ),
}
MAP_ONLY: dict[str, tuple[Callable[[Dataset], Iterator[dict] | Rows], Callable[[list], list]]] = {
    "select": (lambda d: d.select([5, 1, 5]), lambda e: [e[5], e[1], e[5]]),
    "shuffle, flatten indices": (lambda d: d.select([3, 9, 0]).flatten_indices(), lambda e: [e[3], e[9], e[0]]),
    "sort": (lambda d: d.sort("sent_id"), lambda e: sorted(e, key=lambda row: row["sent_id"])),
    "two processes": (lambda d: d.map(same, num_proc=2), lambda e: e),
    "two processes after select": (
        lambda d: d.select([3, 9, 0, 1]).map(numbered, num_proc=2),
        lambda e: with_words([e[i] for i in (3, 9, 0, 1)]),
    ),
    "filter in two processes": (lambda d: d.filter(has_target, num_proc=2), targets_only),
    "train_test_split": (lambda d: d.train_test_split(test_size=4, shuffle=False)["test"], lambda e: e[-4:]),
    "batch": (lambda d: (dict(zip(b, v)) for b in d.batch(4) for v in zip(*b.values())), lambda e: e),
    "iter": (lambda d: (dict(zip(b, v)) for b in d.iter(4) for v in zip(*b.values())), lambda e: e),
    "transform": (lambda d: d.with_transform(lambda batch: batch), lambda e: e),
    "arrow": (lambda d: d.with_format("arrow")[:].to_pylist(), lambda e: e),
    "pandas format": (lambda d: d.with_format("pandas")[:].to_dict("records"), lambda e: e),
    "to_pandas": (lambda d: d.to_pandas().to_dict("records"), lambda e: e),
    "to_dict": (lambda d: (dict(zip(d.to_dict(), v)) for v in zip(*d.to_dict().values())), lambda e: e),
    "to_list": (lambda d: d.to_list(), lambda e: e),
    "to_iterable": (lambda d: d.to_iterable_dataset(num_shards=3), lambda e: e),
    "to_iterable, shuffle": (
        lambda d: sorted(d.to_iterable_dataset().shuffle(seed=1, buffer_size=9), key=lambda row: row["sent_id"]),
        lambda e: sorted(e, key=lambda row: row["sent_id"]),
    ),
    "add column": (
        lambda d: d.add_column("n", list(range(len(d)))),
        lambda e: [{**row, "n": n} for n, row in enumerate(e)],
    ),
    "pickle": (lambda d: pickle.loads(pickle.dumps(d)), lambda e: e),
    "pickled part": (lambda d: pickle.loads(pickle.dumps(d.select(range(3, 9)))), lambda e: e[3:9]),
    "concatenate with a copy": (
        lambda d: datasets.concatenate_datasets([d, d.map(numbered).remove_columns("words")]),
        lambda e: [*e, *e],
    ),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_operation_gives_the_rows(rows, stream, plain, kind, name):
    operation, expected = BOTH[name]
    if name == "torch":
        pytest.importorskip("torch")
    if kind == "stream" and name == "shards":
        pytest.skip("a stream shards itself")
    results = [simple(row) for row in operation(rows if kind == "map" else stream)]
    expected = expected(plain)
    if name == "interleave" and kind == "stream":  # which `datasets` ends one row earlier
        expected = expected[:-1]
    if name == "torch":  # pictures have their channels first
        results = [{**row, "image": np.moveaxis(row["image"], 0, -1).tolist()} for row in results]
    assert len(results) == len(expected)
    for row, wanted in zip(results, expected):
        assert row == wanted


@pytest.mark.parametrize("name", MAP_ONLY)
def test_operation_on_map_style_rows(rows, plain, name):
    operation, expected = MAP_ONLY[name]
    results = [simple(row) for row in operation(rows)]
    assert len(results) == len(expected(plain))
    for row, wanted in zip(results, expected(plain)):
        assert row == wanted


@pytest.mark.parametrize("form", ["disk", "parquet", "json"])
def test_rows_survive_a_copy_on_disk(rows, plain, tmp_path, form):
    """Not for streams: `datasets` infers the types of a stream that a function makes from each batch anew."""
    if form == "disk":
        rows.save_to_disk(tmp_path / "copy", num_shards=2)
        results = datasets.load_from_disk(tmp_path / "copy")
    elif form == "parquet":
        rows.to_parquet(str(tmp_path / "copy.parquet"))
        results = datasets.load_dataset("parquet", data_files=str(tmp_path / "copy.parquet"), split="train")
    else:
        rows.remove_columns("image").to_json(tmp_path / "copy.json")
        results = [json.loads(line) for line in (tmp_path / "copy.json").read_text().splitlines()]
        plain = without(plain, "image")
    assert [simple(row) for row in results] == plain
    if form != "json":  # readable without this project
        assert type(results.features["image"]) is datasets.Image and results.features["image"].mode == "RGB"


def test_features_are_declared(rows, stream):
    for dataset in (rows, stream):
        assert dataset.select_columns(list(grefcoco.EXPRESSION_FEATURES)).features == grefcoco.EXPRESSION_FEATURES
    assert rows.features.to_dict()["image"] == {"mode": "RGB", "_type": "Image"}


def test_a_changed_picture_is_not_given_to_another_row(rows):
    first, other = rows[0], rows[1]
    assert first["image_id"] == other["image_id"] and first["image"] is other["image"]
    before = np.asarray(other["image"]).copy()
    first["image"].paste((1, 2, 3), (0, 0, 9, 9))
    again = rows[0]["image"]
    assert again is not first["image"] and np.array_equal(again, before)


def test_shared_images_take_no_memory(rows):
    """All sentences point to the bytes of one image, also after operations and in other processes."""
    addresses = {}
    for part in (rows, rows.select(range(2, 9)), rows.select_columns(["image", "image_id"])):
        table = part.data.table
        for image, image_id in zip(table["image"].chunks, table["image_id"].to_pylist()):
            address = image.field("bytes").buffers()[2].address, image.offset
            assert addresses.setdefault(image_id, address) == address
    assert len(pickle.dumps(rows)) < 20_000
    assert len(pickle.dumps(rows.select(range(2, 9)))) < 20_000

"""Every operation of `datasets` on expression rows gives the rows that it gives on plain rows."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import pickle
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, IterableDataset
from datasets.distributed import split_dataset_by_node
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
    """The rows as simple values."""
    expected = [simple(row) for row in rows]
    assert len(expected) > 20 and {len(row["ann_ids"]) for row in expected} == {0, 1, 2}
    return expected


@pytest.fixture(scope="module")
def plain_rows(rows, plain) -> Dataset:
    """The same rows as `datasets` itself makes them."""
    features = Features({**rows.features, "image": datasets.Image(mode="RGB")})
    return Dataset.from_list(rows.to_list(), features=features)


def simple(value: object) -> object:
    """Python values of rows in any format; images and their stored forms as the bytes of their pixels."""
    if isinstance(value, Image.Image):
        return value.convert("RGB").tobytes()
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return simple(Image.open(io.BytesIO(value["bytes"])))
    if isinstance(value, dict):
        return {name: simple(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [simple(item) for item in value]
    if hasattr(value, "detach"):  # a tensor; pictures have their channels first
        return simple(np.moveaxis(value.numpy(), 0, -1) if value.ndim == 3 else value.numpy())
    if isinstance(value, np.ndarray):
        return value.astype(np.uint8).tobytes() if value.ndim == 3 else simple(value.tolist())
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


def rows_of(batch: dict[str, list]) -> list[dict]:
    """The rows of a batch."""
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


def read_back(rows: Rows, name: str, folder: Path) -> list[dict]:
    """The rows after a copy to a file."""
    if name == "parquet":
        rows.to_parquet(str(folder / "copy.parquet"))
        return list(datasets.load_dataset("parquet", data_files=str(folder / "copy.parquet"), split="train"))
    small = rows.select_columns(["sent_id", "sentence", "no_target", "boxes", "mask"])
    if name == "json":
        small.to_json(folder / "copy.json")
        return [json.loads(line) for line in (folder / "copy.json").read_text().splitlines()]
    if name == "csv":
        small.to_csv(folder / "copy.csv")
        return list(csv.DictReader((folder / "copy.csv").open()))
    with sqlite3.connect(folder / "copy.db") as connection:
        small.select_columns(["sent_id", "sentence", "no_target"]).to_sql("rows", connection)
        return [{"values": values} for values in connection.execute("select * from rows")]


# The same operation on plain rows says what is right.
AS_PLAIN: dict[str, Callable[[Rows], object]] = {
    "add_column": lambda d: d.add_column("n", list(range(len(list(d.select_columns("sent_id")))))),
    "batch": lambda d: [row for batch in d.batch(5) for row in rows_of(batch)],
    "iter": lambda d: [row for batch in d.iter(5, drop_last_batch=True) for row in rows_of(batch)],
    "map a batch": lambda d: d.map(lambda batch: {"n": list(map(len, batch["ann_ids"]))}, batched=True, batch_size=7),
    "map a batch to fewer rows": lambda d: d.map(
        lambda batch: {"first": batch["sentence"][:1]}, batched=True, batch_size=7, remove_columns=COLUMNS
    ),
    "map with indices": lambda d: d.map(lambda row, i: {"i": i}, with_indices=True, remove_columns=["image"]),
    "map arrow": lambda d: d.with_format("arrow").map(lambda t: t.slice(0, 1), batched=True, batch_size=4),
    "filter by batch": lambda d: d.filter(lambda b: [len(ids) > 1 for ids in b["ann_ids"]], batched=True),
    "rename_columns": lambda d: d.rename_columns({"image": "picture", "mask": "union"}),
    "cast": lambda d: d.cast(d.features),
    "cast_column": lambda d: d.cast_column("sent_id", datasets.Value("string")),
    "column": lambda d: [{"image": image} for image in d["image"]],
    "concatenate columns": lambda d: datasets.concatenate_datasets(
        [d.select_columns(["image"]), d.select_columns(["mask", "boxes"])], axis=1
    ),
    "interleave at random": lambda d: datasets.interleave_datasets([d, d.take(5)], probabilities=[0.6, 0.4], seed=3),
    "shuffle": lambda d: sorted(d.shuffle(seed=1), key=lambda row: row["sent_id"]),
    "split by node": lambda d: sorted(
        (row for rank in range(2) for row in split_dataset_by_node(d, rank, 2)), key=lambda row: row["sent_id"]
    ),
    "skip, take, repeat": lambda d: d.skip(3).take(4).repeat(2),
    "numpy batches": lambda d: [{"ids": batch["sent_id"]} for batch in d.with_format("numpy").iter(4)],
    "to_dict": lambda d: rows_of(d.to_dict()),
    "to_list": lambda d: d.to_list(),
    "to_pandas": lambda d: d.to_pandas().to_dict("records"),
}
OF_STREAMS: dict[str, Callable[[IterableDataset], object]] = {
    "decode": lambda d: d.decode(False),
    "decode in threads": lambda d: d.decode(num_threads=2),
    "reshard": lambda d: d.reshard(),
    "shard": lambda d: [row for i in range(d.num_shards) for row in d.shard(d.num_shards, i)],
    "state_dict, load_state_dict": lambda d: resumed(d, 11),
    "state after map": lambda d: resumed(d.map(numbered), 11),
    "set_epoch": lambda d: sorted(epoch(d.shuffle(seed=1, buffer_size=9), 2), key=lambda row: row["sent_id"]),
    "pandas in batches": lambda d: [
        row for t in d.to_pandas(batched=True, batch_size=6) for row in t.to_dict("records")
    ],
    "loader in two processes": lambda d: sorted(loaded(d), key=lambda row: row["sent_id"]),
}
OF_TABLES: dict[str, Callable[[Dataset], object]] = {
    "flatten": lambda d: d.flatten(),
    "unique": lambda d: [{"ids": d.unique("image_id")}],
    "class_encode_column": lambda d: d.class_encode_column("file_name"),
    "add_item": lambda d: d.select_columns(["sent_id", "raw"]).add_item({"sent_id": -1, "raw": "x"}),
    "set_format": lambda d: after(d, lambda copy: copy.set_format("numpy", columns=["sent_id", "image"])),
    "set_transform": lambda d: after(d, lambda copy: copy.set_transform(lambda batch: {"words": batch["sentence"]})),
    "reset_format": lambda d: after(d.with_format("numpy"), lambda copy: copy.reset_format()),
    "formatted_as": lambda d: formatted(d),
    "sort by two": lambda d: d.sort(["no_target", "sent_id"], reverse=[True, False]),
    "loader in two processes": lambda d: loaded(d),
    "map in two processes": lambda d: d.map(lambda row: {"wide": row["image"].size[0] > 9}, num_proc=2),
    "filter in two processes, by batch": lambda d: d.filter(
        lambda b: [len(ids) > 1 for ids in b["ann_ids"]], batched=True, num_proc=2
    ),
}


def after(rows: Dataset, change: Callable[[Dataset], object]) -> Dataset:
    copy_of_rows = copy.copy(rows)
    change(copy_of_rows)
    return copy_of_rows


def formatted(rows: Dataset) -> list[dict]:
    with rows.formatted_as("numpy", columns=["boxes"]):
        return list(rows)


def resumed(stream: IterableDataset, cut: int) -> list[dict]:
    """The rows before a state that is saved, and those after it is loaded."""
    rows = list(itertools.islice(stream, cut))
    other = copy.deepcopy(stream)
    other.load_state_dict(stream.state_dict())
    return [*rows, *other]


def epoch(stream: IterableDataset, number: int) -> IterableDataset:
    stream.set_epoch(number)
    return stream


def loaded(rows: Rows) -> list[dict]:
    """The rows from a loader with two worker processes."""
    loading = pytest.importorskip("torch.utils.data")
    return [row for batch in loading.DataLoader(rows, batch_size=4, num_workers=2, collate_fn=list) for row in batch]


# `datasets` waits five seconds for the threads of these
WAITING = [("stream", name) for name in ("interleave", "interleave at random", "shuffle", "set_epoch")]


def timed(cases: Iterable[tuple[str, str]]) -> list[object]:
    """The cases, the slow ones marked: those that wait, and those in two processes."""
    return [
        pytest.param(*case, marks=pytest.mark.slow if case in WAITING or "two processes" in case[1] else ())
        for case in cases
    ]


@pytest.mark.parametrize(("kind", "name"), timed((kind, name) for name in BOTH for kind in ("map", "stream")))
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


ALL_AS_PLAIN = [
    *((kind, name) for name in AS_PLAIN for kind in ("map", "stream")),
    *(("stream", name) for name in OF_STREAMS),
    *(("map", name) for name in OF_TABLES),
]


@pytest.mark.parametrize(("kind", "name"), timed(ALL_AS_PLAIN))
def test_operation_gives_what_it_gives_on_plain_rows(rows, stream, plain_rows, kind, name):
    operation = (AS_PLAIN | (OF_TABLES if kind == "map" else OF_STREAMS))[name]
    results, expected = (
        [simple(row) for row in operation(own)]
        for own in ((rows, plain_rows) if kind == "map" else (stream, plain_rows.to_iterable_dataset(num_shards=4)))
    )
    assert results == expected and expected


@pytest.mark.parametrize("form", ["parquet", "json", "csv", "sql"])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_copies_in_files_are_those_of_plain_rows(rows, stream, plain_rows, tmp_path, kind, form):
    results = [simple(row) for row in read_back(rows if kind == "map" else stream, form, tmp_path)]
    (tmp_path / "plain").mkdir()
    assert results == [simple(row) for row in read_back(plain_rows, form, tmp_path / "plain")] and results


@pytest.mark.parametrize("num_proc", [None, pytest.param(2, marks=pytest.mark.slow)])  # two import torch anew
def test_rows_survive_a_copy_on_disk(rows, plain, tmp_path, num_proc):
    rows.save_to_disk(tmp_path / "copy", num_shards=2, num_proc=num_proc)
    results = datasets.load_from_disk(tmp_path / "copy")
    assert [simple(row) for row in results] == plain
    assert type(results.features["image"]) is datasets.Image and results.features["image"].mode == "RGB"


def test_copies_can_be_read_without_this_project(rows, stream, tmp_path):
    for own in (rows, stream):
        own.to_parquet(str(tmp_path / "copy.parquet"))
        features = Features.from_arrow_schema(pq.read_schema(tmp_path / "copy.parquet"))
        assert type(features["image"]) is datasets.Image
        assert features.arrow_schema.types == own.features.arrow_schema.types


# Methods that make rows, describe them, or need a library or a server that the tests do not have.
OTHER_METHODS = """
    from_buffer from_csv from_dict from_file from_generator from_json from_list from_pandas from_parquet from_polars
    from_spark from_sql from_text load_from_disk push_to_hub to_polars to_tf_dataset align_labels_with_mapping
    add_elasticsearch_index add_faiss_index add_faiss_index_from_external_arrays drop_index get_index
    get_nearest_examples get_nearest_examples_batch is_index_initialized list_indexes load_elasticsearch_index
    load_faiss_index save_faiss_index search search_batch cleanup_cache_files
"""


def test_the_tables_hold_all_operations():
    text = Path(__file__).read_text()
    for kind in (Dataset, IterableDataset):
        names = {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}
        assert {name for name in names - set(OTHER_METHODS.split()) if f".{name}(" not in text} == set()


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

"""Damaged built folders: every command gives one line and exit code 2, or what it gives for the whole folder."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import grefcoco
from grefcoco_data.commands import main
from grefcoco_data.rows import explode
from tests.processes import Forked
from tests.sizes import DAMAGED_BUILDS
from tests.tiny_grefcoco import write_genuine


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    genuine = write_genuine(tmp_path_factory.mktemp("genuine") / "set")
    grefcoco.build(genuine, genuine / "train2014", genuine.parent / "built")
    return genuine.parent / "built"


def shard(folder: Path) -> Path:
    return next((folder / "data").glob("train-*"))


def change_table(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(edit(pq.read_table(shard(folder))), shard(folder))


def change_report(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        report = json.loads((folder / "build.json").read_text())
        (folder / "build.json").write_text(json.dumps({**report, **values}))

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


DAMAGE = {
    "bad YAML": write("README.md", "---\nconfigs: [\n---\n"),
    "YAML of another type": write("README.md", "---\nconfigs: 3\n---\n"),
    "no configuration": write("README.md", "---\nlicense: mit\n---\n"),
    "a cut shard": lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-200]),
    "an empty shard": lambda folder: shard(folder).write_bytes(b""),
    "no shard": lambda folder: shutil.rmtree(folder / "data"),
    "a column less": change_table(lambda table: table.drop(["objects"])),
    "a column of another type": change_table(
        lambda table: table.set_column(5, "objects", pa.array(["x"] * len(table)))
    ),
    "not JSON": write("build.json", "{"),
    "shards as a list": change_report(shards=["data/train.parquet"]),
    "shards elsewhere": change_report(shards={"../../secret": "0"}),
    "counts as text": change_report(splits={"train": {"images": "many"}}),
    "splits as numbers": change_report(splits={"train": 7}),
    "problems as numbers": change_report(problems={"bad": [3]}),
    "categories as text": change_report(categories=["person"]),
    "another configuration": change_report(config="refcoco_unc"),
    "a long unknown configuration": change_report(config="x" * 5_000),
    "categories of wrong types": change_report(categories=[{"id": [1]}]),
    "refs of wrong types": change_report(refs_without_sentences=[{"ref_id": 1}]),
    "a long name in the YAML": write("README.md", f"---\nconfigs: [{{data_files: {'x' * 5_000}}}]\n---\n"),
    "README is a folder": lambda folder: ((folder / "README.md").unlink(), (folder / "README.md").mkdir()),
    "a split without its shard": lambda folder: next((folder / "data").glob("val-*")).unlink(),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
    "nothing": shutil.rmtree,
}
COMMANDS = ("show", "check", "stats", "export")


def outcome(command: str, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code; a failure prints one readable line."""
    code = main([command, str(folder), *(["--out", str(out)] if command in ("show", "export") else [])])
    message = capsys.readouterr().err
    problems = [line for line in message.splitlines() if line.startswith("grefcoco ")]
    assert code in (0, 1) or (code == 2 and len(problems) == 1 and len(problems[0]) < 1_000), message
    return code


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(built, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(built, tmp_path / "copy")
    DAMAGE[damage](tmp_path / "copy")
    codes = {name: outcome(name, tmp_path / "copy", tmp_path / name, capsys) for name in COMMANDS}
    if damage not in ("another configuration", "a split without its shard"):
        assert codes["check"] and codes["show"], "it is named"
    if damage in ("not JSON", "shards as a list", "shards elsewhere", "splits as numbers", "categories as text"):
        assert codes["check"] == codes["stats"] == codes["export"] == 2
    elif "shard" in damage or "column" in damage:
        assert codes["check"] == 1 and codes["show"] == codes["stats"] == codes["export"] == 2
    elif damage in ("an empty folder", "a file", "nothing"):
        assert set(codes.values()) == {2}


JUNK = [None, -1, 0, 7, 2**31 - 1, 2**62, 1e38, "", "x", [], [None], {}, True, b"x"]


def change_bytes(folder: Path, chance: random.Random) -> None:
    """Bytes of any file, also of the table of contents at the end of a shard."""
    path = chance.choice([shard(folder), folder / "README.md", folder / "build.json"])
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 5)):
        start = chance.choice([chance.randrange(len(content)), -chance.randrange(1, min(3_000, len(content)))])
        content[start] = chance.randrange(256)
    path.write_bytes(content)


def change_values(folder: Path, chance: random.Random) -> None:
    """Values of image rows, with the same schema."""
    table = pq.read_table(shard(folder))
    rows = table.to_pylist()
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(places(rows)))
        holder[key] = copy.deepcopy(chance.choice([*JUNK, *(holder if isinstance(holder, list) else [])]))
    with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard(folder))


def change_schema(folder: Path, chance: random.Random) -> None:
    """Columns left out, renamed, moved, repeated, emptied or of another type; row groups of another size."""
    table = pq.read_table(shard(folder))
    names = table.column_names
    name, other = chance.sample(names, 2)
    kind = chance.choice([pa.string(), pa.int8(), pa.int64(), pa.float64(), pa.large_string(), pa.null()])
    changes = [
        lambda: table.drop([name]),
        lambda: table.rename_columns([other if column == name else column for column in names]),
        lambda: table.select(chance.sample(names, len(names))),
        lambda: table.append_column("more", table[name]),
        lambda: table.set_column(names.index(name), name, pa.nulls(len(table), kind)),
        lambda: table.set_column(names.index(name), name, table[name].cast(kind)),
        lambda: table.replace_schema_metadata(None),
        lambda: table.slice(0, 0),
        lambda: pa.concat_tables([table, table]),
    ]
    with contextlib.suppress(pa.ArrowException):
        pq.write_table(chance.choice(changes)(), shard(folder), row_group_size=chance.choice([1, 3, 100]))


def change_texts(folder: Path, chance: random.Random) -> None:
    """Values of build.json, lines of README.md."""
    if chance.random() < 0.5:
        report = json.loads((folder / "build.json").read_text())
        holder, key = chance.choice(list(places(report)))
        holder[key] = chance.choice([value for value in JUNK if not isinstance(value, bytes)])
        (folder / "build.json").write_text(json.dumps(report))
        return
    lines = (folder / "README.md").read_text().split("\n")
    first, second = (chance.randrange(lines.index("---", 1) + 1) for _ in range(2))
    lines[first] = chance.choice(
        ["", "---", lines[second], lines[first] + ": x", lines[first][2:], "- " + lines[first]]
    )
    (folder / "README.md").write_text("\n".join(lines))


def places(value: object) -> Iterator[tuple[list | dict, object]]:
    """Every list or dictionary in `value` with every one of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def run_on_random_damage(built: Path, work: Path, number: int) -> None:
    """Rows are the same from all readers, or there is one error. A signal ends this process."""
    datasets.disable_progress_bars()
    chance = random.Random(number)
    for place in range(number, DAMAGED_BUILDS, 2):
        folder = work / f"{place}"
        datasets.config.HF_DATASETS_CACHE = work / f"cache-{place}"
        shutil.copytree(built, folder)
        chance.choice([change_bytes, change_values, change_schema, change_texts])(folder, chance)
        readers = mapped_rows, streamed_rows, plain_rows
        results = [rows_or_error(reader, folder) for reader in readers]
        correct = [rows for rows in results if rows != "error"]
        assert all(rows == correct[0] for rows in correct), place
        for command in ("check", "stats"):
            assert main([command, str(folder)]) in (0, 1, 2), place
        shutil.rmtree(folder)
        shutil.rmtree(work / f"cache-{place}", ignore_errors=True)


def rows_or_error(reader: Callable[[Path], Iterator[dict]], folder: Path) -> list[dict] | str:
    try:
        return [{**row, "image": row["image"].tobytes()} for row in reader(folder)]
    except (ValueError, OSError):  # Pillow has OSError for damaged pictures
        return "error"


def mapped_rows(folder: Path) -> Iterator[dict]:
    return iter(grefcoco.load(folder, split="train"))


def streamed_rows(folder: Path) -> Iterator[dict]:
    stream = grefcoco.load(folder, split="train", streaming=True)
    try:
        yield from stream
    except Exception as error:  # what `datasets` raises on a shard of another schema
        raise ValueError(str(error)) from error


def plain_rows(folder: Path) -> Iterator[dict]:
    """The rows of the image rows one by one; whatever is wrong with them is an error."""
    try:
        table = pq.read_table(shard(folder)).select(list(grefcoco.IMAGE_FEATURES))
        for image in table.cast(grefcoco.IMAGE_FEATURES.arrow_schema).to_pylist():
            batch = explode({name: [value] for name, value in image.items()}, list(grefcoco.EXPRESSION_FEATURES))
            yield from (dict(zip(batch, values)) for values in zip(*batch.values()))
    except Exception as error:
        raise ValueError(str(error)) from error


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_random_damage_crashes_nothing(built, tmp_path, number):
    done = Forked(run_on_random_damage, built, tmp_path, number).wait(timeout=60 + 10 * DAMAGED_BUILDS)
    assert done.returncode == 0, done.stderr[-3_000:]

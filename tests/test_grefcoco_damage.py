"""Damaged built folders: every command gives one line and exit code 2, or what it gives for the whole folder."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import grefcoco
from grefcoco_data.commands import main
from tests.processes import fork
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
    if damage in ("not JSON", "shards as a list", "shards elsewhere", "splits as numbers", "categories as text"):
        assert codes["check"] == codes["stats"] == codes["export"] == 2
    elif "shard" in damage or "column" in damage:
        assert codes["check"] == 1 and codes["show"] == codes["stats"] == codes["export"] == 2
    elif "YAML" in damage or "configuration" in damage:
        assert codes["show"] == 2 or damage == "another configuration"


def run_on_random_damage(built: Path, work: Path, number: int) -> None:
    """Change bytes of any file; rows are the same from all readers, or there is one error. A signal ends this."""
    datasets.disable_progress_bars()
    chance = random.Random(number)
    for place in range(number, DAMAGED_BUILDS, 2):
        folder = work / f"{place}"
        datasets.config.HF_DATASETS_CACHE = work / f"cache-{place}"
        shutil.copytree(built, folder)
        path = chance.choice([shard(folder), folder / "README.md", folder / "build.json"])
        content = bytearray(path.read_bytes())
        for _ in range(chance.randint(1, 5)):
            start = chance.choice([chance.randrange(len(content)), -chance.randrange(1, min(3_000, len(content)))])
            content[start] = chance.randrange(256)
        path.write_bytes(content)
        mapped, streamed = (rows_or_error(folder, streaming) for streaming in (False, True))
        assert mapped == streamed or "error" in (mapped, streamed)
        shutil.rmtree(folder)
        shutil.rmtree(work / f"cache-{place}", ignore_errors=True)


def rows_or_error(folder: Path, streaming: bool) -> list[dict] | str:
    try:
        rows = grefcoco.load(folder, split="train", streaming=streaming)
        return [{**row, "image": row["image"].tobytes()} for row in rows]
    except (ValueError, OSError):  # Pillow has OSError for damaged pictures
        return "error"


@pytest.mark.parametrize("number", [0, 1])
def test_random_damage_crashes_nothing(built, tmp_path, number):
    done = fork(run_on_random_damage, built, tmp_path, number)
    assert done.returncode == 0, done.stderr[-3_000:]

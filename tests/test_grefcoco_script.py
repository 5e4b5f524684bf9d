"""grefcoco.py as a loading script of `datasets` before 4; PYTHON_WITH_LOWEST_DATA names a Python with one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import grefcoco
from tests.tiny_grefcoco import write_genuine, write_json

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PYTHON_WITH_LOWEST_DATA" not in os.environ, reason="names a Python that has datasets 3.6"),
]
LOAD = """
import json, sys, datasets
assert datasets.__version__ < "4", datasets.__version__
script, num_proc, *options = sys.argv[1:]
options = dict(option.split("=") for option in options)
rows = datasets.load_dataset(script, **options, num_proc=int(num_proc), trust_remote_code=True)
pictures = {split: [list(row["image"].size) for row in part] for split, part in rows.items()}
rows = rows.remove_columns("image")
print(json.dumps([{split: list(part) for split, part in rows.items()}, pictures]))
"""


@pytest.fixture
def genuine(tmp_path: Path) -> Path:
    return write_genuine(tmp_path / "set")


def load(script: Path | str, cwd: Path, *options: str, num_proc: int = 1) -> subprocess.CompletedProcess:
    """Run in `cwd` without the repository on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONSAFEPATH": "1", "HF_HOME": str(cwd / "home")}
    command = [os.environ["PYTHON_WITH_LOWEST_DATA"], "-c", LOAD, str(script), str(num_proc), *options]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def rows(done: subprocess.CompletedProcess) -> dict[str, list[dict]]:
    assert done.returncode == 0, done.stderr
    splits, sizes = json.loads(done.stdout.splitlines()[-1])
    assert all(sizes[split] == [[row["width"], row["height"]] for row in part] for split, part in splits.items())
    return splits


def expected(genuine: Path) -> dict[str, list[dict]]:
    built = grefcoco.load(genuine, images=genuine / "train2014", layout="image")
    return {split: list(part.remove_columns("image")) for split, part in built.items()}


def test_script_gives_the_same_rows(genuine, tmp_path):
    """From any folder, from a folder or zip of images, in processes, and with new rows after a file has changed."""
    options = ["annotations=set", "images=set/train2014"]
    assert rows(load(ROOT / "grefcoco.py", tmp_path, *options)) == expected(genuine)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in (genuine / "train2014").iterdir():
            archive.write(path, f"train2014/{path.name}")
    refs = json.loads((genuine / "grefs(unc).json").read_text())
    refs[0]["sentences"][0]["sent"] = "changed"
    write_json(genuine / "grefs(unc).json", refs)
    assert rows(load(ROOT / "grefcoco.py", tmp_path, *options)) == expected(genuine)
    in_zip = load(ROOT / "grefcoco.py", tmp_path, "annotations=set", "images=images.zip", num_proc=2)
    assert rows(in_zip) == expected(genuine)


def test_script_by_its_name_and_without_the_package(genuine, tmp_path):
    place = tmp_path / "checkout"
    place.mkdir()
    shutil.copy(ROOT / "grefcoco.py", place)
    options = [f"annotations={genuine}", f"images={genuine / 'train2014'}"]
    alone = load("grefcoco.py", place, *options)
    assert alone.returncode == 1 and "needs the folder grefcoco_data" in alone.stderr.splitlines()[-1]
    shutil.copytree(ROOT / "grefcoco_data", place / "grefcoco_data")
    assert rows(load("grefcoco.py", place, *options)) == expected(genuine)


def test_script_says_what_it_needs(tmp_path):
    nothing = load(ROOT / "grefcoco.py", tmp_path)
    assert nothing.returncode == 1 and "annotations=FOLDER" in nothing.stderr.splitlines()[-1]

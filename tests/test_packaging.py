"""The wheel holds the data set and the model, nothing else, and its metadata comes from setup.cfg."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import grefcoco

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, files):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_top_level_of_the_wheel(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    code = {name for name in top if not name.endswith((".dist-info", ".data"))}
    assert code == {"grefcoco.py", "grefcoco_data", "grefcoco_modeling"}
    assert "grefcoco_modeling/modeling_rela.py" in wheel.namelist()
    assert any(name.endswith(".data/data/share/grefcoco/dataset_card.md") for name in wheel.namelist())


def test_metadata_and_extras(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("grefcoco", grefcoco.__version__)
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "grefcoco = grefcoco_data.commands:main" in entry_points
    assert set(metadata.get_all("Provides-Extra")) == {"plot", "model", "train", "demo", "test", "all"}
    core = [line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(core) == ["datasets", "huggingface_hub", "numpy", "pillow", "pyarrow", "pycocotools", "tqdm"]


def test_house_rules():
    assert not (ROOT / "evaluate" / "__init__.py").exists(), "it would hide the installed evaluate package"
    visible = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert len({path.name for path in visible} & tops) <= 18

"""The wheel holds the data set and the model, nothing else, and its metadata comes from setup.cfg."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import grefcoco

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the source distribution of the tracked files, and the wheel that is built from it alone."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, files):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.mark.slow
def test_the_source_distribution_holds_what_makes_the_wheel(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"grefcoco.py", "dataset_card.md", "LICENSE", "modeling/modeling_rela.py"} <= names
    tops = {name.split("/")[0] for name in names if name and "." not in name.split("/")[0]}
    assert tops == {"LICENSE", "PKG-INFO", "grefcoco_data", "modeling"}, "tests without what they test, or more"


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
    assert set(metadata.get_all("Provides-Extra")) == {"plot", "model", "train", "demo", "vlt", "test", "all"}
    core = [line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(core) == [
        "datasets",
        "fsspec",
        "huggingface_hub",
        "numpy",
        "pillow",
        "pyarrow",
        "pycocotools",
        "tqdm",
    ]


def test_house_rules():
    assert not (ROOT / "evaluate" / "__init__.py").exists(), "it would hide the installed evaluate package"
    visible = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert len({path.name for path in visible} & tops) <= 18


LOWER = {  # what the modules of each room may import of this repository, besides their own room
    "grefcoco_data": set(),
    "modeling": set(),
    "evaluate": set(),
    "grefcoco.py": {"grefcoco_data"},
    "training": {"grefcoco", "grefcoco_data", "modeling"},
    "scoring": {"grefcoco", "grefcoco_data", "modeling", "training"},
    "train.py": {"grefcoco", "grefcoco_data", "modeling", "training", "scoring"},
    "demo": {"grefcoco_data", "modeling", "training"},
}
ROOMS = {"grefcoco", "grefcoco_data", "modeling", "training", "scoring", "train", "demo", "benchmarks", "tests"}


@pytest.mark.parametrize("room", LOWER)
def test_imports_run_one_way(room):
    """Data lies below everything; models and metrics do not know each other; nothing imports a program."""
    place = ROOT / room
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        foreign = {name.split(".")[0] for name in names} & ROOMS - LOWER[room] - {room}
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_no_circle_inside_a_room():
    for room in ("grefcoco_data", "modeling", "training", "scoring", "evaluate/gres", "evaluate/grec", "evaluate/jf"):
        files = {path.stem: path for path in (ROOT / room).glob("*.py")}
        imports = {
            name: _imports_of(path, room.rpartition("/")[2]) & set(files) - {name} for name, path in files.items()
        }
        while leaves := [name for name, targets in imports.items() if not targets & set(imports)]:
            for name in leaves:
                del imports[name]
        assert not imports, f"{room} has a circle of imports through {', '.join(imports)}"


def _imports_of(path: Path, room: str) -> set[str]:
    """Names of the modules of the same room that a file imports at run time."""
    tree, names = ast.parse(path.read_text()), set()
    skipped = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    inside = {id(child) for node in skipped for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in inside:
            if node.level == 1 or node.module == room:
                names |= {node.module} if node.level and node.module else {alias.name for alias in node.names}
            elif (node.module or "").startswith(f"{room}."):
                names.add(node.module.split(".")[1])
    return names

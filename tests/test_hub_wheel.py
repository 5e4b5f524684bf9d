"""The wheel in a new environment, without the repository: every command runs, a data set and a model are shared."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from email import message_from_bytes
from importlib import metadata
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import grefcoco
from tests.hub_server import Hub
from tests.tiny_grefcoco import write_genuine
from tests.tiny_rela import SMALL

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import grefcoco
assert "site-packages" in grefcoco.__file__, "this is not the installed module"
rows = grefcoco.load("me/grefcoco", split="testA", streaming=True)
print(len([row["image"].size for row in rows]))
"""
PUSH = """
import json, sys
from transformers import BertTokenizerFast
from grefcoco_modeling.configuration_rela import RelaConfig
from grefcoco_modeling.image_processing_rela import RelaImageProcessor
from grefcoco_modeling.modeling_rela import RelaModel
from grefcoco_modeling.processing_rela import RelaProcessor
model = RelaModel(RelaConfig(**json.loads(sys.argv[1])))
tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
model.push_to_hub("me/rela")
RelaProcessor(RelaImageProcessor(size={"height": 64, "width": 64}), tokenizer).push_to_hub("me/rela")
print(sum(parameter.double().abs().sum() for parameter in model.parameters()).item())
"""
USE = """
import grefcoco_modeling
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("me/rela"), AutoProcessor.from_pretrained("me/rela")
assert type(model).__module__ == "grefcoco_modeling.modeling_rela"
assert type(processor).__module__ == "grefcoco_modeling.processing_rela"
print(sum(parameter.double().abs().sum() for parameter in model.parameters()).item())
"""
IMPORT_ALL = """
import importlib, importlib.util, pkgutil
import grefcoco, grefcoco_data
for name in ("torch", "matplotlib", "transformers", "accelerate", "evaluate"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed"
names = {module.name for module in pkgutil.iter_modules(grefcoco_data.__path__)}
for name in names:
    importlib.import_module(f"grefcoco_data.{name}")
print(*sorted(names))
"""
LOWEST_DATA = """
import sys, grefcoco
genuine, out = sys.argv[1:]
report = grefcoco.build(genuine, f"{genuine}/train2014", out)
for split, counts in report["splits"].items():
    rows = grefcoco.load(out, split=split)
    sizes = [row["image"].size for row in rows]
    stream = grefcoco.load(out, split=split, streaming=True)
    assert counts["expressions"] == len(sizes) and [row["image"].size for row in stream] == sizes
    assert list(rows["sent_id"]) == [row["sent_id"] for row in stream]
print(grefcoco.__version__)
"""
LOWEST_MODEL = """
import json, sys
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertTokenizerFast, pipeline
import grefcoco
from grefcoco_modeling.configuration_rela import RelaConfig
from grefcoco_modeling.image_processing_rela import RelaImageProcessor
from grefcoco_modeling.modeling_rela import RelaModel
from grefcoco_modeling.processing_rela import RelaProcessor
tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
RelaModel(RelaConfig(**json.loads(sys.argv[1]))).save_pretrained("model")
RelaProcessor(RelaImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained("model")
model, processor = AutoModel.from_pretrained("model"), AutoProcessor.from_pretrained("model")
segment = pipeline("referring-segmentation", model=model, processor=processor)
assert [a["mask"].shape for a in segment(Image.new("RGB", (50, 40)), text=["a cat", "a dog"])] == [(40, 50)] * 2
print(grefcoco.__version__)
"""
VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run_here("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source")
    return next(folder.glob("*.whl"))


def fresh_environment(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """Interpreter and site-packages of a new environment that holds the wheel and nothing else."""
    python = folder / "bin" / "python"
    run_here("-m", "venv", "--without-pip", folder)
    run_here("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return python, Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel; its dependencies are borrowed from this environment."""
    python, packages = fresh_environment(tmp_path_factory.mktemp("fresh") / "fresh", wheel)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture(scope="module")
def core_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """As `python`, but only with the packages that `pip install grefcoco` installs: links to those of this one."""
    python, packages = fresh_environment(tmp_path_factory.mktemp("core") / "fresh", wheel)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        requires = message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    for distribution in required_distributions(requires).values():
        for top in {path.parts[0] for path in distribution.files if path.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return python


def required_distributions(requires: Iterable[str], extras: Iterable[str] = ()) -> dict[str, Distribution]:
    """Installed distributions that these requirements need, and what those need in turn."""
    needed = {}
    todo = [(requirement, tuple(extras)) for requirement in requires]
    while todo:
        line, extras = todo.pop()
        requirement = Requirement(line)
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        if not applies or (key := (requirement.name, *sorted(requirement.extras))) in needed:
            continue
        needed[key] = metadata.distribution(requirement.name)
        todo += [(inner, tuple(requirement.extras)) for inner in needed[key].requires or ()]
    return needed


def run_here(*arguments: object) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Iterator[Run]:
    """Run the fresh interpreter as a user of a Hub, `author` or `user`, each in a folder of its own."""
    with Hub(tmp_path / "hub", {"hf_me": "me"}) as hub:

        def run(who: str, *arguments: object) -> str:
            home = tmp_path / who
            home.mkdir(exist_ok=True)
            environment = hub.environment(home, "hf_me" if who == "author" else None) | {"OMP_NUM_THREADS": "1"}
            command = [str(python), *map(str, arguments)]
            done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run


@pytest.mark.slow
def test_data_set_from_the_wheel(run: Run, tmp_path: Path) -> None:
    genuine = write_genuine(tmp_path / "set")
    places = ["--annotations", genuine, "--images", genuine / "train2014", "--out", tmp_path / "out"]
    run("author", "-m", "grefcoco", "build", *places, "--push-to-hub", "me/grefcoco")
    refs = json.loads((genuine / "grefs(unc).json").read_text())
    expected = sum(len(ref["sentences"]) for ref in refs if ref["split"] == "testA")
    assert run("user", "-c", LOAD).split() == [str(expected)]


@pytest.mark.slow
def test_model_from_the_wheel_needs_no_remote_code(run: Run) -> None:
    pushed = run("author", "-c", PUSH, json.dumps(SMALL))
    assert run("user", "-c", USE) == pushed


@pytest.mark.slow
def test_every_module_and_command_works_without_torch_and_matplotlib(core_python: Path, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        command = [str(argument) for argument in arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        return done

    modules = run(core_python, "-c", IMPORT_ALL).stdout.split()
    assert set(modules) == {path.stem for path in (ROOT / "grefcoco_data").glob("[!_]*.py")}
    genuine = write_genuine(tmp_path / "set")
    files = ["--annotations", genuine, "--images", genuine / "train2014"]
    command = core_python.with_name("grefcoco")
    assert "complete" in run(command, "download", *files).stdout
    assert "ready" in run(command, "build", *files, "--out", "built", "--download", "--skip_bad_images").stdout
    for source in ("set", "built"):
        assert "shared between splits" in run(command, "check", source).stdout
        assert "| train |" in run(command, "stats", source).stdout
        assert run(command, "export", source, "--out", f"{source}-json").stdout.count("images") == 4
        coco = run(command, "export", source, "--out", f"{source}-coco", "--format", "coco")
        assert coco.stdout.count("instances_") == 4
        images = ["--images", genuine / "train2014"] if source == "set" else []
        run(command, "show", source, *images, "--out", f"{source}-page")
        assert list((tmp_path / f"{source}-page").glob("*.png"))
        refused = run(command, "stats", source, "--out", "plots.png", code=2)
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("grefcoco stats: ")]
        assert "pip install 'grefcoco[plot]'" in line and not (tmp_path / "plots.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "code"), [("data", LOWEST_DATA), ("model", LOWEST_MODEL)])
def test_the_wheel_works_with_the_lowest_versions_that_it_names(
    part: str, code: str, wheel: Path, tmp_path: Path
) -> None:
    """PYTHON_WITH_LOWEST_DATA and PYTHON_WITH_LOWEST_MODEL name Pythons of environments that .ci/run makes."""
    lowest = os.environ.get(f"PYTHON_WITH_LOWEST_{part.upper()}")
    if lowest is None:
        pytest.skip("names a Python that has the lowest versions")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        requires = map(Requirement, message_from_bytes(archive.read(name)).get_all("Requires-Dist"))
    if part == "data":
        requires = [line for line in requires if not line.marker]
        arguments = [write_genuine(tmp_path / "set"), tmp_path / "out"]
    else:  # whose lowest huggingface_hub is that of transformers
        requires = [line for line in requires if str(line.marker) == 'extra == "model"' and line.name != "torch"]
        arguments = [json.dumps(SMALL)]
    floors = {line.name: str(line.specifier).removeprefix(">=") for line in requires}
    python, packages = fresh_environment(tmp_path / "fresh", wheel)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    borrowed = [subprocess.run([lowest, "-c", purelib], capture_output=True, text=True, check=True).stdout.strip()]
    borrowed += [sysconfig.get_path("purelib")] if part == "model" else []  # for torch; packages above come first
    (packages / "borrowed.pth").write_text("\n".join(borrowed))

    def run(*arguments: object) -> str:
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [str(python), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    installed = json.loads(run("-c", VERSIONS, *floors))
    assert {name: Version(floor) for name, floor in floors.items()} == {
        name: Version(number) for name, number in installed.items()
    }
    assert run("-c", code, *arguments).split() == [grefcoco.__version__]

"""From the wheel alone, in a fresh environment and far from the repository: share a data set and a model, use both."""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub
from tests.tiny_grefcoco import write_genuine
from tests.tiny_rela import SMALL

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import grefcoco
assert "site-packages" in grefcoco.__file__, "this is not what the wheel installed"
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
Run = Callable[..., str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel; what the wheel depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    python = folder / "fresh" / "bin" / "python"
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    run_here(*build)
    run_here("-m", "venv", "--without-pip", folder / "fresh")
    wheel = next(folder.glob("*.whl"))
    run_here("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


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

"""Settings and fixtures of all tests: one thread per process, caches of their own, data made once per process."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.sizes import LARGE

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # on stderr, where tests count the lines of errors
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process that tests start would compile all modules again
CACHE = tempfile.mkdtemp(prefix="grefcoco-tests-")
os.environ["HF_HOME"] = CACHE  # test processes that run at the same time must not write remote code to one folder
settings.register_profile("suite", deadline=None, derandomize=not LARGE)  # the same examples in every run
settings.load_profile("suite")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def scenes_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built folder of 36 scenes on which tests train; read only."""
    from tests.tiny_training import make_dataset

    return made_once(tmp_path_factory, "scenes", make_dataset) / "built"


@pytest.fixture(scope="session")
def finished_run(scenes_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `python train.py` left, with pictures, a tracker and a best model; read only."""
    from tests.tiny_training import run, tiny

    def train(folder: Path) -> None:
        flags = tiny(scenes_dataset, folder / "out", eval_steps=3)
        done = run("train.py", *flags, "--report_to", "tensorboard", "--metric_for_best_model", "gIoU")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "finished", train) / "out"


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make` fills: the first of the test processes makes it, the others wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
            make(unfinished)
            unfinished.rename(folder)
    return folder

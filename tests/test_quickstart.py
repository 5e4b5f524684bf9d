"""demo/quickstart.ipynb runs from the first cell to the last after `make demo`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "demo" / "quickstart.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_holds_no_outputs() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK["nbformat"] == 4 and len(cells) >= 4
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(scenes_dataset: Path, finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    for name in ("demo", "evaluate", "grefcoco.py", "grefcoco_data", "modeling", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "easy").symlink_to(scenes_dataset)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "checkpoint").symlink_to(finished_run / "checkpoint")
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    done = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sentences;" in done.stdout and "127.0.0.1" in done.stdout

"""demo/quickstart.ipynb and the README's blocks run from the first to the last after `make demo`."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import fork

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "demo" / "quickstart.ipynb").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_notebook_holds_no_outputs() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK["nbformat"] == 4 and len(cells) >= 4
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.fixture
def after_demo(scenes_dataset: Path, finished_run: Path, tmp_path: Path) -> Path:
    """A folder as the repository's after `make demo`, with smaller data and another model."""
    for name in ("demo", "evaluate", "grefcoco.py", "grefcoco_data", "modeling", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "easy").symlink_to(scenes_dataset)
    (tmp_path / "data" / "scenes-easy").symlink_to(scenes_dataset.parent / "scenes")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "checkpoint").symlink_to(finished_run / "checkpoint")
    return tmp_path


@pytest.mark.slow
def test_the_notebook_runs(after_demo: Path) -> None:
    pytest.importorskip("gradio")
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    (after_demo / "cells.py").write_text("\n".join(cells))
    done = subprocess.run([sys.executable, "cells.py"], cwd=after_demo, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sentences;" in done.stdout and "127.0.0.1" in done.stdout


def run_blocks(folder: Path, blocks: list[str], commands: list[str]) -> int:
    os.chdir(folder)
    for block in blocks:
        print(f"-- {block.splitlines()[-1]}", flush=True)
        exec(block, {"__name__": "__main__"})
    from scoring.__main__ import main

    return max(main(shlex.split(command, comments=True)[3:]) for command in commands)


@pytest.mark.slow
def test_the_readmes_blocks_run_as_typed(after_demo: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    blocks = [block.replace("max_steps=100", "max_steps=2, use_cpu=True") for block in blocks]
    assert len(blocks) >= 5 and sum("use_cpu" in block for block in blocks) == 1
    scripts = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
    commands = [line for line in scripts if line.startswith("python -m scoring") and " data/easy " in line]
    assert [command.split()[3] for command in commands] == ["predict", "score"]
    done = fork(run_blocks, after_demo, blocks, commands)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = README.partition("prints about\n\n```\n")[2].partition("```")[0].splitlines()
    for line in lines:  # numbers and answers differ, because the model does
        sentence = line.partition(":")[0]
        assert re.search(rf"^{sentence}: .* \(none with probability \d\.\d\d\)$", done.stdout, re.MULTILINE), line
    assert (after_demo / "runs" / "demo" / "scores.json").is_file()


def test_every_program_and_file_that_the_readme_names_exists() -> None:
    scripts = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    names = re.findall(
        r"(?<!runs/)\b(?:demo|recipes|benchmarks|evaluate)/[\w/]*\w\.\w+|\b(?:grefcoco|train)\.py", README
    )
    names += [f"{name.replace('.', '/')}" for name in re.findall(r"-m (modeling\.\w+|scoring)", scripts)]
    for name in names:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    for target in re.findall(r"make (\w+)", scripts):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target

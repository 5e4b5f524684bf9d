"""The README's demo command, shortened: scenes to build to training to report, as a user types it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def make_demo(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    settings = [
        f"DATA={folder / 'data'}",
        f"OUT={folder / 'run'}",
        "SCENES_FLAGS=--train 40 --val 10 --testA 6 --testB 6",
        "TRAIN_FLAGS=--max_train_steps 6 --category_warmup_steps 2 --eval_steps 3 --checkpointing_steps 3",
    ]
    return subprocess.run(["make", "demo", *settings, *flags], cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="make demo would install an environment")
def test_shortened_demo_and_a_second_run(tmp_path):
    done = make_demo(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "run"
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) >= {"gres", "grec", "train"} and metrics["train"]["steps"] == 6
    assert 0 <= metrics["gres"]["gIoU"] <= 100
    page = (out / "report.md").read_text()
    assert "always empty" in page and "every object" in page and "predictions.png" in page
    for name in ("predictions.png", "learning_curve.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 100
    assert (out / "checkpoint" / "model.safetensors").exists()
    built = os.stat(tmp_path / "data" / "easy" / "README.md").st_mtime_ns
    again = make_demo(tmp_path, "SCENES_FLAGS=--train 40 --val 10 --testA 6 --testB 6")
    assert again.returncode == 0, again.stderr[-3000:]
    assert os.stat(tmp_path / "data" / "easy" / "README.md").st_mtime_ns == built, "the data should have been reused"
    assert json.loads((out / "metrics.json").read_text())["gres"] == metrics["gres"], "a run is not deterministic"

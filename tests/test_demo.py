"""`make demo` with few images and steps: scenes, data set, training, report."""

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
        "SCENES_FLAGS=--train 60 --val 12 --testA 6 --testB 6",
        "TRAIN_FLAGS=--max_train_steps 30 --category_warmup_steps 10 --eval_steps 15 --checkpointing_steps 15",
    ]
    return subprocess.run(["make", "demo", *settings, *flags], cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="make demo needs an installed environment")
def test_short_demo_and_a_second_run(tmp_path):
    first = make_demo(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    out = tmp_path / "run"
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) >= {"gres", "grec", "train"} and metrics["train"]["steps"] == 30
    assert 0 <= metrics["gres"]["gIoU"] <= 100
    report = (out / "report.md").read_text()
    assert "always empty" in report and "every object" in report and "predictions.png" in report
    for name in ("predictions.png", "learning_curve.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 100
    assert (out / "checkpoint" / "model.safetensors").exists()
    built = os.stat(tmp_path / "data" / "easy" / "README.md").st_mtime_ns
    second = make_demo(tmp_path, "SCENES_FLAGS=--train 60 --val 12 --testA 6 --testB 6")
    assert second.returncode == 0, second.stderr[-3000:]
    assert os.stat(tmp_path / "data" / "easy" / "README.md").st_mtime_ns == built, "the data must be reused"
    assert json.loads((out / "metrics.json").read_text())["gres"] == metrics["gres"], "scores must be deterministic"

"""A data set and a recipe with which train.py runs in seconds."""

import itertools
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import train
from demo.scenes import write_scenes

ROOT = Path(__file__).resolve().parents[1]


def make_dataset(folder: Path) -> Path:
    """A built folder of 36 scenes."""
    write_scenes(folder / "scenes", "easy", 0, {"train": 24, "val": 6, "testA": 3, "testB": 3}, size=64)
    train.grefcoco.build(folder / "scenes", folder / "scenes" / "train2014", folder / "built")
    return folder / "built"


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess:
    """A command of the repository in a process of its own."""
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs)


def train_here(*flags: object, pictures: bool = False) -> int:
    """Run train.py in this process, without its imports and drawings. Returns the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # drawing takes two thirds of a tiny run
    names = () if pictures else ("draw_answers", "draw_calibration", "draw_learning_curve")
    drawings = dict.fromkeys(names, no_picture)
    with mock.patch.multiple(train, **drawings) if drawings else nullcontext():
        try:
            train.main([str(flag) for flag in flags])
        except SystemExit as stop:
            return stop.code
    return 0


def train_and_die(method: str, call: int, number: int, *flags: object) -> int:
    """Run train.py, and send this process signal `number` after the `call`-th call of an Accelerator's `method`.

    SIGKILL takes the data loader's processes along.
    """
    original, calls = getattr(Accelerator, method), itertools.count(1)

    def call_and_signal(*arguments: object, **options: object) -> object:
        result = original(*arguments, **options)
        if next(calls) == call:
            for child in psutil.Process().children() if number == signal.SIGKILL else []:
                child.kill()
            os.kill(os.getpid(), number)
        return result

    with mock.patch.object(Accelerator, method, call_and_signal):
        return train_here(*flags)


def no_picture(*arguments: object) -> np.ndarray:
    """Stand in for a drawing of train.py: a black pixel for the tracker, and no file."""
    return np.zeros((1, 1, 3), np.uint8)


def tiny(dataset: Path, out: Path, **flags: object) -> list[str]:
    """Arguments of a run that takes seconds, with drop-out on so that random numbers matter."""
    recipe = yaml.safe_load((ROOT / "recipes" / "unified.yaml").read_text())
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {"stem_channels": 8, "stage_channels": [8, 8, 16, 16], "pixel_decoder_size": 16, "mask_size": 16}
    model = recipe["model"] | sizes | {"hidden_size": 16, "depths": [1, 1, 1, 1], "decoder_ffn_size": 16}
    recipe |= {
        "model": model | {"text_config": {**recipe["model"]["text_config"], **text, "hidden_dropout_prob": 0.1}}
    }
    recipe |= {"dataset": str(dataset), "output_dir": str(out), "image_size": 64, "report_to": "none"}
    recipe |= {"max_train_steps": 8, "category_warmup_steps": 2, "per_device_train_batch_size": 8}
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(recipe | flags))
    return [str(path)]

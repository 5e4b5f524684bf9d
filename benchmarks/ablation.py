"""The effect of each part of the unified recipe: `python -m benchmarks.ablation DATASET OUT --steps 800 --jobs 2`.

train.py trains every row for the same steps with several seeds and measures it on `val`. Rows that change the answers
only ("answered together", "calibrated") are measured again, not trained. A row with a metrics.json is not run again,
so an interrupted table continues. Unknown flags are passed to train.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import yaml

from grefcoco_data.arguments import ArgumentParser
from train import Run
from training.config import TrainConfig, read_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "unified.yaml"
# Fields of the model, where they are not RelaConfig's defaults, which are the published ones.
LOSS = {
    "mask_loss": "bce_dice", "auxiliary_loss": True, "no_target_loss_weight": 1.0, "loss_scale": 1.0,
    "class_weights": [1.0, 0.7],
}  # fmt: skip
LANGUAGE = {
    "region_language_mask": True, "region_language_weight": 1.0, "soft_minimap": True, "minimap_loss_weight": 1.0
}  # fmt: skip
INSTANCES = {"num_instance_queries": 16}
HARD_NEGATIVES = {"augmentation": {"hard_negatives": 0.15}}
UNSUPERVISED = HARD_NEGATIVES | {"category_supervision": False}  # it needs closed language gates
ROWS = {  # fields of the model, flags of the run; all else is the recipe's
    "published loss": ({}, {}),
    "+ dice, auxiliary losses, equal weights": (LOSS, {}),
    "+ language mask, soft minimap": (LOSS | LANGUAGE, {}),
    "+ instance branch": (LOSS | LANGUAGE | INSTANCES, {}),
    "+ hard negatives": (LOSS | LANGUAGE | INSTANCES, HARD_NEGATIVES),
    "+ counting": (LOSS | LANGUAGE | INSTANCES | {"count_loss_weight": 0.1}, HARD_NEGATIVES),
    "no counting, no category supervision": (LOSS | LANGUAGE | INSTANCES, UNSUPERVISED),
    "the same, open gates": (LOSS | LANGUAGE | INSTANCES | {"language_gate": "open"}, UNSUPERVISED),
    "instance branch, neither language mask nor soft minimap": (LOSS | INSTANCES, {}),
}
SCORES = {"gIoU": 2, "cIoU": 2, "N_acc": 3, "T_acc": 3, "grec/F1_score": 3}  # and their decimals


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dataset", help="built data set folder")
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    options, added = parser.parse_known_args()
    torch.set_num_threads(1)  # this process calibrates while others train
    common = {**read_recipe(RECIPE), "max_train_steps": options.steps, "eval_steps": options.steps}
    later = {*LOSS, *INSTANCES, "merge_instances"}
    model = {name: value for name, value in common["model"].items() if name not in later}
    recipes = {row: {**common, **flags, "model": {**model, **fields}} for row, (fields, flags) in ROWS.items()}
    runs = [(name, seed) for seed in options.seeds for name in options.rows]
    folders = {(name, seed): options.out / f"{list(ROWS).index(name)}-seed{seed}" for name, seed in runs}
    run_all(
        [
            partial(run, recipes[name], ["--seed", seed, *added], folder, options.dataset)
            for (name, seed), folder in folders.items()
        ],
        options.jobs,
    )
    print(table_head("row"))
    for name in options.rows:
        measured = [answers(folders[name, seed], options.dataset) for seed in options.seeds]
        for kind in measured[0]:
            print(table_row(name + kind, [scores[kind] for scores in measured]))


def run_all(runs: list[Callable[[], None]], jobs: int) -> None:
    """Call all `runs`, `jobs` at a time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one) for one in runs]
    for future in waiting:
        future.result()


def run(recipe: dict[str, object], flags: list[object], out: Path, dataset: str) -> None:
    """Train a row; if it has instances, measure it again with the answers of regions and instances merged."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(out, [out / "recipe.yaml", *flags, "--report_to", "none", "--resume_from_checkpoint", "latest"], dataset)
    if "num_instance_queries" in recipe["model"]:
        together = out / "together"
        shutil.copytree(out / "checkpoint", together / "model", dirs_exist_ok=True)
        config = json.loads((together / "model" / "config.json").read_text())
        (together / "model" / "config.json").write_text(json.dumps({**config, "merge_instances": True}))
        train(together, ["--eval_only", "--checkpoint", together / "model", "--report_to", "none"], dataset)


def answers(out: Path, dataset: str) -> dict[str, dict[str, float]]:
    """Scores of a trained row, by how its answers are made."""
    scores = {"": scores_of(out)}
    if (out / "together").exists():
        scores[", answered together"] = scores_of(out / "together")
        scores[", answered together, calibrated"] = calibrated(out / "together", dataset)
    return scores


def train(out: Path, flags: list[object], dataset: str) -> None:
    """Run train.py into `out`, unless its metrics.json exists."""
    if (out / "metrics.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "train.py", *flags, "--dataset", dataset, "--output_dir", out]
    with open(out / "log.txt", "w") as log:
        subprocess.run(
            list(map(str, command)), cwd=ROOT, check=True, stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def scores_of(out: Path) -> dict[str, float]:
    metrics = json.loads((out / "metrics.json").read_text())
    return {**metrics["gres"], "grec/F1_score": metrics.get("grec", {}).get("F1_score", float("nan"))}


def calibrated(out: Path, dataset: str) -> dict[str, float]:
    """GRES scores on `val` with the no-target threshold that is best on `testA`; GREC has no such threshold."""
    path = out / "calibrated.json"
    if not path.exists():
        measured = {}
        for split in ("testA", "val"):
            config = TrainConfig(
                dataset=dataset, split=split, checkpoint=str(out / "model"), eval_only=True, report_to="none",
                output_dir=str(out), per_device_train_batch_size=32,
            )  # fmt: skip
            measured[split] = Run(config).measure().gres
        path.write_text(json.dumps(measured["val"].compute(threshold=measured["testA"].choose_threshold())))
    return {**json.loads(path.read_text()), "grec/F1_score": float("nan")}


def table_head(first: str) -> str:
    """The head of a table of `SCORES`, with the name of its first column."""
    return f"| {first} | {' | '.join(SCORES)} |\n|---{'|---' * len(SCORES)}|"


def table_row(name: str, seeds: list[dict[str, float]]) -> str:
    """Mean and range over the seeds."""
    cells = []
    for score, digits in SCORES.items():
        values = [scores[score] for scores in seeds]
        mean, low, high = sum(values) / len(values), min(values), max(values)
        cells.append("" if mean != mean else f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})")
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

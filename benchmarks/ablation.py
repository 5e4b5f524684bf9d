"""What each part of the unified recipe brings: `python -m benchmarks.ablation DATASET OUT --steps 800 --jobs 2`.

Every row adds one part to the one above, is trained for the same steps with several seeds by train.py, and is measured
on `val`. Rows that change answers alone ("answered together", "calibrated") are measured anew, not trained. A row that
has its metrics.json is not run again, so an interrupted table goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from grefcoco_data.recipe import read_recipe
from train import Run, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "unified.yaml"
PUBLISHED = {
    "mask_loss": "ce", "auxiliary_loss": False, "soft_minimap": False, "region_language_mask": False,
    "region_language_weight": 0.1, "class_weights": [0.9, 1.1], "minimap_loss_weight": 0.1,
    "no_target_loss_weight": 0.1, "loss_scale": 5.0, "num_instance_queries": 0, "merge_instances": False,
    "count_loss_weight": 0.0,
}  # fmt: skip
EQUAL_WEIGHTS = {"no_target_loss_weight": 1.0, "loss_scale": 1.0, "class_weights": [1.0, 0.7]}
REGIONS = {
    "region_language_mask": True,
    "region_language_weight": 1.0,
    "soft_minimap": True,
    "minimap_loss_weight": 1.0,
}
HARD_NEGATIVES = {"augmentation": {"hard_negatives": 0.15}}
NO_CATEGORIES = {"category_supervision": False}
# name: (fields of the model, flags of the run) that it adds to the row above
ADDED = {
    "published loss": ({}, {"augmentation": {}}),
    "+ dice, auxiliary losses, equal weights": (
        {"mask_loss": "bce_dice", "auxiliary_loss": True, **EQUAL_WEIGHTS},
        {},
    ),
    "+ language mask, soft minimap": (REGIONS, {}),
    "+ instance branch": ({"num_instance_queries": 16}, {}),
    "+ hard negatives": ({}, HARD_NEGATIVES),
    "+ counting": ({"count_loss_weight": 0.1}, {}),
    "no counting, no category supervision": ({"count_loss_weight": 0.0}, NO_CATEGORIES),
    "the same, open gates": ({"language_gate": "open"}, {}),
}
SCORES = {"gIoU": 2, "cIoU": 2, "N_acc": 3, "T_acc": 3, "grec/F1_score": 3}  # and their decimals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("dataset", help="built data set folder")
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--rows", nargs="+", default=list(ADDED), choices=list(ADDED), metavar="ROW")
    options = parser.parse_args()
    recipes, model, flags = {}, {**read_recipe(RECIPE)["model"], **PUBLISHED}, read_recipe(RECIPE)
    for name, (fields, changes) in ADDED.items():
        model, flags = {**model, **fields}, {**flags, **changes}
        recipes[name] = {**flags, "model": model, "max_train_steps": options.steps, "eval_steps": options.steps}
    runs = [(name, seed) for seed in options.seeds for name in options.rows]
    folders = {(name, seed): options.out / f"{list(ADDED).index(name)}-seed{seed}" for name, seed in runs}
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [
            pool.submit(run, recipes[name], seed, folder, options.dataset) for (name, seed), folder in folders.items()
        ]
    for finished in waiting:
        finished.result()
    print("| row | " + " | ".join(SCORES) + " |\n|---" + "|---" * len(SCORES) + "|")
    for name in options.rows:
        measured = [answers(folders[name, seed], options.dataset) for seed in options.seeds]
        for kind in measured[0]:
            print(table_row(name + kind, [scores[kind] for scores in measured]))


def run(recipe: dict[str, object], seed: int, out: Path, dataset: str) -> None:
    """Train a row; where it has instances, measure it a second time with regions and instances answering together."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--seed", seed, "--report_to", "none", "--resume_from_checkpoint", "latest"]
    train(out, [out / "recipe.yaml", *flags], dataset)
    if recipe["model"]["num_instance_queries"]:
        together = out / "together"
        shutil.copytree(out / "checkpoint", together / "model", dirs_exist_ok=True)
        config = json.loads((together / "model" / "config.json").read_text())
        (together / "model" / "config.json").write_text(json.dumps({**config, "merge_instances": True}))
        train(together, ["--eval_only", "--checkpoint", together / "model", "--report_to", "none"], dataset)


def answers(out: Path, dataset: str) -> dict[str, dict[str, float]]:
    """Scores of a trained row, by what was done to its answers."""
    scores = {"": scores_of(out)}
    if (out / "together").exists():
        scores[", answered together"] = scores_of(out / "together")
        scores[", answered together, calibrated"] = calibrated(out / "together", dataset)
    return scores


def train(out: Path, flags: list[object], dataset: str) -> None:
    """train.py into `out`, unless it has been there."""
    if (out / "metrics.json").exists():
        return
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
    """GRES scores on `val` with the no-target threshold that is best on `testA`; GREC knows no such threshold."""
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

"""A pretrained text encoder against the demo's small one, on sentences in words of the training and in other words.

    python demo/scenes.py data/scenes-words --level full --train 4000 --val 150 --testB 150 --paraphrase testB
    python grefcoco.py build --annotations data/scenes-words --images data/scenes-words/train2014 --out data/words
    python -m benchmarks.readers data/words OUT --reader FOLDER --steps 700

Both train with the demo's recipe on the same batches; the pretrained encoder is frozen. Unknown flags are passed to
train.py. A run with a metrics.json is not repeated.
"""

import argparse
from functools import partial
from pathlib import Path

import yaml

from benchmarks.ablation import RECIPE, run_all, scores_of, table_head, table_row, train
from grefcoco_data.arguments import ArgumentParser
from training.config import read_recipe

SPLITS = {"val": "words of the training", "testB": "other words"}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="built data set folder whose testB is paraphrased")
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--reader", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    options, added = parser.parse_known_args()
    small = {**read_recipe(RECIPE), "max_train_steps": options.steps, "eval_steps": options.steps}
    model = {name: value for name, value in small["model"].items() if name != "text_config"}
    pretrained = {**small, "model": model, "tokenizer": options.reader, "frozen": ["text_encoder"]}
    runs = {
        (name, seed): (recipe, options.out / f"{name}-seed{seed}")
        for seed in options.seeds
        for name, recipe in (("small", small), ("pretrained", pretrained))
    }
    run_all(
        [
            partial(run, recipe, ["--seed", seed, *added], folder, options.dataset)
            for (_, seed), (recipe, folder) in runs.items()
        ],
        options.jobs,
    )
    print(table_head("text encoder, sentences"))
    for name in ("small", "pretrained"):
        for split, words in SPLITS.items():
            scores = [scores_of(folder / split) for (row, _), (_, folder) in runs.items() if row == name]
            print(table_row(f"{name}, {words}", scores))


def run(recipe: dict[str, object], flags: list[object], out: Path, dataset: str) -> None:
    """Train a reader's model and measure it on both splits."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    common = ["--report_to", "none"]
    train(out / "val", [out / "recipe.yaml", *flags, *common, "--resume_from_checkpoint", "latest"], dataset)
    checkpoint = ["--checkpoint", out / "val" / "checkpoint"]
    train(out / "testB", ["--eval_only", *checkpoint, "--split", "testB", *common], dataset)


if __name__ == "__main__":
    main()

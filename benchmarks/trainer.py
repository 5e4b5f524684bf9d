"""A recipe's training by transformers' Trainer instead of train.py: `python -m benchmarks.trainer RECIPE DATASET OUT`.

The same new model, batches, learning rates and losses, measured by the same accumulators; the scores are printed as
JSON. Streams, augmentation and weight averages are not supported here.
"""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import grefcoco
from grefcoco_data.arguments import ArgumentParser
from grefcoco_data.loading import category_ids
from scoring.measurement import GREC, GRES
from training.augmentation import Augmentation
from training.config import TrainConfig, read_recipe
from training.families import FAMILIES, new_model
from training.sampling import SentenceBatchSampler, TrainRows, vision_only
from training.schedule import rate_factor


class SceneTrainer(Trainer):
    """Trainer whose batches hold several sentences of each image."""

    def __init__(self, sentences_per_image: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.sentences_per_image = sentences_per_image

    def get_train_dataloader(self) -> DataLoader:
        images = np.asarray(self.train_dataset.with_format(None)["image_id"])
        size, seed = self.args.train_batch_size, self.args.seed
        sampler = SentenceBatchSampler(images, size, self.sentences_per_image, seed, rank=0, world_size=1)
        rows = TrainRows(self.train_dataset, Augmentation(), seed)
        return DataLoader(rows, batch_sampler=sampler, collate_fn=self.data_collator)


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("dataset", help="built data set folder or Hub id")
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = TrainConfig(**read_recipe(options.recipe) | {"dataset": options.dataset, "seed": options.seed})
    set_seed(options.seed)
    started = time.perf_counter()
    model, trainer = fit(config, options.out)
    seconds = time.perf_counter() - started
    scores = trainer.evaluate()
    model.save_pretrained(options.out)
    trainer.processing_class.save_pretrained(options.out)
    print(json.dumps({"minutes": round(seconds / 60, 1), **scores}))


def fit(config: TrainConfig, out: Path) -> tuple[PreTrainedModel, Trainer]:
    """Train as the recipe says; its category warm-up becomes a training of its own before the other."""
    categories = category_ids(config.dataset, ["train", config.split])
    supervised = categories if config.category_supervision else ()
    stream = partial(grefcoco.load, config.dataset, split="train", columns=["sentence"], streaming=True)
    model, processor = new_model(config, lambda: (row["sentence"] for row in stream()), supervised)
    columns = [*processor.columns(training=True, config=model.config), "boxes", "objects"]
    columns = list(dict.fromkeys(columns))
    rows, val = (grefcoco.load(config.dataset, split=split, columns=columns) for split in ("train", config.split))
    collator = processor.collator(model.config, config.text_column, supervised, True, share_images=True)
    metrics = processor.trainer_metrics(GRES, GREC)
    warm_up = config.category_warmup_steps
    phases = [(0, warm_up, 1, lambda rows: vision_only(collator(rows)))] if warm_up else []
    phases.append((warm_up, config.max_train_steps - warm_up, config.sentences_per_image, collator))
    parameter_groups = FAMILIES[model.config.model_type].training.parameter_groups
    for first, steps, sentences_per_image, collate in phases:
        groups = parameter_groups(model, config.learning_rate, config.weight_decay, config.tower_learning_rates)
        optimizer = torch.optim.AdamW(groups, fused=True)
        rates = [partial(rate, config, group.get("schedule", config.lr_scheduler_type), first) for group in groups]
        trainer = SceneTrainer(
            sentences_per_image,
            model=model,
            args=TrainingArguments(
                str(out), max_steps=steps, per_device_train_batch_size=config.per_device_train_batch_size,
                per_device_eval_batch_size=config.per_device_train_batch_size, max_grad_norm=config.max_grad_norm,
                seed=config.seed, remove_unused_columns=False, label_names=["labels"], batch_eval_metrics=True,
                report_to=[], save_strategy="no", logging_steps=50,
            ),
            train_dataset=rows, eval_dataset=val, data_collator=collate, processing_class=processor,
            compute_metrics=metrics, preprocess_logits_for_metrics=metrics.reduce,
            optimizers=(optimizer, LambdaLR(optimizer, rates)),
        )  # fmt: skip
        trainer.train()
    return model, trainer


def rate(config: TrainConfig, schedule: str, first: int, step: int) -> float:
    """Factor of the learning rate at `step` of a phase that begins at step `first` of the recipe."""
    restart, rise = config.category_warmup_steps, config.lr_warmup_steps
    return rate_factor(schedule, first + step, config.max_train_steps, rise, config.lr_decay_steps, restart)


if __name__ == "__main__":
    main()

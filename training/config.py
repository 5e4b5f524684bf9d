"""The flags of train.py, which are also the keys of a YAML recipe."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import HfArgumentParser

from grefcoco_data.arguments import one_line
from training.augmentation import Augmentation

# mappings in a recipe, JSON when typed; declared as str, the only type that the argument parser reads
MAPPINGS = ("model", "augmentation", "tower_learning_rates")


def option(default: object, help: str) -> dataclasses.Field:
    """A dataclass field with its help text."""
    factory = {"default_factory": lambda: default} if isinstance(default, (dict, list)) else {"default": default}
    return field(metadata={"help": help}, **factory)


@dataclass
class TrainConfig:
    """The configuration of a run. Names follow the Hugging Face example scripts; mappings are JSON when typed."""

    # data
    dataset: str = option("", "built data set folder or Hub id, as grefcoco.load takes it")
    split: str = option("val", "split that is measured, during training and at the end")
    streaming: bool = option(False, "read the training images in stored order from disk or Hub, shuffled in blocks")
    text_column: str = option("sentence", "column with the words: sentence, or raw as published")
    sentences_per_image: int = option(1, "sentences of an image that stay together in a batch, to decode it once")
    augmentation: str = option({}, "fields of Augmentation: hard_negatives, flip, colour, scale, each 0 to 1")
    dataloader_num_workers: int = option(0, "processes that read and prepare samples")
    # model
    checkpoint: str | None = option(None, "model folder or Hub id to start from or to evaluate")
    trust_remote_code: bool = option(False, "run the checkpoint's own Python files where this project has no class")
    model: str = option({}, "fields of a new model's configuration; model_type names its family, rela by default")
    tokenizer: str | None = option(
        None,
        "text encoder, a folder or Hub id, for tokeniser and weights; VLT: a file of word vectors; default: its own",
    )
    backbone: str | None = option(
        None,
        "weights the vision trunk starts from: a file, a folder or a Hub id; any AutoBackbone for backbone: auto",
    )
    image_size: int = option(
        480, "side in pixels of the square that images are squashed to; for MDETR the shorter side"
    )
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    torch_compile: bool = option(False, "compile the model's forward with torch.compile")
    # optimisation
    max_train_steps: int = option(150_000, "optimiser steps")
    per_device_train_batch_size: int = option(48, "sentences a step on each process, before accumulation")
    gradient_accumulation_steps: int = option(1, "batches summed before an optimiser step")
    learning_rate: float = option(1e-5, "AdamW learning rate at its peak")
    tower_learning_rates: str = option({}, "other peaks, by the beginning of the parameters' names")
    weight_decay: float = option(0.05, "AdamW decay; norms and embeddings of ReLA are not decayed")
    frozen: list[str] = option([], "beginnings of the names of parameters that are not trained")
    max_grad_norm: float = option(0.01, "gradients are clipped to this norm over the whole model")
    lr_scheduler_type: str = option("step", "constant, cosine, or step (x 0.1 at each of lr_decay_steps)")
    lr_decay_steps: list[int] = option([110_000, 140_000], "steps of the decays of the step schedule")
    lr_warmup_steps: int = option(0, "steps of linear warm-up, at the start and again after the category warm-up")
    category_supervision: bool = option(False, "also train the vision trunk on the category of every annotated pixel")
    category_warmup_steps: int = option(0, "first steps that train the vision trunk alone, on categories and objects")
    mixed_precision: str = option("no", "no, fp16 or bf16; with the last two, fp32 matrix products use TF32 on a GPU")
    ema_decay: float = option(0.0, "average the weights with this decay (EMA), measure and save the average")
    # run
    output_dir: str = option("runs/train", "folder that the run writes")
    seed: int = option(0, "seed of everything random")
    eval_only: bool = option(False, "measure --checkpoint on --split and stop")
    eval_steps: int = option(5000, "steps between measurements")
    checkpointing_steps: int = option(5000, "steps between checkpoints to resume from")
    checkpoints_total_limit: int = option(2, "newest checkpoints that are kept")
    metric_for_best_model: str | None = option(None, "score of the model under best/, e.g. gIoU or grec/F1_score")
    resume_from_checkpoint: str | None = option(None, "latest, or a folder under output_dir/checkpoints")
    report_to: str = option("tensorboard", "tracker: tensorboard, wandb or none")
    push_to_hub: bool = option(False, "upload the model with its card and report at the end")
    hub_model_id: str | None = option(None, "Hub repository, by default named as output_dir")
    hub_strategy: str = option("end", "when to upload: end, or checkpoint (also after every checkpoint)")

    def __post_init__(self) -> None:
        for name in MAPPINGS:
            if isinstance(getattr(self, name), str):
                setattr(self, name, _json_mapping(name, getattr(self, name)))
        choices = {
            "lr_scheduler_type": ("constant", "cosine", "step"),
            "mixed_precision": ("no", "fp16", "bf16"),
            "text_column": ("sentence", "raw"),
            "hub_strategy": ("end", "checkpoint"),
            "report_to": ("tensorboard", "wandb", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        tracker = self.report_to
        if tracker != "none" and find_spec(tracker) is None:
            raise ValueError(
                f"report_to is {tracker!r}, which is not installed: `pip install {tracker}`, or choose none"
            )
        positive = ("max_train_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "image_size")
        positive += ("eval_steps", "checkpointing_steps", "checkpoints_total_limit", "sentences_per_image")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and less than 1")
        if unknown := set(self.augmentation) - {f.name for f in dataclasses.fields(Augmentation)}:
            known = ", ".join(f.name for f in dataclasses.fields(Augmentation))
            raise ValueError(f"augmentation: {sorted(unknown)[0]!r} is none of {known}")
        if not self.dataset:
            raise ValueError("no data set given; name a built folder or a Hub id with --dataset")
        if self.eval_only and not self.checkpoint:
            raise ValueError("--eval_only needs the model to measure; name it with --checkpoint")


def _unknown(name: str, message: str) -> str:
    """`message` with the name that does not exist, and the nearest that does."""
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(known)}"
    return f"{message.format(name)}; {hint}"


def _json_mapping(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, which is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f'{name} is {text!r}; it must be a mapping, such as {{"flip": 0.5}}')
    return value


def parse_config(argv: list[str]) -> TrainConfig:
    """Read `[recipe.yaml] [--flag value ...]`; raises ValueError on an unknown key or a wrong value."""
    parser = HfArgumentParser(
        TrainConfig,
        usage="train.py [recipe.yaml] [--flag value ...]",
        description="Train and evaluate with Accelerate.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="YAML file of flags, the first argument; typed flags win")
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_recipe(Path(argv[0])))
        argv = argv[1:]
    config, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(_unknown(unknown[0].split("=")[0].lstrip("-"), "unknown flag --{}"))
    if rest.recipe is not None:
        raise ValueError(f"{rest.recipe}: the recipe must be the first argument")
    return config


def check_dataset(dataset: str) -> None:
    """Raise ValueError at once for a name that is neither a folder nor a data set on the Hub."""
    if Path(dataset).exists() or HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(dataset, timeout=10)
    except Exception as error:  # the HTTP errors of huggingface_hub change their base class with its version
        raise ValueError(
            f"--dataset {dataset}: there is no such folder, and the Hub does not give it "
            f"({one_line(error)}); build a folder, or set HF_HUB_OFFLINE=1 to use a copy in the cache"
        ) from error


def read_recipe(path: Path) -> dict[str, object]:
    """The mapping in a YAML recipe; raises ValueError when it is none or holds a key that is not a flag."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read this recipe ({one_line(error)})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of flags to values, this is {type(recipe).__name__}")
    known = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key in recipe:
        if key not in known:
            raise ValueError(_unknown(str(key), f"{path}: unknown key {{!r}}"))
        if key in MAPPINGS and not isinstance(recipe[key], dict):
            raise ValueError(f"{path}: {key} is {recipe[key]!r}; it must be a mapping")
    return recipe

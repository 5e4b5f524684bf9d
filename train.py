"""Train and evaluate a model for generalised referring expressions with Accelerate.

    accelerate launch train.py recipes/rela_swin_base.yaml --dataset data/grefcoco --output_dir runs/rela
    python train.py recipes/demo.yaml --dataset data/easy --output_dir runs/demo
    python train.py --eval_only --checkpoint runs/demo/checkpoint --dataset data/easy --split testA

A recipe is a YAML file whose keys are the flags below; flags typed after it win. A run leaves in `output_dir`:
`report.md`, `metrics.json`, `predictions.png`, `learning_curve.png` and the model under `checkpoint/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import evaluate
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, gather_object, send_to_device, set_seed
from datasets import Dataset
from pyarrow import compute
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, AutoTokenizer, BertTokenizer, HfArgumentParser

import grefcoco
from grefcoco_data import report
from modeling.configuration_rela import RelaConfig
from modeling.image_processing_rela import RelaImageProcessor
from modeling.modeling_rela import RelaModel
from modeling.pretrained_rela import load_backbone, load_text_encoder
from modeling.processing_rela import RelaCollator, RelaProcessor, decode_mask

ROOT = Path(__file__).resolve().parent
COLUMNS = ["image", "image_id", "width", "height", "sent_id", "sentence", "raw", "no_target", "ann_ids", "mask"]
GresAccumulator = evaluate.load(str(ROOT / "evaluate" / "gres")).accumulator
LOGGING_STEPS = 50  # steps between records of the loss
logger = get_logger(__name__)


def option(default: object, help: str) -> dataclasses.Field:
    """A dataclass field with its help text."""
    factory = {"default_factory": lambda: default} if isinstance(default, (dict, list)) else {"default": default}
    return field(metadata={"help": help}, **factory)


@dataclass
class TrainConfig:
    """Everything a run depends on. Names follow the Hugging Face example scripts."""

    # data
    dataset: str = option("", "built data set folder or Hub id, as grefcoco.load takes it")
    split: str = option("val", "split that is measured, during training and at the end")
    text_column: str = option("sentence", "column with the words: sentence, or raw as published")
    sentences_per_image: int = option(1, "sentences of one image that stay together in a batch and share its decoding")
    dataloader_num_workers: int = option(0, "processes that read and prepare samples")
    # model
    checkpoint: str | None = option(None, "model folder or Hub id to start from or to evaluate")
    model: str | dict = option({}, "fields of a new RelaConfig (a mapping in a recipe, JSON on the command line)")
    tokenizer: str | None = option(
        None, "BERT folder or Hub id for tokeniser and text weights; unset trains a small one"
    )
    backbone: str | None = option(None, "weights the vision trunk starts from: a file, a folder or a Hub id")
    image_size: int = option(480, "side in pixels of the square that images are squashed to")
    # optimisation
    max_train_steps: int = option(150_000, "optimiser steps")
    per_device_train_batch_size: int = option(48, "sentences a step on each process, before accumulation")
    gradient_accumulation_steps: int = option(1, "batches summed before an optimiser step")
    learning_rate: float = option(1e-5, "AdamW learning rate at its peak")
    weight_decay: float = option(0.05, "AdamW decay of matrices; norms, biases and embeddings are not decayed")
    frozen: list[str] = option([], "beginnings of the names of parameters that are not trained")
    max_grad_norm: float = option(0.01, "gradients are clipped to this norm over the whole model")
    lr_scheduler_type: str = option("step", "constant, cosine, or step (x 0.1 at each of lr_decay_steps)")
    lr_decay_steps: list[int] = option([110_000, 140_000], "steps of the decays of the step schedule")
    lr_warmup_steps: int = option(0, "steps of linear warm-up, at the start and again after the category warm-up")
    category_supervision: bool = option(False, "teach the vision trunk the category of every annotated pixel as well")
    category_warmup_steps: int = option(0, "first steps that train the vision trunk alone to name categories")
    mixed_precision: str = option("no", "no, fp16 or bf16")
    # run
    output_dir: str = option("runs/train", "folder that the run writes")
    seed: int = option(0, "seed of everything random")
    eval_only: bool = option(False, "measure --checkpoint on --split and stop")
    eval_steps: int = option(5000, "steps between measurements")
    checkpointing_steps: int = option(5000, "steps between checkpoints to resume from")
    checkpoints_total_limit: int = option(2, "newest checkpoints that are kept")
    resume_from_checkpoint: str | None = option(None, "latest, or a folder under output_dir/checkpoints")
    report_to: str = option("tensorboard", "tracker: tensorboard, wandb or none")

    def __post_init__(self) -> None:
        if isinstance(self.model, str):
            self.model = json.loads(self.model)
        choices = {
            "lr_scheduler_type": ("constant", "cosine", "step"),
            "mixed_precision": ("no", "fp16", "bf16"),
            "text_column": ("sentence", "raw"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("max_train_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.dataset:
            raise ValueError("no data set given; name a built folder or a Hub id with --dataset")
        if self.eval_only and not self.checkpoint:
            raise ValueError("--eval_only needs the model to measure; name it with --checkpoint")


def parse_config(argv: list[str]) -> TrainConfig:
    """Read `[recipe.yaml] [--flag value ...]`; raises ValueError on an unknown key or a wrong value."""
    parser = HfArgumentParser(TrainConfig, description=__doc__.splitlines()[0])
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_recipe(Path(argv[0])))
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(argv)[0]


def read_recipe(path: Path) -> dict[str, object]:
    """The mapping in a YAML recipe; raises ValueError when it is none or holds a key that is not a flag."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read this recipe ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe is a mapping of flags to values, this is {type(recipe).__name__}")
    known = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key in recipe:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(known)}"
            raise ValueError(f"{path}: unknown key {key!r}{hint}")
    return recipe


class SentenceBatchSampler:
    """Endless batches of expression indices, a pure function of (seed, step): resuming is starting at another step.

    Each epoch is a fresh permutation; sentences of one image are cut into groups of `sentences_per_image` that stay
    together. Every process takes its own part of the same global batch. What does not fill the last batch of an
    epoch is left out of that epoch.
    """

    def __init__(
        self,
        image_ids: np.ndarray,
        batch_size: int,
        sentences_per_image: int,
        seed: int,
        rank: int,
        world_size: int,
        start: int = 0,
    ) -> None:
        self.groups = np.split(order := np.argsort(image_ids, kind="stable"), _changes(image_ids[order]))
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.sentences_per_image, self.seed, self.start = sentences_per_image, seed, start
        self.batches_per_epoch = len(image_ids) // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"a batch of {batch_size} x {world_size} processes is more than {len(image_ids)} sentences"
            )

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            epoch, position = divmod(step, self.batches_per_epoch)
            for batch in self._epoch(epoch)[position:]:
                yield batch.tolist()
                step += 1

    def _epoch(self, epoch: int) -> np.ndarray:  # (batches, batch_size) of this process
        random = np.random.default_rng((self.seed, epoch))
        size = self.sentences_per_image
        mixed = [random.permutation(group) for group in self.groups]
        pieces = [group[i : i + size] for group in mixed for i in range(0, len(group), size)]
        order = np.concatenate([pieces[i] for i in random.permutation(len(pieces))])
        whole = self.batches_per_epoch * self.batch_size * self.world_size
        return order[:whole].reshape(self.batches_per_epoch, self.world_size, self.batch_size)[:, self.rank]


def category_ids(dataset: str, splits: list[str]) -> list[int]:
    """All category ids that objects of these splits have, ascending."""
    found: set[int] = set()
    for split in splits:
        objects = grefcoco.load(dataset, split=split, layout="image", columns=["objects"]).with_format("arrow")[:]
        ids = compute.struct_field(compute.list_flatten(objects["objects"]), "category_id")
        found.update(compute.unique(ids).to_pylist())
    return sorted(found)


def _changes(values: np.ndarray) -> np.ndarray:
    """Positions at which a sorted array takes a new value."""
    return np.flatnonzero(np.diff(values)) + 1


def load_model(
    config: TrainConfig, train_rows: Dataset | None, num_categories: int
) -> tuple[RelaModel, RelaProcessor]:
    """The model and processor to train or measure: from `checkpoint`, or new from the recipe's `model` fields."""
    if config.checkpoint:
        model = AutoModel.from_pretrained(config.checkpoint, trust_remote_code=True)
        return model, AutoProcessor.from_pretrained(config.checkpoint, trust_remote_code=True)
    fields = {"num_categories": num_categories if config.category_supervision else 0, **config.model}
    if config.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    else:
        tokenizer = word_tokenizer(train_rows.with_format(None)["sentence"])
        fields["text_config"] = {**fields.get("text_config", {}), "vocab_size": len(tokenizer)}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(RelaConfig)})
    if unknown:
        raise ValueError(f"model: {unknown[0]!r} is not a field of RelaConfig")
    model = RelaModel(RelaConfig(**fields))
    if config.tokenizer:
        load_text_encoder(model, config.tokenizer)
    if config.backbone:
        load_backbone(model, config.backbone)
    image_processor = RelaImageProcessor(size={"height": config.image_size, "width": config.image_size})
    return model, RelaProcessor(image_processor, tokenizer)


def word_tokenizer(sentences: Iterable[str], max_words: int = 4000) -> BertTokenizer:
    """A BERT tokeniser of the most frequent words, with single characters for all others.

    (The WordPiece trainer of `tokenizers` gives another vocabulary at every run.)
    """
    rules = BertTokenizer().backend_tokenizer
    words = Counter()
    for sentence in sentences:
        pieces = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(sentence))
        words.update(word for word, _ in pieces)
    characters = sorted(set("".join(words)))
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))[:max_words]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *("##" + character for character in characters), *frequent]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices with decay; vectors (norms, biases), embeddings and position tables without (ReLA's train_net.py)."""
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            table = parameter.ndim < 2 or "embed" in name.rsplit(".", 1)[0] or "position_bias_table" in name
            (kept if table else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of `step`, a pure function, so that nothing of the schedule has to be saved."""
    since_phase_began = step - config.category_warmup_steps if step >= config.category_warmup_steps else step
    rate = config.learning_rate * min(1.0, (since_phase_began + 1) / max(1, config.lr_warmup_steps))
    if config.lr_scheduler_type == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / config.max_train_steps))
    if config.lr_scheduler_type == "step":
        return rate * 0.1 ** sum(step >= decay for decay in config.lr_decay_steps)
    return rate


@dataclass
class Progress:
    """Where a run stands: optimiser steps done, seconds spent, and the records that draw its curve."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Run:
    """One run: its configuration, data, model, and the folder it fills."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.output_dir = config, Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
            cpu=not torch.accelerator.is_available(),  # said aloud, or processes on CPUs do not find each other
            # a closed language gate and the category warm-up leave parameters without gradient
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        set_seed(config.seed)
        self.progress, self.stop_signal = Progress(), None
        self.rows = grefcoco.load(config.dataset, split=config.split, columns=[*COLUMNS, "objects"])
        self.train_rows = (
            None if config.eval_only else grefcoco.load(config.dataset, split="train", columns=[*COLUMNS, "objects"])
        )
        categories = category_ids(config.dataset, [config.split] if config.eval_only else ["train", config.split])
        self.model, self.processor = load_model(config, self.train_rows, len(categories))
        self.collator = RelaCollator(self.processor, categories, config.text_column)
        if config.eval_only:
            self.model = self.accelerator.prepare(self.model)
        else:
            self._prepare_training()

    def _prepare_training(self) -> None:
        config = self.config
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(config.frozen)))
        groups = parameter_groups(self.model, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if config.resume_from_checkpoint:
            self.resume(config.resume_from_checkpoint)
        self.accelerator.init_trackers("tracker", config=_scalars(dataclasses.asdict(config)))

    def train(self) -> None:
        """Train from `progress.step` to `max_train_steps`, measuring, recording and saving along the way."""
        config, progress = self.config, self.progress
        batches = self.batches(progress.step * config.gradient_accumulation_steps)
        bar = tqdm(
            total=config.max_train_steps,
            initial=progress.step,
            desc="train",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        started, losses = time.perf_counter() - progress.seconds, []
        while progress.step < config.max_train_steps and self.stop_signal is None:
            losses.append(self.train_step(batches))
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            bar.update()
            if progress.step % LOGGING_STEPS == 0 or progress.step == config.max_train_steps:
                loss = torch.stack(losses).mean().item()
                losses.clear()
                bar.set_postfix(loss=f"{loss:.3f}")
                self.record({"loss": loss, "learning_rate": learning_rate(config, progress.step - 1)})
            if progress.step % config.eval_steps == 0 and progress.step < config.max_train_steps:
                self.record(self.measure()["model"].compute())
            if progress.step % config.checkpointing_steps == 0 and progress.step < config.max_train_steps:
                self.save_checkpoint()
        bar.close()

    def batches(self, start: int) -> Iterator[dict[str, object]]:
        """This process's batches from batch `start` on; those of the category warm-up hold one sentence an image."""
        config = self.config
        warm_up = config.category_warmup_steps * config.gradient_accumulation_steps
        if start < warm_up:
            yield from islice(self._loader(1, start), warm_up - start)
        yield from self._loader(config.sentences_per_image, max(0, start - warm_up))

    def _loader(self, sentences_per_image: int, start: int) -> DataLoader:
        sampler = SentenceBatchSampler(
            np.asarray(self.train_rows.with_format(None)["image_id"]),
            self.config.per_device_train_batch_size,
            sentences_per_image,
            self.config.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            start,
        )
        supervised = self.config.category_supervision
        return DataLoader(
            self.train_rows if supervised else self.train_rows.remove_columns("objects"),
            batch_sampler=sampler,
            collate_fn=self.collator if supervised else RelaCollator(self.processor, (), self.config.text_column),
            num_workers=self.config.dataloader_num_workers,
        )

    def train_step(self, batches: Iterator[dict[str, object]]) -> torch.Tensor:
        """One optimiser step; returns its mean loss. Its random numbers depend on (seed, step, process) alone."""
        config, step = self.config, self.progress.step
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        losses = []
        for part in range(config.gradient_accumulation_steps):
            batch = send_to_device(next(batches), self.accelerator.device)
            torch.manual_seed(hash((config.seed, step, part, self.accelerator.process_index)) & 0x7FFFFFFF)
            with self.accelerator.accumulate(self.model):
                loss = self.model(**(vision_only(batch) if step < config.category_warmup_steps else batch)).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: let the step in progress end, then save and stop."""
        self.stop_signal = number

    def record(self, values: dict[str, float]) -> None:
        """Put `values` into the history and the tracker at the present step."""
        step = self.progress.step
        self.progress.history.append({"step": step, **values})
        self.accelerator.log(_scalars(values), step=step)

    def save_checkpoint(self) -> None:
        """Save everything a resume needs under checkpoints/step-N: written aside, sealed with hashes, then renamed."""
        folder = self.output_dir / "checkpoints"
        temporary = folder / ".writing"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (temporary / "progress.json").write_text(json.dumps(dataclasses.asdict(self.progress)))
            seal(temporary)
            final = folder / f"step-{self.progress.step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            flush(folder)
            for old in sorted(folder.glob("step-*"))[: -self.config.checkpoints_total_limit]:
                shutil.rmtree(old)

    def resume(self, choice: str) -> None:
        """Load a checkpoint folder, or with `latest` the newest whole one; a broken newer one is passed over."""
        folder = self.output_dir / "checkpoints"
        found = sorted(folder.glob("step-*"), reverse=True) if choice == "latest" else [Path(choice)]
        for checkpoint in found:
            broken = broken_seal(checkpoint)
            if broken is None:
                self.accelerator.load_state(str(checkpoint))
                self.progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
                logger.info("resumed from %s", checkpoint)
                return
            if choice != "latest":
                raise ValueError(f"{checkpoint}: {broken}; choose another checkpoint, or latest")
            logger.warning("%s: %s; trying the one before", checkpoint, broken)

    @torch.inference_mode()
    def measure(self) -> dict[str, GresAccumulator]:
        """What the model, and an answer of every object, get on the rows of `split`, at the processed size.

        Every process measures its own batches; what is kept and gathered is a few numbers per sentence.
        """
        self.model.eval()
        size = self.config.per_device_train_batch_size
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        batches = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        loader = DataLoader(
            self.rows, batch_sampler=batches, collate_fn=self.collator, num_workers=self.config.dataloader_num_workers
        )
        index = self.rows.with_format(None)
        ids, counts = np.asarray(index["sent_id"]), np.array([len(ids) for ids in index["ann_ids"]])
        words = np.array([len(sentence.split()) for sentence in index["sentence"]])
        model, everything = GresAccumulator(), GresAccumulator()
        bar = tqdm(loader, desc="measure", leave=False, disable=not self.accelerator.is_main_process)
        for indices, batch in zip(batches, bar):
            batch = send_to_device(batch, self.accelerator.device)
            labels = batch.pop("labels")
            outputs = self.model(**batch)
            truth = labels["masks"] > 0.5
            logits = torch.nn.functional.interpolate(outputs.pred_masks.float(), truth.shape[-2:], mode="bilinear")
            columns = {
                "sent_id": ids[indices],
                "num_targets": counts[indices],
                "num_words": words[indices],
                "no_target": labels["no_target"].cpu().numpy(),
            }
            scores = outputs.no_target_logits.float().softmax(-1)[:, 1].cpu().numpy()
            model.add_masks(logits[:, 1] > logits[:, 0], truth, no_target_score=scores, **columns)
            if "categories" in labels:
                objects = labels["categories"][batch["image_index"]] > 0
                everything.add_masks(objects, truth, no_target_score=np.zeros(len(truth)), **columns)
        found = {"model": model, "every object": everything}
        for accumulator in found.values():
            self._merge_processes(accumulator)
        return {name: accumulator for name, accumulator in found.items() if len(accumulator)}

    def _merge_processes(self, accumulator: GresAccumulator) -> None:
        for rank, state in enumerate(gather_object([accumulator.state()])):
            if rank != self.accelerator.process_index:
                accumulator.merge(state)

    def predict(self, rows: Dataset) -> list[report.Sample]:
        """Answers on a few rows at the images' own sizes, for the picture."""
        self.model.eval()
        rows = list(rows)
        batch = send_to_device(self.collator(rows), self.accelerator.device)
        batch.pop("labels")
        with torch.inference_mode():
            outputs = self.model(**batch)
        sizes = [(row["height"], row["width"]) for row in rows]
        answers = self.processor.post_process_referring_segmentation(outputs, target_sizes=sizes)
        return [
            report.Sample(
                image=row["image"],
                sentence=row["sentence"],
                truth=decode_mask(row["mask"]).astype(bool),
                prediction=answer["mask"].cpu().numpy(),
                no_target=row["no_target"],
                predicted_no_target=answer["no_target"],
                num_targets=len(row["ann_ids"]),
            )
            for row, answer in zip(rows, answers)
        ]

    def finish(self, measured: dict[str, GresAccumulator]) -> None:
        """Write the model under checkpoint/ (after training), metrics.json, the pictures and report.md."""
        if not self.accelerator.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if not self.config.eval_only:
            self.accelerator.unwrap_model(self.model).save_pretrained(self.output_dir / "checkpoint")
            self.processor.save_pretrained(self.output_dir / "checkpoint")
        expected = self.rows.with_format(None)["sent_id"]
        scores = {name: accumulator.compute(expected=expected) for name, accumulator in measured.items()}
        if not self.config.eval_only:
            self.record(scores["model"])
        summary = {
            "gres": scores["model"],
            "baselines": {"always empty": always_empty(scores.pop("model")), **scores},
            "breakdown": measured["model"].breakdown(),
            "train": self._training_summary(),
        }
        report.write_text(self.output_dir / "metrics.json", json.dumps(summary, indent=2) + "\n")
        samples = self.predict(pick_rows(self.rows, per_kind=6, seed=self.config.seed))
        report.draw_predictions(samples, self.output_dir / "predictions.png")
        if self.progress.history:
            report.draw_learning_curve(self.progress.history, self.output_dir / "learning_curve.png")
        page = report.run_page(summary, dataclasses.asdict(self.config), len(self.rows))
        report.write_text(self.output_dir / "report.md", page)
        print(page)

    def _training_summary(self) -> dict[str, float]:
        sentences = self.progress.step * self.config.per_device_train_batch_size * self.accelerator.num_processes
        sentences *= self.config.gradient_accumulation_steps
        return {
            "steps": self.progress.step,
            "sentences": sentences,
            "seconds": round(self.progress.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def always_empty(scores: dict[str, float]) -> dict[str, float]:
    """What answering "none" to every sentence scores, for the set that `scores` are of."""
    nothing = dict.fromkeys(("cIoU", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"), 0.0)
    return {"gIoU": scores["always_empty/gIoU"], "N_acc": 1.0, **nothing}


def pick_rows(rows: Dataset, per_kind: int, seed: int) -> Dataset:
    """`per_kind` random rows each of many, one and no target, in that order."""
    random = np.random.default_rng(seed)
    counts = np.array([len(ids) for ids in rows.with_format(None)["ann_ids"]])
    kinds = [np.flatnonzero(chosen) for chosen in (counts > 1, counts == 1, counts == 0)]
    return rows.select(np.concatenate([random.permutation(kind)[:per_kind] for kind in kinds]).tolist())


def seal(folder: Path) -> None:
    """Force every file of a checkpoint to disk and write manifest.json with their sha256."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.sha256(file.read()).hexdigest()
            os.fsync(file.fileno())
    with (folder / "manifest.json").open("w") as file:
        json.dump(hashes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush(folder)


def broken_seal(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as it was sealed."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text())
        for name, sha256 in hashes.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"it is incomplete ({error})"
    return None


def flush(folder: Path) -> None:
    """Force a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def vision_only(batch: dict[str, object]) -> dict[str, object]:
    """The part of a batch that trains the vision trunk to name categories, without any sentence."""
    return {"pixel_values": batch["pixel_values"], "labels": {"categories": batch["labels"]["categories"]}}


def _scalars(values: dict[str, object]) -> dict[str, object]:
    """What a tracker can show."""
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str))}


def main(argv: list[str] | None = None) -> None:
    """The command line; bad input ends it with one line and exit code 2, a signal with the code the shell expects."""
    try:
        run = Run(parse_config(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if not run.config.eval_only:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, run.stop)
        run.train()
    if run.stop_signal is not None:
        run.save_checkpoint()
        print(f"stopped at step {run.progress.step}; --resume_from_checkpoint latest goes on from there")
        sys.exit(128 + run.stop_signal)
    run.finish(run.measure())
    run.accelerator.end_training()


if __name__ == "__main__":
    main()

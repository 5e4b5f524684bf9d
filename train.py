"""Train and evaluate a model for generalised referring expressions with Accelerate.

    accelerate launch train.py recipes/rela_swin_base.yaml --dataset data/grefcoco --output_dir runs/rela
    python train.py recipes/unified.yaml --dataset data/easy --output_dir runs/demo
    python train.py --eval_only --checkpoint runs/demo/checkpoint --dataset data/easy --split testA

A recipe is a YAML file whose keys are the flags below; flags typed after it win. A run leaves in `output_dir`:
`report.md`, `metrics.json`, `predictions.png`, `best_and_worst.png`, `learning_curve.png`, the model under
`checkpoint/`, the best one measured on the way under `best/`, and under `checkpoints/` what resuming needs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    gather_object,
    send_to_device,
    set_seed,
)
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

import grefcoco
from grefcoco_data import report
from grefcoco_data.augmentation import Augmentation
from grefcoco_data.measurement import Measurement
from grefcoco_data.model_card import model_card
from grefcoco_data.recipe import TrainConfig, parse_config
from grefcoco_data.sampling import SentenceBatchSampler, StreamedBatches, TrainRows
from modeling import training_mdetr, training_rela
from modeling.processing_rela import decode_mask
from modeling.referring_processor import BASE_COLUMNS, Collator
from modeling.trainer_metrics import flat
from modeling.training_state import aside, broken_seal, put, seal
from training.schedule import rate_factor, weight_average

ROOT = Path(__file__).resolve().parent
GRES, GREC = (evaluate.load(str(ROOT / "evaluate" / name)) for name in ("gres", "grec"))
FAMILIES = {"rela": training_rela, "mdetr": training_mdetr}  # how each kind of model is made and trained
LOGGING_STEPS = 50  # steps between records of the loss
STOP_STEPS = 10  # steps between the moments at which several processes ask each other whether to stop
MAX_SKIPPED = 20  # steps without a finite gradient, one after another, before a run gives up
logger = get_logger(__name__)


class Stopped(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


@dataclass
class Progress:
    """Where a run stands: optimiser steps done, seconds spent, the records that draw its curve, the best score."""

    step: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # seconds of them spent on the next batch
    skipped: int = 0  # steps without a finite gradient
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None


class Run:
    """One run: its configuration, data, model, and the folder it fills."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.output_dir = config, Path(config.output_dir)
        self.augmentation = Augmentation(**config.augmentation)
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
        self.progress, self.stop_signal, self.skipped_in_a_row = Progress(), None, 0
        columns = [*BASE_COLUMNS, "mask", "boxes", "objects"]
        self.rows = grefcoco.load(config.dataset, split=config.split, columns=columns)
        self.model, self.processor = self.load_model()
        self.collator = self.make_collator(training=False)
        self.repository = HfApi().create_repo(self.hub_id(), exist_ok=True).repo_id if config.push_to_hub else None
        if config.eval_only:
            self.model, self.average = self.accelerator.prepare(self.model), None
        else:
            self._prepare_training()

    def load_model(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model and processor to train or measure: from `checkpoint`, or new from the recipe's `model` fields."""
        config = self.config
        if config.checkpoint:
            model = AutoModel.from_pretrained(config.checkpoint, trust_remote_code=True)
            return model, AutoProcessor.from_pretrained(config.checkpoint, trust_remote_code=True)
        fields = dict(config.model)
        family = FAMILIES.get(fields.pop("model_type", "rela"))
        if family is None:
            wrong = config.model["model_type"]
            raise ValueError(f"model: model_type is {wrong!r}; choose one of {', '.join(FAMILIES)}")
        if config.category_supervision:
            fields = {"num_categories": len(self.categories("train", config.split)), **fields}
        return family.new_model(fields, self.sentences, config.tokenizer, config.backbone, config.image_size)

    def sentences(self) -> Iterator[str]:
        """All sentences of the training split."""
        stream = grefcoco.load(self.config.dataset, split="train", columns=["sentence"], streaming=True)
        return (row["sentence"] for row in stream)

    def categories(self, *splits: str) -> list[int]:
        """All category ids that objects of these splits have, ascending."""
        found: set[int] = set()
        for split in splits:
            options = {"layout": "image", "columns": ["objects"], "streaming": True}
            for row in grefcoco.load(self.config.dataset, split=split, **options):
                found.update(item["category_id"] for item in row["objects"])
        return sorted(found)

    def make_collator(self, training: bool) -> Collator:
        """The function from rows to batches, with the labels of the losses or (categories included) of measuring."""
        config = self.config
        splits = [config.split] if config.eval_only else ["train", config.split]
        category_ids = self.categories(*splits) if config.category_supervision or not training else ()
        return self.processor.collator(self.model_config, config.text_column, category_ids, training)

    def _prepare_training(self) -> None:
        config = self.config
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.startswith(tuple(config.frozen)))
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        family = FAMILIES[self.model.config.model_type]
        groups = family.parameter_groups(
            self.model, config.learning_rate, config.weight_decay, config.tower_learning_rates
        )
        for group in groups:
            group["peak"] = group["lr"]
        optimizer = torch.optim.AdamW(groups, fused=True)  # one pass over the parameters
        kind = self.accelerator.distributed_type
        if config.ema_decay and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"ema_decay is {config.ema_decay}, and with {kind.value} no process holds whole weights to average: "
                "set it to 0, or train without sharding"
            )
        self.average = weight_average(self.model, config.ema_decay) if config.ema_decay else None
        if config.torch_compile:
            self.model.compile()
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.average is not None:
            self.average.to(self.accelerator.device)
        if config.resume_from_checkpoint:
            self.resume(config.resume_from_checkpoint)
        self.accelerator.init_trackers("tracker", config=_scalars(dataclasses.asdict(config)))

    def train(self) -> None:
        """Train from `progress.step` to `max_train_steps`, measuring, recording and saving along the way."""
        config, progress = self.config, self.progress
        batches = self.batches(progress.step * config.gradient_accumulation_steps)
        started, losses = time.perf_counter() - progress.seconds, []
        with tqdm(
            total=config.max_train_steps,
            initial=progress.step,
            desc="train",
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while progress.step < config.max_train_steps and not self.stopping():
                losses.append(self.train_step(batches))
                progress.step += 1
                progress.seconds = time.perf_counter() - started
                bar.update()
                last = progress.step == config.max_train_steps
                if progress.step % LOGGING_STEPS == 0 or last:
                    loss = self.accelerator.reduce(torch.stack(losses).nanmean(), "mean").item()
                    losses.clear()
                    bar.set_postfix(loss=f"{loss:.3f}")
                    self.record({"loss": loss, "learning_rate": self.optimizer.param_groups[0]["lr"]})
                if progress.step % config.eval_steps == 0 and not last:
                    self.evaluate_and_record()
                if progress.step % config.checkpointing_steps == 0 and not last:
                    self.save_checkpoint()

    def batches(self, start: int) -> Iterator[dict[str, object]]:
        """This process's batches from batch `start` on; those of the category warm-up hold one sentence an image."""
        config = self.config
        warm_up = config.category_warmup_steps * config.gradient_accumulation_steps
        if start < warm_up:
            yield from islice(self._loader(1, start), warm_up - start)
        yield from self._loader(config.sentences_per_image, max(0, start - warm_up))

    def _loader(self, sentences_per_image: int, start: int) -> Iterable[dict[str, object]]:
        config, columns = self.config, self.train_columns()
        settings = {
            "collate_fn": self.make_collator(training=True),
            "pin_memory": self.accelerator.device.type == "cuda",
        }
        place = (config.seed, self.accelerator.process_index, self.accelerator.num_processes, start)
        size = (config.per_device_train_batch_size, sentences_per_image)
        if config.streaming:
            images = partial(grefcoco.load, config.dataset, split="train", streaming=True, layout="image")
            stream = StreamedBatches(lambda names: images(columns=names), columns, self.augmentation, *size, *place)
            workers = min(config.dataloader_num_workers, stream.num_shards)
            stream.start, ahead = start - start % max(1, workers), start % max(1, workers)
            return islice(DataLoader(stream, batch_size=None, num_workers=workers, **settings), ahead, None)
        rows = grefcoco.load(config.dataset, split="train", columns=columns)
        sampler = SentenceBatchSampler(np.asarray(rows.with_format(None)["image_id"]), *size, *place)
        rows = TrainRows(rows, self.augmentation, config.seed)
        return DataLoader(rows, batch_sampler=sampler, num_workers=config.dataloader_num_workers, **settings)

    def train_columns(self) -> list[str]:
        """The columns that training rows need; others are not even looked up."""
        columns = self.processor.columns(True, self.model_config)
        augmented = ["mask", "objects", "boxes", "category_ids", "masks"] if self.augmentation.active else []
        return list(dict.fromkeys([*columns, *augmented]))

    @property
    def model_config(self) -> PreTrainedConfig:
        return self.accelerator.unwrap_model(self.model).config

    def train_step(self, batches: Iterator[dict[str, object]]) -> torch.Tensor:
        """One optimiser step; returns its mean loss. Its random numbers depend on (seed, step, process) alone."""
        config, step = self.config, self.progress.step
        self.model.train()
        for group in self.optimizer.param_groups:
            schedule = group.get("schedule", config.lr_scheduler_type)
            restart = config.category_warmup_steps
            factor = rate_factor(
                schedule, step, config.max_train_steps, config.lr_warmup_steps, config.lr_decay_steps, restart
            )
            group["lr"] = group["peak"] * factor
        losses, sent_ids = [], []
        for part in range(config.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch = next(batches)
            self.progress.waiting += time.perf_counter() - asked
            sent_ids.append(batch["labels"]["sent_id"])
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            torch.manual_seed(hash((config.seed, step, part, self.accelerator.process_index)) & 0x7FFFFFFF)
            with self.accelerator.accumulate(self.model):
                loss = self.model(**(vision_only(batch) if step < config.category_warmup_steps else batch)).loss
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    self._update(losses, sent_ids)
                self.optimizer.zero_grad()
        return torch.stack(losses).mean()

    def _update(self, losses: list[torch.Tensor], sent_ids: list[torch.Tensor]) -> None:
        """Clip the gradients and step, unless they are not finite: then every process leaves this step out."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        finite = norm is None or bool(torch.as_tensor(norm).isfinite())  # reduced: the same in every process
        if finite or self.config.mixed_precision == "fp16":  # whose scaler leaves the step out itself and scales down
            self.optimizer.step()
        if finite:
            self.skipped_in_a_row = 0
            if self.average is not None:
                self.average.update_parameters(self.accelerator.unwrap_model(self.model))
            return
        self.progress.skipped += 1
        self.skipped_in_a_row += 1
        wrong = [ids for loss, ids in zip(losses, sent_ids) if not loss.isfinite()]
        mine = [] if not wrong else torch.cat(wrong).tolist()
        found = sorted(set(gather_object(mine)))
        about = f"of the batch with sentences {', '.join(map(str, found))}" if found else "in the backward pass alone"
        logger.warning("step %d is left out: the loss is not finite, %s", self.progress.step, about)
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise Stopped(
                f"no finite gradient in {MAX_SKIPPED} steps up to step {self.progress.step}, the last one {about}; "
                "resume from a checkpoint with a lower --learning_rate, or look at these sentences"
            )

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: let the step in progress end, then save and stop."""
        self.stop_signal = number
        if self.accelerator.num_processes == 1:
            signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    def stopping(self) -> bool:
        """Whether a process was told to stop; several processes agree on it now and then."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if self.progress.step % STOP_STEPS:
            return False
        told = torch.tensor([self.stop_signal or 0], device=self.accelerator.device)
        self.stop_signal = int(self.accelerator.gather(told).max()) or None
        return self.stop_signal is not None

    def record(self, values: dict[str, float]) -> None:
        """Put `values` into the history and the tracker at the present step."""
        step = self.progress.step
        self.progress.history.append({"step": step, **values})
        self.accelerator.log(_scalars(values), step=step)

    def evaluate_and_record(self) -> None:
        """Measure, record, show predictions in the tracker, and keep the model when it is the best so far."""
        scores = flat(self.measure().scores())
        self.record(scores)
        metric = self.config.metric_for_best_model
        if metric is not None:
            if metric not in scores:
                raise Stopped(f"metric_for_best_model is {metric!r}; what is measured is {', '.join(scores)}")
            if self.progress.best is None or scores[metric] > self.progress.best:
                self.progress.best = scores[metric]
                self.save_model("best")
        if self.accelerator.trackers:
            samples = self.predict(pick_rows(self.rows, per_kind=3, seed=self.config.seed))
            if self.accelerator.is_main_process:
                picture = report.draw_predictions(samples)
                for tracker in self.accelerator.trackers:
                    form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"predictions": picture[None]}, step=self.progress.step, **form)

    def save_model(self, name: str) -> None:
        """Write the model, or its running average, with its processor and code under output_dir/`name`, whole."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            final = self.output_dir / name
            with self.room_on_disk(final):
                temporary = aside(final)
                if self.average is None:
                    model.save_pretrained(temporary, state_dict=state)
                else:
                    self.average.module.save_pretrained(temporary)
                self.processor.save_pretrained(temporary)
                put(temporary, final)

    def save_checkpoint(self) -> None:
        """Save everything a resume needs under checkpoints/step-N: written aside, sealed with hashes, then renamed."""
        final = self.output_dir / "checkpoints" / f"step-{self.progress.step:08d}"
        if self.accelerator.is_main_process:
            with self.room_on_disk(final):
                aside(final)
        self.accelerator.wait_for_everyone()
        with self.room_on_disk(final) as temporary:
            self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self.room_on_disk(final) as temporary:
                if self.average is not None:
                    save_file(self.average.state_dict(), temporary / "average.safetensors")
                (temporary / "progress.json").write_text(json.dumps(dataclasses.asdict(self.progress)))
                seal(temporary)
                put(temporary, final)
            for old in sorted(final.parent.glob("step-*"))[: -self.config.checkpoints_total_limit]:
                shutil.rmtree(old)
        if self.config.push_to_hub and self.config.hub_strategy == "checkpoint":
            self.save_model("checkpoint")
            self.write_card({})
            self.upload(f"Step {self.progress.step}")

    @contextmanager
    def room_on_disk(self, final: Path) -> Iterator[Path]:
        """Where to write `final` aside; what cannot be written is removed, and the run stops with one line."""
        temporary = final.with_name(".writing")
        try:
            yield temporary
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            shutil.rmtree(temporary, ignore_errors=True)
            raise Stopped(
                f"cannot write {final}: {error}; what was saved before is intact: make room, then "
                "--resume_from_checkpoint latest"
            ) from error

    def resume(self, choice: str) -> None:
        """Load a checkpoint folder, or with `latest` the newest whole one; a broken newer one is passed over."""
        folder = self.output_dir / "checkpoints"
        found = sorted(folder.glob("step-*"), reverse=True) if choice == "latest" else [Path(choice)]
        for checkpoint in found:
            broken = broken_seal(checkpoint)
            if broken is None:
                self.accelerator.load_state(str(checkpoint))
                if self.average is not None:
                    self.average.load_state_dict(load_file(checkpoint / "average.safetensors"))
                self.progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
                logger.info("resumed from %s", checkpoint)
                return
            if choice != "latest":
                raise ValueError(f"{checkpoint}: {broken}; choose another checkpoint, or latest")
            logger.warning("%s: %s; trying the one before", checkpoint, broken)
        logger.warning("%s: no whole checkpoint to resume from; starting at the beginning", folder)

    @torch.inference_mode()
    def measure(self) -> Measurement:
        """What the model, and an answer of every object, get on the rows of `split`.

        Every process measures its own batches; what is kept and gathered is a few numbers per sentence. Where there
        are not batches enough for all, the first ones are measured again (FSDP must call the model together): equal
        counts of one sentence are one.
        """
        model = self.evaluated_model()
        size, processes = self.config.per_device_train_batch_size, self.accelerator.num_processes
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        batches += batches[: -len(batches) % processes]
        batches = batches[self.accelerator.process_index :: processes]
        workers = self.config.dataloader_num_workers
        loader = DataLoader(self.rows, batch_sampler=batches, collate_fn=self.collator, num_workers=workers)
        measurement = Measurement(self.rows, self.processor.trainer_metrics(GRES, GREC))
        bar = tqdm(loader, desc="measure", leave=False, disable=not self.accelerator.is_main_process)
        for batch in bar:
            batch = send_to_device(batch, self.accelerator.device)
            labels = batch.pop("labels")
            measurement.add(model(**batch), labels, batch.get("image_index"))
        for rank, state in enumerate(gather_object([measurement.state()])):
            if rank != self.accelerator.process_index:
                measurement.merge(state)
        return measurement

    def evaluated_model(self) -> torch.nn.Module:
        """The model, or its running average, in evaluation mode."""
        model = self.model if self.average is None else self.average.module
        return model.eval()

    @torch.inference_mode()
    def predict(self, rows: Dataset) -> list[report.Sample]:
        """Answers on a few rows at the images' own sizes, for the pictures; all processes call this together."""
        rows = list(rows)
        batch = send_to_device(self.collator(rows), self.accelerator.device)
        batch.pop("labels")
        outputs, sizes = self.evaluated_model()(**batch), [(row["height"], row["width"]) for row in rows]
        masks = boxes = [None] * len(rows)
        if "pred_masks" in outputs:
            masks = self.processor.post_process_referring_segmentation(outputs, target_sizes=sizes)
        if "pred_boxes" in outputs:
            boxes = self.processor.post_process_referring_detection(outputs, target_sizes=sizes)
        return [
            report.Sample(
                image=row["image"],
                sentence=row["sentence"],
                truth=decode_mask(row["mask"]).astype(bool),
                truth_boxes=None if box is None else report.corners(row["boxes"]),
                no_target=row["no_target"],
                num_targets=len(row["ann_ids"]),
                prediction=None if mask is None else mask["mask"].cpu().numpy(),
                boxes=None if box is None else box["boxes"].cpu().numpy(),
                predicted_no_target=(mask or box)["no_target"],
            )
            for row, mask, box in zip(rows, masks, boxes)
        ]

    def finish(self) -> None:
        """Measure; write the model under checkpoint/ (after training), metrics.json, the pictures, report.md, card."""
        measurement = self.measure()
        scores = measurement.scores(check=True)
        if not self.config.eval_only:
            self.record(flat(scores))
            self.save_model("checkpoint")
        samples = self.predict(pick_rows(self.rows, per_kind=6, seed=self.config.seed))
        best, worst = measurement.extremes(6)
        extremes = self.predict(self.rows.select([*best, *worst]))
        if not self.accelerator.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        summary = {**scores, **measurement.details(), "train": self._training_summary()}
        summary["history"] = self.progress.history
        report.write_text(self.output_dir / "metrics.json", json.dumps(summary, indent=2) + "\n")
        report.draw_predictions(samples, self.output_dir / "predictions.png")
        report.draw_predictions(extremes, self.output_dir / "best_and_worst.png")
        if self.progress.history:
            report.draw_learning_curve(self.progress.history, self.output_dir / "learning_curve.png")
        page = report.run_page(summary, dataclasses.asdict(self.config), len(self.rows))
        report.write_text(self.output_dir / "report.md", page)
        print(page)
        if not self.config.eval_only:
            self.write_card(summary)
            self.upload("End of training")

    def upload(self, message: str) -> None:
        """Send the model's folder to the Hub, where `push_to_hub` asks for that."""
        if not (self.config.push_to_hub and self.accelerator.is_main_process):
            return
        try:
            HfApi().upload_folder(
                repo_id=self.repository, folder_path=self.output_dir / "checkpoint", commit_message=message
            )
        except (OSError, HfHubHTTPError) as error:
            raise Stopped(
                f"the upload to {self.repository} failed ({' '.join(str(error).split())}); the model is whole in "
                f"{self.output_dir / 'checkpoint'}: run `hf upload {self.repository} {self.output_dir / 'checkpoint'}`"
            ) from error

    def write_card(self, summary: dict[str, dict]) -> None:
        """The model's card, beside the model."""
        if not self.accelerator.is_main_process:
            return
        name = self.repository or self.hub_id()
        card = model_card(name, self.model_config.model_type, dataclasses.asdict(self.config), summary, len(self.rows))
        report.write_text(self.output_dir / "checkpoint" / "README.md", card)

    def hub_id(self) -> str:
        """Name of the Hub repository: what the flag says, or that of output_dir."""
        return self.config.hub_model_id or self.output_dir.resolve().name

    def _training_summary(self) -> dict[str, float]:
        progress, config = self.progress, self.config
        sentences = progress.step * config.per_device_train_batch_size * self.accelerator.num_processes
        return {
            "steps": progress.step,
            "sentences": sentences * config.gradient_accumulation_steps,
            "seconds": round(progress.seconds, 1),
            "waiting": round(progress.waiting / max(progress.seconds, 1e-9), 4),
            "skipped": progress.skipped,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def pick_rows(rows: Dataset, per_kind: int, seed: int) -> Dataset:
    """`per_kind` random rows each of many, one and no target, in that order."""
    random = np.random.default_rng(seed)
    counts = np.array([len(ids) for ids in rows.with_format(None)["ann_ids"]])
    kinds = [np.flatnonzero(chosen) for chosen in (counts > 1, counts == 1, counts == 0)]
    return rows.select(np.concatenate([random.permutation(kind)[:per_kind] for kind in kinds]).tolist())


def vision_only(batch: dict[str, object]) -> dict[str, object]:
    """The part of a batch that trains the vision trunk to name categories and find objects, without any sentence."""
    known = ("categories", "object_boxes", "object_masks", "num_objects")
    labels = {name: batch["labels"][name] for name in known if name in batch["labels"]}
    return {"pixel_values": batch["pixel_values"], "labels": labels}


def _scalars(values: dict[str, object]) -> dict[str, object]:
    """What a tracker can show."""
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str))}


def main(argv: list[str] | None = None) -> None:
    """The command line; what cannot be done ends in one line and exit code 2, a signal with the code shells expect."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run = Run(parse_config(sys.argv[1:] if argv is None else argv))
        if not run.config.eval_only:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, run.stop)
    except (ValueError, OSError, HfHubHTTPError) as error:
        _fail(error)
    try:
        if not run.config.eval_only:
            run.train()
        if run.stop_signal is not None:
            run.save_checkpoint()
            print(f"stopped at step {run.progress.step}; --resume_from_checkpoint latest goes on from there")
            sys.exit(128 + run.stop_signal)
        run.finish()
    except Stopped as stopped:
        _fail(stopped)
    run.accelerator.end_training()


def _fail(error: Exception) -> NoReturn:
    print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

"""Train and evaluate a model for generalised referring expressions with Accelerate.

    accelerate launch train.py recipes/rela_swin_base.yaml --dataset data/grefcoco --output_dir runs/rela
    python train.py recipes/unified.yaml --dataset data/easy --output_dir runs/demo
    python train.py --eval_only --checkpoint runs/demo/checkpoint --dataset data/easy --split testA

A recipe is a YAML file whose keys are the flags below; flags typed after it win. A run leaves in `output_dir`:
`report.md` with its pictures, `metrics.json`, the model under `checkpoint/`, the best one measured on the way under
`best/`, and under `checkpoints/` what resuming needs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

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
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

import grefcoco
from grefcoco_data.arguments import one_line
from grefcoco_data.atomic_files import publish, seal, seal_fault, staging_folder, staging_path, write_text
from grefcoco_data.building import one_error
from grefcoco_data.loading import category_ids
from modeling.trainer_metrics import flat
from scoring import report
from scoring.answers import answers_of, check_sentence_ids
from scoring.measurement import Measurement
from scoring.model_card import model_card
from scoring.pictures import draw_answers, draw_calibration, draw_learning_curve
from training.augmentation import Augmentation
from training.config import TrainConfig, check_dataset, parse_config
from training.families import FAMILIES, Family, load_checkpoint, new_model
from training.output_lock import FolderInUse, locked
from training.progress import Progress
from training.sampling import SentenceBatchSampler, StreamedBatches, TrainRows, pick_rows, vision_only
from training.schedule import rate_factor, weight_average

LOGGING_STEPS = 50  # steps between records of the loss
STOP_STEPS = 10  # steps between the moments at which several processes exchange stop signals
MAX_SKIPPED = 20  # consecutive steps without a finite gradient before a run stops
logger = get_logger(__name__)


class Stopped(RuntimeError):
    """A run cannot continue; the message says why and what to do."""


class Run:
    """One run: its configuration, data, model, and the folder it fills."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.output_dir = config, Path(config.output_dir)
        self.augmentation = Augmentation(**config.augmentation)
        self.data_parallel = DistributedDataParallelKwargs()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
            # without this flag processes on CPUs start as separate runs
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[self.data_parallel],
        )
        set_seed(config.seed)
        if config.mixed_precision != "no":  # TF32 for what autocast leaves in fp32, above all the pixel decoder
            torch.set_float32_matmul_precision("high")
        self.progress, self.stop_signal, self.skipped_in_a_row = Progress(), None, 0
        self.losses: list[torch.Tensor] = []  # of this process, of the steps since the last record
        check_dataset(config.dataset)
        self.model, self.processor = self.load_model()
        columns = [*self.processor.columns(training=False), "boxes", "objects"]
        self.rows = grefcoco.load(config.dataset, split=config.split, columns=list(dict.fromkeys(columns)))
        check_sentence_ids(self.rows)
        self.repository = HfApi().create_repo(self.hub_id(), exist_ok=True).repo_id if config.push_to_hub else None
        if config.eval_only:
            self.model, self.average = self.accelerator.prepare(self.model), None
        else:
            self._prepare_training()

    def load_model(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Load the model and processor of `checkpoint`, or make new ones from the recipe's `model` fields.

        The category ids of all objects are read here, once for a run.
        """
        config = self.config
        splits = [config.split] if config.eval_only else ["train", config.split]
        self.categories = category_ids(config.dataset, splits)
        if config.checkpoint:
            return load_checkpoint(config.checkpoint, config.trust_remote_code)
        return new_model(config, self.sentences, self.categories if config.category_supervision else ())

    def sentences(self) -> Iterator[str]:
        """All sentences of the training split."""
        with one_error(self.config.dataset):
            for row in grefcoco.load(self.config.dataset, split="train", columns=["sentence"], streaming=True):
                yield row["sentence"]

    def collator(self, training: bool) -> Callable[[list[dict]], dict[str, object]]:
        """The processor's collator; measuring needs the categories too, for the answer of every object."""
        supervised = self.config.category_supervision or not training
        categories = self.categories if supervised else ()
        return self.processor.collator(
            self.model_config, self.config.text_column, categories, training, share_images=True, uint8_pixels=True
        )

    def on_device(self, batch: dict[str, object]) -> dict[str, object]:
        """A batch on this process's device; its pixels are normalised there."""
        return self.processor.normalize(send_to_device(batch, self.accelerator.device, non_blocking=True))

    def _prepare_training(self) -> None:
        config = self.config
        self.model.train()  # a model may set here which of its parameters have gradients
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.startswith(tuple(config.frozen)))
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        groups = self.family.training.parameter_groups(
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
        # Only then parameters are without gradient; to look for them costs a walk through the graph in every step.
        unused_head = getattr(self.model.config, "num_categories", 0) and not config.category_supervision
        self.data_parallel.find_unused_parameters = bool(config.category_warmup_steps or unused_head)
        if config.torch_compile:
            self.model.compile()
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.average is not None:
            self.average.to(self.accelerator.device)
        if config.resume_from_checkpoint:
            self.resume(config.resume_from_checkpoint)

    def train(self) -> None:
        """Train from `progress.step` to `max_train_steps`, measuring, recording and saving along the way."""
        config, progress = self.config, self.progress
        wandb = {"name": self.output_dir.name, "dir": str(self.output_dir)}
        self.accelerator.init_trackers("grefcoco", _scalars(dataclasses.asdict(config)), init_kwargs={"wandb": wandb})
        batches = self.batches(progress.step * config.gradient_accumulation_steps)
        started = time.perf_counter() - progress.seconds
        with tqdm(
            total=config.max_train_steps,
            initial=progress.step,
            desc="train",
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while progress.step < config.max_train_steps and not self.stopping():
                self.losses.append(self.train_step(batches))
                progress.step += 1
                progress.seconds = time.perf_counter() - started
                bar.update()
                last = progress.step == config.max_train_steps
                if progress.step % LOGGING_STEPS == 0 or last:
                    loss = self.accelerator.reduce(torch.stack(self.losses).nanmean(), "mean").item()
                    self.losses.clear()
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
        settings = self.loader_settings(training=True)
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

    def loader_settings(self, training: bool) -> dict[str, object]:
        """What all loaders share; only from pinned memory does a copy to a GPU overlap with its work."""
        pinned = self.accelerator.device.type == "cuda"
        return {"collate_fn": self.collator(training), "pin_memory": pinned}

    def train_columns(self) -> list[str]:
        """The columns that training rows need; others are not read."""
        columns = self.processor.columns(training=True, config=self.model_config)
        if self.config.category_supervision:
            columns = [*columns, "objects"]
        if self.augmentation.active:
            columns = [*columns, "objects", "boxes", "category_ids", "masks"]
        return list(dict.fromkeys(columns))

    @property
    def model_config(self) -> PreTrainedConfig:
        return self.accelerator.unwrap_model(self.model).config

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_config.model_type]

    def train_step(self, batches: Iterator[dict[str, object]]) -> torch.Tensor:
        """One optimiser step; returns its mean loss. Its random numbers depend on (seed, step, process) alone."""
        config, step = self.config, self.progress.step
        if not self.model.training:  # a model may look at its weights here, for which the host waits
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
            wait_start = time.perf_counter()
            batch = next(batches)
            self.progress.waiting += time.perf_counter() - wait_start
            sent_ids.append(batch["labels"]["sent_id"])
            batch = self.on_device(batch)
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
        """Clip the gradients and step; every process skips a step whose gradients are not finite."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        finite = norm is None or bool(torch.as_tensor(norm).isfinite())  # reduced: the same in every process
        if finite or self.config.mixed_precision == "fp16":  # the fp16 scaler skips the step itself and scales down
            self.optimizer.step()
        if finite:
            self.skipped_in_a_row = 0
            if self.average is not None:
                self.average.update_parameters(self.accelerator.unwrap_model(self.model))
            return
        self.progress.skipped += 1
        self.skipped_in_a_row += 1
        parts = [ids for loss, ids in zip(losses, sent_ids) if not loss.isfinite()]
        bad_ids = sorted(set(gather_object(torch.cat(parts).tolist() if parts else [])))
        place = (
            f"in the batch with sentences {', '.join(map(str, bad_ids))}" if bad_ids else "in the backward pass alone"
        )
        logger.warning("step %d is skipped: the loss is not finite %s", self.progress.step, place)
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise Stopped(
                f"no finite gradient in {MAX_SKIPPED} steps up to step {self.progress.step}, the last one {place}; "
                "resume from a checkpoint with a lower --learning_rate, or check these sentences"
            )

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: let the step in progress end, then save and stop."""
        self.stop_signal = number
        if self.accelerator.num_processes == 1:
            signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    def stopping(self) -> bool:
        """Whether a process got a stop signal; several processes exchange it every `STOP_STEPS` steps."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if self.progress.step % STOP_STEPS:
            return False
        number = torch.tensor([self.stop_signal or 0], device=self.accelerator.device)
        self.stop_signal = int(self.accelerator.gather(number).max()) or None
        return self.stop_signal is not None

    def record(self, values: dict[str, float]) -> None:
        """Add `values` to the history and the tracker at the current step."""
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
            picture = self.draw(pick_rows(self.rows, per_kind=3, seed=self.config.seed))
            if self.accelerator.is_main_process:
                for tracker in self.accelerator.trackers:
                    form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"predictions": picture[None]}, step=self.progress.step, **form)

    def save_model(self, name: str) -> None:
        """Write the model, or the average of its weights, with its processor and code under output_dir/`name`."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            final = self.output_dir / name
            with self.disk_errors(final):
                staging = staging_folder(final)
                if self.average is None:
                    model.save_pretrained(staging, state_dict=state)
                else:
                    self.average.module.save_pretrained(staging)
                self.processor.save_pretrained(staging)
                publish(staging, final)

    def save_checkpoint(self) -> None:
        """Save everything a resume needs under checkpoints/step-N, sealed with hashes and renamed when it is whole."""
        final = self.output_dir / "checkpoints" / f"step-{self.progress.step:08d}"
        staging = staging_path(final)
        if self.accelerator.is_main_process:
            with self.disk_errors(final):
                staging_folder(final)
        self.accelerator.wait_for_everyone()
        with self.disk_errors(final):
            self.accelerator.save_state(str(staging))
            losses = self.accelerator.gather(torch.stack(self.losses)[None]).tolist() if self.losses else []
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self.disk_errors(final):
                if self.average is not None:
                    save_file(self.average.state_dict(), staging / "average.safetensors")
                progress = dataclasses.replace(self.progress, losses=losses)
                (staging / "progress.json").write_text(json.dumps(dataclasses.asdict(progress)))
                seal(staging)
                publish(staging, final)
            for old in sorted(final.parent.glob("step-*"))[: -self.config.checkpoints_total_limit]:
                shutil.rmtree(old)
        if self.config.push_to_hub and self.config.hub_strategy == "checkpoint":
            self.save_model("checkpoint")
            self.write_card({})
            self.upload(f"Step {self.progress.step}")

    @contextmanager
    def disk_errors(self, final: Path) -> Iterator[None]:
        """Stop the run with one line when `final` cannot be written, and remove what was written of it."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own errors
            shutil.rmtree(staging_path(final), ignore_errors=True)
            raise Stopped(
                f"cannot write {final}: {error}; what was saved before is intact: free some disk space, then "
                "--resume_from_checkpoint latest"
            ) from error

    def resume(self, choice: str) -> None:
        """Load a checkpoint folder, or with `latest` the newest whole one."""
        folder = self.output_dir / "checkpoints"
        candidates = sorted(folder.glob("step-*"), reverse=True) if choice == "latest" else [Path(choice)]
        for checkpoint in candidates:
            fault = seal_fault(checkpoint)
            if fault is None:
                self.accelerator.load_state(str(checkpoint))
                if self.average is not None:
                    self.average.load_state_dict(load_file(checkpoint / "average.safetensors"))
                self.progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
                if len(self.progress.losses) == self.accelerator.num_processes:
                    losses = self.progress.losses[self.accelerator.process_index]
                    self.losses = list(torch.tensor(losses, device=self.accelerator.device))
                logger.info("resumed from %s", checkpoint)
                return
            if choice != "latest":
                raise ValueError(f"{checkpoint}: {fault}; choose another checkpoint, or latest")
            logger.warning("%s: %s; trying the one before", checkpoint, fault)
        logger.warning("%s: no whole checkpoint to resume from; starting at the beginning", folder)

    @torch.inference_mode()
    def measure(self) -> Measurement:
        """Measure the model on the rows of `split`.

        Every process measures its own batches and gathers a few numbers per sentence. All processes must call the
        model equally often (FSDP), so the first batches are repeated where there are too few: a sentence with equal
        counts is counted once.
        """
        model = self.evaluated_model()
        size, processes = self.config.per_device_train_batch_size, self.accelerator.num_processes
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        batches += batches[: -len(batches) % processes]
        batches = batches[self.accelerator.process_index :: processes]
        workers = self.config.dataloader_num_workers
        settings = self.loader_settings(training=False)
        loader = DataLoader(self.rows, batch_sampler=batches, num_workers=workers, **settings)
        measurement = Measurement(self.rows, self.processor)
        for batch in tqdm(loader, desc="measure", leave=False, disable=not self.accelerator.is_main_process):
            batch = self.on_device(batch)
            labels = batch.pop("labels")
            measurement.add_outputs(model(**batch), labels, batch.get("image_index"))
        for rank, state in enumerate(gather_object([measurement.state()])):
            if rank != self.accelerator.process_index:
                measurement.merge(state)
        return measurement

    def evaluated_model(self) -> torch.nn.Module:
        """The model, or the average of its weights, in evaluation mode."""
        model = self.model if self.average is None else self.average.module
        return model.eval()

    @torch.inference_mode()
    def draw(self, rows: Dataset, path: Path | None = None) -> np.ndarray | None:
        """Draw the answers to a few rows, into a file or as an array; all processes call this together."""
        rows = list(rows)
        batch = self.on_device(self.collator(training=False)(rows))
        batch.pop("labels")
        answers = answers_of(self.processor, self.evaluated_model()(**batch), rows)
        if not self.accelerator.is_main_process:
            return None
        return draw_answers(rows, answers, self.processor.no_target_threshold, path)

    def finish(self) -> None:
        """Write the model (after training), then measure it: metrics.json, the pictures, report.md, the card."""
        config, out = self.config, self.output_dir
        if not config.eval_only:
            self.save_model("checkpoint")
        measurement = self.measure()
        scores = measurement.scores(check=True)
        if not config.eval_only:
            self.record(flat(scores))
        out.mkdir(parents=True, exist_ok=True)
        self.draw(pick_rows(self.rows, per_kind=6, seed=config.seed), out / "predictions.png")
        examples = measurement.examples(6)
        extremes = [*examples["best"], *examples["worst"]]
        for name, places in {"best_and_worst": extremes, "no_target_failures": examples["failures"]}.items():
            if places:
                self.draw(self.rows.select(places), out / f"{name}.png")
            else:
                (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier run
        if not self.accelerator.is_main_process:
            return
        summary = {**scores, **measurement.details(), "train": self._training_summary(), "examples": examples}
        summary["environment"] = report.environment(self.accelerator.device, self.accelerator.num_processes)
        summary["history"] = self.progress.history
        write_text(out / "metrics.json", json.dumps(summary, indent=2) + "\n")
        draw_calibration(summary["calibration"]["points"], out / "calibration.png")
        if self.progress.history:
            warmup = config.category_warmup_steps
            draw_learning_curve(self.progress.history, out / "learning_curve.png", warmup, config.split)
        page = report.run_page(summary, dataclasses.asdict(config), len(self.rows))
        write_text(out / "report.md", page)
        print(page)
        if not config.eval_only:
            self.write_card(summary)
            self.upload("End of training")

    def upload(self, message: str) -> None:
        """Upload the model's folder to the Hub, if `push_to_hub` is set."""
        if not (self.config.push_to_hub and self.accelerator.is_main_process):
            return
        try:
            HfApi().upload_folder(
                repo_id=self.repository, folder_path=self.output_dir / "checkpoint", commit_message=message
            )
        except (OSError, HfHubHTTPError) as error:
            raise Stopped(
                f"the upload to {self.repository} failed ({one_line(error)}); the model is whole in "
                f"{self.output_dir / 'checkpoint'}: run `hf upload {self.repository} {self.output_dir / 'checkpoint'}`"
            ) from error

    def write_card(self, summary: dict[str, dict]) -> None:
        """Write the model's card into the model's folder."""
        if not self.accelerator.is_main_process:
            return
        name, config = self.repository or self.hub_id(), dataclasses.asdict(self.config)
        card = model_card(name, self.family, config, summary, len(self.rows))
        write_text(self.output_dir / "checkpoint" / "README.md", card)

    def hub_id(self) -> str:
        """Name of the Hub repository: the flag's value, or the name of output_dir."""
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


def _scalars(values: dict[str, object]) -> dict[str, object]:
    """What a tracker can show."""
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str))}


def main(argv: list[str] | None = None) -> None:
    """Run the command line: bad input ends in one line and exit code 2, a signal in the exit code 128 + its number."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run = Run(parse_config(sys.argv[1:] if argv is None else argv))
        if not run.config.eval_only:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, run.stop)
    except (ValueError, OSError, HfHubHTTPError) as error:
        _fail(error)
    try:
        with locked(run.output_dir) if run.accelerator.is_main_process else nullcontext():
            if not run.config.eval_only:
                run.train()
            if run.stop_signal is not None:
                run.save_checkpoint()
                print(f"stopped at step {run.progress.step}; --resume_from_checkpoint latest continues from there")
                sys.exit(128 + run.stop_signal)
            run.finish()
    except (Stopped, FolderInUse) as error:
        _fail(error)
    except ConnectionError as error:  # of a stream; that of a worker ends with the worker's own message
        reason = str(error).strip().splitlines()[-1]
        _fail(ConnectionError(f"{run.config.dataset}: {reason}; --resume_from_checkpoint latest continues"))
    run.accelerator.end_training()


def _fail(error: Exception) -> NoReturn:
    print(f"train.py: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

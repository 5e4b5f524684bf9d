"""The metrics in several processes and inside a Trainer: the same scores as in one loop."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from transformers.utils import ModelOutput

from tests.processes import start_group

GRES = str(Path(__file__).resolve().parents[1] / "evaluate" / "gres")


def score_half(cache: Path) -> None:
    """Score every second sentence in this process of two; process 0 prints what both have together."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    metric = evaluate.load(GRES, num_process=2, process_id=accelerator.process_index, cache_dir=str(cache))
    rng = np.random.default_rng(0)
    masks = rng.random((2, 9, 6, 6)) < 0.5
    empty = np.zeros((6, 6))
    mine = [i % 9 for i in range(accelerator.process_index, 10, 2)]  # ten for nine: the last is padding
    answers = [{"mask": metric.encode(masks[0, i]), "no_target": i % 2} for i in mine]
    truths = [
        {"mask": metric.encode(empty if i % 3 == 0 else masks[1, i]), "no_target": i % 3 == 0, "sent_id": i}
        for i in mine
    ]
    metric.add_batch(predictions=answers, references=truths)
    through_evaluate = metric.compute()
    accumulator, merged = metric.accumulator(), metric.accumulator()
    accumulator.add_batch(predictions=answers, references=truths)
    for state in gather_object([accumulator.state()]):
        merged.merge(state)
    scores = merged.compute(expected=range(9))
    if accelerator.is_main_process:
        assert through_evaluate == scores, (through_evaluate, scores)
        print(scores)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    done, other = [process.wait() for process in start_group(2, score_half, tmp_path / "cache")]
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    metric = evaluate.load(GRES, keep_in_memory=True)
    masks = np.random.default_rng(0).random((2, 9, 6, 6)) < 0.5
    no_target = np.arange(9) % 3 == 0
    masks[1, no_target] = False
    accumulator = metric.accumulator()
    accumulator.add_masks(*masks, no_target_score=np.arange(9) % 2, no_target=no_target)
    assert done.stdout.strip() == str(accumulator.compute())


class Thresholding(torch.nn.Module):
    """Masks a picture where it is bright; says "none" of a dark one."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, pixel_values: torch.Tensor, labels: dict[str, torch.Tensor] | None = None) -> ModelOutput:
        pred_masks = pixel_values > self.cut
        score = 1 - pixel_values.flatten(1).mean(dim=1)
        return ModelOutput(loss=self.cut * 0, pred_masks=pred_masks, no_target_score=score)


@pytest.mark.slow
def test_trainer_scores_as_one_loop(tmp_path):
    metric = evaluate.load(GRES, keep_in_memory=True)
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(
        rng.random((11, 8, 8), np.float32) * np.linspace(0.4, 1, 11, dtype=np.float32)[:, None, None]
    )
    masks, no_target = torch.from_numpy(rng.random((11, 8, 8)) < 0.5), torch.arange(11) < 4
    rows = [
        {"pixel_values": picture, "labels": {"masks": mask, "no_target": none}}
        for picture, mask, none in zip(pictures, masks, no_target)
    ]
    seen = metric.accumulator()

    def compute_metrics(batch: object, compute_result: bool) -> dict[str, float]:
        pred_masks, scores = batch.predictions
        seen.add_masks(
            pred_masks, batch.label_ids["masks"], no_target_score=scores, no_target=batch.label_ids["no_target"]
        )
        return seen.compute() if compute_result else {}

    arguments = TrainingArguments(
        tmp_path,
        per_device_eval_batch_size=4,
        batch_eval_metrics=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        Thresholding(), arguments, data_collator=default_collate, compute_metrics=compute_metrics, eval_dataset=rows
    )
    measured = trainer.evaluate()
    alone = metric.accumulator()
    outputs = Thresholding()(pictures)
    alone.add_masks(outputs.pred_masks, masks, no_target_score=outputs.no_target_score.detach(), no_target=no_target)
    assert len(seen) == 11
    assert {name: measured[f"eval_{name}"] for name in alone.compute()} == alone.compute()

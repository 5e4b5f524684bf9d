"""Measure the speed of a training step against the original modules: `python -m benchmarks.train --original FOLDER`.

Without `--original` the step is that of `make demo`, 32 sentences about 10 images, on one thread in CPU seconds.

Swin-B at 480 x 480 with random weights in fp32. A step has the forward pass, the published loss, the backward pass,
gradient clipping and AdamW. Both sides get the same random batch and alternate on one thread; the result is the median
CPU time. The loss of the original is its three cross entropies.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu import Case, build
from benchmarks.model import SIDE, cpu_seconds, random_inputs
from benchmarks.original_rela import OriginalRela
from grefcoco_data.arguments import ArgumentParser
from modeling.configuration_rela import RelaConfig
from modeling.convert_rela import convert_state_dict
from modeling.modeling_rela import RelaModel
from modeling.training_rela import parameter_groups


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, help="checkout of the original ReLA repository")
    parser.add_argument("--batch", type=int, default=1, help="sentences per step")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side; the median is reported")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.original is None:
        step, model, _ = build(Case("unified", "fp32", "step", 32, 10))
        seconds = sorted(cpu_seconds(lambda: step(model)) for _ in range(options.repeats + 1))
        print(f"a step of make demo: {seconds[0]:.3f} CPU s at best, {statistics.median(seconds):.3f} in the median")
        return
    original = OriginalRela(options.original).eval()  # no dropout, so that the losses are comparable
    model = RelaModel(RelaConfig()).eval()
    model.load_state_dict(convert_state_dict(original.state_dict()))
    inputs = random_inputs(options.batch, options.batch)
    masks = (torch.rand(options.batch, SIDE, SIDE) > 0.9).float()
    labels = {"masks": masks, "no_target": torch.zeros(options.batch, dtype=torch.bool)}
    original_optimizer = torch.optim.AdamW(original.parameters(), lr=1e-5, weight_decay=0.05)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, 0.05))
    sides = {
        "original": training_step(original, original_optimizer, lambda: original_loss(original(**inputs), labels)),
        "here": training_step(model, optimizer, lambda: model(**inputs, labels=labels).loss),
    }
    seconds, losses = {name: [] for name in sides}, {}
    for _ in range(options.repeats + 1):
        for name, run_step in sides.items():
            start = time.process_time()
            losses.setdefault(name, run_step())
            seconds[name].append(time.process_time() - start)
    before, after = (statistics.median(seconds[name][1:]) for name in sides)  # the first step of each side is warm-up
    print("| step | original, s | here, s | ratio | losses of the first step |\n|---|---|---|---|---|")
    ratio, first_losses = before / after, " and ".join(f"{losses[name]:.5f}" for name in sides)
    print(f"| training step, batch {options.batch} | {before:.2f} | {after:.2f} | {ratio:.2f} | {first_losses} |")


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]) -> Callable:
    """Return a function that runs one training step and returns its loss."""

    def run() -> float:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def original_loss(outputs: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the published loss from the outputs of the original model."""
    weight = torch.tensor([0.9, 1.1])
    masks = nn.functional.interpolate(outputs["pred_masks"], (SIDE, SIDE), mode="bilinear", align_corners=False)
    small = nn.functional.interpolate(labels["masks"][:, None], (10, 10), mode="bilinear", align_corners=False)
    entropy = nn.functional.cross_entropy
    total = entropy(masks, labels["masks"].long(), weight)
    total = total + 0.1 * entropy(outputs["pred_logits"].transpose(1, 2), small.flatten(1).long(), weight)
    return 5 * (total + 0.1 * entropy(outputs["nt_label"], labels["no_target"].long(), weight))


if __name__ == "__main__":
    main()

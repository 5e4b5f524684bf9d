"""Speed and memory of the metrics beside a plain rewriting of the published method: `python benchmarks/metrics.py`.

Both sides get the same inputs in the same run on one thread, and their scores must agree. The limit is the time this
machine needs to read the masks once.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import evaluate
import numpy as np
import torch
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parents[1]
SIDE, QUERIES = 480, 100


def main() -> None:
    """Run every comparison and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=128, help="sentences per comparison")
    parser.add_argument("--million", type=int, default=1_000_000, help="sentences of the memory test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gres, grec = (evaluate.load(str(ROOT / "evaluate" / name)) for name in ("gres", "grec"))
    print("| what | published, us/sentence | here | ratio | limit (one reading) |\n|---|---|---|---|---|")
    compare_masks(gres, np.random.default_rng(0), options.samples)
    compare_boxes(grec, np.random.default_rng(0), options.samples * 8)
    print()
    measure_memory(gres, options.million)


def compare_masks(metric: evaluate.Metric, rng: np.random.Generator, samples: int) -> None:
    """GRES from bool masks, from run lengths and from two-channel logits."""
    predictions, truths = (np.stack([blob(rng) for _ in range(samples)]) for _ in range(2))
    no_target = np.zeros(samples, bool)
    rles = [[metric.encode(mask) for mask in masks] for masks in (predictions, truths)]
    answers = [{"mask": rle, "no_target": False} for rle in rles[0]]
    references = [{"mask": rle, "no_target": False} for rle in rles[1]]

    def dense(accumulator: object) -> None:
        accumulator.add_masks(predictions, truths, no_target_score=no_target, no_target=no_target)

    def run_lengths(accumulator: object) -> None:
        accumulator.add_batch(predictions=answers, references=references)

    def score(count: Callable[[object], None]) -> tuple[float, float]:
        accumulator = metric.accumulator()
        count(accumulator)
        return tuple(accumulator.compute()[name] for name in ("gIoU", "cIoU"))

    limit = seconds(lambda: [masks.view(np.uint64).max() for masks in (predictions, truths)]) / samples
    report("GRES, bool masks", samples, lambda: published_masks(zip(predictions, truths)), lambda: score(dense), limit)
    report(
        "GRES, run lengths",
        samples,
        lambda: published_masks((coco.decode(a), coco.decode(b)) for a, b in zip(*rles)),
        lambda: score(run_lengths),
        None,
    )
    few = min(samples, 16)
    logits = torch.from_numpy(rng.standard_normal((few, 2, SIDE, SIDE), np.float32))

    def from_logits(accumulator: object) -> None:
        for sample, truth in zip(logits, truths):
            mask = metric.foreground(sample)[None]
            accumulator.add_masks(mask, torch.from_numpy(truth)[None], no_target_score=[0], no_target=[False])

    limit = seconds(lambda: logits.numpy().view(np.uint64).max()) / few
    report(
        "GRES, float logits",
        few,
        lambda: published_masks((sample.argmax(dim=0).numpy(), truth) for sample, truth in zip(logits, truths)),
        lambda: score(from_logits),
        limit,
    )


def published_masks(pairs: object) -> tuple[float, float]:
    """gIoU and cIoU as the published evaluator has them: dense masks kept as int8, then four passes over each pair."""
    kept = [(np.array(pred, dtype=np.int8), np.array(truth, dtype=np.int8)) for pred, truth in pairs]
    ious, intersections, unions = [], 0, 0
    for pred, truth in kept:
        intersection, union = np.sum(np.logical_and(pred, truth)), np.sum(np.logical_or(pred, truth))
        ious.append(intersection / union)
        intersections, unions = intersections + intersection, unions + union
    return 100 * np.mean(ious), 100 * intersections / unions


def compare_boxes(metric: evaluate.Metric, rng: np.random.Generator, samples: int) -> None:
    """GREC from 100 boxes a sentence, and AP by its two backends."""
    predictions, references = [], []
    for _ in range(samples):
        truth = boxes(rng, rng.integers(0, 4))
        near = np.repeat(truth, 2, axis=0) + rng.normal(0, 4, (2 * len(truth), 4))
        found = np.concatenate([near, boxes(rng, QUERIES - len(near))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        scores = np.where(np.arange(QUERIES) < len(near), rng.uniform(0.6, 1, QUERIES), rng.beta(1, 6, QUERIES))
        predictions.append({"boxes": found.astype(np.float32), "scores": scores.astype(np.float32)})
        references.append({"boxes": truth.astype(np.float32)})

    def ours() -> tuple[float]:
        accumulator = metric.accumulator()
        accumulator.add_batch(predictions=predictions, references=references)
        return (accumulator.compute()["F1_score"],)

    report("GREC, F1 of 100 boxes", samples, lambda: (published_boxes(predictions, references),), ours, None)
    if find_spec("hotcoco"):

        def average(backend: str) -> tuple[float, ...]:
            return tuple(metric.average_precision(predictions, references, backend).values())

        slow, fast = (partial(average, backend) for backend in ("pycocotools", "hotcoco"))
        report("GREC, AP by pycocotools and by hotcoco", samples, slow, fast, None)


def published_boxes(predictions: list[dict], references: list[dict]) -> float:
    """F1_score as the published evaluator has it: sentence by sentence on torch."""
    correct = 0
    for prediction, reference in zip(predictions, references):
        pairs = sorted(zip(prediction["scores"].tolist(), prediction["boxes"].tolist()), reverse=True)
        scores, ordered = zip(*pairs)
        ordered = torch.cat([torch.as_tensor(box).view(1, 4) for box in ordered])
        kept, truth = ordered[np.array(scores) >= 0.7], torch.from_numpy(reference["boxes"])
        if not len(truth):
            correct += not len(kept)
            continue
        overlap, matched = giou(kept, truth), 0
        for _ in range(min(overlap.shape)):
            value, index = torch.topk(overlap.flatten(), 1)
            if value < 0.5:
                break
            matched += 1
            overlap[index // len(truth), :] = 0
            overlap[:, index % len(truth)] = 0
        correct += 2 * matched / (len(kept) + len(truth)) >= 1
    return correct / len(references)


def giou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of all pairs of boxes."""
    shared = torch.minimum(one[:, None, 2:], other[:, 2:]) - torch.maximum(one[:, None, :2], other[:, :2])
    intersection = shared.clamp(min=0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1] - intersection
    hull = torch.maximum(one[:, None, 2:], other[:, 2:]) - torch.minimum(one[:, None, :2], other[:, :2])
    hull = hull.clamp(min=0).prod(dim=2)
    return intersection / union - (hull - union) / hull


def measure_memory(metric: evaluate.Metric, sentences: int) -> None:
    """A million sentences through one accumulator."""
    rng, batch = np.random.default_rng(0), 1000
    accumulator = metric.accumulator()
    tracemalloc.start()
    for start in range(0, sentences, batch):
        both, rest = rng.integers(0, SIDE * SIDE // 2, (2, batch))
        accumulator.add_counts(
            intersection=both,
            union=both + rest,
            predicted=both,
            no_target_score=rng.random(batch),
            no_target=rng.random(batch) < 0.3,
            sent_id=np.arange(start, start + batch),
        )
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(f"{sentences} sentences held in {held / sentences:.1f} bytes each (published: {2 * SIDE * SIDE} each)")
    print(f"their scores take {seconds(accumulator.compute):.2f} s")


def report(name: str, samples: int, published: Callable, ours: Callable, limit: float | None) -> None:
    np.testing.assert_allclose(ours(), published(), rtol=1e-9)
    slow, fast = seconds(published) / samples, seconds(ours) / samples
    bound = f"{limit * 1e6:.1f}" if limit else ""
    print(f"| {name} | {slow * 1e6:.1f} | {fast * 1e6:.1f} | {slow / fast:.0f} | {bound} |", flush=True)


def seconds(action: Callable) -> float:
    """Best of the runs that fit into a second, or of three."""
    times = []
    while len(times) < 3 or sum(times) < 1:
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def blob(rng: np.random.Generator) -> np.ndarray:
    """A bool mask of one to three wavy discs, about as detailed as an object of COCO."""
    y, x = np.ogrid[:SIDE, :SIDE]
    mask = np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(1, 4)):
        centre, radius = rng.integers(80, 400, 2), rng.integers(25, 90)
        angle = np.arctan2(y - centre[0], x - centre[1])
        mask |= np.hypot(y - centre[0], x - centre[1]) < radius * (1 + 0.15 * np.sin(5 * angle))
    return mask


def boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    """Boxes x0, y0, x1, y1 in a picture of 640 x 480."""
    corner = rng.uniform(0, [540, 380], (number, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 100, (number, 2))], axis=1)


if __name__ == "__main__":
    main()

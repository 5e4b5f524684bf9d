"""Speed and memory of the metrics beside a plain rewriting of the published method: `python benchmarks/metrics.py`.

Both sides get the same inputs in the same run on one thread, turn by turn, and their scores must agree; medians. Dense
inputs come in batches of 16 written just before, as a model writes them. The limit is the time this machine needs to
read them once.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import evaluate
import numpy as np
import torch
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parents[1]
SIDE, QUERIES, BATCH, REPEATS, SHAPES = 480, 100, 16, 7, 64


def main() -> None:
    """Run every comparison and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=512, help="sentences per comparison")
    parser.add_argument("--million", type=int, default=1_000_000, help="sentences of the memory test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gres, grec = (evaluate.load(str(ROOT / "evaluate" / name)) for name in ("gres", "grec"))
    print("| what | published, us/sentence | here | ratio | limit (one reading) |\n|---|---|---|---|---|")
    compare_masks(gres, np.random.default_rng(0), options.samples)
    compare_boxes(grec, np.random.default_rng(0), options.samples * 2)
    print()
    measure_memory(gres, options.million)


class Fresh:
    """Batches of arrays, each written just before it is read, as a model does; the writing is not timed.

    Attributes:
        seconds: what the writing took.
    """

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays, self.seconds = arrays, 0.0

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for start in range(0, len(self.arrays[0]), BATCH):
            begin = time.process_time()
            batch = [array[start : start + BATCH].copy() for array in self.arrays]
            self.seconds += time.process_time() - begin
            yield batch


def compare_masks(metric: evaluate.Metric, rng: np.random.Generator, samples: int) -> None:
    """GRES from bool masks, from run lengths and from two-channel logits."""
    shapes = [np.stack([blob(rng) for _ in range(SHAPES)]) for _ in range(2)]
    predictions, truths = (shape[np.arange(samples) % SHAPES] for shape in shapes)
    noise = rng.random((2, samples, SIDE, SIDE), np.float32) < 0.3
    rles = [[metric.encode(mask) for mask in masks] for masks in (predictions, truths)]
    answers = [{"mask": rle, "no_target": False} for rle in rles[0]]
    references = [{"mask": rle, "no_target": False} for rle in rles[1]]

    def dense(batches: Iterable) -> tuple[float, float]:
        accumulator = metric.accumulator()
        for pred_masks, masks in batches:
            none = np.zeros(len(masks), bool)
            accumulator.add_masks(pred_masks, masks, no_target_score=none, no_target=none)
        return headline(accumulator)

    def run_lengths() -> tuple[float, float]:
        accumulator = metric.accumulator()
        accumulator.add_batch(predictions=answers, references=references)
        return headline(accumulator)

    def headline(accumulator: object) -> tuple[float, float]:
        return tuple(accumulator.compute()[name] for name in ("gIoU", "cIoU"))

    def from_logits(batches: Iterable) -> tuple[float, float]:
        return dense((metric.foreground(torch.from_numpy(logits)).numpy(), masks) for logits, masks in batches)

    def read(batches: Iterable) -> None:
        for batch in batches:
            for array in batch:
                array.reshape(-1).view(np.uint64).max()

    for name, arrays in (("objects", (predictions, truths)), ("noise", noise)):
        report(f"GRES, bool masks ({name})", samples, published_masks, dense, Fresh(*arrays), read)
    report(
        "GRES, run lengths",
        samples,
        lambda: published_masks([[[coco.decode(rle)] for rle in pair] for pair in zip(*rles)]),
        run_lengths,
    )
    few = min(samples, 16)
    logits = rng.standard_normal((few, 2, SIDE, SIDE), np.float32)

    def published_logits(batches: Iterable) -> tuple[float, float]:
        return published_masks(
            ([sample.argmax(dim=0) for sample in torch.from_numpy(logits)], masks) for logits, masks in batches
        )

    report("GRES, float logits", few, published_logits, from_logits, Fresh(logits, truths[:few]), read)


def published_masks(batches: Iterable) -> tuple[float, float]:
    """gIoU and cIoU as the published evaluator has them: dense masks kept as int8, then four passes over each pair."""
    kept = [
        (np.array(pred, dtype=np.int8), np.array(truth, dtype=np.int8))
        for batch in batches
        for pred, truth in zip(*batch)
    ]
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

    report("GREC, F1 of 100 boxes", samples, lambda: (published_boxes(predictions, references),), ours)
    if find_spec("hotcoco"):

        def average(backend: str) -> tuple[float, ...]:
            return tuple(metric.average_precision(predictions, references, backend).values())

        slow, fast = (partial(average, backend) for backend in ("pycocotools", "hotcoco"))
        report("GREC, AP by pycocotools and by hotcoco", samples, slow, fast)


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


def report(
    name: str,
    samples: int,
    published: Callable,
    ours: Callable,
    fresh: Fresh | None = None,
    read: Callable | None = None,
) -> None:
    """One line of the table; the two sides and the reading alone take turns, so that the load is the same for all."""
    inputs = [fresh] if fresh else []
    np.testing.assert_allclose(ours(*inputs), published(*inputs), rtol=1e-9)
    actions = [published, ours] + ([read] if read else [])
    times = np.array([[seconds(action, fresh) for action in actions] for _ in range(REPEATS)])
    slow, fast, *limit = (f"{1e6 * time / samples:.1f}" for time in np.median(times, axis=0))
    ratio = np.median(times[:, 0] / times[:, 1])
    print(f"| {name} | {slow} | {fast} | {ratio:.0f} | {''.join(limit)} |", flush=True)


def seconds(action: Callable, fresh: Fresh | None = None) -> float:
    """What the action took, less the writing of its inputs."""
    inputs = [fresh] if fresh else []
    written = fresh.seconds if fresh else 0.0
    start = time.process_time()
    action(*inputs)
    return time.process_time() - start - ((fresh.seconds - written) if fresh else 0.0)


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

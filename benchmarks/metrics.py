"""Speed and memory of the metrics beside a plain rewriting of the published method: `python benchmarks/metrics.py`.

Both sides get the same inputs in the same run on one thread, turn by turn, and their scores must agree. The ratio is
the median of the ratios of all turns, with the lowest and the highest beside. Dense inputs come in batches of 16
written just before, as a model writes them. The limit is the time this machine needs to read dense inputs once.

Through run lengths the published side gets the masks it needs, dense, and ours the strings. Masks have about as many
runs as those of COCO (`RUNS`), and four of ten sentences have no target. "compute" is what
`evaluate.load(...).compute` takes.
"""

from __future__ import annotations

import os

from grefcoco_data.arguments import ArgumentParser

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import evaluate
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SIDE, QUERIES, BATCH, REPEATS, SHAPES = 480, 100, 16, 7, 64
RUNS = 250  # of the mask of an object referred to in COCO, squashed to 480 x 480; those made here have as many


def main() -> None:
    """Run every comparison and print a Markdown table."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=512, help="sentences per comparison")
    parser.add_argument("--million", type=int, default=1_000_000, help="sentences of the memory test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gres, grec = (evaluate.load(str(ROOT / "evaluate" / name)) for name in ("gres", "grec"))
    print("| what | published, us/sentence | here | ratio | lowest..highest | limit (one reading) |")
    print("|---|---|---|---|---|---|")
    compare_run_lengths(gres, np.random.default_rng(0), options.samples)
    compare_masks(gres, np.random.default_rng(0), options.samples)
    compare_boxes(grec, np.random.default_rng(0), options.samples * 2)
    print()
    measure_memory(gres, options.million)
    measure_compute(gres, options.million)


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
    """GRES from bool masks and from two-channel logits."""
    shapes = [np.stack([blob(rng) for _ in range(SHAPES)]) for _ in range(2)]
    predictions, truths = (shape[np.arange(samples) % SHAPES] for shape in shapes)
    noise = rng.random((2, samples, SIDE, SIDE), np.float32) < 0.3

    def dense(batches: Iterable) -> tuple[float, float]:
        accumulator = metric.accumulator()
        for pred_masks, masks in batches:
            none = np.zeros(len(masks), bool)
            accumulator.add_masks(pred_masks, masks, no_target_score=none, no_target=none)
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
    few = min(samples, 16)
    logits = rng.standard_normal((few, 2, SIDE, SIDE), np.float32)

    def published_logits(batches: Iterable) -> tuple[float, float]:
        return published_masks(
            ([sample.argmax(dim=0) for sample in torch.from_numpy(logits)], masks) for logits, masks in batches
        )

    report("GRES, float logits", few, published_logits, from_logits, Fresh(logits, truths[:few]), read)


def compare_run_lengths(metric: evaluate.Metric, rng: np.random.Generator, samples: int) -> None:
    """GRES from run lengths, at the size given and with the truth resized, through `compute` and an accumulator."""
    number = 4 * samples
    none = rng.random(number) < 0.4
    shapes = [object_like(rng, (SIDE, SIDE)) for _ in range(SHAPES)]
    runs = np.mean([np.count_nonzero(np.diff(shape.ravel(order="F"))) for shape in shapes])
    print(f"<!-- {runs:.0f} runs a mask -->")
    moved = [np.roll(shape, rng.integers(-20, 20, 2), axis=(0, 1)) for shape in shapes]
    large = [object_like(rng, (480, 640)) for _ in range(SHAPES)]
    square = [object_like(rng, (384, 384)) for _ in range(SHAPES)]
    for name, compat, predicted, true in (("run lengths", "rela", moved, shapes), ("resized", "deris", square, large)):
        empty = np.zeros_like(true[0])
        dense = [(predicted[i % SHAPES], empty if none[i] else true[i % SHAPES]) for i in range(number)]
        strings = {id(mask): metric.encode(mask) for pair in dense for mask in pair}
        encoded = [[strings[id(mask)] for mask in pair] for pair in dense]
        answers = [{"mask": mask, "no_target": 0.0} for mask, _ in encoded]
        references = [
            {"mask": truth, "no_target": bool(no_target), "sent_id": index, "image_id": index // 10}
            for index, ((_, truth), no_target) in enumerate(zip(encoded, none))
        ]

        def published(dense: list = dense, compat: str = compat) -> tuple[float, float]:
            return published_scores(dense, none, 384 if compat == "deris" else None)

        def accumulated(answers: list = answers, references: list = references, compat: str = compat) -> tuple:
            accumulator = metric.accumulator(compat)
            accumulator.add_batch(predictions=answers, references=references)
            scores = accumulator.compute()
            return scores["gIoU"], scores["cIoU"]

        def computed(answers: list = answers, references: list = references, compat: str = compat) -> tuple:
            scores = metric.compute(predictions=answers, references=references, compat=compat)
            return scores["gIoU"], scores["cIoU"]

        report(f"GRES, {name}, compute", number, published, computed)
        report(f"GRES, {name}, accumulator", number, published, accumulated)


def published_scores(pairs: list[tuple], none: np.ndarray, side: int | None) -> tuple[float, float]:
    """gIoU and cIoU of masks given, no sentence rejected, as the published loops have it; resized as by OpenCV."""
    ious, intersections, unions = [], 0, 0
    for (pred, truth), no_target in zip(pairs, none):
        if side:
            rows, columns = (
                np.minimum((np.arange(side) * (1 / (side / old))).astype(int), old - 1) for old in truth.shape
            )
            truth = truth[rows][:, columns]
        pred, truth = np.array(pred, dtype=np.int8), np.array(truth, dtype=np.int8)
        intersection, union = np.sum(np.logical_and(pred, truth)), np.sum(np.logical_or(pred, truth))
        ious.append(0.0 if no_target else intersection / union if union else 0.0)
        intersections, unions = intersections + intersection, unions + union
    return 100 * np.mean(ious), 100 * intersections / unions


def object_like(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A bool mask with about `RUNS` runs of pixels, column by column: a wavy disc, sometimes two."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, bool)
    for _ in range(rng.integers(1, 3)):
        centre = rng.integers(np.multiply(shape, 0.25), np.multiply(shape, 0.75))
        radius = rng.uniform(0.5, 1.2) * RUNS / 6
        angle = np.arctan2(y - centre[0], x - centre[1])
        mask |= np.hypot(y - centre[0], x - centre[1]) < radius * (1 + 0.15 * np.sin(5 * angle))
    return mask


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
        drawn = np.concatenate([near, boxes(rng, QUERIES - len(near))])
        drawn[:, 2:] = np.maximum(drawn[:, 2:], drawn[:, :2])
        scores = np.where(np.arange(QUERIES) < len(near), rng.uniform(0.6, 1, QUERIES), rng.beta(1, 6, QUERIES))
        predictions.append({"boxes": drawn.astype(np.float32), "scores": scores.astype(np.float32)})
        references.append({"boxes": truth.astype(np.float32)})

    def computed() -> tuple[float]:
        return (metric.compute(predictions=predictions, references=references)["F1_score"],)

    def ours() -> tuple[float]:
        accumulator = metric.accumulator()
        accumulator.add_batch(predictions=predictions, references=references)
        return (accumulator.compute()["F1_score"],)

    report("GREC, F1 of 100 boxes, compute", samples, lambda: (published_boxes(predictions, references),), computed)
    report("GREC, F1 of 100 boxes, accumulator", samples, lambda: (published_boxes(predictions, references),), ours)
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


def measure_compute(metric: evaluate.Metric, sentences: int) -> None:
    """A million sentences through `compute`: what it needs besides its inputs."""
    mask = metric.encode(object_like(np.random.default_rng(0), (SIDE, SIDE)))
    answers, references = (
        [{"mask": mask, "no_target": 0.1}] * sentences,
        [{"mask": mask, "no_target": False}] * sentences,
    )
    tracemalloc.start()
    metric.compute(predictions=answers, references=references)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{sentences} sentences through compute: {peak / 2**20:.0f} MiB at most besides the inputs")


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
    ratios = times[:, 0] / times[:, 1]
    spread = f"{ratios.min():.1f}..{ratios.max():.1f}"
    print(f"| {name} | {slow} | {fast} | {np.median(ratios):.1f} | {spread} | {''.join(limit)} |", flush=True)


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

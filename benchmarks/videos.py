"""Speed of the J&F metric against the original code, and of a data set about videos of full size.

    python benchmarks/videos.py metric [--original FOLDER]      folder of the original's metrics.py (needs opencv)
    python benchmarks/videos.py data --work DIR                 33,072 sentences, 434,000 masks, made here
    python benchmarks/videos.py motion                          what needs no motion on the moving scenes

Times are CPU seconds of one thread. Peaks are resident memory with all libraries. Every measurement of data runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType

import evaluate
import numpy as np
from PIL import Image

from grefcoco_data.arguments import ArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grefcoco
from demo.moving_scenes import KINDS, RGB, make_moving_scene
from grefcoco_data.masks import decode_mask, encode_mask

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((480, 854, 12), (720, 1280, 12), (1080, 1920, 6))  # height, width, frames
NUM_VIDEOS, NUM_OBJECTS, NUM_FRAMES, NUM_SENTENCES = 2006, 8171, 54, 33_072


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("metric", "data", "motion", "build", "stream", "map"))
    parser.add_argument("--original", type=Path)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    if options.what == "metric":
        measure_metric(options.original)
    elif options.what == "motion":
        measure_motion()
    elif options.what == "data":
        if not (options.work / "genuine").exists():
            write_genuine(options.work / "genuine")
        for what in ("build", "stream", "map"):
            command = [sys.executable, __file__, what, "--work", str(options.work)]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="")
    else:
        {"build": measure_build, "stream": measure_stream, "map": measure_map}[options.what](options.work)


def peak() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"


def seconds(work: Callable[[], object], repeats: int) -> tuple[float, object]:
    """The least CPU time of a call, and its result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return min(times), result


# ---- metric ------------------------------------------------------------------------------------------------------


def measure_metric(original: Path | None) -> None:
    metric = evaluate.load(str(ROOT / "evaluate/jf"), keep_in_memory=True)
    if original:
        sys.path.insert(0, str(original))
    published = import_module("metrics") if original else None
    print("| size | predictions | original J + F, ms a frame | this project, from RLE | ratio |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for height, width, frames in SIZES:
        truths = [blobs(rng, height, width) for _ in range(frames)]
        kinds = {"good": [np.roll(t, 2, 1) & np.roll(t, -1, 0) for t in truths]}
        kinds["elsewhere"] = [blobs(rng, height, width) for _ in range(frames)]
        kinds["noisy"] = [t ^ speckle(rng, height, width) for t in truths]
        for kind, predictions in kinds.items():
            theirs, ours = compare(metric, published, predictions, truths)
            print(f"| {height} x {width} | {kind} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.0f} |")


def compare(
    metric: evaluate.Metric, published: ModuleType | None, predictions: list[np.ndarray], truths: list[np.ndarray]
) -> tuple[float, float]:
    """Milliseconds a frame of the original code (nan without it) and of the metric; their scores must be equal."""
    rles = [[encode_mask(mask) for mask in masks] for masks in (predictions, truths)]
    ours, scores = seconds(lambda: metric.frame_scores(*rles, "x"), 5)
    theirs = float("nan")
    if published:
        painted = np.array(predictions).astype(np.uint8)

        def score() -> tuple[np.ndarray, np.ndarray]:
            truth = np.array([decode_mask(rle) for rle in rles[1]])
            return published.db_eval_iou(truth, painted), published.db_eval_boundary(truth, painted)

        theirs, expected = seconds(score, 3)
        assert np.array_equal(expected[0], scores.region) and np.array_equal(expected[1], scores.boundary)
    return 1e3 * theirs / len(truths), 1e3 * ours / len(truths)


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two wavy objects."""
    rows, columns = np.ogrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(2):
        y, x, size = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.25) * height
        angle = np.arctan2(rows - y, columns - x)
        mask |= np.hypot(rows - y, columns - x) < size * (1 + 0.2 * np.sin(5 * angle + rng.uniform(0, 6)))
    return mask


def speckle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One in a hundred of all squares of 4 x 4 pixels."""
    return np.kron(rng.random((height // 4, -(-width // 4))) < 0.01, np.ones((4, 4), bool))[:height, :width]


def measure_motion(num_videos: int = 30, size: int = 128) -> None:
    """J&F on moving scenes of answers that ignore motion: nothing, everything, and what has the shape and colour."""
    metric = evaluate.load(str(ROOT / "evaluate/jf"), keep_in_memory=True)
    answers = {name: metric.accumulator() for name in ("always empty", "every shape", "shape and colour")}
    for index in range(num_videos):
        scene = make_moving_scene(0, "valid_u", index, size, num_frames=12, no_target=0.15)
        for number, (sentence, targets) in enumerate(scene.sentences):
            words = sentence.replace("squares", "square").replace("circles", "circle").replace("stars", "star").split()
            described = [
                place
                for place, item in enumerate(scene.objects)
                if (item.shape in words or not {*KINDS} & {*words}) and (item.colour in words or not {*RGB} & {*words})
            ]
            reference = {"masks": union(scene.masks, targets), "no_target": not targets}
            reference |= {"video_id": str(index), "exp_id": str(number), "num_targets": len(targets)}
            chosen = {"always empty": [], "every shape": [*range(len(scene.objects))], "shape and colour": described}
            for name, places in chosen.items():
                answers[name].add(prediction={"masks": union(scene.masks, places)}, reference=reference)
    for name, accumulator in answers.items():
        print(name, {key: round(value, 4) for key, value in accumulator.compute().items()})


def union(masks: np.ndarray, places: list[int]) -> list[dict]:
    """The mask of some objects together on each frame, of masks (objects, frames, height, width)."""
    return [encode_mask(frame) for frame in masks[places].any(axis=0)]


# ---- data --------------------------------------------------------------------------------------------------------


def write_genuine(root: Path) -> None:
    """Write one split of full size: masks of 720 x 1280 pixels, frames of few bytes in a tar."""
    rng, folder = np.random.default_rng(0), root / "train"
    folder.mkdir(parents=True)
    pool = [json.dumps(encode_mask(blobs(rng, 720, 1280))) for _ in range(300)]
    image = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (9, 16, 3), np.uint8)).resize((1280, 720)).save(image, format="JPEG")
    objects_each = np.bincount(rng.integers(0, NUM_VIDEOS, NUM_OBJECTS), minlength=NUM_VIDEOS)
    sentences_each = np.bincount(rng.integers(0, NUM_VIDEOS, NUM_SENTENCES), minlength=NUM_VIDEOS)
    frames = [f"{number:05}" for number in range(NUM_FRAMES)]
    videos, first = {}, 0
    with (folder / "mask_dict.json").open("w") as file, tarfile.open(folder / "JPEGImages.tar", "w") as archive:
        file.write("{")
        for number, (num_objects, num_sentences) in enumerate(zip(objects_each.tolist(), sentences_each.tolist())):
            for anno_id in range(first, first + num_objects):
                masks = ", ".join(pool[place] for place in rng.integers(0, len(pool), NUM_FRAMES))
                file.write(f'{", " if anno_id else ""}"{anno_id}": [{masks}]')
            expressions = {}
            for sentence in range(num_sentences):
                targets = rng.choice(num_objects, rng.integers(0, min(3, num_objects) + 1), replace=False).tolist()
                ids = {"obj_id": targets, "anno_id": [first + place for place in targets]}
                expressions[str(sentence)] = {"exp": f"the thing {sentence} that moves to the left"} | ids
            first += num_objects
            videos[f"{number:012x}"] = {"expressions": expressions, "frames": frames}
            for name in frames:
                member = tarfile.TarInfo(f"JPEGImages/{number:012x}/{name}.jpg")
                member.size = len(image.getvalue())
                archive.addfile(member, io.BytesIO(image.getvalue()))
        file.write("}")
    (folder / "meta_expressions_v2.json").write_text(json.dumps({"videos": videos}))


def measure_build(work: Path) -> None:
    taken, report = seconds(lambda: grefcoco.build_videos(work / "genuine", work / "built", "mevis_v2"), 1)
    size = (work / "genuine/train/mask_dict.json").stat().st_size / 1e6
    counts = report["splits"]["train"]
    print(f"build: {taken:.0f} CPU s, {peak()}, {counts}, mask_dict.json {size:.0f} MB")


def measure_stream(work: Path) -> None:
    start = time.perf_counter(), time.process_time()
    rows = iter(grefcoco.load(work / "built", config="mevis_v2", split="train", streaming=True))
    next(rows)
    waited, worked = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"stream: first row after {waited:.2f} s ({worked:.2f} CPU s)", end="")
    taken, _ = seconds(lambda: deque(islice(rows, 5000), maxlen=0), 1)
    print(f", then {5000 / taken:.0f} frame rows a CPU second, {peak()}")


def measure_map(work: Path) -> None:
    load = {"config": "mevis_v2", "split": "train"}
    grefcoco.load(work / "built", **load, layout="video")  # prepares the cache
    taken, rows = seconds(lambda: grefcoco.load(work / "built", **load), 1)
    places = np.random.default_rng(0).integers(0, len(rows), 300).tolist()
    reading, _ = seconds(lambda: [rows[place] for place in places], 1)
    print(f"map: {len(rows):,} frame rows ready in {taken:.1f} CPU s", end="")
    print(f", {300 / reading:.0f} random rows a CPU second, {peak()}")


if __name__ == "__main__":
    main()

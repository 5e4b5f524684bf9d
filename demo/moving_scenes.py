"""Synthetic videos in the file format of MeViS v2: shapes that move, and sentences about their motion.

    python demo/moving_scenes.py data/moving --train 120 --valid-u 30
    grefcoco build --config mevis_v2 --annotations data/moving --out data/moving-built

A video has a few coloured shapes on a background; each moves left, right, up or down, stays, stops half-way or appears
late. A sentence names the targets by motion, and sometimes by shape and colour; some sentences have no target. Most
cannot be answered from one frame: what moves left looks as what stays.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's import path has only its own folder

from demo.scenes import RGB, SHAPES, Figure, draw_background
from grefcoco_data.arguments import ArgumentParser
from grefcoco_data.masks import encode_mask

SPLITS = ("train", "valid_u")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = {f"move {way}": step for way, step in MOVES.items()} | {"stay still": (0, 0), "stop": None, "appear": (0, 0)}
NUMBERS = {1: "the", 2: "the two", 3: "the three", 4: "the four", 5: "the five"}
KINDS = SHAPES[:3]  # circle, square, star
TRAVEL = 0.3  # of the side of a frame, from the first frame to the last


@dataclass(frozen=True)
class MovingObject:
    """A shape with its colour, its motion (of `MOTIONS`), and where it is on each frame (None: not there yet)."""

    shape: str
    colour: str
    motion: str
    radius: float
    centres: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class MovingScene:
    """Frames (size, size, 3) uint8, masks (objects, frames, size, size) bool, sentences with the places of targets."""

    objects: list[MovingObject]
    frames: list[np.ndarray]
    masks: np.ndarray
    sentences: list[tuple[str, list[int]]]


def make_moving_scene(seed: int, split: str, index: int, size: int, num_frames: int, no_target: float) -> MovingScene:
    """Make the video of these arguments; `no_target` is the share of sentences without target."""
    rng = random.Random(f"{seed} {split} {index}")
    noise_seed = rng.getrandbits(64)
    colours = rng.sample(sorted(RGB), 3)
    objects = [draw_object(rng, colours, size, num_frames) for _ in range(rng.randint(2, 5))]
    background = draw_background(np.random.default_rng(noise_seed), size)
    frames, masks = [], np.zeros((len(objects), num_frames, size, size), bool)
    for frame in range(num_frames):
        canvas, noise = background.copy(), np.random.default_rng(noise_seed)
        for number, item in enumerate(objects):
            if item.centres[frame] is None:
                continue
            figure = Figure.place(item.shape, item.colour, *item.centres[frame], item.radius, 0.0, size)
            figure.paint(canvas, RGB[item.colour], noise)
            inside = figure.full_mask(size)
            masks[:number, frame] &= ~inside  # later shapes cover earlier ones
            masks[number, frame] = inside
        frames.append(np.clip(canvas, 0, 255).astype(np.uint8))
    return MovingScene(objects, frames, masks, draw_sentences(rng, objects, no_target))


def draw_object(rng: random.Random, colours: list[str], size: int, num_frames: int) -> MovingObject:
    """Draw an object whose way lies inside the frame."""
    motion = rng.choice(sorted(MOTIONS))
    radius = rng.uniform(0.08, 0.14) * size
    step = MOVES[rng.choice(sorted(MOVES))] if motion == "stop" else MOTIONS[motion]
    travel = TRAVEL * size
    low, high = 1.2 * radius, size - 1.2 * radius
    start = [rng.uniform(low + travel * max(0, -way), high - travel * max(0, way)) for way in step]
    centres: list[tuple[float, float] | None] = []
    for frame in range(num_frames):
        done = frame / (num_frames - 1)
        if motion == "stop":
            done = min(1.0, 2 * done)
        is_there = motion != "appear" or 2 * frame >= num_frames
        centres.append((start[0] + travel * done * step[0], start[1] + travel * done * step[1]) if is_there else None)
    return MovingObject(rng.choice(KINDS), rng.choice(colours), motion, radius, tuple(centres))


def draw_sentences(rng: random.Random, objects: list[MovingObject], no_target: float) -> list[tuple[str, list[int]]]:
    """Draw different sentences about a video, most with targets."""
    sentences: dict[str, list[int]] = {}
    for _ in range(40):
        example = rng.choice(objects)
        shape = example.shape if rng.random() < 0.6 else None
        colour = example.colour if rng.random() < 0.3 else None
        is_wrong = rng.random() < no_target
        motion = rng.choice(sorted(MOTIONS)) if is_wrong else example.motion
        targets = [
            place
            for place, item in enumerate(objects)
            if item.motion == motion and shape in (None, item.shape) and colour in (None, item.colour)
        ]
        if is_wrong == (not targets):
            sentences[describe(shape, colour, motion, len(targets))] = targets
        if len(sentences) == 6:
            break
    return list(sentences.items())


def describe(shape: str | None, colour: str | None, motion: str, number: int) -> str:
    """Such as "the two red circles that move left"; a sentence without target speaks of one thing."""
    noun = " ".join(word for word in (colour, shape or "shape") if word)
    if number > 1:
        return f"{NUMBERS[number]} {noun}s that {motion}"
    verb, _, rest = motion.partition(" ")
    return f"the {noun} that {verb}s {rest}".strip()


# ---- writing -----------------------------------------------------------------------------------------------------


def write_moving_scenes(
    out: str | os.PathLike,
    videos: dict[str, int],
    seed: int = 0,
    size: int = 128,
    num_frames: int = 12,
    no_target: float = 0.15,
) -> None:
    """Write videos in the file format of MeViS v2 to the folder `out`, atomically.

    Args:
        videos: number of videos of each split.
        size: side of a frame in pixels.
        no_target: share of sentences without target.

    Raises:
        ValueError: a parameter is out of range, or `out` exists.
    """
    if set(videos) - set(SPLITS) or min(videos.values(), default=0) < 0 or not any(videos.values()):
        raise ValueError(f"videos {videos} must have at least one video, of the splits {', '.join(SPLITS)}")
    if not 64 <= size <= 2048 or not 2 <= num_frames <= 1000 or not 0 <= no_target <= 1:
        raise ValueError(
            f"size {size} must be 64 to 2048, num_frames {num_frames} 2 to 1000, no_target {no_target} 0 to 1"
        )
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "videos"
        for split, count in videos.items():
            if count:
                write_split(folder / split, split, count, seed, size, num_frames, no_target)
        folder.rename(out)


def write_split(folder: Path, split: str, count: int, seed: int, size: int, num_frames: int, no_target: float) -> None:
    """Write the frames, sentences and masks of one split."""
    entries, masks = {}, {}
    names = [f"{frame:05}" for frame in range(num_frames)]
    for index in tqdm(range(count), desc=f"moving {split}", unit="video", disable=None):
        scene = make_moving_scene(seed, split, index, size, num_frames, no_target)
        video_id = f"{random.Random(f'{seed} {split} {index} name').getrandbits(48):012x}"
        (folder / "JPEGImages" / video_id).mkdir(parents=True)
        for name, pixels in zip(names, scene.frames):
            Image.fromarray(pixels).save(folder / "JPEGImages" / video_id / f"{name}.jpg", quality=90)
        first = len(masks)
        for column in scene.masks:
            masks[str(len(masks))] = [encode_mask(mask) if mask.any() else None for mask in column]
        entries[video_id] = {
            "expressions": {
                str(number): {"exp": sentence, "obj_id": targets, "anno_id": [first + place for place in targets]}
                for number, (sentence, targets) in enumerate(scene.sentences)
            },
            "vid_id": index,
            "frames": names,
        }
    (folder / "meta_expressions_v2.json").write_text(json.dumps({"videos": entries}), encoding="utf-8")
    (folder / "mask_dict.json").write_text(json.dumps(masks), encoding="utf-8")


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT", help="output folder; it must not exist")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    for split, count in zip(SPLITS, (120, 30)):
        parser.add_argument(
            f"--{split.replace('_', '-')}", type=int, default=count, help=f"number of {split} videos (default {count})"
        )
    parser.add_argument("--size", type=int, default=128, help="side of a frame in pixels (default 128)")
    parser.add_argument("--num-frames", type=int, default=12, help="frames of a video (default 12)")
    parser.add_argument("--no-target", type=float, default=0.15, help="share of sentences without target")
    args = parser.parse_args()
    videos = {split: getattr(args, split) for split in SPLITS}
    try:
        write_moving_scenes(args.out, videos, args.seed, args.size, args.num_frames, args.no_target)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {sum(videos.values())} videos written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Made scenes in the genuine gRefCOCO format, so that a demo drives the real reader without the real data.

    python demo/scenes.py data/scenes-easy --level easy --seed 0 --train 1500 --val 150 --testA 150 --testB 150

writes `grefs(unc).json`, `instances.json` and `train2014/COCO_train2014_%012d.jpg` below the folder it is given.

A scene is a handful of coloured shapes on a textured ground, later ones hiding parts of earlier ones; `sentences.py`
says what is said of it. Every scene depends on (level, seed, split, index, size, no_target) alone: asking for more
images leaves the first ones as they were.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks beside the script only

from demo.sentences import COLOURS, SPEECHES, Expression, Thing, expressions
from grefcoco_data.arguments import ArgumentParser

VERSION = 1  # of the scenes: raise it when equal parameters would give other files
SPLITS = ("train", "val", "testA", "testB")
SHAPES = ("circle", "square", "star", "triangle", "ring")  # category ids count from 1 in this order
RGB = {
    "red": (222, 47, 44),
    "green": (52, 168, 72),
    "blue": (40, 104, 226),
    "yellow": (250, 208, 40),
    "purple": (150, 62, 196),
    "white": (246, 246, 244),
}
DOT_RGB = (72, 66, 60)  # a crowd's colour, none that is spoken of


@dataclass(frozen=True)
class Level:
    """What scenes of a level hold: `radii` as parts of the side, `seen` the part of a thing that others must leave."""

    shapes: tuple[str, ...]
    objects: tuple[int, int]
    radii: tuple[tuple[float, float], ...]
    seen: float
    crowds: float


LEVELS = {
    "easy": Level(SHAPES[:3], objects=(2, 5), radii=((0.09, 0.18),), seen=0.8, crowds=0.0),
    "full": Level(SHAPES, objects=(3, 8), radii=((0.06, 0.075), (0.11, 0.15)), seen=0.75, crowds=0.15),
}


# ----------------------------------------------------------------------------------------------------------- drawing


def star(points: int, inner: float, outer: float) -> np.ndarray:
    """Corners (2 * points, 2) of a star around the origin, one tip upwards."""
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.where(np.arange(2 * points) % 2, inner, outer)[:, None]


CORNERS = {
    "square": 0.80 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
    "star": star(5, 0.50, 1.12),
    "triangle": 1.12 * np.array([[0, -1], [math.sqrt(3) / 2, 0.5], [-math.sqrt(3) / 2, 0.5]]) + [0, 0.1],
}
ROUNDING = {"square": 0.10, "star": 0.05, "triangle": 0.08}
REACH = 1.4  # nothing of a figure, its shadow included, is drawn farther from its centre, in radii


def distance_to(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (h, w) from points to a shape of radius about 1 at the origin; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.27
    start = CORNERS[shape].astype(np.float32)[:, :, None, None]
    edge_x, edge_y = np.moveaxis(np.roll(start, -1, axis=0) - start, 1, 0)
    to_x, to_y = x - start[:, 0], y - start[:, 1]  # (corners, h, w)
    along = np.clip((to_x * edge_x + to_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    distance = np.sqrt(((to_x - along * edge_x) ** 2 + (to_y - along * edge_y) ** 2).min(0))
    after, before = to_y >= 0, to_y < edge_y  # both: the edge goes down past this row; neither: it goes up past it
    turn = edge_x * to_y - edge_y * to_x
    inside = np.logical_xor.reduce((after & before & (turn > 0)) | (~after & ~before & (turn < 0)))
    return np.where(inside, -distance, distance) - ROUNDING[shape]


@dataclass(frozen=True)
class Figure:
    """One thing to draw: centre and radius in pixels, the turn in radians, the window it lies in and its distances."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    window: tuple[slice, slice]
    distance: np.ndarray  # (h, w) of the window, pixels, negative inside

    @classmethod
    def place(cls, shape: str, colour: str, x: float, y: float, radius: float, turn: float, side: int) -> Figure:
        reach = REACH * radius
        top, bottom = max(0, int(y - reach)), min(side, math.ceil(y + reach))
        left, right = max(0, int(x - reach)), min(side, math.ceil(x + reach))
        window = (slice(top, bottom), slice(left, right))
        rows, columns = np.ogrid[window]
        across, down = (((at + 0.5 - centre) / radius).astype(np.float32) for at, centre in ((columns, x), (rows, y)))
        cos, sin = math.cos(turn), math.sin(turn)
        distance = distance_to(shape, cos * across + sin * down, cos * down - sin * across)
        return cls(shape, colour, x, y, radius, window, distance * radius)

    def footprint(self, side: int) -> np.ndarray:
        """Its mask (side, side), as if nothing lay on it."""
        mask = np.zeros((side, side), bool)
        mask[self.window] = self.distance < 0
        return mask

    def paint(self, canvas: np.ndarray, rgb: Sequence[float], noise: np.random.Generator) -> None:
        """Onto `canvas` (side, side, 3) float: shadow, then the figure, lit from the upper left, with an outline."""
        ground = canvas[self.window]
        h, w = self.distance.shape
        shift = max(1, round(0.1 * self.radius))
        shadow = np.pad(self.distance, ((shift, 0), (shift, 0)), mode="edge")[:h, :w]
        ground *= 1 - 0.45 * np.clip(0.5 - shadow / (2.5 * shift), 0, 1)[..., None]
        rows, columns = np.ogrid[self.window]
        light = -((columns - self.x) + (rows - self.y)) / self.radius
        grain = noise.normal(0, 5, (h, w)) + noise.choice((0, 7)) * np.sin((columns - rows) * (5 / self.radius))
        outline = np.clip(0.5 + self.distance + max(1.0, 0.07 * self.radius), 0, 1)
        shade = ((1 + 0.10 * light) * (1 - 0.5 * outline))[..., None]
        ink = np.asarray(rgb) * shade + grain[..., None]
        ground += (ink - ground) * np.clip(0.5 - self.distance, 0, 1)[..., None]


def background(noise: np.random.Generator, side: int) -> np.ndarray:
    """A muted ground (side, side, 3), float 0..255, so that any of the colours stands out on it."""
    rows, columns = np.ogrid[:side, :side]
    turn = noise.uniform(0, 2 * np.pi)
    across = (np.cos(turn) * columns + np.sin(turn) * rows).astype(np.float32) / side
    along = (np.cos(turn) * rows - np.sin(turn) * columns).astype(np.float32) / side
    cells = noise.uniform(4, 9)
    blend = {
        "gradient": lambda: across,
        "stripes": lambda: 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * cells * across)),
        "checker": lambda: 0.5 + 0.5 * np.tanh(6 * np.sin(np.pi * cells * across) * np.sin(np.pi * cells * along)),
        "blotches": lambda: 0.5 + 0.5 * np.tanh(5 * (cloud(noise, side, 6) - 0.5)),
        "noise": lambda: 0.6 * cloud(noise, side, 5) + 0.4 * cloud(noise, side, 24),
    }[noise.choice(("gradient", "stripes", "checker", "blotches", "noise"))]()
    grey = noise.uniform(70, 165)
    tints = grey + noise.uniform(-22, 22, (2, 3)) + noise.uniform(10, 26) * np.array([[1], [-1]])
    ground = tints[0] + (tints[1] - tints[0]) * np.clip(blend, 0, 1)[..., None]
    return ground + noise.uniform(1, 6) * noise.standard_normal((side, side, 1), np.float32)


def cloud(noise: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise (side, side), 0..1, with that many cells across."""
    coarse = Image.fromarray(noise.uniform(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------------------ scenes


@dataclass(frozen=True)
class Scene:
    """A picture, its things from back to front, what is seen of each and of a crowd (maybe nothing), what is said."""

    picture: np.ndarray  # (side, side, 3) uint8
    things: tuple[Thing, ...]
    masks: tuple[np.ndarray, ...]  # (side, side) bool each, disjoint
    crowd: np.ndarray
    expressions: tuple[Expression, ...]


def make_scene(level: str, seed: int, split: str, index: int, size: int = 128, no_target: float = 0.09) -> Scene:
    """The scene that these arguments determine; `size` is the image's side in pixels."""
    rng = random.Random(f"{seed} {level} {split} {index}")
    noise = np.random.default_rng(rng.getrandbits(64))
    rules = LEVELS[level]
    figures, masks = lay_out(rng, rules, size)
    canvas = background(noise, size)
    dots = scatter(rng, size) if rng.random() < rules.crowds else []
    for dot in dots:
        dot.paint(canvas, DOT_RGB, noise)
    for figure in figures:
        figure.paint(canvas, RGB[figure.colour], noise)
    covered = np.any([figure.footprint(size) for figure in figures], axis=0)
    crowd = np.any([np.zeros_like(covered), *(dot.footprint(size) for dot in dots)], axis=0) & ~covered
    things = tuple(Thing.from_box(f.shape, f.colour, box_of(m), size) for f, m in zip(figures, masks))
    said = tuple(expressions(rng, things, SPEECHES[level], no_target))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), things, tuple(masks), crowd, said)


def lay_out(rng: random.Random, level: Level, side: int) -> tuple[list[Figure], list[np.ndarray]]:
    """Figures from back to front and what is seen of each; one that would hide too much of another is drawn anew."""
    figures: list[Figure] = []
    masks: list[np.ndarray] = []
    colours = rng.sample(COLOURS, rng.randint(2, 4))  # few, so that sets and swapped attributes are frequent
    wanted = rng.randint(*level.objects)
    for _ in range(200):
        radius = rng.uniform(*rng.choice(level.radii)) * side
        x, y = (rng.uniform(1.2 * radius, side - 1.2 * radius) for _ in "xy")
        turn = rng.uniform(-0.35, 0.35)
        figure = Figure.place(rng.choice(level.shapes), rng.choice(colours), x, y, radius, turn, side)
        footprint = figure.footprint(side)
        if all((m & ~footprint).sum() >= level.seen * (f.distance < 0).sum() for f, m in zip(figures, masks)):
            masks = [m & ~footprint for m in masks] + [footprint]
            figures.append(figure)
        if len(figures) == wanted:
            break
    return figures, masks


def scatter(rng: random.Random, side: int) -> list[Figure]:
    """A cluster of small dots: one crowd, drawn behind everything and never spoken of."""
    x, y = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
    places = [(x + rng.triangular(-0.16, 0.16), y + rng.triangular(-0.16, 0.16)) for _ in range(rng.randint(9, 16))]
    return [Figure.place("circle", "", a * side, b * side, 0.017 * side, 0, side) for a, b in places]


def box_of(mask: np.ndarray) -> list[float]:
    """The tight box (xywh, pixels) of a mask that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)]


def outlines(mask: np.ndarray) -> list[list[float]] | None:
    """Polygons [x, y, x, y, ...] along the pixels' edges, exactly the mask once rasterised; None if it has holes."""
    edges = edges_of(mask)
    polygons = []
    for start in sorted(edges):
        if start not in edges:
            continue  # walked already
        x, y, way = start
        polygon, turns = [], 0
        while (x, y, way) in edges:
            edges.remove((x, y, way))
            x, y = x + STEPS[way][0], y + STEPS[way][1]
            turn = next((turn for turn in (0, 1, -1) if (x, y, (way + turn) % 4) in edges), start[2] - way)
            if turn:
                polygon += [float(x), float(y)]
                turns += 1 if turn % 4 == 1 else -1
            way = (way + turn) % 4
        if turns < 0:
            return None  # around a hole the walk goes the other way
        polygons.append(polygon)
    return polygons


STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # along the upper, right, lower and left edge of a pixel, clockwise


def edges_of(mask: np.ndarray) -> set[tuple[int, int, int]]:
    """The pixels' edges between a mask and what is outside: (x, y) where each starts, and its way in STEPS."""
    left, top, width, height = (int(side) for side in box_of(mask))
    mask = mask[top : top + height, left : left + width]
    padded = np.pad(mask, 1)
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    edges = set()
    for way, ((x, y), neighbour) in enumerate(zip(((0, 0), (1, 0), (1, 1), (0, 1)), neighbours)):
        rows, columns = np.nonzero(mask & ~neighbour)
        edges.update(zip((columns + (left + x)).tolist(), (rows + (top + y)).tolist(), [way] * len(rows)))
    return edges


# ----------------------------------------------------------------------------------------------------------- writing


def write_scenes(
    out: str | os.PathLike,
    level: str,
    seed: int,
    images: dict[str, int],
    size: int = 128,
    no_target: float = 0.09,
) -> bool:
    """Writes scenes in the genuine format below `out`, all or nothing; False if equal ones are there already.

    `images` says how many of each split, `size` is the side in pixels, `no_target` the share of empty expressions.
    Raises `ValueError` for parameters out of range and where `out` holds something else.
    """
    check_parameters(level, images, size, no_target)
    out = Path(out)
    made = {"level": level, "seed": seed, "images": images, "size": size, "no_target": no_target, "version": VERSION}
    if out.exists():
        if parameters_of(out) == made:
            return False
        raise ValueError(f"{out} exists and holds something other than these scenes: remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "scenes"
        (folder / "train2014").mkdir(parents=True)
        refs, instances = [], new_instances(made)
        plan = [(split, index) for split, count in images.items() for index in range(count)]
        for split, index in tqdm(plan, desc=f"{level} scenes", unit="image"):
            image_id = len(SPLITS) * index + SPLITS.index(split) + 1  # the same whatever the other splits' sizes are
            scene = make_scene(level, seed, split, index, size, no_target)
            name = f"COCO_train2014_{image_id:012d}.jpg"
            Image.fromarray(scene.picture).save(folder / "train2014" / name, quality=90)
            instances["images"].append(image_record(image_id, name, size))
            annotations = annotation_records(scene, image_id)
            instances["annotations"] += annotations
            refs += ref_records(scene, image_id, split, name, annotations, random.Random(f"{seed} raw {image_id}"))
        (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
        (folder / "grefs(unc).json").write_text(json.dumps(refs), encoding="utf-8")
        folder.rename(out)
    return True


def check_parameters(level: str, images: dict[str, int], size: int, no_target: float) -> None:
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if set(images) - set(SPLITS) or min(images.values(), default=0) < 0 or not any(images.values()):
        raise ValueError(f"images {images} must count at least one image, for splits among {', '.join(SPLITS)}")
    if not 64 <= size <= 2048:
        raise ValueError(f"size {size} must lie between 64 and 2048 pixels")
    if not 0 <= no_target <= 1:
        raise ValueError(f"no_target {no_target} must be a share between 0 and 1")


def parameters_of(folder: Path) -> dict | None:
    """What the scenes in `folder` were made with; None if it holds none."""
    try:
        return json.loads((folder / "instances.json").read_text(encoding="utf-8"))["info"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def new_instances(made: dict) -> dict:
    """An `instances.json` without images: the shapes are its categories."""
    return {
        "info": {"description": "Made scenes of coloured shapes", "version": str(VERSION), "parameters": made},
        "licenses": [{"url": "", "id": 1, "name": "No known copyright restrictions"}],
        "images": [],
        "annotations": [],
        "categories": [{"supercategory": "shape", "id": i, "name": name} for i, name in enumerate(SHAPES, 1)],
    }


def image_record(image_id: int, name: str, size: int) -> dict:
    return {
        "license": 1,
        "file_name": name,
        "coco_url": "",
        "height": size,
        "width": size,
        "date_captured": "2014-01-01 00:00:00",
        "flickr_url": "",
        "id": image_id,
    }


def annotation_records(scene: Scene, image_id: int) -> list[dict]:
    """One record per thing, in the scene's order, then the crowd's; ids count on from 100 * image_id."""
    crowd = [scene.crowd] if scene.crowd.any() else []
    shapes = [thing.shape for thing in scene.things] + ["circle"] * len(crowd)
    records = []
    for place, (shape, mask) in enumerate(zip(shapes, [*scene.masks, *crowd])):
        iscrowd = int(place >= len(scene.things))
        records.append(
            {
                "segmentation": (None if iscrowd else outlines(mask)) or run_lengths(mask),
                "area": float(mask.sum()),
                "iscrowd": iscrowd,
                "image_id": image_id,
                "bbox": box_of(mask),
                "category_id": SHAPES.index(shape) + 1,
                "id": 100 * image_id + place,
            }
        )
    return records


def run_lengths(mask: np.ndarray) -> dict:
    """The uncompressed RLE of a mask, column by column, as COCO's own files have it."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def ref_records(
    scene: Scene, image_id: int, split: str, name: str, annotations: list[dict], rng: random.Random
) -> list[dict]:
    """The refs of a scene; ids count on from 20 * (image_id - 1), so that the first is 0 as in the genuine files."""
    records = []
    for place, said in enumerate(scene.expressions):
        ref_id = 20 * (image_id - 1) + place
        targets = [annotations[i] for i in said.targets]
        sent_ids = [20 * ref_id + i for i in range(len(said.sentences))]
        records.append(
            {
                "ref_id": ref_id,
                "image_id": image_id,
                "split": split,
                "file_name": name.replace(".jpg", f"_{place}.jpg") if rng.random() < 0.25 else name,
                "ann_id": [target["id"] for target in targets] or [-1],
                "category_id": [target["category_id"] for target in targets] or [-1],
                "no_target": not targets,
                "sent_ids": sent_ids,
                "sentences": [
                    {"raw": scribble(rng, sent), "sent": sent, "sent_id": sent_id, "tokens": sent.split()}
                    for sent_id, sent in zip(sent_ids, said.sentences)
                ],
            }
        )
    return records


def scribble(rng: random.Random, sent: str) -> str:
    """A sentence as an annotator might type it: most of them clean, some with capitals, a full stop or a slip."""
    chance = rng.random()
    if chance < 0.03:
        at = rng.randrange(len(sent) - 1)
        return sent[:at] + sent[at + 1] + sent[at] + sent[at + 2 :]
    if chance < 0.05:
        return sent.upper()
    return (sent.capitalize() if chance < 0.2 else sent) + rng.choice(("", "", "", "", "", "."))


# ------------------------------------------------------------------------------------------------------ command line


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT", help="folder to write; must be new, or made with the same arguments")
    parser.add_argument("--level", choices=tuple(LEVELS), default="easy")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in zip(SPLITS, (1500, 150, 150, 150)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images of {split} (default {count})")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels (default 128)")
    parser.add_argument("--no-target", type=float, default=0.09, help="share of no-target expressions (default 0.09)")
    args = parser.parse_args()
    images = {split: getattr(args, split) for split in SPLITS}
    try:
        written = write_scenes(args.out, args.level, args.seed, images, args.size, args.no_target)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {sum(images.values())} images {'written' if written else 'reused'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

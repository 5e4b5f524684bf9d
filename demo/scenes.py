"""Synthetic scenes in the file format of gRefCOCO: the demo uses the normal reader without the real data.

    python demo/scenes.py data/scenes-easy --level easy --seed 0 --train 1500 --val 150 --testA 150 --testB 150

The command writes `grefs(unc).json`, `instances.json` and `train2014/COCO_train2014_%012d.jpg` to the given folder.

A scene has a few coloured shapes on a textured background. Later shapes can cover parts of earlier shapes.
`sentences.py` makes its referring expressions. A scene depends only on (level, seed, split, index, size, no_target):
with more images, the first images stay the same.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's import path has only its own folder

from demo.sentences import COLOURS, SENTENCE_RULES, Expression, VisibleObject, draw_expressions, paraphrase
from grefcoco_data.arguments import ArgumentParser

VERSION = 1  # of the scenes: increase it when the same parameters give different files
SPLITS = ("train", "val", "testA", "testB")
SHAPES = ("circle", "square", "star", "triangle", "ring")  # category ids start at 1, in this order
RGB = {
    "red": (222, 47, 44),
    "green": (52, 168, 72),
    "blue": (40, 104, 226),
    "yellow": (250, 208, 40),
    "purple": (150, 62, 196),
    "white": (246, 246, 244),
}
DOT_RGB = (72, 66, 60)  # colour of a crowd; no sentence uses it


@dataclass(frozen=True)
class Level:
    """The contents of the scenes of one level."""

    shapes: tuple[str, ...]
    objects: tuple[int, int]  # minimum and maximum number
    radii: tuple[tuple[float, float], ...]  # ranges, as fractions of the image side
    min_visible: float  # minimum visible fraction of an object's area
    crowd_probability: float


LEVELS = {
    "easy": Level(SHAPES[:3], objects=(2, 5), radii=((0.09, 0.18),), min_visible=0.8, crowd_probability=0.0),
    "full": Level(
        SHAPES, objects=(3, 8), radii=((0.06, 0.075), (0.11, 0.15)), min_visible=0.75, crowd_probability=0.15
    ),
}


# ----------------------------------------------------------------------------------------------------------- drawing


def star_vertices(points: int, inner: float, outer: float) -> np.ndarray:
    """Return the vertices (2 * points, 2) of a star around the origin; one point is at the top."""
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.where(np.arange(2 * points) % 2, inner, outer)[:, None]


VERTICES = {
    "square": 0.80 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
    "star": star_vertices(5, 0.50, 1.12),
    "triangle": 1.12 * np.array([[0, -1], [math.sqrt(3) / 2, 0.5], [-math.sqrt(3) / 2, 0.5]]) + [0, 0.1],
}
ROUNDING_RADIUS = {"square": 0.10, "star": 0.05, "triangle": 0.08}
WINDOW_RADIUS = 1.4  # in radii: a figure and its shadow are inside this distance from the centre


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return signed distances (h, w), negative inside, from points to a shape of radius 1 at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.27
    start = VERTICES[shape].astype(np.float32)[:, :, None, None]
    edge_x, edge_y = np.moveaxis(np.roll(start, -1, axis=0) - start, 1, 0)
    to_x, to_y = x - start[:, 0], y - start[:, 1]  # (vertices, h, w)
    along = np.clip((to_x * edge_x + to_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    distance = np.sqrt(((to_x - along * edge_x) ** 2 + (to_y - along * edge_y) ** 2).min(0))
    # A point is inside if an odd number of edges cross its row on one side of it.
    after, before = to_y >= 0, to_y < edge_y  # both true: the edge crosses this row downwards; both false: upwards
    turn = edge_x * to_y - edge_y * to_x
    inside = np.logical_xor.reduce((after & before & (turn > 0)) | (~after & ~before & (turn < 0)))
    return np.where(inside, -distance, distance) - ROUNDING_RADIUS[shape]


@dataclass(frozen=True)
class Figure:
    """One shape to draw: centre and radius in pixels, and its signed distances in a window of the image."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    window: tuple[slice, slice]
    distance: np.ndarray  # (h, w) of the window, pixels, negative inside

    @classmethod
    def place(cls, shape: str, colour: str, x: float, y: float, radius: float, angle: float, size: int) -> Figure:
        """Make the figure at (x, y), rotated by `angle` in radians, in an image with sides of `size` pixels."""
        reach = WINDOW_RADIUS * radius
        top, bottom = max(0, int(y - reach)), min(size, math.ceil(y + reach))
        left, right = max(0, int(x - reach)), min(size, math.ceil(x + reach))
        window = (slice(top, bottom), slice(left, right))
        rows, columns = np.ogrid[window]
        across, down = (((at + 0.5 - centre) / radius).astype(np.float32) for at, centre in ((columns, x), (rows, y)))
        cos, sin = math.cos(angle), math.sin(angle)
        distance = signed_distance(shape, cos * across + sin * down, cos * down - sin * across)
        return cls(shape, colour, x, y, radius, window, distance * radius)

    def full_mask(self, size: int) -> np.ndarray:
        """Return the mask (size, size) of the whole figure, with the parts that other figures cover."""
        mask = np.zeros((size, size), bool)
        mask[self.window] = self.distance < 0
        return mask

    def paint(self, canvas: np.ndarray, rgb: Sequence[float], noise: np.random.Generator) -> None:
        """Draw a shadow and the figure on `canvas` (size, size, 3) float; the light comes from the upper left."""
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


def draw_background(noise: np.random.Generator, size: int) -> np.ndarray:
    """Draw a grey texture (size, size, 3), float 0..255; all figure colours have contrast to it."""
    rows, columns = np.ogrid[:size, :size]
    angle = noise.uniform(0, 2 * np.pi)
    across = (np.cos(angle) * columns + np.sin(angle) * rows).astype(np.float32) / size
    along = (np.cos(angle) * rows - np.sin(angle) * columns).astype(np.float32) / size
    cells = noise.uniform(4, 9)
    blend = {
        "gradient": lambda: across,
        "stripes": lambda: 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * cells * across)),
        "checker": lambda: 0.5 + 0.5 * np.tanh(6 * np.sin(np.pi * cells * across) * np.sin(np.pi * cells * along)),
        "blotches": lambda: 0.5 + 0.5 * np.tanh(5 * (smooth_noise(noise, size, 6) - 0.5)),
        "noise": lambda: 0.6 * smooth_noise(noise, size, 5) + 0.4 * smooth_noise(noise, size, 24),
    }[noise.choice(("gradient", "stripes", "checker", "blotches", "noise"))]()
    grey = noise.uniform(70, 165)
    tints = grey + noise.uniform(-22, 22, (2, 3)) + noise.uniform(10, 26) * np.array([[1], [-1]])
    ground = tints[0] + (tints[1] - tints[0]) * np.clip(blend, 0, 1)[..., None]
    return ground + noise.uniform(1, 6) * noise.standard_normal((size, size, 1), np.float32)


def smooth_noise(noise: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Draw smooth noise (size, size), about 0..1, from `cells` x `cells` random values."""
    coarse = Image.fromarray(noise.uniform(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------------------ scenes


@dataclass(frozen=True)
class Scene:
    """An image, its objects from back to front, the visible masks of the objects and a crowd, and expressions."""

    image: np.ndarray  # (size, size, 3) uint8
    objects: tuple[VisibleObject, ...]
    masks: tuple[np.ndarray, ...]  # (size, size) bool each, disjoint
    crowd: np.ndarray  # (size, size) bool, empty without a crowd
    expressions: tuple[Expression, ...]


def make_scene(level: str, seed: int, split: str, index: int, size: int = 128, no_target: float = 0.09) -> Scene:
    """Make the scene of these arguments; `size` is the image side in pixels, `no_target` a share of expressions."""
    rng = random.Random(f"{seed} {level} {split} {index}")
    noise = np.random.default_rng(rng.getrandbits(64))
    rules = LEVELS[level]
    figures, masks = place_figures(rng, rules, size)
    canvas = draw_background(noise, size)
    dots = place_dots(rng, size) if rng.random() < rules.crowd_probability else []
    for dot in dots:
        dot.paint(canvas, DOT_RGB, noise)
    for figure in figures:
        figure.paint(canvas, RGB[figure.colour], noise)
    covered = np.any([figure.full_mask(size) for figure in figures], axis=0)
    crowd = np.any([np.zeros_like(covered), *(dot.full_mask(size) for dot in dots)], axis=0) & ~covered
    objects = tuple(
        VisibleObject.from_box(figure.shape, figure.colour, mask_to_box(mask), size)
        for figure, mask in zip(figures, masks)
    )
    expressions = tuple(draw_expressions(rng, objects, SENTENCE_RULES[level], no_target))
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), objects, tuple(masks), crowd, expressions)


def place_figures(rng: random.Random, level: Level, size: int) -> tuple[list[Figure], list[np.ndarray]]:
    """Place figures from back to front; return them and their visible masks. No figure covers too much of another."""
    figures: list[Figure] = []
    masks: list[np.ndarray] = []
    colours = rng.sample(COLOURS, rng.randint(2, 4))  # few, so that objects often share a colour
    count = rng.randint(*level.objects)
    for _ in range(200):
        radius = rng.uniform(*rng.choice(level.radii)) * size
        x, y = (rng.uniform(1.2 * radius, size - 1.2 * radius) for _ in "xy")
        angle = rng.uniform(-0.35, 0.35)
        figure = Figure.place(rng.choice(level.shapes), rng.choice(colours), x, y, radius, angle, size)
        new_mask = figure.full_mask(size)
        if all(
            (mask & ~new_mask).sum() >= level.min_visible * (other.distance < 0).sum()
            for other, mask in zip(figures, masks)
        ):
            masks = [mask & ~new_mask for mask in masks] + [new_mask]
            figures.append(figure)
        if len(figures) == count:
            break
    return figures, masks


def place_dots(rng: random.Random, size: int) -> list[Figure]:
    """Place a cluster of small dots: one crowd, behind all figures. No sentence refers to it."""
    x, y = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
    centres = [(x + rng.triangular(-0.16, 0.16), y + rng.triangular(-0.16, 0.16)) for _ in range(rng.randint(9, 16))]
    return [Figure.place("circle", "", a * size, b * size, 0.017 * size, 0, size) for a, b in centres]


def mask_to_box(mask: np.ndarray) -> list[float]:
    """Return the tight box (xywh, pixels) of a non-empty mask."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)]


# Direction of travel along the upper, right, lower and left edge of a pixel, clockwise.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def mask_to_polygons(mask: np.ndarray) -> list[list[float]] | None:
    """Return polygons [x, y, x, y, ...] along pixel edges that rasterise to exactly this mask; None with holes."""
    edges = boundary_edges(mask)
    polygons = []
    for start in sorted(edges):
        if start not in edges:
            continue  # an earlier polygon used it
        x, y, direction = start
        polygon, turns = [], 0
        while (x, y, direction) in edges:
            edges.remove((x, y, direction))
            x, y = x + STEPS[direction][0], y + STEPS[direction][1]
            # Go straight on if possible, else right, else left; at the start point turn to the start direction.
            candidates = (turn for turn in (0, 1, -1) if (x, y, (direction + turn) % 4) in edges)
            turn = next(candidates, start[2] - direction)
            if turn:
                polygon += [float(x), float(y)]
                turns += 1 if turn % 4 == 1 else -1
            direction = (direction + turn) % 4
        if turns < 0:
            return None  # the boundary of a hole runs counterclockwise
        polygons.append(polygon)
    return polygons


def boundary_edges(mask: np.ndarray) -> set[tuple[int, int, int]]:
    """Return the pixel edges between the mask and the outside: start point x, y and direction (index of STEPS)."""
    left, top, width, height = (int(value) for value in mask_to_box(mask))
    mask = mask[top : top + height, left : left + width]
    padded = np.pad(mask, 1)
    # For each direction: the pixel on the other side of the edge, and the offset of the edge's start in the pixel.
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    offsets = ((0, 0), (1, 0), (1, 1), (0, 1))
    edges = set()
    for direction, ((x, y), neighbour) in enumerate(zip(offsets, neighbours)):
        rows, columns = np.nonzero(mask & ~neighbour)
        starts = (columns + (left + x)).tolist(), (rows + (top + y)).tolist()
        edges.update(zip(*starts, [direction] * len(rows)))
    return edges


# ----------------------------------------------------------------------------------------------------------- writing


def write_scenes(
    out: str | os.PathLike,
    level: str,
    seed: int,
    images: dict[str, int],
    size: int = 128,
    no_target: float = 0.09,
    paraphrased: Sequence[str] = (),
) -> bool:
    """Write scenes in the file format of gRefCOCO to the folder `out`, atomically.

    Args:
        images: number of images of each split.
        size: image side in pixels.
        no_target: share of expressions without target.
        paraphrased: splits whose sentences use words that the other splits do not have.

    Returns:
        False if `out` already has the scenes of these parameters; nothing is written then.

    Raises:
        ValueError: a parameter is out of range, or `out` has other content.
    """
    check_parameters(level, images, size, no_target)
    if unknown := set(paraphrased) - set(SPLITS):
        raise ValueError(f"paraphrase {', '.join(sorted(unknown))}: choose of {', '.join(SPLITS)}")
    out = Path(out)
    parameters = {
        "level": level,
        "seed": seed,
        "images": images,
        "size": size,
        "no_target": no_target,
        "version": VERSION,
        **({"paraphrased": sorted(paraphrased)} if paraphrased else {}),
    }
    if out.exists():
        if read_parameters(out) == parameters:
            return False
        raise ValueError(f"{out} already has other content: remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "scenes"
        (folder / "train2014").mkdir(parents=True)
        refs, instances = [], empty_instances(parameters)
        plan = [(split, index) for split, count in images.items() for index in range(count)]
        for split, index in tqdm(plan, desc=f"{level} scenes", unit="image"):
            image_id = (
                len(SPLITS) * index + SPLITS.index(split) + 1
            )  # does not depend on the sizes of the other splits
            scene = make_scene(level, seed, split, index, size, no_target)
            if split in paraphrased:
                scene = reword(scene, random.Random(f"{seed} paraphrase {image_id}"))
            name = f"COCO_train2014_{image_id:012d}.jpg"
            Image.fromarray(scene.image).save(folder / "train2014" / name, quality=90)
            instances["images"].append(image_record(image_id, name, size))
            annotations = annotation_records(scene, image_id)
            instances["annotations"] += annotations
            refs += ref_records(scene, image_id, split, name, annotations, random.Random(f"{seed} raw {image_id}"))
        (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
        (folder / "grefs(unc).json").write_text(json.dumps(refs), encoding="utf-8")
        folder.rename(out)
    return True


def reword(scene: Scene, rng: random.Random) -> Scene:
    """The scene with paraphrased sentences."""
    expressions = [replace(x, sentences=tuple(paraphrase(rng, s) for s in x.sentences)) for x in scene.expressions]
    return replace(scene, expressions=tuple(expressions))


def check_parameters(level: str, images: dict[str, int], size: int, no_target: float) -> None:
    """Raise `ValueError` if a parameter is out of range."""
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if set(images) - set(SPLITS) or min(images.values(), default=0) < 0 or not any(images.values()):
        raise ValueError(f"images {images} must have at least one image, of the splits {', '.join(SPLITS)}")
    if not 64 <= size <= 2048:
        raise ValueError(f"size {size} must be between 64 and 2048 pixels")
    if not 0 <= no_target <= 1:
        raise ValueError(f"no_target {no_target} must be a share between 0 and 1")


def read_parameters(folder: Path) -> dict | None:
    """Read the parameters of the scenes in `folder`; None if it has no scenes."""
    try:
        return json.loads((folder / "instances.json").read_text(encoding="utf-8"))["info"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def empty_instances(parameters: dict) -> dict:
    """Return the content of an `instances.json` without images; the shapes are its categories."""
    return {
        "info": {"description": "Made scenes of coloured shapes", "version": str(VERSION), "parameters": parameters},
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
    """Return one annotation per object in the order of the scene, then the crowd's; ids start at 100 * image_id."""
    crowd = [scene.crowd] if scene.crowd.any() else []
    shapes = [obj.shape for obj in scene.objects] + ["circle"] * len(crowd)
    records = []
    for index, (shape, mask) in enumerate(zip(shapes, [*scene.masks, *crowd])):
        iscrowd = int(index >= len(scene.objects))
        records.append(
            {
                "segmentation": (None if iscrowd else mask_to_polygons(mask)) or mask_to_rle(mask),
                "area": float(mask.sum()),
                "iscrowd": iscrowd,
                "image_id": image_id,
                "bbox": mask_to_box(mask),
                "category_id": SHAPES.index(shape) + 1,
                "id": 100 * image_id + index,
            }
        )
    return records


def mask_to_rle(mask: np.ndarray) -> dict:
    """Return the uncompressed RLE of a mask in column order, as in COCO's files."""
    # Runs alternate between 0 and 1 and start with 0; the padding adds an end to the first and the last run.
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def ref_records(
    scene: Scene, image_id: int, split: str, name: str, annotations: list[dict], rng: random.Random
) -> list[dict]:
    """Return the refs of a scene; ids start at 20 * (image_id - 1), so that the first is 0 as in gRefCOCO."""
    records = []
    for index, expression in enumerate(scene.expressions):
        ref_id = 20 * (image_id - 1) + index
        targets = [annotations[i] for i in expression.targets]
        sent_ids = [20 * ref_id + i for i in range(len(expression.sentences))]
        records.append(
            {
                "ref_id": ref_id,
                "image_id": image_id,
                "split": split,
                "file_name": name.replace(".jpg", f"_{index}.jpg") if rng.random() < 0.25 else name,
                "ann_id": [target["id"] for target in targets] or [-1],
                "category_id": [target["category_id"] for target in targets] or [-1],
                "no_target": not targets,
                "sent_ids": sent_ids,
                "sentences": [
                    {"raw": draw_raw_sentence(rng, sent), "sent": sent, "sent_id": sent_id, "tokens": sent.split()}
                    for sent_id, sent in zip(sent_ids, expression.sentences)
                ],
            }
        )
    return records


def draw_raw_sentence(rng: random.Random, sent: str) -> str:
    """Draw a sentence as annotators type it: most are unchanged, some have capitals, a full stop or a typing error."""
    chance = rng.random()
    if chance < 0.03:
        i = rng.randrange(len(sent) - 1)
        return sent[:i] + sent[i + 1] + sent[i] + sent[i + 2 :]
    if chance < 0.05:
        return sent.upper()
    return (sent.capitalize() if chance < 0.2 else sent) + rng.choice(("", "", "", "", "", "."))


# ------------------------------------------------------------------------------------------------------ command line


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT", help="output folder: new, or written with the same arguments")
    parser.add_argument("--level", choices=tuple(LEVELS), default="easy", help="difficulty (default easy)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    for split, count in zip(SPLITS, (1500, 150, 150, 150)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"number of {split} images (default {count})")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default 128)")
    parser.add_argument("--no-target", type=float, default=0.09, help="share of no-target expressions (default 0.09)")
    parser.add_argument(
        "--paraphrase", nargs="+", default=[], metavar="SPLIT", help="splits with words that no other split has"
    )
    args = parser.parse_args()
    images = {split: getattr(args, split) for split in SPLITS}
    try:
        written = write_scenes(args.out, args.level, args.seed, images, args.size, args.no_target, args.paraphrase)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {sum(images.values())} images {'written' if written else 'reused'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

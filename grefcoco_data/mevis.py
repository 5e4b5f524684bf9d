"""Sentences about videos in the genuine layout: MeViS (both versions) and Ref-YouTube-VOS, found, read and checked.

    ROOT/{train,valid_u,valid}/JPEGImages/VIDEO/FRAME.jpg       or JPEGImages.tar, read in place
    ROOT/{train,valid_u,valid}/meta_expressions.json            version 2: meta_expressions_v2.json
    ROOT/{train,valid_u}/mask_dict.json                         {anno_id: [RLE or null for each frame]}

Ref-YouTube-VOS has ROOT/meta_expressions/SPLIT/meta_expressions.json, and its masks are
ROOT/train/Annotations/VIDEO/FRAME.png.
No file is trusted: what is wrong is either one clear `ValueError` or a named entry in `Problems`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from grefcoco_data.annotation_json import read_json
from grefcoco_data.annotations import Problems
from grefcoco_data.images import MAX_IMAGE_BYTES
from grefcoco_data.masks import encode_mask
from grefcoco_data.video_collections import VideoCollection, video_collection_of

SPLITS = ("train", "valid_u", "valid", "test")
BLOCK = 1 << 22  # characters of mask_dict.json read at once
PER_SPLIT = 10_000_000  # numbers of sentences and of frames that a split can have; the next split begins there
FIRST_KEY, NEXT_KEY = (re.compile(rf'\s*{mark}\s*"(\d+)"\s*:\s*') for mark in (r"\{", ","))
SAFE_NAME = re.compile(r"\w[\w.\-]*")


@dataclass(frozen=True)
class Expression:
    """A sentence about a video: its own name, its number in the data set, its words, and the objects it means."""

    exp_id: str
    sent_id: int
    raw: str
    anno_ids: tuple[int, ...]


@dataclass(frozen=True)
class Video:
    """A video, in the order of its split: names of its frames, its sentences, its objects (`anno_id` to `obj_id`)."""

    video_id: str
    first_frame: int  # number of its first frame in the data set
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...]
    objects: dict[int, str]


@dataclass
class Videos:
    """All splits of a folder. A split whose masks are withheld is in `withheld`: its sentences have no targets."""

    splits: dict[str, list[Video]] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    sources: list[Path] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


def read_videos(root: str | Path, config: str) -> Videos:
    """The sentences of all splits below `root`; nothing of the masks and images is read yet.

    Raises:
        ValueError: a file of sentences is not in the layout, or an unknown configuration.
        FileNotFoundError: no file of sentences at `root`.
    """
    collection, videos = video_collection_of(config), Videos()
    paths = {split: path for split in SPLITS if (path := collection.find_sentences(Path(root), split))}
    if not paths:
        raise FileNotFoundError(
            f"{root} has no {' or '.join(collection.sentences)} of any split: name the folder that holds "
            f"{', '.join(SPLITS[:3])} of {collection.title}."
        )
    contents = {split: _read_sentences(path) for split, path in paths.items()}
    for number, split in enumerate(SPLITS):
        if split not in contents:
            continue
        entries = contents[split]
        if collection.name == "ref_youtube_vos" and split == "valid":  # its file holds the videos of test too
            entries = {name: entry for name, entry in entries.items() if name not in contents.get("test", {})}
        if not any("anno_id" in e or "obj_id" in e for v in entries.values() for e in v["expressions"].values()):
            videos.withheld.add(split)
        videos.splits[split] = _read_split(entries, number, collection, videos.problems, split in videos.withheld)
        videos.sources.append(paths[split])
    return videos


def _read_sentences(path: Path) -> dict[str, dict]:
    content = read_json(path)
    entries = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError(f'{path} is not of the form {{"videos": {{VIDEO: {{"expressions": ..., "frames": ...}}}}}}.')
    for video_id, entry in entries.items():
        if unsafe := [name for name in (video_id, *entry["frames"]) if not SAFE_NAME.fullmatch(name)]:
            raise ValueError(f"{path}: unsafe name {unsafe[0]!r} in video {video_id!r}, refused.")
    return entries


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("expressions"), dict):
        return False
    if not isinstance(entry.get("frames"), list) or not all(isinstance(name, str) for name in entry["frames"]):
        return False
    return all(isinstance(expression, dict) for expression in entry["expressions"].values())


def _read_split(
    entries: dict[str, dict], number: int, collection: VideoCollection, problems: Problems, withheld: bool
) -> list[Video]:
    videos, sent_id, frame = [], number * PER_SPLIT, number * PER_SPLIT
    for video_id, entry in entries.items():
        expressions, objects = [], {}
        for exp_id, expression in entry["expressions"].items():
            parsed = [] if withheld else _targets(expression, collection)
            if parsed is None or not isinstance(expression.get("exp"), str):
                problems.add(
                    "expression without words or with targets that are no ids, skipped", f"{video_id} {exp_id}"
                )
            else:
                objects.update(parsed)
                ids = tuple(dict.fromkeys(anno_id for anno_id, _ in parsed))
                expressions.append(Expression(exp_id, sent_id, expression["exp"], ids))
            sent_id += 1
        if len(entry["frames"]) and expressions:
            videos.append(Video(video_id, frame, tuple(entry["frames"]), tuple(expressions), objects))
        else:
            problems.add("video without frames or sentences, skipped", video_id)
        frame += len(entry["frames"])
    return videos


def _targets(expression: dict, collection: VideoCollection) -> list[tuple[int, str]] | None:
    """(anno_id, obj_id) of each target; None for what is not of the layout."""
    objects = expression.get("obj_id")
    if collection.masks == "palette":  # one object, as text; it is the value of the pixels
        return [(int(objects), objects)] if isinstance(objects, str) and objects.isdecimal() else None
    ids = expression.get("anno_id")
    if not isinstance(ids, list) or not isinstance(objects, list) or len(ids) != len(objects):
        return None
    if not all(type(value) is int and value >= 0 for value in (*ids, *objects)):
        return None
    return [(anno_id, str(obj_id)) for anno_id, obj_id in zip(ids, objects)]


# ---- masks -------------------------------------------------------------------------------------------------------


class MaskFile:
    """mask_dict.json, of which the masks of one object are read at a time.

    Opening it goes through the file once, in blocks, and keeps where each object's masks are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        try:
            self.places = dict(_places(path))
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON object of lists of masks ({error}); download it again.") from error

    def masks(
        self, video: Video, anno_id: int, height: int, width: int, problems: Problems
    ) -> list[dict | None] | None:
        """The mask of an object on each frame, None where it is not visible; None when they cannot be used."""
        if anno_id not in self.places:
            problems.add("object without masks, skipped with its sentences", f"{video.video_id} anno_id {anno_id}")
            return None
        start, end = self.places[anno_id]
        masks = json.loads(os.pread(self.file.fileno(), end - start, start))
        fault = masks_fault(masks, len(video.frames), height, width)
        if fault:
            problems.add(f"{fault}, skipped with its sentences", f"{video.video_id} anno_id {anno_id}")
            return None
        return [None if mask is None else {"size": mask["size"], "counts": mask["counts"]} for mask in masks]


@functools.lru_cache(maxsize=4)
def open_masks(path: Path, mtime_ns: int) -> MaskFile:
    """The file, whose places are read once until it changes."""
    return MaskFile(path)


def _places(path: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """(anno_id, (first byte, byte after the last)) of each value in a JSON object, read in blocks."""
    decoder = json.JSONDecoder()
    # each byte is one character, so that places in the text are places in the file
    with path.open(encoding="latin-1", newline="") as file:
        text, offset, position, number = file.read(BLOCK), 0, 0, 0
        while True:
            match = (NEXT_KEY if number else FIRST_KEY).match(text, position)
            try:
                value, end = decoder.raw_decode(text, match.end()) if match else (None, 0)
            except ValueError:
                match = None
            if match and end < len(text):  # a value that ends with the text may go on
                if not isinstance(value, list):
                    raise ValueError(f"the value of {match[1]} is no list")
                yield int(match[1]), (offset + match.end(), offset + end)
                position, number = end, number + 1
                continue
            block = file.read(max(BLOCK, len(text) - position))  # twice as much, if a value is longer than a block
            if not block:
                break
            text, offset, position = text[position:] + block, offset + position, 0
    if text[position:].strip() not in ("}", "{}"):
        raise ValueError(f"it is broken after byte {offset + position}")


def masks_fault(masks: list, num_frames: int, height: int, width: int) -> str | None:
    """What is wrong with the masks of an object, or None. They are checked before C code reads them."""
    if len(masks) != num_frames:
        return f"object with {len(masks)} masks in a video of {num_frames} frames"
    masks = [mask for mask in masks if mask is not None]
    if not all(isinstance(mask, dict) and isinstance(mask.get("counts"), str) for mask in masks):
        return "mask that is no compressed RLE"
    if not all(mask.get("size") == [height, width] for mask in masks):
        return "mask of another size than its video"
    if masks and not _cover(["".join(mask["counts"]) for mask in masks], height * width):
        return "mask that does not cover its frame exactly"
    return None


def _cover(strings: list[str], pixels: int) -> bool:
    """Whether each string is a compressed RLE whose runs have `pixels` pixels in all."""
    if not all(string and string.isascii() for string in strings):
        return False
    codes = np.frombuffer("".join(strings).encode(), np.uint8) - np.uint8(48)
    ends = np.cumsum([*map(len, strings)])
    is_last = codes < 32  # of a number's characters, which hold 5 bits each, the lowest first
    if codes.max() > 63 or not is_last[ends - 1].all():
        return False
    stops = np.flatnonzero(is_last)
    starts = np.append(0, stops[:-1] + 1)
    if (stops - starts).max() > 5:
        return False
    digit = np.arange(len(codes)) - np.repeat(starts, stops - starts + 1)
    numbers = np.add.reduceat((codes & 31).astype(np.int64) << 5 * digit, starts)
    negative = codes[stops] & 16 > 0  # the highest bit is the sign
    numbers[negative] -= 1 << 5 * (stops - starts + 1)[negative]
    for run_lengths in np.split(numbers, np.searchsorted(stops, ends[:-1])):
        # from the fourth number on, the difference to the number two places before is stored
        run_lengths[1::2], run_lengths[2::2] = np.cumsum(run_lengths[1::2]), np.cumsum(run_lengths[2::2])
        if run_lengths.min() < 0 or run_lengths.sum() != pixels:
            return False
    return True


def palette_masks(files: FrameFiles, video: Video, height: int, width: int) -> dict[int, list[dict | None]]:
    """The masks of all objects of a video, of PNGs that hold the number of an object at each pixel."""
    masks: dict[int, list[dict | None]] = {anno_id: [] for anno_id in video.objects}
    for name in video.frames:
        try:
            with Image.open(io.BytesIO(files.read(video.video_id, name, "png")), formats=("PNG",)) as image:
                pixels = np.array(image) if image.size == (width, height) and image.mode in "PL" else None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{files.path}: mask {video.video_id}/{name}.png cannot be read ({error}).") from error
        if pixels is None:
            raise ValueError(
                f"{files.path}: mask {video.video_id}/{name}.png is not {width} x {height} palette pixels."
            )
        for anno_id, column in masks.items():
            inside = pixels == anno_id
            column.append(encode_mask(inside) if inside.any() else None)
    return masks


# ---- frames ------------------------------------------------------------------------------------------------------


class FrameFiles:
    """Files VIDEO/FRAME.jpg of a split in a folder, or in a tar that is read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places = {} if path.is_dir() else _tar_places(path)
        self.file = None if path.is_dir() else path.open("rb", buffering=0)

    def read(self, video_id: str, frame: str, kind: str = "jpg") -> bytes:
        """The bytes of a file. Raises FileNotFoundError when there is none, OSError when it is too large."""
        name = f"{video_id}/{frame}.{kind}"
        if self.file is None:
            if (size := (self.path / name).stat().st_size) <= MAX_IMAGE_BYTES:
                return (self.path / name).read_bytes()
        elif name not in self.places:
            raise FileNotFoundError(f"no member {name}")
        elif (size := self.places[name][1]) <= MAX_IMAGE_BYTES:
            return os.pread(self.file.fileno(), size, self.places[name][0])
        raise OSError(f"{size} bytes are too many for an image")


def open_frames(folder: Path) -> FrameFiles:
    """The frames or masks of a split, in a folder or in the tar beside it, whose table of contents is read once.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = folder if folder.is_dir() else folder.with_name(f"{folder.name}.tar")
    if not path.exists():
        raise FileNotFoundError(f"{folder} is missing, and {path.name} too; put one of them there.")
    return _open_frames(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _open_frames(path: Path, mtime_ns: int) -> FrameFiles:
    return FrameFiles(path)


def _tar_places(path: Path) -> dict[str, tuple[int, int]]:
    """VIDEO/FRAME.jpg -> (first byte, number of bytes), for all files of an uncompressed tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = ((member.name, member) for member in archive if member.isreg())
            return {"/".join(name.split("/")[-2:]): (member.offset_data, member.size) for name, member in members}
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a complete tar file ({error}); download it again.") from error

"""Answers about videos: from a model's answers to frames, a submission of PNGs or JSON, to J&F and to a submission.

    python -m scoring predict CHECKPOINT data/mevis --config mevis --split valid_u --out runs/rela/valid_u.jsonl
    python -m scoring videos runs/rela/valid_u.jsonl data/mevis --config mevis --split valid_u --none mean
    python -m scoring videos runs/rela/valid.jsonl data/mevis --config mevis --split valid --submission valid.zip
    python -m scoring videos submission.zip data/mevis --config mevis --split valid_u

Any model of `scoring predict` answers frame by frame. Its "none" is decided for each frame ("frame", as published for
images), or once for a clip by the mean of the probabilities of its frames ("mean").
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import evaluate
import numpy as np
from PIL import Image

import grefcoco
from grefcoco_data.atomic_files import new_file, write_text
from grefcoco_data.masks import decode_mask, empty_rle, encode_mask
from grefcoco_data.video_collections import VIDEO_CONFIGS
from grefcoco_data.video_rows import MAX_FRAMES, VIDEO_FEATURES, merged_masks
from scoring.answers import Answer, parse_answer

JF = evaluate.load(str(Path(__file__).resolve().parents[1] / "evaluate/jf"))
NONE_RULES = ("frame", "mean")
PNG_BYTES = 64 << 20  # the most that a mask of a submission may have
Clip = tuple[dict, dict, list[dict | None]]  # video row, expression, a mask for each frame; no masks: no such video


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command `videos`."""
    add = commands.add_parser("videos", help="score answers about videos by J&F, or write a submission of them")
    help_of_answers = "answers of `predict` to frames, a folder or zip of VIDEO/SENTENCE/FRAME.png, or JSON of RLE"
    add.add_argument("answers", type=Path, help=help_of_answers)
    add.add_argument("dataset", help="built folder or Hub id")
    add.add_argument("--config", default="mevis", choices=VIDEO_CONFIGS, help="configuration of the data set")
    add.add_argument("--split", required=True, help="split that is answered")
    add.add_argument("--none", default="frame", choices=NONE_RULES, help="where answers to frames say none")
    add.add_argument("--threshold", type=float, default=0.5, help="no-target probability above which it is none")
    add.add_argument("--compat", default="published", help=f"evaluator to follow: {', '.join(JF.modes)}")
    add.add_argument("--details", action="store_true", help="score groups of sentences too")
    add.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples for confidence intervals")
    add.add_argument(
        "--submission", type=Path, metavar="ZIP", help="write the masks as PNGs, as the challenge takes them"
    )
    add.add_argument("--out", type=Path, metavar="JSON", help="write the scores to a file too")
    add.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.submission and options.submission.suffix != ".zip":
        raise ValueError(f"--submission is {options.submission}; the name of a zip was expected")
    columns = [name for name in VIDEO_FEATURES if name != "frames"]
    location = {"config": options.config, "split": options.split}
    videos = grefcoco.load(options.dataset, **location, layout="video", columns=columns)
    clips = read_clips(options.answers, videos, options.none, options.threshold)
    if options.submission:
        clips = write_submission(clips, options.submission)
    accumulator = score_clips(clips, options.compat)
    if not len(accumulator):
        if not options.submission:
            raise ValueError(
                f"the masks of {options.split} are not published: use --submission and the challenge's server"
            )
        print(f"{options.submission} is ready; the masks of {options.split} are not published, so there are no scores")
        return
    result = accumulator.compute()
    if options.details:
        result["groups"] = accumulator.breakdown()
    if options.bootstrap:
        result["intervals"] = accumulator.intervals(resamples=options.bootstrap)
    text = json.dumps({"jf": result}, indent=2) + "\n"
    if options.out:
        write_text(options.out, text)
    print(text, end="")


def score_clips(clips: Iterable[Clip], compat: str = "published") -> object:
    """The J&F accumulator of clips; sentences whose targets are not published are not added."""
    accumulator = JF.accumulator(compat)
    for video, expression, masks in clips:
        if not expression["anno_ids"] and not expression["no_target"]:
            continue
        reference = {"masks": merged_masks(video, expression), "no_target": expression["no_target"]}
        reference |= {"video_id": video["video_id"], "exp_id": expression["exp_id"], "sent_id": expression["sent_id"]}
        reference["num_targets"] = len(expression["anno_ids"])
        accumulator.add(prediction={"masks": masks}, reference=reference)
    return accumulator


def write_submission(clips: Iterable[Clip], path: Path) -> Iterator[Clip]:
    """Write VIDEO/SENTENCE/FRAME.png of every clip into a zip while they pass through.

    Raises:
        ValueError: the mask of a frame is missing.
    """
    with new_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for video, expression, masks in clips:
            for frame, mask in zip(video["frame_names"], masks or [None], strict=bool(masks)):
                name = f"{video['video_id']}/{expression['exp_id']}/{frame}.png"
                if mask is None:
                    raise ValueError(f"there is no mask for {name}: a submission has all frames of all videos")
                data = io.BytesIO()
                Image.fromarray(decode_mask(mask) * 255).save(data, format="PNG")
                # without the time of now, equal masks give equal files
                archive.writestr(zipfile.ZipInfo(name), data.getvalue())
            yield video, expression, masks


# ---- reading -----------------------------------------------------------------------------------------------------


def read_clips(path: Path, videos: datasets.Dataset, none_rule: str, threshold: float) -> Iterator[Clip]:
    """The masks that a file or folder has for every sentence of `videos`.

    Args:
        path: JSON lines of answers to frames; a folder or a zip of PNGs; or JSON of the form
            `{VIDEO: {SENTENCE: {"prediction_masks": [RLE, ...]}}}`.
        none_rule, threshold: of answers to frames; see the top of this file.

    Raises:
        ValueError: what cannot be read, named with its place.
    """
    if path.is_dir():
        return _png_clips(_folder_reader(path), videos)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if zipfile.is_zipfile(path):
        return _png_clips(_zip_reader(path), videos)
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    if path.suffix == ".jsonl" or '"sent_id"' in first[:200]:
        return _answer_clips(path, videos, none_rule, threshold)
    return _json_clips(path, videos)


Reader = Callable[[str], "bytes | None"]  # gives the bytes of a file; None where it is missing


def _folder_reader(path: Path) -> Reader:
    def read(name: str) -> bytes | None:
        file = path / name
        if not file.is_file():
            return None if not name.endswith("/") or not file.is_dir() else b""
        if file.stat().st_size > PNG_BYTES:
            raise ValueError(f"{file} is too large for a mask")
        return file.read_bytes()

    return read


def _zip_reader(path: Path) -> Reader:
    archive = zipfile.ZipFile(path)
    entries = {entry.filename: entry for entry in archive.infolist()}
    folders = {f"{name.split('/')[0]}/" for name in entries}

    def read(name: str) -> bytes | None:
        if name.endswith("/"):
            return b"" if name in folders else None
        if name not in entries:
            return None
        if entries[name].file_size > PNG_BYTES:
            raise ValueError(f"{path}: {name} is too large for a mask")
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path}: {name} cannot be read ({error})") from error

    return read


def _png_clips(read: Reader, videos: datasets.Dataset) -> Iterator[Clip]:
    for video in videos:
        exists = read(f"{video['video_id']}/") is not None
        for expression in video["expressions"]:
            names = [f"{video['video_id']}/{expression['exp_id']}/{name}.png" for name in video["frame_names"]]
            size = video["height"], video["width"]
            yield video, expression, [_png_mask(read(name), name, size) for name in names] if exists else []


def _png_mask(data: bytes | None, name: str, size: tuple[int, int]) -> dict | None:
    """The mask of a PNG, in which whatever is not black is inside; None for a file that is missing."""
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size == (size[1], size[0]):
                return encode_mask(np.asarray(image.convert("L")))
            fault = f"is {image.size[1]} x {image.size[0]}, its video {size[0]} x {size[1]} (height x width)"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        fault = f"is no PNG that can be read ({error})"
    raise ValueError(f"the mask {name} {fault}")


def _json_clips(path: Path, videos: datasets.Dataset) -> Iterator[Clip]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        given = {video: {key: e["prediction_masks"] for key, e in entry.items()} for video, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{path} is neither answers nor {{VIDEO: {{SENTENCE: {{"prediction_masks": [...]}}}}}} ({error})'
        ) from error
    for video in videos:
        entry = given.get(video["video_id"])
        for expression in video["expressions"]:
            masks = (entry or {}).get(expression["exp_id"], [])
            if not isinstance(masks, list):
                raise ValueError(
                    f"{path}: video {video['video_id']} sentence {expression['exp_id']} has no list of masks"
                )
            yield video, expression, masks


def _answer_clips(path: Path, videos: datasets.Dataset, none_rule: str, threshold: float) -> Iterator[Clip]:
    """Clips of answers to frames, in any order; a video leaves as soon as all its answers were read."""
    places = {e["sent_id"]: row for row, entry in enumerate(videos["expressions"][:]) for e in entry}
    expected = [len(names) * len(entry) for names, entry in zip(videos["frame_names"][:], videos["expressions"][:])]
    answers: dict[int, dict[int, Answer]] = {}  # of videos that are not complete, by row and sent_id
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                answer = parse_answer(line)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is no answer ({error})") from None
            row = places.get(answer.sent_id // MAX_FRAMES)
            if row is None:
                raise ValueError(f"{path}, line {number}: {answer.sent_id} is no sentence on a frame of this split")
            if answer.mask is None:
                raise ValueError(f"{path}, line {number} has no mask: J&F needs a model that gives masks")
            answers.setdefault(row, {})[answer.sent_id] = answer
            if len(answers[row]) == expected[row]:
                yield from _clips_of(videos[row], answers.pop(row), none_rule, threshold)
                expected[row] = 0
    for row, number in enumerate(expected):
        if number:
            yield from _clips_of(videos[row], answers.pop(row, {}), none_rule, threshold)


def _clips_of(video: dict, answers: dict[int, Answer], none_rule: str, threshold: float) -> Iterator[Clip]:
    empty = empty_rle(video["height"], video["width"])
    for expression in video["expressions"]:
        ids = range(expression["sent_id"] * MAX_FRAMES, expression["sent_id"] * MAX_FRAMES + len(video["frame_names"]))
        clip = [answers.get(sent_id) for sent_id in ids]
        scores = [answer.no_target for answer in clip if answer is not None and answer.no_target is not None]
        if none_rule == "mean" and scores:
            rejected = [np.mean(scores) > threshold] * len(clip)
        else:
            rejected = [answer is not None and (answer.no_target or 0) > threshold for answer in clip]
        masks = [answer and (empty if none else answer.mask) for answer, none in zip(clip, rejected)]
        yield video, expression, masks if answers else []

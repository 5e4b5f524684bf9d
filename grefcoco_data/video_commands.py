"""The commands for data sets about videos: build, download, check, stats and show, with the options of `commands`."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from grefcoco_data.annotations import Problems
from grefcoco_data.atomic_files import new_file, sha256, write_text
from grefcoco_data.building import REPORT, damaged_files, read_report
from grefcoco_data.masks import decode_mask
from grefcoco_data.official import push
from grefcoco_data.pictures import decode_image
from grefcoco_data.show import SAMPLES_PAGE, TARGET_COLOURS, draw_statistics
from grefcoco_data.video_building import build_videos, download_videos, source_files
from grefcoco_data.video_collections import video_collection_of
from grefcoco_data.video_rows import VIDEO_FEATURES, load_videos

FRAMES_SHOWN = 4  # of a video, on the page of samples
VIDEO_PANELS = {  # plots of `video_statistics`
    "targets": ("targets", "sentences"),
    "visible": ("frames with a target, % of the video", "sentences with targets"),
    "frames": ("frames", "videos"),
    "mask_share": ("area of an object, % of the frame", "masks"),
}
FRAME_WIDTH = 240  # pixels of a frame on the page


def run_video_command(options: argparse.Namespace) -> int:
    """Run a command on a data set about videos; returns the exit code, 1 when `check` finds damage."""
    commands = {"build": _build, "download": _download, "check": _check, "stats": _stats, "show": _show}
    if options.command not in commands:
        raise ValueError(f"{options.command} has no format for videos.")
    if getattr(options, "images", None):
        raise ValueError("--images is not for videos: their frames lie beside the annotations, in SPLIT/JPEGImages.")
    return commands[options.command](options)


def _build(options: argparse.Namespace) -> int:
    if options.num_proc < 1:
        raise ValueError(f"--num-proc is {options.num_proc}; it must be 1 or more.")
    if options.download:
        download_videos(Path(options.annotations), options.config)
    report = build_videos(
        options.annotations,
        options.out,
        config=options.config,
        strict=options.strict,
        skip_bad_videos=options.skip_bad_images,
        num_proc=options.num_proc,
    )
    _print_report(report)
    if options.push_to_hub:
        push(options.out, options.push_to_hub)
    place = options.push_to_hub or options.out
    print(f"{place} is ready: datasets.load_dataset({place!r})")
    return 0


def _download(options: argparse.Namespace) -> int:
    download_videos(Path(options.annotations), options.config)
    print(f"{options.annotations} is complete")
    return 0


def _check(options: argparse.Namespace) -> int:
    source = Path(options.source)
    if not (source / REPORT).is_file():
        known = video_collection_of(options.config).sha256
        for path in source_files(source, options.config):
            digest, official = sha256(path), known.get(str(path.relative_to(source)))
            verdict = "official release" if digest == official else "not the official release"
            print(f"{path}: sha256 {digest}, {verdict if official else 'no official hash'}")
        return 0
    report = read_report(source)
    _print_report(report)
    damage = damaged_files(source)
    for line in damage:
        print(f"DAMAGED: {line}")
    return int(bool(damage))


def _print_report(report: dict) -> None:
    official = video_collection_of(report["config"]).counts
    for split, counts in report["splits"].items():
        kinds = f"{counts['no_target']:,} none, {counts['single']:,} single, {counts['multi']:,} multi"
        line = f"{split}: {counts['videos']:,} videos, {counts['expressions']:,} expressions ({kinds})"
        differences = {name: n for name, n in official.get(split, {}).items() if counts[name] != n}
        wrong = ", ".join(f"{name} {number:,}" for name, number in differences.items())
        verdict = f"not the official release (which has {wrong})" if wrong else "as in the official release"
        print(f"{line}: {verdict if split in official else 'no official counts'}")
    for line in Problems(report["problems"]).lines():
        print(f"problem: {line}")


def _stats(options: argparse.Namespace) -> int:
    columns = [name for name in VIDEO_FEATURES if name != "frames"]
    splits = load_videos(options.source, options.config, layout="video", columns=columns)
    statistics = {split: video_statistics(videos) for split, videos in splits.items()}
    if options.out:
        draw_statistics(statistics, Path(options.out), VIDEO_PANELS)
    print(
        "| split | videos | expressions | none | single | multi | words | frames | visible, % |\n" + "|---" * 9 + "|"
    )
    for split, values in statistics.items():
        targets = values["targets"]
        kinds = [len(splits[split]), len(targets), (targets == 0).sum(), (targets == 1).sum(), (targets > 1).sum()]
        means = [values[name].mean() if len(values[name]) else 0.0 for name in ("words", "frames", "visible")]
        print(f"| {split} | " + " | ".join([*(f"{n:,}" for n in kinds), *(f"{n:.1f}" for n in means)]) + " |")
    if options.out:
        print(f"The plots are in {options.out}")
    return 0


def video_statistics(videos: Iterable[dict]) -> dict[str, np.ndarray]:
    """Numbers of video rows.

    `targets` and `words` of each sentence; `visible` of each one with targets: the frames that show one, in % of all;
    `frames` of each video; `mask_share` of each object on each frame that shows it, in % of the frame.
    """
    targets, words, visible, frames, shares = [], [], [], [], []
    for video in videos:
        frames.append(len(video["frame_names"]))
        shown = {o["anno_id"]: [mask is not None for mask in o["segmentations"]] for o in video["objects"]}
        masks = [mask for item in video["objects"] for mask in item["segmentations"] if mask is not None]
        areas = [coco_mask.area(mask) for mask in masks]  # one by one: of more than 255 together, pycocotools fails
        shares.append(100 * np.array(areas, float) / (video["width"] * video["height"]))
        for expression in video["expressions"]:
            targets.append(len(expression["anno_ids"]))
            words.append(len(expression["sentence"].split()))
            if expression["anno_ids"]:
                visible.append(100 * np.any([shown[anno_id] for anno_id in expression["anno_ids"]], axis=0).mean())
    counts = {"targets": np.array(targets, int), "words": np.array(words, int), "frames": np.array(frames, int)}
    return counts | {"visible": np.array(visible, float), "mask_share": np.concatenate([*shares, []])}


def _show(options: argparse.Namespace) -> int:
    splits = load_videos(options.source, options.config, layout="video")
    split = options.split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"{options.source} has no split {split!r}; choose one of {', '.join(splits)}.")
    index = splits[split].select_columns(["expressions"])
    chosen = (
        (row, expression)
        for row, entry in enumerate(index)
        for expression in entry["expressions"]
        if (not options.id or expression["sent_id"] in options.id)
        and options.targets in (None, len(expression["anno_ids"]))
    )
    samples = list(islice(chosen, options.limit))
    if not samples:
        raise ValueError(f"No sentence of {split} fits --id and --targets.")
    videos = splits[split].with_format(None)
    page = write_videos_page([(videos[row], expression) for row, expression in samples], Path(options.out), split)
    print(f"{len(samples)} sentences of {split} in {page}")
    return 0


def write_videos_page(samples: list[tuple[dict, dict]], folder: Path, title: str) -> Path:
    """Write a PNG of some frames for each (video row, expression), and the page `index.html` that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for video, expression in samples:
        name = f"{title}-{expression['sent_id']}.png"
        with new_file(folder / name) as temporary:
            draw_frames(video, expression).save(temporary, format="PNG")
        count = f"{len(expression['anno_ids'])} target{'s' * (len(expression['anno_ids']) != 1)}"
        sentence = html.escape(expression["sentence"])
        caption = f"sentence {expression['sent_id']}, video {html.escape(video['video_id'])}, {count}"
        figures.append(
            f'<figure><img src="{name}" alt="{sentence}"><figcaption>{sentence}<br>{caption}</figcaption></figure>'
        )
    page = folder / "index.html"
    texts = {"title": html.escape(title), "subtitle": f"{len(samples):,} sentences"}
    write_text(page, SAMPLES_PAGE.format(**texts, figures="\n".join(figures)))
    return page


def draw_frames(video: dict, expression: dict) -> Image.Image:
    """Frames of a video side by side, from the first to the last, with each target of a sentence in its colour."""
    numbers = np.unique(np.linspace(0, len(video["frame_names"]) - 1, FRAMES_SHOWN).round().astype(int)).tolist()
    targets = [item for item in video["objects"] if item["anno_id"] in expression["anno_ids"]]
    height = max(1, round(FRAME_WIDTH * video["height"] / video["width"]))
    strip = Image.new("RGB", (FRAME_WIDTH * len(numbers), height))
    for column, number in enumerate(numbers):
        frame = video["frames"][number]
        pixels = np.asarray(decode_image(frame) if isinstance(frame, dict) else frame.convert("RGB"), np.float32) * 0.8
        for place, item in enumerate(targets):
            if (mask := item["segmentations"][number]) is not None:
                inside, colour = decode_mask(mask).astype(bool), TARGET_COLOURS[place % len(TARGET_COLOURS)]
                pixels[inside] = pixels[inside] * 0.5 + np.array(colour) * 0.5
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((FRAME_WIDTH, height))
        strip.paste(picture, (FRAME_WIDTH * column, 0))
    return strip

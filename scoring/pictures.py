"""Pictures a person looks at after a run: sentences with truth and answer, and learning curves.

A picture shows an expression row (as `grefcoco.load` gives it) beside the `Answer` of a model. Drawn by matplotlib,
written as PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from grefcoco_data.atomic_files import new_file
from grefcoco_data.masks import covered_area, decode_mask, xywh_to_xyxy
from scoring.answers import Answer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CURVES = (
    ("gIoU", 1, "#f0386b", "gIoU"),
    ("cIoU", 1, "#8a5cf0", "cIoU"),
    ("N_acc", 100, "#d99000", "N_acc"),
    ("T_acc", 100, "#2e9e5b", "T_acc"),
    ("grec/F1_score", 100, "#1f78b4", "GREC F1_score"),
)
TRUTH_COLOUR, ANSWER_COLOUR = "#00b3a4", "#f0386b"
GOOD, BAD = "#2e9e5b", "#c8323c"


def draw_answers(
    rows: Sequence[dict], answers: Sequence[Answer], no_target_threshold: float, path: Path | None = None
) -> np.ndarray | None:
    """A grid of sentences, each as image, truth and answer side by side.

    Args:
        rows, answers: expression rows with `image`, `mask` and `boxes`, and what a model says of them.
        no_target_threshold: an answer is "none" above this probability.
        path: PNG to write; without it the picture is returned as (height, width, 3) uint8.
    """
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    aspect = min(2.0, max(row["image"].height / row["image"].width for row in rows))
    figure = plt.figure(figsize=(columns * 4.9, lines * (1.57 * aspect + 0.55)), layout="constrained")
    blocks = figure.subfigures(lines, columns, squeeze=False, wspace=0.03, hspace=0.04)
    for block, row, answer in zip(blocks.flat, rows, answers):
        _draw_sentence(block, row, answer, answer.rejects(no_target_threshold))
    if path is not None:
        save_figure(figure, path, dpi=110)
        return None
    figure.set_dpi(80)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return pixels


def draw_learning_curve(history: list[dict], path: Path, warmup_steps: int = 0, split: str = "val") -> None:
    """Plot the loss and the scores measured along the way, over the same steps.

    Args:
        history: rows with `step`, and `loss` or scores.
        warmup_steps: length of the category warm-up, whose loss is another one; it is marked.
        split: on which the scores were measured.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharex=True)
    losses = np.array([(row["step"], row["loss"]) for row in history if "loss" in row]).reshape(-1, 2)
    for part in (losses[losses[:, 0] <= warmup_steps], losses[losses[:, 0] > warmup_steps]):  # two losses, two lines
        left.plot(*part.T, ".-", markersize=3, color="#555", linewidth=1)
    left.set(xlabel="step", title="training loss")
    if len(losses):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        left.yaxis.set_minor_locator(NullLocator())
    for key, scale, colour, label in CURVES:
        points = [(row["step"], row[key] * scale) for row in history if key in row]
        if points:
            right.plot(*zip(*points), "o-", markersize=3, color=colour, label=label)
    right.set(xlabel="step", title=f"scores of split {split}, %", ylim=(0, 101))
    for axes in (left, right):
        if warmup_steps:
            axes.axvspan(0, warmup_steps, color="#8a5cf0", alpha=0.12, linewidth=0, label="category warm-up")
        axes.set_xlim(0, 1.02 * max(row["step"] for row in history))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best")
    save_figure(figure, path, dpi=120)


def draw_calibration(points: list[dict], path: Path) -> None:
    """Draw the reliability diagram of "none", with the number of sentences below; `points` as of `reliability`."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(4.6, 5), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    columns = {name: [point[name] for point in points] for name in points[0]}
    top.plot((0, 1), (0, 1), "--", color="#999", linewidth=1, label="perfect calibration")
    top.plot(columns["probability"], columns["frequency"], "o-", color=ANSWER_COLOUR, label="this model")
    top.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), ylabel="share of sentences without target")
    bottom.bar(columns["probability"], columns["samples"], width=0.04, color=ANSWER_COLOUR)
    bottom.set(xlabel="probability of “none”", ylabel="sentences", yscale="log", ylim=(0.7, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    top.legend(frameon=False, loc="upper left", fontsize=8)
    save_figure(figure, path, dpi=120)


def answer_iou(row: dict, answer: Answer, rejected: bool) -> float:
    """IoU in 0..1 as the published evaluator scores it: 1 or 0 where nothing is there or the answer is "none".

    An answer without a mask is scored by the areas that its boxes and the true boxes cover.
    """
    if row["no_target"] or rejected:
        return float(row["no_target"] and rejected)
    if answer.mask is not None:
        truth, prediction = (decode_mask(rle).astype(bool) for rle in (row["mask"], answer.mask))
    else:
        shape = (row["height"], row["width"])
        truth = covered_area(xywh_to_xyxy(row["boxes"]), shape)
        prediction = covered_area(answer.kept_boxes(), shape)
    union = np.logical_or(truth, prediction).sum()
    return float(np.logical_and(truth, prediction).sum() / union) if union else 0.0


def overlay(image: Image.Image, mask: np.ndarray, colour: str, strength: float = 0.55) -> np.ndarray:
    """Paint `mask` (height, width) over `image` and dim the rest; returns (height, width, 3) uint8."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    tint = np.array(matplotlib.colors.to_rgb(colour), dtype=np.float32) * 255
    dimmed = pixels * 0.62
    painted = pixels * (1 - strength) + tint * strength
    inside = mask[..., None]
    return np.where(inside, painted, dimmed).round().astype(np.uint8)


def save_figure(figure: plt.Figure, path: Path, dpi: int) -> None:
    """Save a matplotlib figure as PNG whole or not at all, and close it."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)


def _draw_sentence(block: plt.SubFigure, row: dict, answer: Answer, rejected: bool) -> None:
    iou, count = answer_iou(row, answer, rejected), len(row["ann_ids"])
    correct = iou >= 0.7
    block.set_facecolor("#f4faf6" if correct else "#fdf3f3")
    block.suptitle(_title(row["sentence"]), fontsize=9, fontweight="bold", color="#222", x=0.02, ha="left")
    block.texts[-1].set_parse_math(False)  # a "$" in a sentence is no formula
    panels = original, truth, prediction = block.subplots(1, 3)
    original.imshow(row["image"].convert("RGB"))
    _panel_title(original, f"{count} target{'s' * (count != 1)}", "#444")
    # a model without masks is compared by its boxes, one without boxes by its masks
    true_mask = None if answer.mask is None else decode_mask(row["mask"]).astype(bool)
    true_boxes = () if answer.boxes is None else xywh_to_xyxy(row["boxes"])
    _draw_panel(truth, row["image"], true_mask, true_boxes, row["no_target"], TRUTH_COLOUR)
    _panel_title(truth, "truth", TRUTH_COLOUR)
    mask = None if answer.mask is None else decode_mask(answer.mask).astype(bool)
    _draw_panel(prediction, row["image"], mask, answer.kept_boxes(), rejected, ANSWER_COLOUR)
    score = "none" if rejected else "not none" if row["no_target"] else f"IoU {iou * 100:.0f}"
    _panel_title(prediction, f"{'✓' if correct else '✗'} {score}", GOOD if correct else BAD)
    for axes in panels:
        axes.set(xticks=[], yticks=[], anchor="N")
        axes.spines[:].set_visible(False)


def _draw_panel(
    axes: plt.Axes, image: Image.Image, mask: np.ndarray | None, boxes: np.ndarray, none: bool, colour: str
) -> None:
    """The image with its mask painted and boxes drawn, or dimmed with the word "none"."""
    shown = np.zeros((image.height, image.width), bool) if none or mask is None else mask
    axes.imshow(overlay(image, shown, colour) if none or mask is not None else np.asarray(image.convert("RGB")))
    if none:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="white", fontsize=13)
        return
    if shown.any() and not shown.all():
        axes.contour(shown, levels=[0.5], colors=[colour], linewidths=1.2)
    for left, top, right, bottom in boxes:
        axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.2))


def _panel_title(axes: plt.Axes, text: str, colour: str) -> None:
    axes.set_xlabel(text, fontsize=8, color=colour, labelpad=2)


def _title(sentence: str, limit: int = 62) -> str:
    """The sentence in quotes, cut to `limit` characters, without characters that no font can draw."""
    text = sentence.encode("utf-8", "replace").decode()
    return f"“{text if len(text) <= limit else text[: limit - 1] + '…'}”"

"""What a person looks at after a run: prediction grids, learning curves and the report page.

It draws from plain numbers and arrays; measuring is the work of `evaluate/`, reading that of `grefcoco.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CURVES = (
    ("gIoU", 1, "#f0386b", "gIoU"),
    ("cIoU", 1, "#8a5cf0", "cIoU"),
    ("N_acc", 100, "#d99000", "N_acc"),
    ("T_acc", 100, "#2e9e5b", "T_acc"),
    ("grec/F1_score", 100, "#1f78b4", "GREC F1_score"),
)
TRUTH_COLOUR, PREDICTION_COLOUR = "#00b3a4", "#f0386b"
GOOD, BAD = "#2e9e5b", "#c8323c"
# gIoU, cIoU of the published models (ReLA paper, table of GRES results); val, testA, testB.
PUBLISHED_SENTENCES = {"val": 14_229, "testA": 19_200, "testB": 16_063}
PUBLISHED_GREC = {"val": (0.427, 0.363), "testA": (0.500, 0.345), "testB": (0.365, 0.310)}  # MDETR: F1_score, N_acc
PUBLISHED_GRES = {
    "ReLA Swin-B": {"val": (63.60, 62.42), "testA": (70.03, 69.26), "testB": (61.02, 59.88)},
    "ReLA Swin-T": {"val": (56.86, 57.73)},
    "ReLA ResNet-50": {"val": (38.62, 39.53)},
}


@dataclass
class Sample:
    """One sentence, its truth and a model's answer.

    Masks are (height, width) bool at the image's own size, boxes (n, 4) xyxy in its pixels; a model that gives no
    masks or no boxes has None there.
    """

    image: Image.Image
    sentence: str
    truth: np.ndarray
    prediction: np.ndarray | None
    no_target: bool
    predicted_no_target: bool
    num_targets: int = 0
    truth_boxes: np.ndarray | None = None
    boxes: np.ndarray | None = None

    @property
    def iou(self) -> float:
        """IoU in 0..1 as the published evaluator scores it: 1 or 0 when nothing is there or nothing is found.

        Without masks, that of the areas which the boxes cover.
        """
        if self.no_target or self.predicted_no_target:
            return float(self.no_target and self.predicted_no_target)
        truth, prediction = self.truth, self.prediction
        if prediction is None:
            truth, prediction = (covered(boxes, truth.shape) for boxes in (self.truth_boxes, self.boxes))
        union = np.logical_or(truth, prediction).sum()
        return float(np.logical_and(truth, prediction).sum() / union) if union else 0.0


def corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """(n, 4) float32 xywh -> xyxy."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def covered(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(n, 4) xyxy in pixels -> (height, width) bool, what the boxes cover together."""
    mask = np.zeros(shape, bool)
    for left, top, right, bottom in np.asarray(boxes).round().astype(int).clip(0):
        mask[top:bottom, left:right] = True
    return mask


def overlay(image: Image.Image, mask: np.ndarray, colour: str, strength: float = 0.55) -> np.ndarray:
    """Paint `mask` (height, width) over `image` and dim the rest; returns (height, width, 3) uint8."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    tint = np.array(matplotlib.colors.to_rgb(colour), dtype=np.float32) * 255
    dimmed = pixels * 0.62
    painted = pixels * (1 - strength) + tint * strength
    inside = mask[..., None]
    return np.where(inside, painted, dimmed).round().astype(np.uint8)


def draw_predictions(samples: list[Sample], path: Path | None = None, columns: int = 3) -> np.ndarray | None:
    """A grid of samples, each as image, truth and prediction side by side under its sentence.

    Saved as PNG, or without `path` returned as (height, width, 3) uint8.
    """
    rows = -(-len(samples) // columns)
    figure = plt.figure(figsize=(columns * 4.9, rows * 2.15 + 0.5), layout="constrained")
    blocks = figure.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.04)
    for block, sample in zip(blocks.flat, samples):
        _draw_sample(block, sample)
    if path is not None:
        save_figure(figure, path, dpi=110)
        return None
    figure.set_dpi(80)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return pixels


def draw_learning_curve(history: list[dict], path: Path) -> None:
    """Plot the loss and the metrics measured along the way; `history` rows hold `step` with `loss` or metrics."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    left.plot(*zip(*losses) if losses else ([], []), color="#555", linewidth=1)
    left.set(xlabel="step", ylabel="training loss", yscale="log" if losses else "linear")
    for key, scale, colour, label in CURVES:
        points = [(row["step"], row[key] * scale) for row in history if key in row]
        if points:
            right.plot(*zip(*points), "o-", markersize=3, color=colour, label=label)
    right.set(xlabel="step", ylabel="%", ylim=(0, 101))
    if right.lines:
        right.legend(frameon=False, ncols=2, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    save_figure(figure, path, dpi=120)


def metrics_table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown table of GRES results, a named row each: IoUs and Pr in %, accuracies in 0..1, as published."""
    return _table(("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"), rows)


def grec_table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown table of GREC results, a named row each, in 0..1; `F1_score` is the paper's Pr@F1=1."""
    return _table(("F1_score", "N_acc", "T_acc"), rows)


def _table(keys: Sequence[str], rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, metrics in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(key, metrics.get(key)) for key in keys) + " |")
    return "\n".join(lines)


def breakdown_table(groups: dict[str, dict[str, float]]) -> str:
    """Markdown table of the groups of sentences that a metric's `breakdown` gives."""
    keys = [key for key in ("gIoU", "cIoU", "F1_score") if any(key in row for row in groups.values())]
    lines = [f"| sentences | number | {' | '.join(keys)} | answered none |", "|---" * (len(keys) + 3) + "|"]
    for name, row in groups.items():
        label = name.replace("num_", "").replace("_", " ")
        cells = " | ".join(_cell(key, row[key]) for key in keys)
        lines.append(f"| {label} | {row['samples']} | {cells} | {row['rejected']:.3f} |")
    return "\n".join(lines)


def published_rows(split: str, num_sentences: int) -> dict[str, dict[str, float]]:
    """The published GRES results of `split` for `metrics_table`; none unless all its sentences were measured."""
    if PUBLISHED_SENTENCES.get(split) != num_sentences:
        return {}
    found = {name: splits[split] for name, splits in PUBLISHED_GRES.items() if split in splits}
    return {f"{name} (published)": {"gIoU": g, "cIoU": c} for name, (g, c) in found.items()}


def results(summary: dict[str, dict], split: str, num_sentences: int) -> str:
    """The tables of a run, from what metrics.json holds: GRES and GREC, each where the model answers so."""
    lines = []
    if "gres" in summary:
        rows = {"**this model**": summary["gres"], **summary["baselines"], **published_rows(split, num_sentences)}
        lines += [f"## GRES, split {split}, {num_sentences} sentences", "", metrics_table(rows), ""]
        lines += ["By kind of sentence:", "", breakdown_table(summary["breakdown"]), ""]
    if "grec" in summary:
        rows = {"**this model**": summary["grec"]}
        rows["always empty"] = {"F1_score": summary["grec"]["always_empty/F1_score"], "N_acc": 1.0, "T_acc": 0.0}
        if PUBLISHED_SENTENCES.get(split) == num_sentences:
            rows["MDETR (published)"] = dict(zip(("F1_score", "N_acc"), PUBLISHED_GREC[split]))
        lines += [f"## GREC, split {split}, {num_sentences} sentences", "", grec_table(rows), ""]
        lines += ["By number of targets:", "", breakdown_table(summary["grec_breakdown"]), ""]
    return "\n".join(lines)


def run_page(summary: dict[str, dict], config: dict[str, object], num_sentences: int) -> str:
    """report.md of a run, from what metrics.json holds, its configuration and the number of measured sentences."""
    split, trained = config["split"], summary["train"]
    lines = [f"# {config['dataset']}", "", results(summary, split, num_sentences)]
    if trained["steps"]:
        speed = trained["sentences"] / max(trained["seconds"], 1e-9)
        lines += [
            f"Trained {trained['steps']} steps on {trained['sentences']} sentences in {trained['seconds'] / 60:.1f} "
            f"minutes ({speed:.0f} sentences a second, {trained['waiting']:.1%} of the time waiting for data), "
            f"{trained['parameters'] / 1e6:.2f} M parameters, seed {config['seed']}.",
            "",
        ]
        if trained["skipped"]:
            lines += [f"{trained['skipped']} steps were left out because their gradients were not finite.", ""]
        lines += ["![learning curve](learning_curve.png)", ""]
    pictures = ["![predictions](predictions.png)", "", "The best and the worst answers to sentences with targets:", ""]
    return "\n".join([*lines, *pictures, "![best and worst](best_and_worst.png)", ""])


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_figure(figure: plt.Figure, path: Path, dpi: int) -> None:
    """Save a matplotlib figure as PNG whole or not at all, and close it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)
    temporary.replace(path)


def _draw_sample(block: plt.SubFigure, sample: Sample) -> None:
    right = sample.iou >= 0.7
    block.set_facecolor("#f4faf6" if right else "#fdf3f3")
    score = "none" if sample.predicted_no_target else f"IoU {sample.iou * 100:.0f}"
    block.suptitle(_shorten(sample.sentence), fontsize=9, fontweight="bold", color="#222", x=0.02, ha="left")
    original, truth, prediction = block.subplots(1, 3)
    original.imshow(sample.image.convert("RGB"))
    _panel_title(original, f"{sample.num_targets} target{'s' * (sample.num_targets != 1)}", "#444")
    _draw_answer(truth, sample.image, sample.truth, sample.truth_boxes, sample.no_target, TRUTH_COLOUR)
    _panel_title(truth, "truth", TRUTH_COLOUR)
    shown, none = (sample.prediction, sample.boxes), sample.predicted_no_target
    _draw_answer(prediction, sample.image, *shown, none, PREDICTION_COLOUR)
    _panel_title(prediction, f"{'✓' if right else '✗'} {score}", GOOD if right else BAD)
    for axes in (original, truth, prediction):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _draw_answer(
    axes: plt.Axes, image: Image.Image, mask: np.ndarray | None, boxes: np.ndarray | None, none: bool, colour: str
) -> None:
    shape = (image.height, image.width)
    shown = np.zeros(shape, bool) if none or mask is None else mask
    axes.imshow(overlay(image, shown, colour) if none or mask is not None else np.asarray(image.convert("RGB")))
    if none:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="white", fontsize=13)
        return
    if shown.any() and not shown.all():
        axes.contour(shown, levels=[0.5], colors=[colour], linewidths=1.2)
    for left, top, right, bottom in boxes if boxes is not None else ():
        axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.2))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key.endswith(("acc", "score")) else f"{value:.2f}"


def _panel_title(axes: plt.Axes, text: str, colour: str) -> None:
    axes.set_xlabel(text, fontsize=8, color=colour, labelpad=2)


def _shorten(sentence: str, limit: int = 62) -> str:
    return f"“{sentence if len(sentence) <= limit else sentence[: limit - 1] + '…'}”"

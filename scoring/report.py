"""The report of a run: tables of scores in Markdown, from what metrics.json holds."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "pillow", "pycocotools")

# gIoU, cIoU of the published models (ReLA paper, table of GRES results); val, testA, testB.
PUBLISHED_SENTENCES = {"val": 14_229, "testA": 19_200, "testB": 16_063}
PUBLISHED_GREC = {"val": (0.427, 0.363), "testA": (0.500, 0.345), "testB": (0.365, 0.310)}  # MDETR: F1_score, N_acc
PUBLISHED_GRES = {
    "ReLA Swin-B": {"val": (63.60, 62.42), "testA": (70.03, 69.26), "testB": (61.02, 59.88)},
    "ReLA Swin-T": {"val": (56.86, 57.73)},
    "ReLA ResNet-50": {"val": (38.62, 39.53)},
}


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
    rows = {name: splits[split] for name, splits in PUBLISHED_GRES.items() if split in splits}
    return {f"{name} (published)": {"gIoU": gIoU, "cIoU": cIoU} for name, (gIoU, cIoU) in rows.items()}


def results(summary: dict[str, dict], split: str, num_sentences: int) -> str:
    """The tables of a run, from what metrics.json holds: GRES and GREC, each where the model answers so."""
    lines = []
    if "gres" in summary:
        rows = {**_measured(summary, "gres"), **summary["baselines"], **published_rows(split, num_sentences)}
        lines += [f"## GRES, split {split}, {num_sentences} sentences", "", metrics_table(rows), ""]
        lines += ["By kind of sentence:", "", breakdown_table(summary["breakdown"]), ""]
    if "grec" in summary:
        rows = _measured(summary, "grec")
        rows["always empty"] = {"F1_score": summary["grec"]["always_empty/F1_score"], "N_acc": 1.0, "T_acc": 0.0}
        if PUBLISHED_SENTENCES.get(split) == num_sentences:
            rows["MDETR (published)"] = dict(zip(("F1_score", "N_acc"), PUBLISHED_GREC[split]))
        lines += [f"## GREC, split {split}, {num_sentences} sentences", "", grec_table(rows), ""]
        lines += ["By number of targets:", "", breakdown_table(summary["grec_breakdown"]), ""]
    lines += [
        "95 % intervals: percentile bootstrap over images, 1,000 resamples, seed 0. They show how much the scores "
        "depend on the choice of images. How much they vary between trainings is not in them.",
        "",
    ]
    return "\n".join(lines)


def _measured(summary: dict[str, dict], task: str) -> dict[str, dict]:
    """The first rows of a task's table: the scores, and their intervals."""
    return {"**this model**": summary[task], "95 % interval": summary["intervals"][task]}


def run_page(summary: dict[str, dict], config: dict[str, object], num_sentences: int) -> str:
    """report.md of a run, from what metrics.json holds, its configuration and the number of measured sentences."""
    split, trained = config["split"], summary["train"]
    lines = [f"# {config['dataset']}", "", results(summary, split, num_sentences)]
    if trained["steps"]:
        lines += [
            "## Training",
            "",
            _training(trained, config["seed"]),
            "",
        ]
    if summary["history"]:
        lines += ["![learning curve](learning_curve.png)", ""]
    ece = summary["calibration"]["ECE"]
    lines += [
        "## Predictions",
        "",
        "Random sentences:",
        "",
        "![predictions](predictions.png)",
        "",
        *_examples(summary),
        "## Calibration of “none”",
        "",
        "Of sentences that get a probability, the share that does refer to nothing; the expected calibration error is "
        f"{ece:.3f}.",
        "",
        "![calibration](calibration.png)",
        "",
        "## Hardware and versions",
        "",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in summary["environment"].items()),
        "",
    ]
    return "\n".join(lines)


def _training(trained: dict[str, float], seed: object) -> str:
    speed = trained["sentences"] / max(trained["seconds"], 1e-9)
    text = (
        f"{trained['steps']:,} steps on {trained['sentences']:,} sentences in {trained['seconds'] / 60:.1f} minutes "
        f"({speed:.0f} sentences a second, {trained['waiting']:.1%} of the time waiting for data), "
        f"{trained['parameters'] / 1e6:.2f} M parameters, seed {seed}."
    )
    if trained["skipped"]:
        text += f" {trained['skipped']} steps were skipped because their gradients were not finite."
    return text


def _examples(summary: dict[str, dict]) -> list[str]:
    """The pictures of the best and worst answers and of the failures on sentences without target, where there are."""
    best, worst, failures = (len(summary["examples"][name]) for name in ("best", "worst", "failures"))
    lines = []
    if best:
        lines += [
            f"The best answers to sentences with targets ({best}), then the worst ({worst}), all of different images:"
        ]
        lines += ["", "![best and worst](best_and_worst.png)", ""]
    group = (summary["breakdown"] or summary["grec_breakdown"]).get("num_targets=0")
    if group:
        wrong = round(group["samples"] * (1 - group["rejected"]))
        lines += ["### Sentences without target", ""]
        lines += [f"{wrong:,} of {group['samples']:,} were not answered “none”."]
        lines[-1] += " The most certain, all of different images:" if failures else ""
        lines += ["", *(["![failures](no_target_failures.png)", ""] if failures else [])]
    return lines


def environment(device: torch.device, processes: int) -> dict[str, str]:
    """Hardware and versions of a run, by name."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {device.type}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    here = {"device": hardware, "processes": str(processes), "CPU cores": str(cores)}
    here |= {"system": f"{platform.system()} {platform.machine()}", "Python": platform.python_version()}
    return here | {name: version(name) for name in PACKAGES}


def _processor() -> str:
    """Name of the CPU."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cell(key: str, value: float | tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, tuple):
        return " to ".join(_cell(key, end) for end in value)
    return f"{value:.3f}" if key.endswith(("acc", "score")) else f"{value:.2f}"

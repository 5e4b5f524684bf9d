"""The table of several models: rows of their scores.json files, beside them always-empty and published results.

    python -m scoring table runs/*/scores.json --out runs/table    # runs/table.md, .csv and .png

All scores are in percent. N_acc and T_acc of both tasks, and results by number of targets, stand beside the main
scores; default and calibrated thresholds are rows of their own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from scoring.report import PUBLISHED_GREC, PUBLISHED_GRES, PUBLISHED_SENTENCES

SCORES = {  # column of the table: task, key of its scores, factor to percent
    "gIoU": ("gres", "gIoU", 1),
    "cIoU": ("gres", "cIoU", 1),
    "GRES N_acc": ("gres", "N_acc", 100),
    "GRES T_acc": ("gres", "T_acc", 100),
    "F1": ("grec", "F1_score", 100),
    "GREC N_acc": ("grec", "N_acc", 100),
    "GREC T_acc": ("grec", "T_acc", 100),
}
KINDS = ("0", "1", "2", "3+")  # targets of a sentence
KIND_SCORES = {"gIoU": ("gres", "gIoU", 1), "F1": ("grec", "F1_score", 100)}
COLUMNS = ("model", "split", "thresholds", "seen COCO/RefCOCO pictures", "unreadable", *SCORES, "source")

MMDETECTION = "open-mmlab/mmdetection, configs/mm_grounding_dino/README.md; its metric: first true box only"
OTHER_VAL = "; its val has other sentences: N_acc and F1 do not fit the val of 62.58 % none"
GREC = ("F1", "GREC N_acc")
GRES = ("gIoU", "cIoU", "GRES N_acc")
TUNED = "trained on gRefCOCO"
# Published results that were read in their primary source: model, pictures seen, source, columns, values by split.
PUBLISHED: list[tuple[str, str, str, tuple[str, ...], dict[str, tuple[float, ...]]]] = [
    (
        "Grounding DINO-T, threshold 0.7",
        "zero-shot",
        MMDETECTION,
        GREC,
        {"val": (41.3, 91.8), "testA": (27.2, 90.2), "testB": (29.7, 93.5)},
    ),
    (
        "MM Grounding DINO-T, threshold 0.7",
        "zero-shot",
        MMDETECTION,
        GREC,
        {"val": (41.0, 91.3), "testA": (26.1, 93.0), "testB": (30.4, 92.3)},
    ),
    (
        "Grounding DINO-B, threshold 0.7",
        "yes: COCO and RefCOCO, the test pictures too",
        MMDETECTION.replace("mm_grounding_dino", "grounding_dino"),
        GREC,
        {"val": (46.18, 81.44), "testA": (38.60, 76.06), "testB": (35.87, 80.58)},
    ),
    (
        "M2VG (BEiT3-B)",
        TUNED,
        "its README",
        (*GREC, "gIoU", "cIoU"),
        {"val": (75.3, 76.4, 73.5, 69.0), "testA": (68.9, 74.4, 74.6, 73.2), "testB": (59.4, 67.3, 65.1, 64.6)},
    ),
    (
        "DeRIS-B",
        TUNED,
        "Dmmm1997/DeRIS, README",
        GRES,
        {"val": (74.10, 68.06, 77.03), "testA": (73.72, 71.99, 75.98), "testB": (65.63, 64.65, 63.44)},
    ),
    (
        "DeRIS-L",
        TUNED,
        "Dmmm1997/DeRIS, README",
        GRES,
        {"val": (77.67, 72.00, 82.22), "testA": (75.30, 73.73, 78.30), "testB": (67.99, 67.38, 66.81)},
    ),
    (
        "GSVA-7B, pretrained",
        "not stated",
        "LeapLabTHU/GSVA, README",
        GRES,
        {"val": (63.47, 61.65, 56.98), "testA": (69.99, 69.17, 63.39), "testB": (61.34, 60.26, 58.68)},
    ),
    (
        "GSVA-7B, tuned",
        TUNED,
        "LeapLabTHU/GSVA, README",
        GRES,
        {"val": (66.43, 63.19, 62.56), "testA": (71.06, 69.87, 65.72), "testB": (62.20, 60.35, 60.72)},
    ),
    (
        "MDETR",
        TUNED,
        "paper of GREC",
        GREC,
        {split: tuple(round(100 * value, 2) for value in values) for split, values in PUBLISHED_GREC.items()},
    ),
    *((name, TUNED, "paper of ReLA", GRES[:2], values) for name, values in PUBLISHED_GRES.items()),
]

Row = dict[str, object]  # by column; what is unknown is absent


def table_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of files that `python -m scoring score --out` wrote, then always-empty and published results.

    Raises:
        ValueError: a file that is no such file; names it.
    """
    rows: list[Row] = []
    empty: dict[str, Row] = {}
    published: dict[str, list[Row]] = {}
    for path in paths:
        measured, empty_row, number = _read_scores(path)
        split = str(empty_row["split"])
        rows += measured
        empty[split] = empty.get(split, {}) | empty_row
        if number == PUBLISHED_SENTENCES.get(split):  # of other data the published results say nothing
            published[split] = _published_rows(split)
    return [*rows, *empty.values(), *(row for part in published.values() for row in part)]


def markdown(rows: Sequence[Row]) -> str:
    """A table for each split, and one by number of targets where scores were made with --details."""
    parts = []
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        parts += [f"## {split}", "", _markdown_table([name for name in COLUMNS if name != "split"], own), ""]
        kinds = [name for name in _kind_columns() if any(name in row for row in own)]
        if kinds:
            detailed = [row for row in own if kinds[0] in row or kinds[-1] in row]
            parts += ["By number of targets:", "", _markdown_table(["model", "thresholds", *kinds], detailed), ""]
    return "\n".join(parts)


def csv_text(rows: Sequence[Row]) -> str:
    """All rows with all columns."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*COLUMNS, *_kind_columns()], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG of horizontal bars: gIoU and F1 of each row, an axis for each split and task."""
    import matplotlib.pyplot as plt

    from scoring.pictures import save_figure

    panels = [
        (split, score, own)
        for split in dict.fromkeys(row["split"] for row in rows)
        for score in ("gIoU", "F1")
        if (own := [row for row in rows if row["split"] == split and score in row])
    ]
    heights = [len(own) + 1 for _, _, own in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.28 * sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (split, score, own) in zip(axes[:, 0], panels):
        colours = ["tab:grey" if row["thresholds"] in ("published", "") else "tab:blue" for row in own]
        labels = [f"{row['model']} ({row['thresholds']})" if row["thresholds"] else row["model"] for row in own]
        bars = axis.barh(range(len(own)), [row[score] for row in own], color=colours)
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axis.set_yticks(range(len(own)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(f"{split}: {score} in %", fontsize=9, loc="left")
    save_figure(figure, path, dpi=120)


def _read_scores(path: Path) -> tuple[list[Row], Row, int]:
    """The rows of a file, for calibrated and default thresholds, the row of always-empty, the number of sentences."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        origin = scores["origin"]
        base = {"model": origin.get("model") or origin.get("checkpoint") or origin["answers"]}
        base |= {"split": origin["split"], "seen COCO/RefCOCO pictures": origin.get("seen") or "unknown"}
        if outcomes := origin.get("outcomes"):
            base["unreadable"] = 100 * outcomes["unreadable"] / max(1, sum(outcomes.values()))
        versions = {
            "calibrated" if "default" in scores else "default": scores,
            "default": scores.get("default", scores),
        }
        rows = [{**base, "thresholds": name, **_percentages(part)} for name, part in versions.items()]
        empty = {"model": "always empty", "split": origin["split"], "thresholds": ""}
        if "gres" in scores:
            empty |= {"gIoU": scores["gres"]["always_empty/gIoU"], "cIoU": 0.0, "GRES N_acc": 100.0, "GRES T_acc": 0.0}
        if "grec" in scores:
            share = 100 * scores["grec"]["always_empty/F1_score"]
            empty |= {"F1": share, "GREC N_acc": 100.0, "GREC T_acc": 0.0}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no scores of `python -m scoring score --out` ({error!r})") from None
    return rows, empty, origin.get("measured", 0)


def _percentages(scores: dict[str, dict]) -> dict[str, float]:
    """The columns of `SCORES`, and those by number of targets, that a set of scores has."""
    values = {column: factor * scores[task][key] for column, (task, key, factor) in SCORES.items() if task in scores}
    for column, (task, key, factor) in KIND_SCORES.items():
        groups = scores.get(task, {}).get("groups", {})
        for kind in KINDS:
            if group := groups.get(f"num_targets={kind}"):
                values[f"{column}, {kind} targets"] = factor * group[key]
    return values


def _published_rows(split: str) -> list[Row]:
    rows = []
    for model, seen, source, columns, splits in PUBLISHED:
        if split in splits:
            source += OTHER_VAL if "mmdetection" in source and split == "val" else ""
            row = {"model": model, "split": split, "thresholds": "published", "seen COCO/RefCOCO pictures": seen}
            rows.append({**row, **dict(zip(columns, splits[split])), "source": source})
    return rows


def _kind_columns() -> list[str]:
    return [f"{score}, {kind} targets" for score in KIND_SCORES for kind in KINDS]


def _markdown_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    columns = [name for name in columns if name == "model" or any(row.get(name) not in (None, "") for row in rows)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str("" if value is None else value).replace("|", "/")

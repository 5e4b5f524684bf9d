"""Score a file of predictions against a split: `python evaluate/grec PREDICTIONS DATASET --split val`.

PREDICTIONS holds one JSON object a line, `{"sent_id": 1, "boxes": [[x0, y0, x1, y1]], "scores": [0.9]}` in pixels, for
every sentence of the split; DATASET is what `grefcoco.load` takes. The scores go to stdout as JSON; bad input ends in
one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import evaluate

sys.path.append(str(Path(__file__).resolve().parents[2]))  # grefcoco.py, where it is not installed
import grefcoco


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _score(options)
    except (OSError, ValueError) as error:
        print(f"grec: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grec", description="GREC scores of a predictions file.")
    parser.add_argument("predictions", help="JSON lines of sent_id, boxes (x0, y0, x1, y1 in pixels) and scores")
    parser.add_argument("dataset", help="built folder or Hub id")
    parser.add_argument("--config", default="grefcoco", help="configuration of the data set")
    parser.add_argument("--split", required=True, help="split the predictions are of")
    parser.add_argument("--thresh-score", type=float, default=0.7, help="least score of a box")
    parser.add_argument("--thresh-iou", type=float, default=0.5, help="least overlap of a matched pair")
    parser.add_argument("--thresh-F1", type=float, default=1.0, help="least F1 of a correct sentence")
    parser.add_argument("--iou", default="giou", help="giou (as published) or iou")
    parser.add_argument("--compat", default="published", help="published or mmdet")
    parser.add_argument("--ap", metavar="BACKEND", help="add COCO AP by pycocotools or hotcoco")
    parser.add_argument("--details", action="store_true", help="score sentences by number of targets too")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples for confidence intervals")
    parser.add_argument("--table", type=Path, metavar="CSV", help="write one line per sentence")
    return parser


def _score(options: argparse.Namespace) -> None:
    metric = evaluate.load(str(Path(__file__).resolve().parent))
    rows = grefcoco.load(
        options.dataset, config=options.config, split=options.split, columns=["sent_id", "image_id", "boxes"]
    )
    references = {
        row["sent_id"]: {"sent_id": row["sent_id"], "image_id": row["image_id"], "boxes": _corners(row["boxes"])}
        for row in rows
    }
    accumulator = metric.accumulator(
        thresh_score=options.thresh_score,
        thresh_iou=options.thresh_iou,
        thresh_F1=options.thresh_F1,
        iou=options.iou,
        compat=options.compat,
    )
    predictions = list(_read(Path(options.predictions), references))
    truths = [references[prediction.pop("sent_id")] for prediction in predictions]
    accumulator.add_batch(predictions=predictions, references=truths)
    result = accumulator.compute(expected=references)
    if options.ap:
        result |= metric.average_precision(predictions, truths, options.ap)
    if options.details:
        result["groups"] = accumulator.breakdown()
    if options.bootstrap:
        result["intervals"] = accumulator.intervals(resamples=options.bootstrap)
    if options.table:
        table = accumulator.table()
        with options.table.open("w", newline="") as file:
            csv.writer(file).writerows([table, *zip(*table.values())])
    print(json.dumps(result, indent=2))


def _corners(boxes: list[list[float]]) -> list[list[float]]:
    return [[x, y, x + width, y + height] for x, y, width, height in boxes]


def _read(path: Path, known: dict[int, dict]) -> Iterator[dict]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                answer = json.loads(line)
                prediction = {name: answer[name] for name in ("sent_id", "boxes", "scores")}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is no prediction ({error!r}): see --help") from None
            if prediction["sent_id"] not in known:
                raise ValueError(f"{path}, line {number}: sentence {prediction['sent_id']!r} is not of this split")
            yield prediction


if __name__ == "__main__":
    sys.exit(main())

"""Score a file of predictions against a split: `python evaluate/gres PREDICTIONS DATASET --split val`.

PREDICTIONS holds one JSON object a line, `{"sent_id": 1, "mask": {"size": [h, w], "counts": ".."}, "no_target": 0.1}`,
for every sentence of the split; DATASET is what `grefcoco.load` takes. The scores go to stdout as JSON; bad input ends
in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import evaluate

sys.path.append(str(Path(__file__).resolve().parents[2]))  # grefcoco.py, where it is not installed
import grefcoco

BATCH = 1024
COLUMNS = ["sent_id", "image_id", "sentence", "no_target", "ann_ids", "mask"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if bool(options.threshold_from) != bool(options.threshold_split):
            raise ValueError("--threshold-from and --threshold-split belong together")
        if options.threshold is not None and options.threshold_from:
            raise ValueError("--threshold and --threshold-from exclude each other")
        _score(options)
    except (OSError, ValueError) as error:
        print(f"gres: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gres", description="GRES scores of a predictions file.")
    parser.add_argument("predictions", help="JSON lines of sent_id, mask (RLE) and no_target (flag or probability)")
    parser.add_argument("dataset", help="built folder or Hub id")
    parser.add_argument("--config", default="grefcoco", help="configuration of the data set")
    parser.add_argument("--split", required=True, help="split the predictions are of")
    parser.add_argument("--compat", default="rela", help="whose evaluator: rela, gsva, lisa, deris or propvg")
    parser.add_argument("--resolution", type=_resolution, help='"original" or the side of a square in pixels')
    parser.add_argument("--threshold", type=float, help="no-target probability above which a sentence is rejected")
    parser.add_argument("--threshold-from", metavar="FILE", help="choose it on predictions of held-out sentences")
    parser.add_argument("--threshold-split", metavar="SPLIT", help="split those are of; any part of it will do")
    parser.add_argument("--details", action="store_true", help="score groups of sentences too")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples for confidence intervals")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="draw the no-target operating curve")
    parser.add_argument("--table", type=Path, metavar="CSV", help="write one line per sentence")
    return parser


def _resolution(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _score(options: argparse.Namespace) -> None:
    metric = evaluate.load(str(Path(__file__).resolve().parent))
    accumulator, ids = _accumulate(metric, options, options.predictions, options.split)
    threshold = options.threshold
    if options.threshold_from:
        held_out, _ = _accumulate(metric, options, options.threshold_from, options.threshold_split)
        threshold = held_out.choose_threshold()
    result = accumulator.compute(threshold=threshold, expected=ids)
    if options.threshold_from:
        result["threshold"] = threshold.value
    if options.details:
        result["groups"] = accumulator.breakdown(threshold)
    if options.bootstrap:
        result["intervals"] = accumulator.intervals(threshold, resamples=options.bootstrap)
    if options.curve:
        metric.plot_curve(accumulator.curve(), options.curve)
    if options.table:
        table = accumulator.table(threshold)
        with options.table.open("w", newline="") as file:
            csv.writer(file).writerows([table, *zip(*table.values())])
    print(json.dumps(result, indent=2))


def _accumulate(
    metric: evaluate.Metric, options: argparse.Namespace, path: str, split: str
) -> tuple[object, Sequence[int]]:
    """The accumulator of a predictions file, and the ids of all sentences of its split."""
    rows = grefcoco.load(options.dataset, config=options.config, split=split, columns=COLUMNS)
    ids = rows.with_format(None)["sent_id"][:]
    place = {sent_id: index for index, sent_id in enumerate(ids)}
    accumulator = metric.accumulator(options.compat, options.resolution)
    predictions = _read(Path(path), place)
    while batch := list(islice(predictions, BATCH)):
        sent_ids, answers = zip(*batch)
        truth = rows[[place[sent_id] for sent_id in sent_ids]]
        columns = {name: truth[name] for name in ("mask", "no_target", "sent_id", "image_id", "sentence")}
        columns["num_targets"] = [len(ann_ids) for ann_ids in truth["ann_ids"]]
        references = [dict(zip(columns, values)) for values in zip(*columns.values())]
        accumulator.add_batch(predictions=answers, references=references)
    return accumulator, ids


def _read(path: Path, known: dict[int, int]) -> Iterator[tuple[int, dict]]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                answer = json.loads(line)
                mask = {"size": [int(side) for side in answer["mask"]["size"]], "counts": answer["mask"]["counts"]}
                sent_id, prediction = answer["sent_id"], {"mask": mask, "no_target": float(answer["no_target"])}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is no prediction ({error!r}): see --help") from None
            if sent_id not in known:
                raise ValueError(f"{path}, line {number}: sentence {sent_id!r} is not of this split")
            yield sent_id, prediction


if __name__ == "__main__":
    sys.exit(main())

"""The scoring commands: answers of a checkpoint into a file, and the scores of such a file.

    python -m scoring predict runs/demo/checkpoint data/easy --split val --out runs/demo/val.jsonl
    python -m scoring score runs/demo/val.jsonl data/easy --split val --details --bootstrap 1000

A file of answers (see scoring/answers.py) may come from any model. Bad input ends in one line on stderr and exit
code 2.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from huggingface_hub.errors import HfHubHTTPError

import grefcoco
from grefcoco_data.arguments import ArgumentParser
from grefcoco_data.atomic_files import new_file, write_text
from scoring.answers import BOX_THRESHOLD, read_answers
from scoring.measurement import COLUMNS, GREC, GRES, Measurement, batches, box_reference
from scoring.prediction import write_answers
from scoring.videos import add_command as add_videos_command
from training.families import load_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after one line on bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, HfHubHTTPError) as error:
        print(f"scoring {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="scoring", description="Answers of models, and their scores.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("predict", help="write the answers of a checkpoint")
    add.add_argument("checkpoint", help="model folder or Hub id")
    _add_data(add)
    add.add_argument("--out", required=True, type=Path, help="file of JSON lines to write; a killed run goes on")
    add.add_argument("--batch-size", type=int, default=16, help="sentences at a time")
    add.add_argument("--sentences", type=int, help="only so many sentences, the first ones")
    add.set_defaults(run=_predict)
    add = commands.add_parser("score", help="score a file of answers")
    add.add_argument("answers", type=Path, help="JSON lines, one a sentence; see scoring/answers.py")
    _add_data(add)
    add.add_argument(
        "--compat", help=f"evaluator to follow. GRES: {', '.join(GRES.protocols)}. GREC: {', '.join(GREC.modes)}"
    )
    add.add_argument("--resolution", type=_resolution, help='of masks: "original" or the side of a square in pixels')
    add.add_argument("--threshold", type=float, help="no-target probability above which a sentence is rejected")
    add.add_argument("--thresh-score", type=float, default=BOX_THRESHOLD, help="least score of a box")
    add.add_argument("--batch-size", type=int, help="sentences of a batch, for evaluators that average over batches")
    add.add_argument("--thresh-iou", type=float, default=0.5, help="least overlap of a matched pair of boxes")
    add.add_argument("--thresh-F1", type=float, default=1.0, help="least F1 of a correct sentence")
    add.add_argument("--iou", help="overlap of boxes: giou (as published) or iou")
    add.add_argument("--threshold-from", metavar="FILE", type=Path, help="choose thresholds on these held-out answers")
    add.add_argument("--threshold-split", metavar="SPLIT", help="the split of the held-out answers")
    add.add_argument("--ap", metavar="BACKEND", help="add COCO AP of the boxes by pycocotools or hotcoco")
    add.add_argument("--details", action="store_true", help="score groups of sentences too")
    add.add_argument("--bootstrap", type=int, default=0, metavar="N", help="resamples for confidence intervals")
    add.add_argument("--curve", type=Path, metavar="PNG", help="draw the operating curve of the threshold")
    add.add_argument("--table", type=Path, metavar="CSV", help="write one line a sentence")
    add.add_argument("--out", type=Path, metavar="JSON", help="write the scores to a file too")
    add.set_defaults(run=_score)
    add_videos_command(commands)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="built folder or Hub id")
    parser.add_argument("--config", default="grefcoco", help="configuration of the data set")
    parser.add_argument("--split", required=True, help="split that is answered")


def _resolution(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# ---- predict -----------------------------------------------------------------------------------------------------


def _predict(options: argparse.Namespace) -> None:
    for name in ("batch_size", "sentences"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    model, processor = load_checkpoint(options.checkpoint)
    rows = _load(options.dataset, options.config, options.split, processor.columns(training=False))
    rows = rows if options.sentences is None else rows.select(range(min(options.sentences, len(rows))))
    names = ("checkpoint", "dataset", "config", "split", "batch_size", "sentences")
    origin = {name: getattr(options, name) for name in names}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    write_answers(model.to(device), processor, rows, options.out, options.batch_size, origin)
    print(f"{options.out}: the answers to {len(rows):,} sentences")


def _load(dataset: str, config: str, split: str, columns: Sequence[str]) -> datasets.Dataset:
    return grefcoco.load(dataset, config=config, split=split, columns=columns)


# ---- score -------------------------------------------------------------------------------------------------------


def _score(options: argparse.Namespace) -> None:
    _check(options)
    measurement = _measure(options, options.answers, options.split)
    if not measurement.tasks():
        raise ValueError(f"{options.answers} has neither masks nor boxes")
    thresholds = {"gres": options.threshold, "grec": None}
    if options.threshold_from:
        held_out = _measure(options, options.threshold_from, options.threshold_split)
        thresholds |= {name: part.choose_threshold() for name, part in held_out.tasks().items()}
    result = {}
    for name, accumulator in measurement.tasks().items():
        result[name] = _scores(options, accumulator, thresholds[name], measurement.ids)
    if options.ap:
        result["grec"] |= _average_precision(options, measurement)
    if options.curve:
        for name, accumulator in measurement.tasks().items():
            metric = GRES if name == "gres" else GREC
            metric.plot_curve(accumulator.curve(), _path_of(options.curve, name, result))
    if options.table:
        _write_table(options.table, measurement, thresholds)
    text = json.dumps(result, indent=2) + "\n"
    if options.out:
        write_text(options.out, text)
    print(text, end="")


def _check(options: argparse.Namespace) -> None:
    if bool(options.threshold_from) != bool(options.threshold_split):
        raise ValueError("--threshold-from and --threshold-split belong together")
    if options.threshold is not None and options.threshold_from:
        raise ValueError("--threshold and --threshold-from exclude each other")
    if options.compat and options.compat not in {*GRES.protocols, *GREC.modes}:
        names = f"GRES has {', '.join(GRES.protocols)}; GREC has {', '.join(GREC.modes)}"
        raise ValueError(f"--compat is {options.compat!r}; {names}")


def _measure(options: argparse.Namespace, path: Path, split: str) -> Measurement:
    """The accumulators of a file of answers; each task follows `--compat` where it knows that evaluator."""
    gres = {"compat": options.compat} if options.compat in GRES.protocols else {}
    grec = {"compat": options.compat} if options.compat in GREC.modes else {}
    grec |= {name: getattr(options, name) for name in ("thresh_score", "thresh_iou", "thresh_F1")}
    grec |= {name: getattr(options, name) for name in ("iou", "batch_size") if getattr(options, name) is not None}
    rows = _load(options.dataset, options.config, split, COLUMNS)
    accumulators = {"gres": GRES.accumulator(**gres, resolution=options.resolution), "grec": GREC.accumulator(**grec)}
    measurement = Measurement(rows, **accumulators)
    for batch in batches(read_answers(path, measurement.places)):
        measurement.add_answers(batch)
    return measurement


def _scores(options: argparse.Namespace, accumulator: object, threshold: object, ids: Sequence[int]) -> dict:
    chosen = {} if threshold is None else {"threshold": threshold}
    result = accumulator.compute(**chosen, expected=ids)
    if options.threshold_from and chosen:
        result["threshold"] = threshold.value
    if options.details:
        result["groups"] = accumulator.breakdown(**chosen)
    if options.bootstrap:
        result["intervals"] = accumulator.intervals(**chosen, resamples=options.bootstrap)
    return result


def _average_precision(options: argparse.Namespace, measurement: Measurement) -> dict[str, float]:
    """COCO AP, which needs all boxes at once."""
    rows = measurement.rows.select_columns(["sent_id", "image_id", "boxes"])
    answers = read_answers(options.answers, measurement.places)
    answers = [answer for answer in answers if answer.boxes is not None]
    truth = rows[[measurement.places[answer.sent_id] for answer in answers]]
    references = [box_reference(dict(zip(truth, values))) for values in zip(*truth.values())]
    predictions = [{"boxes": answer.boxes, "scores": answer.scores} for answer in answers]
    return GREC.average_precision(predictions, references, options.ap)


def _path_of(path: Path, task: str, result: dict) -> Path:
    """`path`, with the task in its name where both tasks are answered."""
    return path if len(result) == 1 else path.with_stem(f"{path.stem}-{task}")


def _write_table(path: Path, measurement: Measurement, thresholds: dict[str, object]) -> None:
    for name, accumulator in measurement.tasks().items():
        threshold = thresholds[name]
        table = accumulator.table(**({} if threshold is None else {"threshold": threshold}))
        place = _path_of(path, name, measurement.tasks())
        with new_file(place) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([table, *zip(*table.values())])


if __name__ == "__main__":
    sys.exit(main())

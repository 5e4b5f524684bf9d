"""The scoring commands: answers of a model into a file, the scores of such a file, a table of several models.

    python -m scoring predict runs/demo/checkpoint data/easy --split val --out runs/demo/val.jsonl
    python -m scoring predict IDEA-Research/grounding-dino-tiny data/easy --split val --out runs/gdino/val.jsonl
    python -m scoring predict http://127.0.0.1:8000/v1 data/easy --model Qwen/Qwen3-VL-8B-Instruct --grammar qwen3 ...
    python -m scoring reparse runs/qwen/val.jsonl data/easy --split val
    python -m scoring score runs/demo/val.jsonl data/easy --split val --details --bootstrap 1000
    python -m scoring table runs/*/scores.json --out runs/table

`accelerate launch -m scoring predict ...` shares the sentences among processes.
A file of answers (see scoring/answers.py) may come from any model. Bad input ends in one line on
stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from huggingface_hub.errors import HfHubHTTPError

import grefcoco
from grefcoco_data.arguments import ArgumentParser, one_line
from grefcoco_data.atomic_files import new_file, write_text
from scoring.answers import BOX_THRESHOLD, read_answers
from scoring.endpoint import Endpoint
from scoring.grammars import GRAMMARS
from scoring.measurement import COLUMNS, GREC, GRES, Measurement, batches, box_reference
from scoring.peers import Segmented, Segmenter, load_peer
from scoring.prediction import OwnModel, Predictor, processes, read_origin, reparse, write_answers
from scoring.table import csv_text, draw, markdown, table_rows
from scoring.videos import add_command as add_videos_command
from training.families import FAMILIES, load_checkpoint, model_type_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after one line on bad input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, ImportError, HfHubHTTPError) as error:
        print(f"scoring {options.command}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="scoring", description="Answers of models, and their scores.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("predict", help="write the answers of a model")
    add.add_argument("checkpoint", help="model folder, Hub id, or URL of an OpenAI-compatible server")
    _add_data(add)
    add.add_argument("--out", required=True, type=Path, help="file of JSON lines to write; a killed run goes on")
    add.add_argument("--batch-size", type=int, help="sentences at a time; 16, with a server 4 for each request")
    add.add_argument("--sentences", type=int, help="only so many sentences, the first ones")
    add.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own Python files if needed"
    )
    add.add_argument("--segmenter", help="SAM that makes masks of the boxes: a model of AutoModelForMaskGeneration")
    add.add_argument("--seen", help="which COCO pictures the model was trained on; goes into the table")
    add.add_argument("--model", help="with a server: name of the model there")
    add.add_argument("--grammar", help=f"with a server: how the model writes boxes, one of {', '.join(GRAMMARS)}")
    add.add_argument("--concurrency", type=int, default=8, help="with a server: requests at a time")
    add.add_argument("--max-tokens", type=int, default=2048, help="with a server: the longest answer")
    add.add_argument("--seed", type=int, default=0, help="with a server: of its random numbers")
    add.set_defaults(run=_predict)
    add = commands.add_parser("reparse", help="read the raw answers of a language model again")
    add.add_argument("answers", type=Path, help="file that predict wrote; it is replaced")
    _add_data(add)
    add.add_argument("--grammar", help="how the model writes boxes; by default what predict was given")
    add.set_defaults(run=_reparse)
    add = commands.add_parser("score", help="score a file of answers")
    add.add_argument("answers", type=Path, help="JSON lines, one a sentence; see scoring/answers.py")
    _add_data(add)
    add.add_argument(
        "--compat", help=f"evaluator to follow. GRES: {', '.join(GRES.modes)}. GREC: {', '.join(GREC.modes)}"
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
    add.add_argument(
        "--save-threshold",
        metavar="CHECKPOINT",
        type=Path,
        help="save the chosen no-target threshold in a model folder",
    )
    add.add_argument("--curve", type=Path, metavar="PNG", help="draw the operating curve of the threshold")
    add.add_argument("--table", type=Path, metavar="CSV", help="write one line a sentence")
    add.add_argument("--out", type=Path, metavar="JSON", help="write the scores to a file too")
    add.set_defaults(run=_score)
    add = commands.add_parser("table", help="several files of scores as one table")
    add.add_argument("scores", nargs="+", type=Path, help="files that `score --out` wrote")
    add.add_argument("--out", type=Path, help="path without suffix; writes .md, .csv and .png")
    add.set_defaults(run=_table)
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
    for name in ("batch_size", "sentences", "concurrency", "max_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    is_served = options.checkpoint.startswith(("http://", "https://"))
    predictor = _predictor(options, is_served)
    columns = dict.fromkeys([*predictor.columns, "sent_id", "image_id", "sentence"])
    rows = _load(options.dataset, options.config, options.split, list(columns))
    rows = rows if options.sentences is None else rows.select(range(min(options.sentences, len(rows))))
    batch_size = options.batch_size or (4 * options.concurrency if is_served else 16)
    names = ("checkpoint", "dataset", "config", "split", "sentences", "segmenter", "seen")
    origin = {name: getattr(options, name) for name in names} | {"batch_size": batch_size}
    origin = write_answers(predictor, rows, options.out, batch_size, origin)
    if processes().is_main_process:
        print(f"{options.out}: the answers to {len(rows):,} sentences{_outcomes(origin)}")


def _predictor(options: argparse.Namespace, is_served: bool) -> Predictor:
    if is_served != bool(options.model) or is_served != bool(options.grammar):
        raise ValueError("a server's URL needs --model and --grammar; a checkpoint takes neither")
    if is_served:
        limits = {name: getattr(options, name) for name in ("concurrency", "max_tokens", "seed")}
        predictor: Predictor = Endpoint(options.checkpoint, options.model, options.grammar, **limits)
    elif (model_type := model_type_of(options.checkpoint)) in FAMILIES:
        predictor = OwnModel(*load_checkpoint(options.checkpoint, options.trust_remote_code))
    else:
        predictor = load_peer(options.checkpoint, model_type)
    if options.segmenter:
        threshold = getattr(predictor, "threshold", 0.0)
        predictor = Segmented(predictor, Segmenter(options.segmenter), threshold)
    return predictor


def _outcomes(origin: dict) -> str:
    """The outcomes of a language model's answers in words."""
    if "outcomes" not in origin:
        return ""
    return ": " + ", ".join(f"{count:,} {name}" for name, count in origin["outcomes"].items())


def _reparse(options: argparse.Namespace) -> None:
    origin = read_origin(options.answers) or {}
    grammar = options.grammar or origin.get("grammar")
    if not grammar:
        raise ValueError(f"nothing beside {options.answers} says the grammar; give --grammar")
    rows = _load(options.dataset, options.config, options.split, ["sent_id", "width", "height"]).with_format(None)
    rows = {row["sent_id"]: row for row in rows}
    changed = reparse(options.answers, grammar, rows, origin)
    print(f"{options.answers}: {changed:,} answers changed{_outcomes(read_origin(options.answers))}")


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
    if options.save_threshold and thresholds["gres"] is None:
        raise ValueError(f"{options.threshold_from} has no masks, so no no-target threshold was chosen to save")
    if options.save_threshold:
        save_threshold(options.save_threshold, thresholds["gres"].value)
    result = {}
    tasks = measurement.tasks()
    for name, accumulator in tasks.items():
        result[name] = _scores(options, accumulator, thresholds[name], measurement.ids)
    if options.threshold_from:
        result["default"] = {name: _scores(options, part, None, measurement.ids) for name, part in tasks.items()}
    origin = read_origin(options.answers) or {}
    place = {"answers": str(options.answers), "dataset": options.dataset, "split": options.split}
    result["origin"] = {**origin, **place, "measured": len(measurement.ids)}
    if options.ap:
        result["grec"] |= _average_precision(options, measurement)
    if options.curve:
        for name, accumulator in measurement.tasks().items():
            metric = GRES if name == "gres" else GREC
            metric.plot_curve(accumulator.curve(), _path_of(options.curve, name, tasks))
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
    if options.save_threshold and not options.threshold_from:
        raise ValueError("--save-threshold needs --threshold-from, the held-out answers to choose the threshold on")
    if options.compat and options.compat not in {*GRES.modes, *GREC.modes}:
        names = f"GRES has {', '.join(GRES.modes)}; GREC has {', '.join(GREC.modes)}"
        raise ValueError(f"--compat is {options.compat!r}; {names}")


def _measure(options: argparse.Namespace, path: Path, split: str) -> Measurement:
    """The accumulators of a file of answers; each task follows `--compat` where it knows that evaluator."""
    gres = {"compat": options.compat} if options.compat in GRES.modes else {}
    grec = {"compat": options.compat} if options.compat in GREC.modes else {}
    grec |= {name: getattr(options, name) for name in ("thresh_score", "thresh_iou", "thresh_F1")}
    grec |= {name: getattr(options, name) for name in ("iou", "batch_size") if getattr(options, name) is not None}
    rows = _load(options.dataset, options.config, split, COLUMNS)
    accumulators = {"gres": GRES.accumulator(**gres, resolution=options.resolution), "grec": GREC.accumulator(**grec)}
    measurement = Measurement(rows, **accumulators)
    for batch in batches(read_answers(path, measurement.places)):
        measurement.add_answers(batch)
    measurement.add_unreadable()
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


def save_threshold(checkpoint: Path, threshold: float) -> None:
    """Make `threshold` the `no_target_threshold` of a model folder's processor.

    Raises:
        ValueError: the folder has no processor of this project.
    """
    path = checkpoint / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "no_target_threshold" not in config:
        raise ValueError(f"{path} has no no_target_threshold; name a model folder that this project wrote")
    write_text(path, json.dumps({**config, "no_target_threshold": threshold}, indent=2, sort_keys=True) + "\n")


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


# ---- table -------------------------------------------------------------------------------------------------------


def _table(options: argparse.Namespace) -> None:
    rows = table_rows(options.scores)
    text = markdown(rows)
    if options.out:
        write_text(options.out.with_name(f"{options.out.name}.md"), text)
        write_text(options.out.with_name(f"{options.out.name}.csv"), csv_text(rows))
        draw(rows, options.out.with_name(f"{options.out.name}.png"))
    print(text)


if __name__ == "__main__":
    sys.exit(main())

"""Answers of a model to a split, written as JSON lines; an interrupted run goes on where it stopped.

Every process appends whole batches to a file of its own, `OUT.part`, `OUT.part1`, ...; when all sentences are answered
the lines go into OUT in the order of the rows. The batches are the same for any number of processes and
interruptions, and so is OUT. `OUT.json` beside it says what made it: model, data, split, versions, outcomes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from grefcoco_data.atomic_files import new_file, write_text
from scoring.answers import Answer, answers_of, check_sentence_ids, read_answers, read_text

PACKAGES = ("torch", "transformers", "datasets", "huggingface_hub")
SENT_ID = re.compile(rb'\{"sent_id": (-?\d+)')


class Predictor(Protocol):
    """Anything that answers sentences: a model of this project, another one (peers.py) or a server (endpoint.py).

    Attributes:
        columns: of the expression rows that it reads.
        origin: what it is, for the file beside the answers: revision, prompt, grammar, seed, as they apply.
    """

    columns: list[str]
    origin: dict[str, object]

    def __call__(self, rows: list[dict]) -> list[Answer]:
        """The answers to expression rows, in their order."""


class OwnModel:
    """A model of this project as a `Predictor`."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = model.eval().to(processes().device), processor
        self.columns = processor.columns(training=False)
        self.collate = processor.collator(model.config, share_images=True, uint8_pixels=True)
        self.origin = {"revision": revision(model)}

    @torch.inference_mode()
    def __call__(self, rows: list[dict]) -> list[Answer]:
        batch = self.processor.normalize(send_to_device(self.collate(rows), self.model.device))
        batch.pop("labels")
        return answers_of(self.processor, self.model(**batch), rows)


def processes() -> PartialState:
    """The processes of this run and the device of each; without an accelerator they share the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def revision(model: PreTrainedModel) -> str | None:
    """The commit of a model on the Hub; None for a model folder."""
    return getattr(model.config, "_commit_hash", None)


def write_answers(predictor: Predictor, rows: datasets.Dataset, out: Path, batch_size: int, origin: dict) -> dict:
    """Write the answers of `predictor` to the sentences of `rows` into `out`; for every process to call.

    Args:
        rows: expression rows with `predictor.columns`.
        batch_size: sentences at a time.
        origin: the command that asks for the answers; a partial file of another origin is refused.

    Returns:
        what `OUT.json` holds.

    Raises:
        ValueError: `out` was begun with another origin, or answers other sentences; a `sent_id` is not unique.
    """
    check_sentence_ids(rows)
    state = processes()
    origin = {**origin, **predictor.origin, "versions": {name: version(name) for name in PACKAGES}}
    own_part = _part(out, state.process_index)
    with state.main_process_first():
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_origin(out, origin)
        if state.is_main_process:
            write_text(_sidecar(out), json.dumps(origin, indent=1) + "\n")
    _cut_torn_line(own_part)
    sent_ids = rows.with_format(None)["sent_id"][:]
    done = _line_places(out, sent_ids)
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if not all(sent_ids[place] in done for place in batch)]
    state.wait_for_everyone()  # all processes have read the parts before any of them writes
    own_batches = batches[state.process_index :: state.num_processes]
    with own_part.open("a", encoding="utf-8") as file:
        for batch in _progress(own_batches, batch_size, state.is_main_process):
            answers = predictor(rows.__getitems__(list(batch)))
            file.write("".join(f"{answer.to_json()}\n" for answer in answers))
            file.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        _join_parts(out, sent_ids)
        if "grammar" in origin:
            with out.open("rb") as lines:
                origin["outcomes"] = count_outcomes(lines)
        write_text(_sidecar(out), json.dumps(origin, indent=1) + "\n")
    state.wait_for_everyone()
    return origin


def reparse(path: Path, grammar: str, rows: dict[int, dict], origin: dict) -> int:
    """Read the raw answers in a file again and replace the file.

    Args:
        rows: `sent_id`, `width` and `height` of the sentences, by their ids.
        origin: what `path`.json holds.

    Returns:
        how many answers changed.

    Raises:
        ValueError: the answers have masks and changed: the masks would belong to other boxes.
    """
    answers = list(read_answers(path, rows))
    changed = 0
    for place, answer in enumerate(answers):
        if answer.answer is not None:
            read = read_text(grammar, answer.answer, rows[answer.sent_id])
            if (read.boxes, read.unreadable) != (answer.boxes, answer.unreadable):
                if answer.mask is not None:
                    raise ValueError(f"{path}: sentence {answer.sent_id} has other boxes now, predict its mask again")
                answers[place] = read
                changed += 1
    lines = [answer.to_json() + "\n" for answer in answers]
    write_text(path, "".join(lines))
    origin |= {"grammar": grammar, "outcomes": count_outcomes(line.encode() for line in lines)}
    write_text(_sidecar(path), json.dumps(origin, indent=1) + "\n")
    return changed


def read_origin(answers: Path) -> dict | None:
    """What stands beside a file of answers; None where nothing does."""
    sidecar = _sidecar(answers)
    return json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.exists() else None


def count_outcomes(lines: Iterable[bytes]) -> dict[str, int]:
    """How many answers of a language model are boxes, none and unreadable; `lines` as `Answer.to_json` writes them."""
    counts = {"boxes": 0, "none": 0, "unreadable": 0}
    for line in lines:
        # quotation marks inside of a raw answer are escaped, so these bytes are keys of the line
        is_unreadable = line.rstrip().endswith(b'"unreadable": true}')
        counts["unreadable" if is_unreadable else "none" if b'"boxes": []' in line else "boxes"] += 1
    return counts


def _part(out: Path, process: int) -> Path:
    return out.with_name(f"{out.name}.part{process or ''}")


def _sidecar(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _check_origin(out: Path, origin: dict) -> None:
    parts, former = sorted(out.parent.glob(f"{out.name}.part*")), read_origin(out)
    if parts and former and former != json.loads(json.dumps(origin)):
        raise ValueError(
            f"{parts[0]} was begun by another command ({_sidecar(out)} names it); remove it or choose another --out"
        )


def _progress(batches: list[range], batch_size: int, is_shown: bool) -> Iterable[range]:
    return tqdm(batches, "predict", unit_scale=batch_size, unit=" sentences", disable=None if is_shown else True)


def _cut_torn_line(part: Path) -> None:
    """Remove what follows the last line break of a file: the line that a killed process was writing."""
    if part.exists():
        with part.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def _line_places(out: Path, sent_ids: Sequence[int]) -> dict[int, tuple[Path, int]]:
    """For each answered sentence the part that holds its line, and the byte where the line starts.

    Raises:
        ValueError: a part answers other sentences than `sent_ids`.
    """
    places: dict[int, tuple[Path, int]] = {}
    asked = set(sent_ids)
    for part in sorted(out.parent.glob(f"{out.name}.part*")):
        start = 0
        with part.open("rb") as file:
            for line in file:
                match = SENT_ID.match(line)
                if line.endswith(b"\n"):
                    if not match or int(match[1]) not in asked:
                        raise ValueError(f"{part} answers other sentences; remove it or choose another --out")
                    places[int(match[1])] = (part, start)
                start += len(line)
    return places


def _join_parts(out: Path, sent_ids: Sequence[int]) -> None:
    """Write `out` from the parts, in the order of `sent_ids`, and remove them."""
    places = _line_places(out, sent_ids)
    files = {part: part.open("rb") for part in {part for part, _ in places.values()}}
    with new_file(out) as temporary:
        with temporary.open("wb") as joined:
            for sent_id in sent_ids:
                part, start = places[sent_id]
                files[part].seek(start)
                joined.write(files[part].readline())
    for file in files.values():
        file.close()
    for part in out.parent.glob(f"{out.name}.part*"):
        part.unlink()

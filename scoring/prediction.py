"""A checkpoint's answers on a split, written as JSON lines; an interrupted run goes on where it stopped.

The lines go to `OUT.part` in the order of the rows, batch by batch, and the file gets its name when it is whole.
`OUT.json` beside it says what made it: model, data, split, versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from grefcoco_data.atomic_files import write_text
from scoring.answers import Answer, answers_of, parse_answer

PACKAGES = ("torch", "transformers", "datasets")


def write_answers(
    model: PreTrainedModel, processor: ProcessorMixin, rows: datasets.Dataset, out: Path, batch_size: int, origin: dict
) -> None:
    """Write the answers of `model` to the sentences of `rows` into `out`.

    Args:
        rows: expression rows with the columns that `processor.columns(training=False)` names.
        batch_size: sentences at a time.
        origin: what the answers come from; a partial file of another origin is refused.

    Raises:
        ValueError: `out` was begun with another origin.
    """
    partial, sidecar = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.json")
    origin = {**origin, "versions": {name: version(name) for name in PACKAGES}}
    out.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists() and sidecar.exists() and json.loads(sidecar.read_text(encoding="utf-8")) != origin:
        raise ValueError(
            f"{partial} was begun by another command ({sidecar} names it); remove it or choose another --out"
        )
    write_text(sidecar, json.dumps(origin, indent=1) + "\n")
    done = _keep_whole_batches(partial, rows.with_format(None)["sent_id"][:], batch_size)
    with partial.open("a", encoding="utf-8") as file:
        with tqdm(total=len(rows), initial=done, desc="predict", unit="sentence", disable=None) as bar:
            for answers in predictions(model, processor, rows, range(done, len(rows)), batch_size):
                file.write("".join(f"{answer.to_json()}\n" for answer in answers))
                file.flush()
                bar.update(len(answers))
    partial.replace(out)


@torch.inference_mode()
def predictions(
    model: PreTrainedModel, processor: ProcessorMixin, rows: datasets.Dataset, indices: Sequence[int], batch_size: int
) -> Iterator[list[Answer]]:
    """The answers to the sentences at `indices`, batch by batch."""
    model.eval()
    collate = processor.collator(model.config, share_images=True)
    for start in range(0, len(indices), batch_size):
        batch_rows = rows.__getitems__(list(indices[start : start + batch_size]))
        batch = send_to_device(collate(batch_rows), model.device)
        batch.pop("labels")
        yield answers_of(processor, model(**batch), batch_rows)


def _keep_whole_batches(partial: Path, sent_ids: Sequence[int], batch_size: int) -> int:
    """Cut `partial` after its last whole batch; returns the number of its sentences.

    Raises:
        ValueError: the file answers other sentences than `sent_ids`, or in another order.
    """
    if not partial.exists():
        return 0
    lines = partial.read_bytes().split(b"\n")[:-1]  # what follows the last line break was cut off
    count = len(lines) - len(lines) % batch_size if len(lines) < len(sent_ids) else len(sent_ids)
    for line, sent_id in zip(lines[:count], sent_ids):
        if parse_answer(line.decode()).sent_id != sent_id:
            raise ValueError(f"{partial} answers other sentences; remove it or choose another --out")
    with partial.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:count]))
    return count

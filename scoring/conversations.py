"""Expression rows as conversations, to tune a language model on them with TRL.

rows = scoring.messages(grefcoco.load("data/grefcoco", split="train"), grammar="qwen3")
SFTTrainer(model, SFTConfig(..., max_length=None, remove_unused_columns=False), train_dataset=rows)
GRPOTrainer(model, [rewards.f1, rewards.grammar_obeyed], GRPOConfig(..., remove_unused_columns=False), rows)
"""

from __future__ import annotations

import datasets

from grefcoco_data.masks import xywh_to_xyxy
from grefcoco_data.rows import EXPRESSION_FEATURES
from scoring.grammars import format_answer, named, prompt, resize

COLUMNS = ["sent_id", "image_id", "width", "height", "sentence", "no_target", "boxes", "mask"]


def messages(
    rows: datasets.Dataset | datasets.IterableDataset, grammar: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Expression rows in the conversational form of TRL, map-style or streamed as `rows` are.

    A row has `images` (one, at the size that the numbers of the grammar refer to), `prompt` (the request),
    `completion` (the answer in the grammar), `grammar`, and `COLUMNS` for the reward functions.

    Args:
        rows: of `grefcoco.load`, with all columns.
        grammar: a key of `scoring.grammars.GRAMMARS`.

    Raises:
        ValueError: a grammar that does not exist.
    """
    named(grammar)
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(conversation, fn_kwargs={"grammar": grammar}, remove_columns=list(EXPRESSION_FEATURES))

    def converse(batch: dict[str, list]) -> dict[str, list]:
        converted = [conversation(dict(zip(batch, values)), grammar) for values in zip(*batch.values())]
        return {name: [row[name] for row in converted] for name in converted[0]}

    return rows.with_transform(converse)


def conversation(row: dict, grammar: str) -> dict[str, object]:
    """One expression row as a row of `messages`."""
    boxes = xywh_to_xyxy(row["boxes"]).tolist()
    answer = format_answer(grammar, boxes, row["sentence"], row["width"], row["height"])
    return {
        "images": [resize(row["image"], grammar)],
        "prompt": [{"role": "user", "content": prompt(grammar, row["sentence"])}],
        "completion": [{"role": "assistant", "content": answer}],
        "grammar": grammar,
        **{name: row[name] for name in COLUMNS},
    }

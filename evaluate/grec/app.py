"""The page of the Space: paste predictions and references as JSON, read the scores."""

import json
from pathlib import Path

import evaluate
import gradio as gr

FOLDER = Path(__file__).resolve().parent
METRIC = evaluate.load(str(FOLDER))
PREDICTIONS = [{"boxes": [[0, 0, 9, 9], [5, 5, 8, 8]], "scores": [0.9, 0.2]}, {"boxes": [], "scores": []}]
REFERENCES = [{"boxes": [[0, 0, 10, 9]]}, {"boxes": []}]


def score(predictions: str, references: str, compat: str) -> dict[str, float]:
    """Scores of two JSON lists; bad input is shown as the error it is."""
    try:
        return METRIC.compute(
            predictions=json.loads(predictions),
            references=json.loads(references),
            compat=compat,
            ap="pycocotools",
            details=METRIC.modes[compat].batch_size is None,  # means over batches have no groups of sentences
        )
    except (KeyError, TypeError, ValueError) as error:
        raise gr.Error(f"{type(error).__name__}: {error}") from error


page = gr.Interface(
    score,
    [
        gr.Code(json.dumps(PREDICTIONS, indent=1), language="json", label="predictions"),
        gr.Code(json.dumps(REFERENCES, indent=1), language="json", label="references"),
        gr.Dropdown(list(METRIC.modes), value="published", label="whose evaluator"),
    ],
    gr.JSON(label="scores"),
    title="GREC",
    description=METRIC.description,
    article=(FOLDER / "README.md").read_text().split("---", 2)[2],
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()

"""The page of the Space: paste predictions and references as JSON, read the scores."""

import json
from pathlib import Path

import evaluate
import gradio as gr

FOLDER = Path(__file__).resolve().parent
METRIC = evaluate.load(str(FOLDER))
MASK, NOTHING = {"size": [2, 2], "counts": "13"}, {"size": [2, 2], "counts": "4"}
PREDICTIONS = [{"masks": [MASK, NOTHING]}, {"masks": [NOTHING, NOTHING]}]
REFERENCES = [{"masks": [MASK, NOTHING], "no_target": False}, {"masks": [NOTHING, NOTHING], "no_target": True}]


def score(predictions: str, references: str, compat: str) -> dict[str, float]:
    """Scores of two JSON lists; bad input is shown as the error it is."""
    try:
        return METRIC.compute(
            predictions=json.loads(predictions), references=json.loads(references), compat=compat, details=True
        )
    except (KeyError, TypeError, ValueError) as error:
        raise gr.Error(f"{type(error).__name__}: {error}") from error


page = gr.Interface(
    score,
    [
        gr.Code(json.dumps(PREDICTIONS, indent=1), language="json", label="predictions"),
        gr.Code(json.dumps(REFERENCES, indent=1), language="json", label="references"),
        gr.Radio([*METRIC.modes], value="published", label="evaluator"),
    ],
    gr.JSON(label="scores"),
    title="J&F",
    description=METRIC.description,
    article=(FOLDER / "README.md").read_text().split("---", 2)[2],
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()

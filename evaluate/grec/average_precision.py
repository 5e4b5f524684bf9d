"""COCO average precision of boxes, every sentence being an image of its own and every object of the one category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO

import numpy as np

from .boxes import join_boxes, join_scores, refuse_bad_boxes, valid_boxes
from .sentence_rows import read_columns

BACKENDS = {"pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"), "hotcoco": ("hotcoco", "hotcoco")}


def average_precision(
    predictions: Sequence[Mapping], references: Sequence[Mapping], backend: str = "pycocotools"
) -> dict[str, float]:
    """AP (IoU 0.5 to 0.95), AP50 and AP75, 0..1, of at most 100 boxes a sentence; 0.0 where there is nothing to find.

    Args:
        predictions: `boxes` (n, 4) x0, y0, x1, y1 in pixels and `scores` (n,) each. A box with nan, infinite or
            exchanged corners is a false positive, one with a nan score is dropped.
        references: `boxes` (m, 4) each, none where the sentence refers to nothing: all its predictions are false.
        backend: "pycocotools", or "hotcoco": the same digits, many times faster, to be installed on its own.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ap={backend!r} is none of {', '.join(BACKENDS)}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    answers = read_columns(predictions, "prediction", ["boxes", "scores"])
    truths, num_truths = join_boxes(read_columns(references, "reference", ["boxes"])["boxes"], "reference")
    boxes, number = join_boxes(answers["boxes"], "prediction")
    scores, num_scores = join_scores(answers["scores"])
    refuse_bad_boxes(boxes, number, num_scores, truths, num_truths)
    boxes[~valid_boxes(boxes)] = 0
    scored = ~np.isnan(scores)
    if not len(truths) or not scored.any():
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    sentence = np.repeat(np.arange(len(number)), number)
    detections = np.column_stack([sentence, _xywh(boxes), scores, np.ones(len(boxes))])[scored]
    return _evaluate(_ground_truth(truths, num_truths), detections, backend)


def _evaluate(truth: dict, detections: np.ndarray, backend: str) -> dict[str, float]:
    coco, cocoeval = (import_module(module) for module in BACKENDS[backend])
    with redirect_stdout(StringIO()):
        if backend == "hotcoco":
            ground = coco.COCO(truth)
        else:
            ground = coco.COCO()
            ground.dataset = truth
            ground.createIndex()
        run = cocoeval.COCOeval(ground, ground.loadRes(detections), "bbox")
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval["precision"])[:, :, 0, 0, -1]  # (IoU thresholds, recalls), all areas, 100 boxes
    return {
        name: float(part.mean()) for name, part in (("AP", precision), ("AP50", precision[0]), ("AP75", precision[5]))
    }


def _ground_truth(truths: np.ndarray, num_truths: np.ndarray) -> dict:
    sentence = np.repeat(np.arange(len(num_truths)), num_truths).tolist()
    boxes = _xywh(truths)
    return {
        "info": {},
        "images": [{"id": index, "width": 1, "height": 1, "file_name": ""} for index in range(len(num_truths))],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {"id": number, "image_id": index, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for number, (index, box) in enumerate(zip(sentence, boxes.tolist()), start=1)
        ],
    }


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(np.float64)
    return np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])

"""Inputs of the metrics as people have them: taken, or refused with one clear error; never a silent number."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parents[1]
GRES, GREC = (evaluate.load(str(ROOT / "evaluate" / name), keep_in_memory=True) for name in ("gres", "grec"))
TRUTH = np.eye(4, dtype=bool)
EMPTY = np.zeros((4, 4), bool)
BOX = [10, 10, 20, 20]


def as_pycocotools(mask: np.ndarray) -> dict:
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def score_masks(
    mask: object = TRUTH,
    no_target: object = 0.1,
    truth: object = TRUTH,
    way: str = "compute",
    options: dict | None = None,
) -> dict[str, float]:
    """Scores of one mask through `compute`, `add_batch` of the metric, or the accumulator."""
    prediction, reference = {"mask": mask, "no_target": no_target}, {"mask": truth, "no_target": False}
    options = options or {}
    if way == "compute":
        return GRES.compute(predictions=[prediction], references=[reference], **options)
    if way == "accumulator":
        accumulator = GRES.accumulator(**options)
        accumulator.add(prediction=prediction, reference=reference)
        return accumulator.compute()
    metric = evaluate.load(str(ROOT / "evaluate/gres"), keep_in_memory=True)
    metric.add_batch(predictions=[prediction], references=[reference])
    return metric.compute(**options)


@pytest.mark.parametrize("way", ["compute", "accumulator", "add_batch"])
@pytest.mark.parametrize(
    "mask",
    [
        as_pycocotools(TRUTH),
        TRUTH,
        TRUTH.astype(np.float32),
        torch.from_numpy(TRUTH),
        GRES.encode(TRUTH),
        as_pycocotools(TRUTH) | {"size": np.array([4, 4])},
        as_pycocotools(TRUTH) | {"size": (np.int64(4), np.int64(4))},
    ],
    ids=["pycocotools", "bool", "float", "torch", "encode", "array size", "numpy sizes"],
)
def test_masks_as_people_have_them(mask, way):
    assert score_masks(mask, way=way)["gIoU"] == 100
    assert score_masks(mask, way=way, truth=mask)["gIoU"] == 100


def test_lisa_reads_no_flags():
    for mask in (TRUTH, EMPTY):
        with_flags = score_masks(mask, options={"compat": "lisa"})
        without = GRES.compute(predictions=[{"mask": mask}], references=[{"mask": TRUTH}], compat="lisa")
        assert without == with_flags
    with pytest.raises(ValueError, match="prediction 0 lacks no_target"):
        GRES.compute(predictions=[{"mask": TRUTH}], references=[{"mask": TRUTH}], compat="gsva")
    # X-SAM drops sentences by the flag of the reference
    with pytest.raises(ValueError, match="reference 0 lacks no_target"):
        GRES.compute(predictions=[{"mask": TRUTH}], references=[{"mask": TRUTH}], compat="xsam")


POLYGONS = [[1.0, 1.0, 3.0, 1.0, 3.0, 3.0]]


@pytest.mark.parametrize("way", ["compute", "accumulator", "add_batch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": POLYGONS}, "the mask of prediction 0 is a list: polygons must be painted .*frPyObjects"),
        ({"mask": "Ym1"}, "the mask of prediction 0 is 'Ym1': give"),
        ({"mask": None}, "the mask of prediction 0 is 'None': give"),
        ({"mask": {"counts": "Ym1"}}, "the mask of prediction 0 is .*give"),
        ({"mask": TRUTH[None]}, r"a mask is \(height, width\), this one is \(1, 4, 4\)"),
        ({"no_target": float("nan")}, "apply softmax"),
        ({"no_target": "true"}, "apply softmax"),
        ({"no_target": None}, "apply softmax"),
        ({"no_target": 1.5}, "apply softmax"),
    ],
)
def test_predictions_that_are_no_answers_are_named(change, message, way):
    with pytest.raises(ValueError, match=message):
        score_masks(**change, way=way)


@pytest.mark.parametrize(
    "size", [[8.7, 8.2], [4.0, 4.0], [-4, -4], [0, 0], [4], [4, 4, 1], "44", None, [2**40, 2**40]]
)
def test_sizes_that_are_none_are_named(size):
    mask = {"size": size, "counts": GRES.encode(TRUTH)["counts"]}
    for way in ("compute", "accumulator"):
        with pytest.raises(ValueError, match="the mask of prediction 0 has the size"):
            score_masks(mask, way=way)
        with pytest.raises(ValueError, match="the mask of reference 0 has the size"):
            score_masks(truth=mask, way=way)


@pytest.mark.parametrize("way", ["compute", "accumulator", "add_batch"])
@pytest.mark.parametrize("value", ["false", 0.3, None, 2, float("nan")])
def test_a_references_flag_is_true_or_false(value, way):
    message = "true or false|no_target of reference 0"
    with pytest.raises(ValueError, match=message):
        references = [{"mask": TRUTH, "no_target": value}]
        predictions = [{"mask": TRUTH, "no_target": 0}]
        if way == "compute":
            GRES.compute(predictions=predictions, references=references)
        elif way == "accumulator":
            GRES.accumulator().add_batch(predictions=predictions, references=references)
        else:
            evaluate.load(str(ROOT / "evaluate/gres"), keep_in_memory=True).add_batch(
                predictions=predictions, references=references
            )


@pytest.mark.parametrize("task", ["gres", "grec"])
@pytest.mark.parametrize("way", ["compute", "accumulator", "add_batch"])
@pytest.mark.parametrize("name", ["sent_id", "image_id"])
@pytest.mark.parametrize("value", [None, 2**63, -2, "7", 1.5, float("nan")])
def test_ids_that_are_none_are_named(task, way, name, value):
    metric = evaluate.load(str(ROOT / "evaluate" / task), keep_in_memory=True) if way == "add_batch" else None
    prediction = {"mask": TRUTH, "no_target": 0} if task == "gres" else {"boxes": [BOX], "scores": [0.9]}
    reference = {"mask": TRUTH, "no_target": False} if task == "gres" else {"boxes": [BOX]}
    inputs = {"predictions": [prediction], "references": [reference | {name: value}]}
    with pytest.raises(ValueError, match=name):
        if way == "compute":
            (GRES if task == "gres" else GREC).compute(**inputs)
        elif way == "accumulator":
            (GRES if task == "gres" else GREC).accumulator().add_batch(**inputs)
        else:
            metric.add_batch(**inputs)


@pytest.mark.parametrize("threshold", [float("nan"), -0.1, 1.1, "0.5", True])
def test_thresholds_that_are_none_are_named(threshold):
    with pytest.raises(ValueError, match="threshold"):
        score_masks(options={"threshold": threshold})
    for name in ("thresh_score", "thresh_iou", "thresh_F1", "threshold"):
        if isinstance(threshold, float) and threshold == threshold:
            continue
        with pytest.raises(ValueError, match=name):
            GREC.compute(predictions=[], references=[], **{name: threshold})


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        (GRES, {"treshold": 0.5}, "unknown option treshold: the options are compat, resolution"),
        (GRES, {"compat": "lisa", "threshold": 0.5}, "compat='lisa' rejects without a threshold: leave threshold=0.5"),
        (GRES, {"compat": "ReLA"}, "compat='ReLA' is none of rela, gsva"),
        (GRES, {"resolution": "480"}, "resolution='480'"),
        (GRES, {"bootstrap": -1}, "bootstrap=-1"),
        (GREC, {"compat": "mmdet", "iou": "giou"}, "iou='giou' with compat='mmdet'"),
        (GREC, {"iou": "diou"}, "iou='diou' is none of giou, iou"),
        (GREC, {"thresh_scores": 0.5}, "unknown option thresh_scores: the options are thresh_score"),
        (GREC, {"batch_size": 8}, "batch_size=8 with compat='published'"),
        (GREC, {"compat": "simvg", "batch_size": 0}, "batch_size=0: give a whole number"),
        (GREC, {"compat": "simvg", "details": True}, "compat='simvg' is a mean over batches, without groups"),
        (GREC, {"ap": "coco"}, "ap='coco' is none of pycocotools, hotcoco"),
    ],
)
def test_options_that_do_not_fit_are_named(metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[], references=[], **options)


@pytest.mark.parametrize("large", [1e38, 3e38, -2e38, 1e19])
@pytest.mark.parametrize("side", ["prediction", "reference"])
def test_boxes_whose_area_overflows_are_named(large, side):
    box = [0, 0, abs(large), abs(large)] if large > 0 else [large, large, 0, 0]
    boxes = {"prediction": [BOX], "reference": [BOX]} | {side: [BOX, box]}
    prediction = {"boxes": boxes["prediction"], "scores": [0.9] * len(boxes["prediction"])}
    with pytest.raises(ValueError, match=f"{side} 0 has the box .*overflows"):
        GREC.compute(predictions=[prediction], references=[{"boxes": boxes["reference"]}])


@pytest.mark.parametrize("boxes", [[["a", 0, 1, 1]], [[None, 0, 1, 1]], "box", [[0, 0, 1, 1], [0, 0, 1]]])
def test_boxes_that_are_no_numbers_are_named(boxes):
    with pytest.raises(ValueError, match="the boxes of prediction 0 are no numbers"):
        GREC.compute(predictions=[{"boxes": boxes, "scores": [0.9] * len(boxes)}], references=[{"boxes": []}])


def test_entries_that_are_no_dictionaries_are_named():
    for metric in (GRES, GREC):
        with pytest.raises(ValueError, match="reference 0 is list, not a dictionary"):
            prediction = {"mask": TRUTH, "no_target": 0, "boxes": [], "scores": []}
            metric.compute(predictions=[prediction], references=[[1]])


def test_boxes_as_people_have_them():
    reference = {"boxes": torch.tensor([BOX]), "sent_id": np.int64(3)}
    for boxes in ([BOX], [tuple(BOX)], (tuple(BOX),), np.array([BOX]), torch.tensor([BOX]), [np.array(BOX)]):
        for scores in ([0.9], (0.9,), np.array([0.9]), torch.tensor([0.9])):
            result = GREC.compute(predictions=[{"boxes": boxes, "scores": scores}], references=[reference])
            assert result["F1_score"] == 1


def test_sentences_buffered_before_compute_are_scored_with_its_own():
    metric = evaluate.load(str(ROOT / "evaluate/gres"), keep_in_memory=True)
    prediction, reference = {"mask": TRUTH, "no_target": 0.1}, {"mask": TRUTH, "no_target": False}
    metric.add(prediction=prediction, reference=reference)
    metric.add_batch(predictions=[prediction | {"mask": EMPTY}] * 2, references=[reference] * 2)
    assert metric.compute(predictions=[prediction], references=[reference])["gIoU"] == 50
    assert metric.compute(predictions=[prediction], references=[reference])["gIoU"] == 100
    with pytest.raises(ValueError, match="give both predictions and references"):
        metric.compute(predictions=[prediction])

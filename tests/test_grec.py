"""The GREC metric: equal to the published evaluator, ties and empty boxes included, and to itself in any order."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/goldens/eval_grec.json").read_text())
METRIC = evaluate.load(str(ROOT / "evaluate/grec"), keep_in_memory=True)
SCORES = ("F1_score", "T_acc", "N_acc")
REFERENCES = [{"boxes": sample[0], "sent_id": index} for index, sample in enumerate(GOLDEN["samples"])]
PREDICTIONS = [{"scores": scores, "boxes": boxes} for _, scores, boxes, _ in GOLDEN["samples"]]
BOX, LEFT, FAR = [10, 10, 20, 20], [10, 10, 15, 20], [80, 80, 90, 90]


def accumulate(predictions=PREDICTIONS, references=REFERENCES, **options):
    accumulator = METRIC.accumulator(**options)
    accumulator.add_batch(predictions=predictions, references=references)
    return accumulator


def correct(truths: list, *boxes: list, score: float = 0.9, **options) -> bool:
    """Whether predicting these boxes for a sentence with these truths is right."""
    prediction = {"boxes": boxes, "scores": [score] * len(boxes)}
    return accumulate([prediction], [{"boxes": truths}], **options).compute()["F1_score"] == 1


# --- equal to the published evaluator


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: str(run["args"]))
def test_scores_equal_the_published_evaluator(run):
    through_evaluate = METRIC.compute(predictions=PREDICTIONS, references=REFERENCES, **run["args"])
    directly = accumulate(**run["args"]).compute()
    assert through_evaluate == directly
    assert [directly[name] for name in SCORES] == pytest.approx([run["results"][name] for name in SCORES], abs=1e-9)


def test_verdicts_equal_the_published_evaluator():
    table = accumulate().table()
    assert table["correct"] == [bool(sample[3]) for sample in GOLDEN["samples"]]


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("score exactly 0.7, which float32 holds as 0.69999999", correct([BOX], BOX, score=0.7)),
        ("duplicate predictions of one truth", correct([BOX], BOX, BOX)),
        ("duplicate truths, one prediction", correct([BOX, BOX], BOX)),
        ("plain IoU reaches 0.5, generalised does not", correct([[0, 0, 10, 10]], [2, 2, 12, 11])),
        ("a box of nothing where there is nothing", correct([], [0, 0, 0, 0])),
    ],
)
def test_edges_that_are_wrong(name, right):
    assert not right, name


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("score 0.75 at a threshold of 0.75", correct([BOX], BOX, score=0.75, thresh_score=0.75)),
        ("duplicate truths, duplicate predictions", correct([BOX, BOX], BOX, BOX)),
        ("half a box is IoU 0.5 exactly", correct([BOX], LEFT)),
        ("no area on either side: 0 / 0 is a match", correct([[5, 5, 5, 9]], [5, 5, 5, 9])),
        ("a pair without area, and a good one", correct([[5, 5, 5, 9], BOX], [5, 5, 5, 9], BOX)),
        ("from 0 on, struck pairs match again", correct([BOX, FAR], BOX, BOX, thresh_iou=0)),
    ],
)
def test_edges_that_are_right(name, right):
    assert right, name


def test_ties_end_as_published():
    """A prediction ties between two truths, and only one choice leaves the other a partner."""
    tall, low = [0, 0, 100, 100], [0, 0, 100, 50]
    first, second = [0, 0, 100, 80], [0, 20, 100, 100]

    def both(truths: list, scores: list[float]) -> bool:
        return accumulate([{"boxes": [tall, low], "scores": scores}], [{"boxes": truths}]).compute()["F1_score"] == 1

    assert both([first, second], [0.9, 0.8])
    assert not both([second, first], [0.9, 0.8])
    assert not both([first, second], [0.8, 0.9])
    assert both([second, first], [0.8, 0.9])
    assert both([first, second], [0.9, 0.9])  # equal scores: the larger box list first
    assert not both([second, first], [0.9, 0.9])
    swapped = {"boxes": [low, tall], "scores": [0.9, 0.9]}
    assert accumulate([swapped], [{"boxes": [first, second]}]).compute()["F1_score"] == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 17, 40, 63, 64, 65, 100])
def test_ties_follow_torch(size):
    rng = np.random.default_rng(size)
    for choice in ([0.5], [0.25, 0.5], [0.1, 0.5, 0.75, 1.0], [0.5, 1.0, np.nan]):
        for _ in range(20):
            values = torch.from_numpy(rng.choice(choice, size))
            assert METRIC.first_of_topk(values.tolist()) == torch.topk(values, 1).indices


def greedy(boxes: torch.Tensor, truths: torch.Tensor, threshold: float) -> int:
    """The published matching, one sentence at a time, on torch."""
    low, high = torch.maximum(boxes[:, None, :2], truths[:, :2]), torch.minimum(boxes[:, None, 2:], truths[:, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None] + (truths[:, 2:] - truths[:, :2]).prod(-1) - inter
    low, high = torch.minimum(boxes[:, None, :2], truths[:, :2]), torch.maximum(boxes[:, None, 2:], truths[:, 2:])
    hull = (high - low).prod(-1)
    giou = inter / union - (hull - union) / hull
    matched = 0
    for _ in range(min(giou.shape)):
        value, index = torch.topk(giou.flatten(), 1)
        if value < threshold:
            break
        matched += 1
        giou[index // giou.shape[1], :] = 0.0
        giou[:, index % giou.shape[1]] = 0.0
    return matched


@given(seed=st.integers(0, 2**32), threshold=st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]), side=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_matching_many_equals_matching_one_by_one(seed, threshold, side):
    """Boxes on a coarse grid, so that ties, duplicates and empty boxes abound."""
    rng = np.random.default_rng(seed)

    def draw(most: int) -> np.ndarray:
        corners = np.sort(rng.integers(0, side, (rng.integers(0, most), 2, 2)), axis=1)
        return corners.reshape(-1, 4).astype(np.float32)

    truths, boxes = [draw(6) for _ in range(20)], [draw(12) for _ in range(20)]
    predictions = [{"boxes": box, "scores": 0.8 + 0.1 * rng.integers(0, 2, len(box))} for box in boxes]
    expected = []
    for prediction, truth in zip(predictions, truths):
        scores = prediction["scores"].astype(np.float32).tolist()
        ordered = sorted(zip(scores, prediction["boxes"].tolist()), reverse=True)
        kept = torch.tensor([box for _, box in ordered]).reshape(-1, 4)
        expected.append(greedy(kept, torch.from_numpy(truth), threshold) if len(kept) and len(truth) else 0)
    accumulator = accumulate(predictions, [{"boxes": truth} for truth in truths], thresh_iou=threshold)
    assert accumulator.rows()["matched"].tolist() == expected


# --- where the published evaluator crashes


def test_nothing_predicted_and_nothing_given():
    assert set(METRIC.compute(predictions=[], references=[], ap="pycocotools").values()) == {0.0}
    assert correct([])
    assert not correct([BOX])
    only_targets = accumulate([{"boxes": [BOX], "scores": [0.9]}], [{"boxes": [BOX]}]).compute()
    assert only_targets == {"F1_score": 1.0, "T_acc": 1.0, "N_acc": 0.0, "always_empty/F1_score": 0.0}
    only_none = accumulate([{"boxes": [], "scores": []}], [{"boxes": []}]).compute()
    assert only_none == {"F1_score": 1.0, "T_acc": 0.0, "N_acc": 1.0, "always_empty/F1_score": 1.0}


@pytest.mark.parametrize("bad", [[20, 10, 10, 20], [np.nan, 10, 20, 20], [10, 10, np.inf, 20], [-np.inf, 0, 20, 20]])
def test_predictions_that_are_no_boxes_match_nothing_but_count(bad):
    assert not correct([BOX], bad)
    assert not correct([BOX], BOX, bad)
    assert not correct([], bad)
    assert correct([BOX], BOX, thresh_iou=1.0)
    two = {"boxes": [BOX, bad], "scores": [0.9, 0.3]}
    assert accumulate([two], [{"boxes": [BOX]}]).compute()["F1_score"] == 1
    ap = METRIC.average_precision([two], [{"boxes": [BOX]}])
    assert ap == {"AP": pytest.approx(1), "AP50": pytest.approx(1), "AP75": pytest.approx(1)}
    with pytest.raises(ValueError, match="reference 1 has the box"):
        accumulate([two, two], [{"boxes": [BOX]}, {"boxes": [BOX, bad]}])


def test_nan_scores_are_dropped():
    prediction = {"boxes": [BOX, FAR], "scores": [0.9, np.nan]}
    accumulator = accumulate([prediction], [{"boxes": [BOX]}])
    assert accumulator.compute()["F1_score"] == 1
    assert accumulator.rows()["best_score"] == np.float32(0.9)
    assert METRIC.average_precision([prediction], [{"boxes": [BOX]}])["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"boxes": [BOX], "scores": []}, {"boxes": []}, "prediction 0 has 1 boxes and 0 scores"),
        ({"boxes": [BOX[:3]], "scores": [1]}, {"boxes": []}, r"sentence 0 have shape \(1, 3\)"),
        ({"boxes": BOX, "scores": [1]}, {"boxes": []}, r"shape \(4,\)"),
        (
            {"boxes": [], "scores": []},
            {"boxes": [], "sent": 1},
            "reference 0 has sent: its keys",
        ),
    ],
)
def test_bad_input_is_named(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        accumulate([prediction], [reference])


def test_bad_options_are_named():
    for options, message in (({"iou": "diou"}, "iou='diou'"), ({"compat": "mmdetection"}, "compat='mmdetection'")):
        with pytest.raises(ValueError, match=message):
            METRIC.accumulator(**options)
    with pytest.raises(ValueError, match="ap='coco' is none of pycocotools, hotcoco"):
        METRIC.compute(predictions=PREDICTIONS, references=REFERENCES, ap="coco")


# --- other wordings


def test_plain_iou_forgives_what_generalised_does_not():
    assert correct([[0, 0, 10, 10]], [0, 0, 6, 9], iou="iou")
    assert not correct([[0, 0, 10, 10]], [4, 0, 10, 10], iou="iou", thresh_iou=0.61)
    shifted = [0, 0, 100, 100], [25, 20, 120, 110]
    assert correct([shifted[0]], shifted[1], iou="iou", thresh_iou=0.45)
    assert not correct([shifted[0]], shifted[1], thresh_iou=0.45)


def test_mmdet_reads_only_the_first_truth():
    assert correct([BOX, FAR], BOX, compat="mmdet")
    assert not correct([BOX, FAR], BOX, FAR, compat="mmdet")
    assert not correct([FAR, BOX], BOX, compat="mmdet")
    assert correct([], compat="mmdet")


def test_mmdet_compares_scores_as_float32_and_matches_no_empty_boxes():
    assert correct([BOX], BOX, score=0.7, compat="mmdet")
    assert not correct([BOX], BOX, score=0.69, compat="mmdet")
    assert not correct([[5, 5, 5, 9]], [5, 5, 5, 9], compat="mmdet")


# --- the interface of evaluate


def test_sentences_added_one_by_one_and_in_batches_score_as_all_at_once():
    predictions, references = PREDICTIONS[:40], REFERENCES[:40]
    expected = METRIC.compute(predictions=predictions, references=references)
    metric = evaluate.load(str(ROOT / "evaluate" / "grec"))
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == expected
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        metric.add_batch(predictions=predictions[:2], references=references[:1])


# --- average precision


def test_average_precision():
    predictions = [
        {"boxes": [FAR, BOX], "scores": [0.9, 0.8]},
        {"boxes": [], "scores": []},
        {"boxes": [BOX], "scores": [0.1]},
    ]
    references = [{"boxes": [BOX]}, {"boxes": [BOX]}, {"boxes": []}]
    # one of two objects, behind one false box: precision 1/2 up to a recall of 1/2, that is 51 of 101 points
    expected = pytest.approx(0.5 * 51 / 101)
    assert METRIC.average_precision(predictions, references) == {"AP": expected, "AP50": expected, "AP75": expected}
    result = METRIC.compute(predictions=PREDICTIONS, references=REFERENCES, ap="pycocotools")
    assert 0 < result["AP"] < result["AP75"] < result["AP50"] < 1


def test_hotcoco_gives_the_same_digits():
    pytest.importorskip("hotcoco")
    slow, fast = (METRIC.average_precision(PREDICTIONS, REFERENCES, name) for name in ("pycocotools", "hotcoco"))
    assert fast == pytest.approx(slow, abs=1e-12)


# --- whatever the order, whoever counted


@given(st.permutations(range(len(REFERENCES))), st.integers(0, len(REFERENCES)))
@settings(max_examples=10, deadline=None)
def test_order_and_processes_leave_no_trace(order, cut):
    merged, whole = METRIC.accumulator(), accumulate()
    for indices in (order[:cut], order[cut:]):
        part = accumulate([PREDICTIONS[i] for i in indices], [REFERENCES[i] for i in indices])
        merged.merge(torch.from_numpy(part.state().copy()))
    assert merged.compute(expected=range(300)) == whole.compute()
    assert merged.table() == whole.table()
    assert merged.intervals(resamples=20) == whole.intervals(resamples=20)


def test_padding_counts_once_conflicts_and_gaps_are_errors():
    accumulator = accumulate()
    before = accumulator.compute()
    accumulator.merge(accumulator.state()[:7])
    assert accumulator.compute() == before
    with pytest.raises(ValueError, match=r"1 are missing \(first: \[300\]\)"):
        accumulator.compute(expected=range(301))
    changed = accumulator.state()[:1].copy()
    changed[0, 16] ^= 1
    accumulator.merge(changed)
    with pytest.raises(ValueError, match="sentence 0 was matched twice"):
        accumulator.compute()
    assert accumulator._buffer.__sizeof__() <= 64 * len(accumulator)


def test_perfect_and_empty():
    perfect = [{"boxes": reference["boxes"], "scores": [1.0] * len(reference["boxes"])} for reference in REFERENCES]
    assert set(accumulate(perfect).compute().values()) == {1.0, accumulate().compute()["always_empty/F1_score"]}
    nothing = accumulate([{"boxes": [], "scores": []}] * len(REFERENCES)).compute()
    assert nothing["F1_score"] == nothing["always_empty/F1_score"] == 84 / 300
    assert (nothing["T_acc"], nothing["N_acc"]) == (0, 1)


def test_groups_and_intervals():
    accumulator = accumulate()
    scores, groups, bounds = accumulator.compute(), accumulator.breakdown(), accumulator.intervals(resamples=200)
    assert sum(group["samples"] for group in groups.values()) == 300
    mean = sum(group["samples"] * group["F1_score"] for group in groups.values()) / 300
    assert mean == pytest.approx(scores["F1_score"])
    assert groups["num_targets=0"]["rejected"] == scores["N_acc"]
    assert all(bounds[name][0] < scores[name] < bounds[name][1] for name in SCORES)
    flat = METRIC.compute(predictions=PREDICTIONS, references=REFERENCES, details=True, bootstrap=200)
    assert flat["num_targets=3+/F1_score"] == groups["num_targets=3+"]["F1_score"]
    assert (flat["N_acc/low"], flat["N_acc/high"]) == bounds["N_acc"]

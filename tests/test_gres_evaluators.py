"""The modes of both metrics: equal to the evaluators of other projects, run as published, and to plain rewritings."""

import json
import lzma
from pathlib import Path

import evaluate
import numpy as np
import pytest
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads(lzma.decompress((ROOT / "tests/goldens/evaluators.json.xz").read_bytes()))
GRES, GREC = (evaluate.load(str(ROOT / "evaluate" / name), keep_in_memory=True) for name in ("gres", "grec"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
# evaluators that sum in float32
ROUGH = {"gsva", "mllmseg", "lisa", "sa2va", "text4seg", "samtok", "lira", "psalm", "grec_simvg"}


def sentences_of(case: dict) -> tuple[list[dict], list[dict]]:
    """Predictions and references of a golden file; sets of the same sentences hold what differs from the first."""
    predictions, references = [], []
    for index, entry in enumerate(GOLDEN["sets"][case["inputs"]]):
        first = GOLDEN["sets"]["rela" if case["metric"] == "gres" else "boxes"]
        entry = first[index] | entry if len(GOLDEN["sets"][case["inputs"]]) == len(first) else entry
        if case["metric"] == "grec":
            predictions.append({"boxes": entry["boxes"], "scores": entry["scores"]})
            references.append({"boxes": entry["truth"], "sent_id": index})
            continue
        predictions.append(answer_of(entry, case["compat"]))
        truth = {"size": entry["size"], "counts": entry["mask"]}
        references.append({"mask": truth, "no_target": entry["no_target"], "source": entry["source"]})
    return predictions, references


def answer_of(entry: dict, compat: str) -> dict:
    size = entry["size"]
    if "pred_sq" in entry:
        return {"mask": {"size": entry["pred_size"], "counts": entry["pred_sq"]}, "no_target": 1 - entry["best"]}
    if "queries" in entry:  # PSALM joins the queries that score above 0.6, or takes the best one
        scores = np.array([score for score, _ in entry["queries"]], np.float32)
        chosen = np.flatnonzero(scores > np.float32(0.6)) if scores.max() > np.float32(0.6) else [scores.argmax()]
        return {"mask": coco.merge([{"size": size, "counts": entry["queries"][i][1]} for i in chosen])}
    if not entry.get("answered", True):
        return {"mask": np.zeros(size, bool), "no_target": 1}
    mask = {"size": size, "counts": entry["pred"]}
    if compat in ("lisa", "xsam"):
        return {"mask": mask}
    flag = {"gsva": entry.get("pred_none"), "lira": False}
    return {"mask": mask, "no_target": flag.get(compat, entry.get("p_none"))}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_published_evaluator(name):
    case = CASES[name]
    predictions, references = sentences_of(case)
    metric = GRES if case["metric"] == "gres" else GREC
    result = metric.compute(predictions=predictions, references=references, compat=case["compat"], **case["options"])
    rough = name in ROUGH or name.split(" ")[-1] in ROUGH
    assert {key: result[key] for key in case["expected"]} == pytest.approx(
        case["expected"], rel=1e-6 if rough else 1e-12
    )


def test_goldens_hold_every_mode():
    assert {case["compat"] for case in GOLDEN["cases"]} == {*GRES.modes, *GREC.modes}
    assert len(CASES) == 31 and all(case["expected"] for case in GOLDEN["cases"])


# --- plain rewritings


def corner(mask: np.ndarray, side: int) -> np.ndarray:
    """OpenCV's nearest neighbour, as mmcv resizes the truth."""
    rows, columns = (np.minimum((np.arange(side) * (1 / (side / old))).astype(int), old - 1) for old in mask.shape)
    return mask[rows[:, None], columns]


def center(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(mask.shape, shape))
    return mask[rows[:, None], columns]


def plain(sentences: list[tuple], compat: str) -> dict[str, float]:
    """Scores of (mask, no_target probability, true mask, no_target) sentences, one after the other on dense masks."""
    ious, intersections, unions, precise = [], 0, 0, {0.7: 0, 0.8: 0, 0.9: 0}
    rejected_none = none = accepted = targets = 0
    side = {"deris": 384, "propvg": 320, "instancevg": 320}.get(compat)
    by_mask = compat in ("gsva", "lisa", "psalm", "xsam", "lira")
    for mask, score, truth, no_target in sentences:
        if compat == "xsam" and no_target:
            continue
        if side:
            mask, truth = corner(mask, side), corner(truth, side)
            rejected = np.float32(1 - score) <= np.float32(0.7)
        else:
            mask = center(mask, truth.shape) if by_mask else mask
            rejected = score > 0.5
        if compat in ("lisa", "psalm", "xsam"):
            rejected = not mask.any()
        no_target = not truth.any() if by_mask else no_target
        intersection, union = (mask & truth).sum(), (mask | truth).sum()
        iou = intersection / union if union else float(compat in ("lisa", "psalm", "xsam", "lira"))
        if compat == "lira":
            intersection, union, iou = (0, 0, 0.0) if rejected else (intersection, union, iou)
            rejected = rejected or not mask.any()
        elif no_target:
            intersection, union, iou = 0, 0 if rejected else union, float(rejected)
        elif rejected and not by_mask:
            intersection, iou = 0, 0.0
        ious.append(iou)
        intersections, unions = intersections + intersection, unions + union
        none, rejected_none = none + no_target, rejected_none + (no_target and rejected)
        targets, accepted = targets + (not no_target), accepted + (not no_target and not rejected)
        for level in precise:
            precise[level] += not no_target and iou >= level
    result = {"gIoU": 100 * np.mean(ious), "cIoU": 100 * intersections / unions}
    result |= {f"Pr@{level}": 100 * count / targets for level, count in precise.items()}
    result |= {"T_acc": accepted / targets if none else 0.0, "N_acc": rejected_none / none if none else 0.0}
    if compat == "mabp":
        result["T_acc"] = rejected_none / (rejected_none + targets - accepted + 1)
        result["N_acc"] = rejected_none / (none + 1)
    return result


def made_up(rng: np.random.Generator, number: int, same_size: bool) -> list[tuple]:
    """Sentences with any mix of empty, full and speckled masks, and scores that tie with the thresholds."""
    sentences = []
    for _ in range(number):
        shape = tuple(rng.integers(2, 40, 2))
        no_target = rng.random() < 0.4
        truth = np.kron(rng.random((3, 3)) < 0.5, np.ones((14, 14), bool))[: shape[0], : shape[1]]
        truth &= not no_target and rng.random() < 0.9
        mask = truth ^ (rng.random(shape) < rng.choice([0, 0.05, 0.5]))
        mask &= rng.random() < 0.8
        mask = mask if same_size else center(mask, tuple(rng.integers(2, 40, 2)))
        score = rng.choice([0.0, 0.3, 0.5, 1 - float(np.float32(0.7)), 1.0, rng.random()])
        sentences.append((mask, float(score), truth, bool(no_target)))
    return sentences


@pytest.mark.parametrize("seed", range(15))
def test_every_mode_equals_a_plain_rewriting(seed):
    rng = np.random.default_rng(seed)
    for compat in GRES.modes:
        sentences = made_up(rng, 40, same_size=compat in ("rela", "cohd", "mabp"))
        predictions = [{"mask": GRES.encode(mask), "no_target": score} for mask, score, _, _ in sentences]
        references = [{"mask": GRES.encode(truth), "no_target": none} for _, _, truth, none in sentences]
        result = GRES.compute(predictions=predictions, references=references, compat=compat)
        expected = plain(sentences, compat)
        assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-9), compat


@pytest.mark.parametrize("level", [0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("compat", ["deris", "propvg", "instancevg"])
def test_a_best_query_at_the_threshold_is_rejected(compat, level):
    """As float32 tensors are compared there: `best > level`."""
    full, empty = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    level32 = np.float32(level)
    for best, accepted in ((np.nextafter(level32, 0), 0), (level32, 0), (np.nextafter(level32, 1), 1)):
        result = GRES.compute(
            predictions=[{"mask": full, "no_target": 1 - float(best)}, {"mask": full, "no_target": 1}],
            references=[{"mask": full, "no_target": False}, {"mask": empty, "no_target": True}],
            compat=compat,
            threshold=1 - level,
        )
        assert result["T_acc"] == accepted, best


@pytest.mark.parametrize("compat", ["rela", "deris", "mabp"])
def test_the_curve_and_the_chosen_threshold_follow_the_mode(compat):
    rng = np.random.default_rng(0)
    accumulator = GRES.accumulator(compat)
    for index, (mask, score, truth, none) in enumerate(made_up(rng, 60, same_size=True)):
        accumulator.add(
            prediction={"mask": mask, "no_target": score},
            reference={"mask": truth, "no_target": none, "sent_id": index},
        )
    points = accumulator.curve()
    for index, threshold in enumerate(points["threshold"]):
        result = accumulator.compute(threshold=threshold)
        for name in ("gIoU", "cIoU", "N_acc", "T_acc"):
            assert points[name][index] == pytest.approx(result[name], abs=1e-9)
    chosen = accumulator.choose_threshold()
    assert accumulator.compute(threshold=chosen.value)["gIoU"] == pytest.approx(points["gIoU"].max())


@pytest.mark.parametrize("compat", GRES.modes)
def test_accuracies_without_no_target_sentences_are_zero_everywhere(compat):
    accumulator = GRES.accumulator(compat)
    full = np.ones((2, 2), bool)
    for index in range(4):
        accumulator.add(
            prediction={"mask": full, "no_target": 0.2}, reference={"mask": full, "no_target": False, "sent_id": index}
        )
    scores, bounds = accumulator.compute(), accumulator.intervals(resamples=20)
    assert (scores["T_acc"], scores["N_acc"]) == (0, 0)
    assert bounds["T_acc"] == bounds["N_acc"] == (0, 0)
    if accumulator.mode.none_rule in ("flag", "query"):
        points = accumulator.curve()
        assert not points["T_acc"].any() and not points["N_acc"].any()

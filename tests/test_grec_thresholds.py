"""GREC at every score threshold: as many accumulators would score, or a plain loop; chosen on a hold-out alone."""

import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
METRIC = evaluate.load(str(ROOT / "evaluate/grec"), keep_in_memory=True)
MODES = [mode for mode in METRIC.modes if mode != "simvg"]


def made_up(seed: int, sentences: int, most_boxes: int = 8) -> tuple[list[dict], list[dict]]:
    """Sentences on a coarse grid with few different scores, so that boxes and scores tie; some scores are nan."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for index in range(sentences):
        truth = np.sort(rng.integers(0, 6, (rng.integers(0, 4), 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
        near = truth[rng.random(len(truth)) < 0.8]
        far = np.sort(rng.integers(0, 6, (rng.integers(0, most_boxes - 2), 2, 2)), axis=1).reshape(-1, 4)
        boxes = np.concatenate([near, far]).astype(np.float32)
        scores = rng.choice([0.2, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, np.nan], len(boxes)).astype(np.float32)
        scores[: len(near)] = np.maximum(scores[: len(near)], np.float32(0.5))
        predictions.append({"boxes": boxes, "scores": scores})
        references.append({"boxes": truth, "sent_id": index, "image_id": index // 3})
    return predictions, references


def fill(predictions: list[dict], references: list[dict], **options):
    accumulator = METRIC.accumulator(**options)
    accumulator.add_batch(predictions=predictions, references=references)
    return accumulator


def plain(prediction: dict, reference: dict, thresh_score: float, thresh_iou: float, thresh_F1: float) -> tuple:
    """Correct or not, and boxes kept, of one sentence as the published code has it, on torch."""
    scored = zip(prediction["scores"].tolist(), prediction["boxes"].tolist())
    ordered = sorted((pair for pair in scored if pair[0] == pair[0]), reverse=True)
    kept = torch.tensor([box for score, box in ordered if score >= thresh_score]).reshape(-1, 4)
    truth = torch.from_numpy(reference["boxes"])
    if not len(truth):
        return not len(kept), len(kept)
    matched = 0
    overlap = torch.from_numpy(METRIC.overlaps(kept.numpy()[:, None], truth.numpy()[None], generalised=True))
    for _ in range(min(overlap.shape)):
        value, index = torch.topk(overlap.flatten(), 1)
        if value < thresh_iou:
            break
        matched += 1
        overlap[index // len(truth), :] = 0
        overlap[:, index % len(truth)] = 0
    return 2 * matched / (len(kept) + len(truth)) >= thresh_F1, len(kept)


@pytest.mark.parametrize("part", range(10))
def test_a_hundred_sets_of_thresholds_equal_a_plain_loop(part):
    rng = np.random.default_rng(part)
    predictions, references = made_up(part, 40)
    none = np.array([not len(reference["boxes"]) for reference in references])
    for _ in range(10):
        score, iou = rng.choice([0.2, 0.3, 0.5, 0.7, 0.75, 0.8, rng.random()]), rng.choice([0.3, 0.5, 0.75, 1.0])
        f1 = rng.choice([0.5, 0.8, 1.0])
        options = {"thresh_score": float(score), "thresh_iou": float(iou), "thresh_F1": float(f1)}
        verdicts = [plain(*pair, *options.values()) for pair in zip(predictions, references)]
        correct, kept = (np.array(column) for column in zip(*verdicts))
        result = METRIC.compute(predictions=predictions, references=references, **options)
        assert result["F1_score"] == pytest.approx(correct.mean()), options
        assert result["T_acc"] == pytest.approx((kept[~none] > 0).mean())
        assert result["N_acc"] == pytest.approx((kept[none] == 0).mean())


@pytest.mark.parametrize("compat", MODES)
@pytest.mark.parametrize("iou", [0.5, 0.0])
def test_the_curve_is_the_score_at_every_threshold(compat, iou):
    predictions, references = made_up(0, 200)
    accumulator = fill(predictions, references, compat=compat, thresh_iou=iou)
    points = accumulator.curve()
    assert len(points["threshold"]) > 5
    grid = accumulator.curve(np.linspace(0.05, 0.95, 19))
    for curve in (points, grid):
        for index, threshold in enumerate(curve["threshold"].tolist()):
            result = fill(predictions, references, compat=compat, thresh_iou=iou, thresh_score=threshold).compute()
            assert {name: curve[name][index] for name in ("F1_score", "T_acc", "N_acc")} == pytest.approx(
                {name: result[name] for name in ("F1_score", "T_acc", "N_acc")}
            )
            assert accumulator.compute(threshold=threshold) == result
    at = accumulator.breakdown(0.5)
    assert at == fill(predictions, references, compat=compat, thresh_iou=iou, thresh_score=0.5).breakdown()
    table = accumulator.table(0.5)["correct"]
    assert table == fill(predictions, references, compat=compat, thresh_iou=iou, thresh_score=0.5).table()["correct"]


@pytest.mark.parametrize("compat", MODES)
def test_the_threshold_is_chosen_on_other_sentences(compat, tmp_path):
    predictions, references = made_up(1, 300)
    whole = fill(predictions, references, compat=compat)
    held_out, reported = (
        fill(predictions[part], references[part], compat=compat) for part in (slice(0, 150), slice(150, None))
    )
    points = held_out.curve()
    for by, goal in (("F1_score", points["F1_score"]), ("balanced", points["N_acc"] + points["T_acc"])):
        chosen = held_out.choose_threshold(by)
        scores = held_out.compute(threshold=chosen.value)
        assert (scores[by] if by == "F1_score" else scores["N_acc"] + scores["T_acc"]) == pytest.approx(goal.max())
        assert reported.compute(threshold=chosen) == reported.compute(threshold=chosen.value)
        with pytest.raises(ValueError, match="was chosen on 150 of the 300 sentences"):
            whole.compute(threshold=chosen)
        again = fill(predictions[150:], references[150:], compat=compat, thresh_score=chosen)
        assert again.compute() == reported.compute(threshold=chosen)
        with pytest.raises(ValueError, match="was chosen on"):
            fill(predictions, references, compat=compat, thresh_score=chosen).compute()
        through_evaluate = METRIC.compute(
            predictions=predictions[150:], references=references[150:], compat=compat, threshold=chosen
        )
        assert through_evaluate == reported.compute(threshold=chosen)
    METRIC.plot_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_a_threshold_needs_ids_and_a_goal_that_exists():
    predictions, references = made_up(2, 20)
    for reference in references:
        del reference["sent_id"]
    with pytest.raises(ValueError, match="choosing a threshold needs held-out sentences, each with its sent_id"):
        fill(predictions, references).choose_threshold()
    with pytest.raises(ValueError, match="by='gIoU' is none of F1_score, balanced"):
        fill(*made_up(2, 20)).choose_threshold("gIoU")
    with pytest.raises(ValueError, match=r"thresh_F1=0.5: other score thresholds .* need thresh_F1=1"):
        fill(*made_up(2, 20), thresh_F1=0.5).curve()


def test_simvg_is_a_mean_of_batches_in_their_order():
    predictions, references = made_up(3, 50)
    references = references[::-1]  # ids descend: batches follow the order of adding
    result = METRIC.compute(predictions=predictions, references=references, compat="simvg", batch_size=16)
    parts = [slice(start, start + 16) for start in range(0, 50, 16)]
    batches = [METRIC.compute(predictions=predictions[part], references=references[part]) for part in parts]
    for name in ("F1_score", "N_acc"):
        assert result[name] == pytest.approx(np.mean([batch[name] for batch in batches]))
    assert "T_acc" not in result
    for method in ("breakdown", "intervals", "curve"):
        with pytest.raises(ValueError, match="compat='simvg' is a mean over batches"):
            getattr(fill(predictions, references, compat="simvg"), method)()


def test_nineteen_thresholds_of_a_large_split_in_seconds():
    rng = np.random.default_rng(0)
    predictions, references = [], []
    for index in range(14_000):
        low = rng.uniform(0, 400, (103, 2)).astype(np.float32)
        boxes = np.concatenate([low, low + 50], axis=1)
        truth = boxes[: index % 4]
        predictions.append({"boxes": boxes[:100], "scores": rng.random(100, np.float32)})
        references.append({"boxes": truth, "sent_id": index})
    start = time.process_time()
    points = fill(predictions, references).curve(np.linspace(0.05, 0.95, 19))
    assert len(points["F1_score"]) == 19
    assert time.process_time() - start < 30

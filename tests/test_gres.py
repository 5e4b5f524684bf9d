"""The GRES metric: equal to the published evaluator, and to itself however its sentences come."""

import json
from importlib import import_module
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/goldens/eval_gres.json").read_text())
METRIC = evaluate.load(str(ROOT / "evaluate/gres"), keep_in_memory=True)
masks = import_module(".masks", type(METRIC).__module__.rpartition(".")[0])
SCORES = ("gIoU", "cIoU", "T_acc", "N_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9")
EMPTY, FULL, HALF, OTHER = (METRIC.encode(np.array(rows)) for rows in ([[0, 0]], [[1, 1]], [[1, 0]], [[0, 1]]))


def golden_samples() -> tuple[list[dict], list[dict]]:
    predictions, references = [], []
    for sent_id, (source, no_target, rejected, truth, prediction, _, _) in enumerate(GOLDEN["samples"]):
        size = GOLDEN["size"]
        predictions.append({"mask": {"size": size, "counts": prediction}, "no_target": rejected})
        truth = {"size": size, "counts": truth}
        references.append({"mask": truth, "no_target": bool(no_target), "source": source, "sent_id": sent_id})
    return predictions, references


def score(*sentences: tuple, **options) -> dict[str, float]:
    """Scores of (predicted mask, predicted no_target, true mask, true no_target) sentences."""
    accumulator = METRIC.accumulator(**options)
    for mask, rejected, truth, no_target in sentences:
        accumulator.add(
            prediction={"mask": mask, "no_target": rejected}, reference={"mask": truth, "no_target": no_target}
        )
    return accumulator.compute()


@pytest.fixture
def filled():
    """An accumulator of the golden masks with made-up probabilities, ids, images, counts and words."""
    rng = np.random.default_rng(0)
    predictions, references = golden_samples()
    accumulator = METRIC.accumulator()
    for prediction, reference in zip(predictions, references):
        prediction["no_target"] = rng.beta(3, 2) if reference["no_target"] else rng.beta(2, 3)
        reference |= {"image_id": reference["sent_id"] // 3, "sentence": "word " * int(rng.integers(1, 12))}
        reference["num_targets"] = 0 if reference["no_target"] else int(rng.integers(1, 6))
    accumulator.add_batch(predictions=predictions, references=references)
    return accumulator


# --- equal to the published evaluator


@pytest.mark.parametrize("way", ["compute", "accumulator", "dense numpy", "dense torch"])
def test_scores_equal_the_published_evaluator(way):
    predictions, references = golden_samples()
    if way == "compute":
        result = METRIC.compute(predictions=predictions, references=references)
    else:
        accumulator = METRIC.accumulator()
        if way == "accumulator":
            accumulator.add_batch(predictions=predictions, references=references)
        else:
            stack = np.stack if way == "dense numpy" else lambda arrays: torch.from_numpy(np.stack(arrays))
            pred_masks, true_masks = (
                stack([coco.decode(sample["mask"]).astype(bool) for sample in samples])
                for samples in (predictions, references)
            )
            columns = {key: [reference[key] for reference in references] for key in ("no_target", "source", "sent_id")}
            scores = [prediction["no_target"] for prediction in predictions]
            accumulator.add_masks(pred_masks, true_masks, no_target_score=scores, **columns)
        result = accumulator.compute()
    for source, published in GOLDEN["results"].items():
        for name, value in published.items():
            key = name if source == "full" else f"{source}/{name}"
            assert result[key] == pytest.approx(value, abs=1e-9), key


def test_counts_equal_the_published_evaluator():
    predictions, references = golden_samples()
    accumulator = METRIC.accumulator()
    accumulator.add_batch(predictions=predictions, references=references)
    rows = accumulator.rows()
    table = accumulator.table()
    for row, iou, rejected, sample in zip(rows, table["iou"], table["rejected"], GOLDEN["samples"], strict=True):
        _, no_target, said_none, _, _, intersection, union = sample
        assert (row["no_target"], rejected) == (no_target, said_none)
        if no_target or not said_none:
            assert (0 if no_target else row["intersection"]) == intersection
        if not no_target:
            assert row["union"] == union
        elif not said_none:
            assert row["predicted"] == union
        expected = float(said_none) if no_target else intersection / union if union else 0.0
        assert iou == expected


def test_edges_of_the_published_evaluator():
    """Where it gives a number ours is the same; where it crashes or gives nan, every empty ratio is 0."""
    nothing_found = dict.fromkeys((*SCORES, "always_empty/gIoU"), 0.0)
    assert score() == nothing_found
    assert score((EMPTY, False, EMPTY, False)) == nothing_found
    assert score((HALF, True, HALF, False)) == nothing_found
    assert score((HALF, False, EMPTY, False)) == nothing_found
    only_no_target = score((HALF, True, EMPTY, True), (EMPTY, True, EMPTY, True))
    assert only_no_target == nothing_found | {"gIoU": 100.0, "N_acc": 1.0, "always_empty/gIoU": 100.0}
    missed = score((HALF, False, EMPTY, True))
    assert missed == nothing_found | {"always_empty/gIoU": 100.0}
    flagged_missed = score((OTHER, False, HALF, True), (FULL, False, FULL, False))  # a truth mask in spite of the flag
    assert flagged_missed["cIoU"] == 100 * 2 / 4
    flagged = score((EMPTY, True, HALF, True), (FULL, False, FULL, False))
    assert flagged == dict.fromkeys(SCORES, 100.0) | {"T_acc": 1.0, "N_acc": 1.0, "always_empty/gIoU": 50.0}


def test_the_head_decides_and_not_the_mask():
    assert score((EMPTY, False, EMPTY, True))["gIoU"] == 0
    assert score((FULL, True, EMPTY, True))["gIoU"] == 100
    assert score((FULL, 0.5, EMPTY, True))["N_acc"] == 0  # a tie of the two logits is "there is a target"
    assert score((FULL, np.nextafter(0.5, 1), EMPTY, True))["N_acc"] == 1


def test_precision_thresholds_include_equality():
    ten = np.zeros((1, 10))
    for pixels, at_7, at_8, at_9 in ((6, 0, 0, 0), (7, 1, 0, 0), (8, 1, 1, 0), (9, 1, 1, 1)):
        ten[0, :pixels] = 1
        result = score((METRIC.encode(ten), False, METRIC.encode(np.ones((1, 10))), False))
        assert [result[f"Pr@{at}"] for at in (0.7, 0.8, 0.9)] == [100 * at_7, 100 * at_8, 100 * at_9]


# --- other people's evaluators


@pytest.mark.parametrize(
    ("compat", "gIoU", "cIoU", "N_acc"),
    # the last sentence has no target by its mask, which rela does not look at
    [("rela", 1.5 / 5, 1 / 4, 1 / 2), ("gsva", 2 / 5, 2 / 4, 1 / 3), ("lisa", 3 / 5, 2 / 5, 2 / 3)],
)
def test_compat_scores_rejected_and_empty_sentences_as_others_do(compat, gIoU, cIoU, N_acc):
    result = score(
        (HALF, False, FULL, False),  # half found
        (HALF, True, FULL, False),  # half found, rejected wrongly: its mask counts for gsva and lisa
        (HALF, True, EMPTY, True),  # right by the head, wrong by the mask (lisa has no head)
        (EMPTY, False, EMPTY, True),  # the reverse
        (EMPTY, False, EMPTY, False),  # nothing to find: 0, but 1 for lisa
        compat=compat,
    )
    assert (result["gIoU"], result["cIoU"], result["N_acc"]) == pytest.approx((100 * gIoU, 100 * cIoU, N_acc))


@pytest.mark.parametrize("compat", ["deris", "propvg"])
def test_query_scores_reject_at_07(compat):
    """There the probability of "none" is 1 - best score, and a sentence is kept above a score of 0.7."""
    for best, kept in ((0.7, False), (0.71, True)):
        result = score((FULL, 1 - best, FULL, False), (EMPTY, True, EMPTY, True), compat=compat)
        assert result["T_acc"] == kept


def test_resolution():
    tall, wide = np.zeros((6, 3)), np.zeros((3, 6))
    tall[:2] = wide[:1] = 1  # the upper third
    pair = METRIC.encode(tall), False, METRIC.encode(wide), False
    with pytest.raises(ValueError, match=r"\[6, 3\] and its reference \[3, 6\].*original"):
        score(pair)
    assert score(pair, resolution="original")["gIoU"] == 100
    assert score(pair, resolution=480)["gIoU"] == 100
    assert score(pair, compat="gsva")["gIoU"] == 100
    accumulator = METRIC.accumulator("propvg")
    accumulator.add(prediction={"mask": pair[0], "no_target": 0}, reference={"mask": pair[2], "no_target": False})
    assert accumulator.rows()["pixels"] == 320 * 320
    line = np.array([[1, 0, 1]])  # brought to two pixels, by their centres and not their corners, it is full
    for ends in (line, line.T):
        full = METRIC.encode(ends[ends > 0].reshape([min(side, 2) for side in ends.shape]))
        assert score((METRIC.encode(ends), False, full, False), resolution="original")["gIoU"] == 100
    for bad in (0, -1, "480", 2.5):
        with pytest.raises(ValueError, match="resolution"):
            METRIC.accumulator(resolution=bad)
    with pytest.raises(ValueError, match="compat='relay' is none of rela, gsva"):
        METRIC.accumulator("relay")


# --- masks

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(shape=shapes, seed=st.integers(0, 2**32), fill=st.tuples(*[st.sampled_from([0, 0.1, 0.5, 0.9, 1])] * 2))
@settings(max_examples=200, deadline=None)
def test_overlaps_are_pixel_counts(shape, seed, fill):
    rng = np.random.default_rng(seed)
    pairs = [[rng.random(shape) < share for share in fill] for _ in range(3)]
    predictions, truths = ([METRIC.encode(pair[side]) for pair in pairs] for side in (0, 1))
    expected = np.array([((p & t).sum(), (p | t).sum(), p.sum()) for p, t in pairs])
    np.testing.assert_array_equal(np.stack(masks.rle_overlaps(predictions, truths), axis=1), expected)
    dense = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    np.testing.assert_array_equal(np.stack(masks.dense_overlaps(*dense), axis=1), expected)
    tensors = torch.from_numpy(dense[0]), torch.from_numpy(dense[1])
    np.testing.assert_array_equal(np.stack(masks.dense_overlaps(*tensors), axis=1), expected)
    # what accelerators do, which the tests may lack
    np.testing.assert_array_equal(masks._count_on_device(*tensors), masks._count_here(*dense))


@pytest.mark.parametrize("shape", [(480, 480), (479, 481)])
def test_full_dense_masks_are_counted_in_full(shape):
    full = np.ones((1, *shape), bool)
    assert [int(count) for count in np.ravel(masks.dense_overlaps(full, full))] == [full.size] * 3


def test_overlaps_of_large_masks_over_many_batches():
    rng = np.random.default_rng(0)
    blobs = [np.kron(rng.random((9, 9)) < 0.4, np.ones((70, 70))) for _ in range(150)]
    encoded = [METRIC.encode(blob) for blob in blobs]
    shifted = encoded[1:] + encoded[:1]
    intersection, union, predicted = masks.rle_overlaps(encoded, shifted)
    np.testing.assert_array_equal(
        intersection, [coco.area(coco.merge([a, b], True)) for a, b in zip(encoded, shifted)]
    )
    np.testing.assert_array_equal(union, [coco.area(coco.merge([a, b])) for a, b in zip(encoded, shifted)])
    np.testing.assert_array_equal(predicted, [coco.area(mask) for mask in encoded])


@pytest.mark.parametrize("shape", [(480, 480), (333, 500), (96, 85)])
def test_dense_masks_that_share_rows_pixels_or_nothing(shape):
    """Objects anywhere, so that the two of a pair lie in the same, in some or in no runs of words."""
    rng = np.random.default_rng(0)
    predictions, truths = np.zeros((2, 24, *shape), bool)
    for mask in (*predictions[1:], *truths[:-1]):  # the first and the last pair have one empty side
        top, left = (int(rng.integers(0, side)) for side in shape)
        height, width = (int(rng.integers(1, side // 2)) for side in shape)
        mask[top : top + height, left : left + width] = rng.random() < 0.7
    for p, t in ((predictions, truths), (predictions[:, ::2, ::3], truths[:, ::2, ::3])):
        expected = [((one & other).sum(), (one | other).sum(), one.sum()) for one, other in zip(p, t)]
        np.testing.assert_array_equal(np.stack(masks.dense_overlaps(p, t), axis=1), expected)


BROKEN = {
    "is empty": "",
    "does not fill its size": "12",
    "no RLE string": "1\x7f",
    "no RLE string ": "1P",
    "negative length": "3N2",
    "compressed COCO string, not list": [4, 5],
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("side", ["prediction", "reference"])
def test_broken_masks_are_named(fault, side):
    good, bad = METRIC.encode(np.eye(3)), {"size": [3, 3], "counts": BROKEN[fault]}
    predictions, truths = [good] * 70, [good] * 70
    (predictions if side == "prediction" else truths)[66] = bad
    where = "" if "list" in fault else f"the mask of {side} 66 .*"
    with pytest.raises(ValueError, match=where + fault.strip()):
        masks.rle_overlaps(predictions, truths)
    with pytest.raises(ValueError, match=where + fault.strip()):
        masks.rle_overlaps(predictions, truths, resolution=4)


@given(st.text(alphabet=[chr(code) for code in range(48, 112)], max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_string_is_a_mask_or_an_error(counts):
    mask = {"size": [3, 5], "counts": counts}
    try:
        intersection, union, predicted = masks.rle_overlaps([mask], [mask])
    except ValueError:
        return
    assert intersection == union == predicted == coco.decode(mask).sum()


def test_encode_and_foreground():
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    for given_mask in (mask, mask.astype(np.int64), torch.from_numpy(mask), torch.from_numpy(mask).float()):
        assert METRIC.encode(given_mask) == METRIC.encode(mask)
    np.testing.assert_array_equal(coco.decode(METRIC.encode(mask)), mask)
    with pytest.raises(ValueError, match="one by one"):
        METRIC.encode(mask[None])
    logits = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)).round()
    assert torch.equal(METRIC.foreground(logits), logits.argmax(dim=1) == 1)


# --- whatever the order, whoever counted


@given(st.permutations(range(len(GOLDEN["samples"]))), st.integers(0, len(GOLDEN["samples"])))
@settings(max_examples=10, deadline=None)
def test_order_and_processes_leave_no_trace(order, cut):
    predictions, references = golden_samples()
    for reference in references:
        del reference["sent_id"]
    whole, first, second = (METRIC.accumulator() for _ in range(3))
    whole.add_batch(predictions=predictions, references=references)
    for part, indices in ((first, order[:cut]), (second, order[cut:])):
        part.add_batch(predictions=[predictions[i] for i in indices], references=[references[i] for i in indices])
    first.merge(second.state())
    assert first.compute() == whole.compute()


@given(st.lists(st.tuples(*[st.integers(0, 40)] * 3, st.floats(0, 1), st.booleans()), max_size=30))
@settings(max_examples=100, deadline=None)
def test_bounds_and_baselines(sentences):
    def fill(predict) -> dict[str, float]:
        accumulator = METRIC.accumulator()
        for both, only_pred, only_true, chance, no_target in sentences:
            counts = predict(both, only_pred, 0 if no_target else only_true + 1, chance, no_target)
            names = ("intersection", "predicted", "union", "no_target_score")
            accumulator.add_counts(no_target=[no_target], **{name: [value] for name, value in zip(names, counts)})
        return accumulator.compute()

    def as_drawn(both, only_pred, only_true, chance, no_target):
        both *= not no_target
        return both, both + only_pred, both + only_pred + only_true, chance

    result = fill(as_drawn)
    assert all(0 <= value <= (1 if name.endswith("acc") else 100) for name, value in result.items())
    answers_none = fill(lambda both, pred, true, chance, no_target: (0, 0, true, 1.0))
    assert answers_none["gIoU"] == pytest.approx(result["always_empty/gIoU"])
    perfect = fill(lambda both, pred, true, chance, no_target: (true, true, true, float(no_target)))
    targeted = any(not sentence[-1] for sentence in sentences)
    assert perfect["gIoU"] == (100 if sentences else 0)
    assert [perfect[name] for name in ("cIoU", "Pr@0.9")] == [100 * targeted] * 2


def test_padding_counts_once_and_conflicts_are_errors(filled):
    before = filled.compute()
    filled.merge(filled.state()[:40])
    assert len(filled) == 340
    assert filled.compute() == before
    changed = filled.state()[:1].copy()
    changed[0, 16] ^= 1  # the lowest byte of the intersection
    filled.merge(torch.from_numpy(changed))
    with pytest.raises(ValueError, match="sentence 0 was counted twice with different results"):
        filled.compute()


def test_gaps_and_strangers_are_errors(filled):
    assert filled.compute(expected=range(300)) == filled.compute()
    with pytest.raises(ValueError, match=r"of 302 .* 2 are missing \(first: \[300, 301\]\) and 0 are"):
        filled.compute(expected=range(302))
    with pytest.raises(ValueError, match=r"0 are missing .* and 1 are not expected \(first: \[0\]\)"):
        filled.compute(expected=range(1, 300))


def test_a_sentence_takes_64_bytes_at_most():
    accumulator = METRIC.accumulator()
    for start in range(0, 5000, 7):
        ids = np.arange(start, start + 7)
        accumulator.add_counts(
            intersection=ids, union=ids, predicted=ids, no_target_score=ids % 2, no_target=ids % 2, sent_id=ids
        )
    assert accumulator._buffer.__sizeof__() <= 64 * len(accumulator)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"no_target_score": [1.5]}, "apply softmax"),
        ({"no_target_score": [float("nan")]}, "apply softmax"),
        ({"num_targets": [2**32]}, "num_targets runs from 4294967296 to 4294967296"),
        ({"union": [2**31]}, "union"),
        ({"source": ["x" * 17]}, "longer than 16 bytes"),
        ({"sent_id": [1, 2]}, r"sent_id has shape \(2,\), there are 1"),
    ],
)
def test_counts_that_do_not_fit_are_refused(columns, message):
    good = {"intersection": [1], "union": [1], "predicted": [1], "no_target_score": [0], "no_target": [False]}
    accumulator = METRIC.accumulator()
    with pytest.raises(ValueError, match=message):
        accumulator.add_counts(**good | columns)
    assert len(accumulator) == 0
    accumulator.add_counts(**good | {"num_words": [300]})  # the one column where too much is enough
    assert accumulator.rows()["num_words"] == 255


def test_dense_masks_are_bool_and_alike():
    accumulator, columns = METRIC.accumulator(), {"no_target_score": [0], "no_target": [False]}
    for array in (np.ones((1, 2, 2)), torch.ones(1, 2, 2)):
        with pytest.raises(ValueError, match="masks are bool"):
            accumulator.add_masks(array, array, **columns)
        with pytest.raises(ValueError, match="height, width"):
            accumulator.add_masks(array > 0, array[:, :1] > 0, **columns)


# --- beyond the headline


def test_groups_part_the_sentences(filled):
    groups = filled.breakdown()
    for kind in ("num_targets", "num_words"):
        parts = [scores for name, scores in groups.items() if name.startswith(kind)]
        assert sum(part["samples"] for part in parts) == 300
        assert sum(part["samples"] * part["gIoU"] for part in parts) == pytest.approx(300 * filled.compute()["gIoU"])
    sizes = sum(scores["samples"] for name, scores in groups.items() if name.startswith("mask_size"))
    assert sizes == groups["targeted"]["samples"] == 188
    assert groups["num_targets=0"]["rejected"] == filled.compute()["N_acc"]
    assert groups["targeted"]["rejected"] == pytest.approx(1 - filled.compute()["T_acc"])


def test_intervals_hold_the_score_and_repeat(filled):
    bounds, scores = filled.intervals(resamples=300), filled.compute()
    assert all(bounds[name][0] < scores[name] < bounds[name][1] for name in SCORES)
    assert filled.intervals(resamples=300) == bounds != filled.intervals(resamples=300, seed=1)
    half = METRIC.accumulator()
    half.merge(filled.state()[:150])
    wider = half.intervals(resamples=300)["gIoU"]
    assert wider[1] - wider[0] > bounds["gIoU"][1] - bounds["gIoU"][0]
    shuffled = METRIC.accumulator()
    shuffled.merge(filled.state()[::-1])
    assert shuffled.intervals(resamples=300) == bounds


@pytest.mark.parametrize("compat", ["rela", "gsva"])
def test_curve_is_the_score_at_every_threshold(filled, compat):
    accumulator = METRIC.accumulator(compat)
    accumulator.merge(filled.state())
    points = accumulator.curve()
    assert len(points["threshold"]) == 301
    for index in (0, 1, 77, 200, 300):
        result = accumulator.compute(threshold=points["threshold"][index])
        for name in ("gIoU", "cIoU", "T_acc", "N_acc"):
            assert points[name][index] == pytest.approx(result[name], abs=1e-9)
    assert (np.diff(points["T_acc"]) >= 0).all() and (np.diff(points["N_acc"]) <= 0).all()
    with pytest.raises(ValueError, match="no threshold to vary"):
        METRIC.accumulator("lisa").curve()


def test_threshold_is_chosen_on_other_sentences(filled):
    held_out, reported = METRIC.accumulator(), METRIC.accumulator()
    held_out.merge(filled.state()[:150])
    reported.merge(filled.state()[150:])
    for by in ("gIoU", "balanced"):
        threshold = held_out.choose_threshold(by)
        goal = {"gIoU": lambda r: r["gIoU"], "balanced": lambda r: r["N_acc"] + r["T_acc"]}[by]
        best = max(goal(held_out.compute(threshold=at)) for at in held_out.curve()["threshold"])
        assert goal(held_out.compute(threshold=threshold.value)) == pytest.approx(best)
        assert reported.compute(threshold=threshold) == reported.compute(threshold=threshold.value)
        with pytest.raises(ValueError, match="was chosen on 150 of the 300 sentences"):
            filled.compute(threshold=threshold)
    anonymous = METRIC.accumulator()
    anonymous.add(prediction={"mask": FULL, "no_target": 0.2}, reference={"mask": FULL, "no_target": False})
    for wrong in (anonymous.choose_threshold, lambda: anonymous.compute(threshold=threshold)):
        with pytest.raises(ValueError, match="sent_id"):
            wrong()
    with pytest.raises(ValueError, match="by='best' is none of gIoU, balanced"):
        held_out.choose_threshold("best")


def test_flags_choose_the_middle():
    accumulator = METRIC.accumulator()
    for sent_id, (mask, no_target) in enumerate([(FULL, False), (EMPTY, True)]):
        reference = {"mask": mask, "no_target": no_target, "sent_id": sent_id}
        accumulator.add(prediction={"mask": FULL, "no_target": no_target}, reference=reference)
    assert accumulator.choose_threshold().value == 0.5


def test_intervals_draw_images():
    one_image, many = METRIC.accumulator(), METRIC.accumulator()
    for accumulator, images in ((one_image, np.zeros(50)), (many, np.arange(50))):
        both = np.arange(50)
        accumulator.add_counts(
            intersection=both,
            union=[50] * 50,
            predicted=both,
            no_target_score=[0] * 50,
            no_target=[False] * 50,
            image_id=images,
        )
    low, high = one_image.intervals(resamples=50)["gIoU"]
    assert low == high == pytest.approx(49)
    assert np.subtract(*many.intervals(resamples=50)["gIoU"]) < -10


def test_curve_is_drawn(filled, tmp_path):
    METRIC.plot_curve(filled.curve(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


# --- through evaluate


def test_wrapper_and_accumulator_are_one(filled):
    predictions, references = golden_samples()
    whole = METRIC.compute(predictions=predictions, references=references, details=True, bootstrap=50)
    for prediction, reference in zip(predictions, references):
        METRIC.add(prediction=prediction, reference=reference)
    assert METRIC.compute(details=True, bootstrap=50) == whole
    accumulator = METRIC.accumulator()
    accumulator.add_batch(predictions=predictions, references=references)
    assert accumulator.compute().items() <= whole.items()
    assert whole["num_targets=0/samples"] == 112
    assert whole["gIoU/low"] < whole["gIoU"] < whole["gIoU/high"]


@pytest.mark.parametrize("target", [METRIC, METRIC.accumulator()], ids=["evaluate", "accumulator"])
@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({}, {"num_target": 1}, "reference 0 has num_target: its keys can be mask, no_target, sent_id, image_id"),
        ({"no_target": None}, {}, "prediction 0 lacks no_target"),
        ({}, {"mask": None}, "reference 0 lacks mask"),
    ],
)
def test_missing_and_misspelt_keys_are_named(target, prediction, reference, message):
    entries = [{"mask": FULL, "no_target": False} | changes for changes in (prediction, reference)]
    entries = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    with pytest.raises(ValueError, match=message):
        target.add(prediction=entries[0], reference=entries[1])
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        target.add_batch(predictions=entries[:1] * 2, references=entries[1:])


def test_nothing_through_evaluate_scores_nothing():
    assert set(METRIC.compute(predictions=[], references=[]).values()) == {0.0}

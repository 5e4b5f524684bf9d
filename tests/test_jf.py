"""The J&F metric: equal to the published evaluator, and to itself however its sentences come."""

import json
from importlib import import_module
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests/goldens/mevis"
METRIC = evaluate.load(str(ROOT / "evaluate/jf"), keep_in_memory=True)
boundaries = import_module(".boundaries", type(METRIC).__module__.rpartition(".")[0])
EMPTY, FULL, HALF = (METRIC.encode(np.array(rows)) for rows in ([[0, 0]], [[1, 1]], [[1, 0]]))


def golden_sentences() -> tuple[list[dict], list[dict], dict]:
    """Predictions and references of the golden videos, and what the original evaluator made of them."""
    read = {name: json.loads((GOLDENS / name).read_text()) for name in ("expected.json", "predictions.json")}
    videos = json.loads((GOLDENS / "valid_u/meta_expressions.json").read_text())["videos"]
    masks = json.loads((GOLDENS / "valid_u/mask_dict.json").read_text())
    predictions, references = [], []
    for video_id, video in videos.items():
        all_masks = [m for e in video["expressions"].values() for a in e["anno_id"] for m in masks[str(a)] if m]
        empty = METRIC.encode(np.zeros(all_masks[0]["size"]))
        for exp_id, expression in video["expressions"].items():
            frames = []
            for frame in range(len(video["frames"])):
                parts = [masks[str(anno_id)][frame] for anno_id in expression["anno_id"]]
                frames.append(coco.merge([part for part in parts if part]) if any(parts) else empty)
            answers = (read["predictions.json"][video_id] or {}).get(exp_id, [])
            predictions.append({"masks": [answer or empty for answer in answers]})
            reference = {"masks": frames, "no_target": not expression["anno_id"]}
            reference |= {"video_id": video_id, "exp_id": exp_id, "num_targets": len(expression["anno_id"])}
            references.append(reference)
    return predictions, references, read["expected.json"]


PREDICTIONS, REFERENCES, EXPECTED = golden_sentences()


@pytest.mark.parametrize("index", range(len(REFERENCES)))
def test_frames_equal_the_original(index):
    name = f"{REFERENCES[index]['video_id']}_{REFERENCES[index]['exp_id']}"
    expected = EXPECTED["original"]
    accumulator = METRIC.accumulator(compat="original")
    accumulator.add(prediction=PREDICTIONS[index], reference=REFERENCES[index])
    row = accumulator.rows()[0]
    assert [row["J"], row["F"]] == expected["per_expression"][name]
    if PREDICTIONS[index]["masks"]:
        scores = METRIC.frame_scores(PREDICTIONS[index]["masks"], REFERENCES[index]["masks"], name)
        assert scores.region.tolist() == expected["per_frame"][name]["J"]
        assert scores.boundary.tolist() == expected["per_frame"][name]["F"]
    else:
        assert name not in expected["per_frame"]


def test_set_equals_the_original():
    scores = METRIC.compute(predictions=PREDICTIONS, references=REFERENCES, compat="original", details=True)
    # the original adds in the order in which its workers end: its last digit is not reproducible
    for name in ("J", "F", "J&F"):
        assert scores[name] == pytest.approx(EXPECTED["original"][name], rel=1e-15)
    ours = EXPECTED["not_original"]
    assert scores["N_acc"] == ours["N_acc"] and scores["T_acc"] == ours["T_acc"]
    assert scores["J&F/targets"] == pytest.approx(ours["J&F over targets only"], rel=1e-15)
    assert scores["Final"] == pytest.approx(ours["Final"], rel=1e-15)
    assert scores["num_targets=0/samples"] == sum(reference["no_target"] for reference in REFERENCES)


def dense_scores(prediction: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[float, float]:
    """J and F of two painted masks, straight from their definition."""
    union = (prediction | truth).sum()
    region = (prediction & truth).sum() / union if union else 1.0
    radius = np.ceil(tolerance * np.linalg.norm(truth.shape))
    edges = []
    for mask in (prediction, truth):
        wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        edge = (wide[:-1, :-1] != wide[1:, :-1]) | (wide[:-1, :-1] != wide[:-1, 1:])
        edges.append(np.argwhere(edge | (wide[:-1, :-1] != wide[1:, 1:])))
    if not all(map(len, edges)):
        return region, float(len(edges[0]) == len(edges[1]))
    squares = ((edges[0][:, None] - edges[1][None]) ** 2).sum(axis=2)
    precision, recall = (np.count_nonzero((squares <= radius**2).any(axis=axis)) for axis in (1, 0))
    precision, recall = precision / len(edges[0]), recall / len(edges[1])
    return region, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
    tolerance=st.sampled_from([0.008, 0.05, 0.2]),
)
@settings(max_examples=150, deadline=None)
def test_scores_from_run_lengths_equal_painted_masks(shape, seed, tolerance):
    rng = np.random.default_rng(seed)
    masks = np.zeros((2, 6, *shape), bool)
    for mask in masks.reshape(12, *shape):
        kind = rng.integers(0, 4)
        if kind == 0:
            mask[:] = rng.random(shape) < rng.choice([0, 0.05, 0.5, 1])
        else:  # rectangles, that touch the borders often
            for _ in range(kind):
                top, left = (int(rng.integers(-side // 2, side)) for side in shape)
                mask[max(top, 0) : top + shape[0] // 2 + 1, max(left, 0) : left + shape[1] // 2 + 1] = True
    masks[0, 0] = masks[1, 0]
    expected = np.array([dense_scores(*pair, tolerance) for pair in zip(*masks)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundaries, "TOLERANCE", tolerance)
        scores = METRIC.frame_scores(*([METRIC.encode(mask) for mask in side] for side in masks), "x")
    np.testing.assert_array_equal(np.stack([scores.region, scores.boundary], axis=1), expected)


def test_long_videos_are_scored_in_parts(monkeypatch):
    lengths = import_module(".run_lengths", type(METRIC).__module__.rpartition(".")[0])
    index = next(i for i, r in enumerate(REFERENCES) if r["video_id"] == "d56a6ec78cfa" and r["exp_id"] == "1")
    masks = PREDICTIONS[index]["masks"], REFERENCES[index]["masks"]
    whole = METRIC.frame_scores(*masks, "x")
    monkeypatch.setattr(lengths, "CHUNK", 100)
    for one, other in zip(METRIC.frame_scores(*masks, "x"), whole):
        np.testing.assert_array_equal(one, other)


def test_any_order_any_processes_and_arrow_give_the_same():
    complete = [index for index, prediction in enumerate(PREDICTIONS) if prediction["masks"]]
    predictions, references = ([side[index] for index in complete] for side in (PREDICTIONS, REFERENCES))
    whole = METRIC.accumulator()
    whole.add_batch(predictions=predictions, references=references)
    assert whole.row.itemsize <= 64
    parts = [METRIC.accumulator() for _ in range(2)]
    for index in reversed(range(len(references))):
        parts[index % 2].add(prediction=predictions[index], reference=references[index])
    parts[0].add(prediction=predictions[1], reference=references[1])  # a sampler repeats a sentence
    parts[0].merge(parts[1].state())
    expected = whole.compute()
    assert parts[0].compute(expected=whole.rows()["sent_id"]) == expected
    assert METRIC.compute(predictions=predictions, references=references) == expected
    METRIC.add_batch(predictions=predictions, references=references)
    assert METRIC.compute() == expected
    assert parts[0].intervals(resamples=20)["J&F"][0] <= expected["J&F"] <= parts[0].intervals(resamples=20)["J&F"][1]
    assert whole.table()["num_targets"] == [
        references[i]["num_targets"] for i in np.argsort(whole.arrived_rows()["sent_id"])
    ]
    with pytest.raises(ValueError, match="1 are missing"):
        whole.compute(expected=[*whole.rows()["sent_id"], 7])
    with pytest.raises(ValueError, match="scored twice with different results"):
        parts[0].add(prediction=predictions[0] | {"masks": references[0]["masks"]}, reference=references[0])
        parts[0].compute()


def test_always_empty_is_what_empty_masks_score():
    empty = [{"masks": [METRIC.encode(np.zeros(r["masks"][0]["size"]))] * len(r["masks"])} for r in REFERENCES]
    scores = METRIC.compute(predictions=empty, references=REFERENCES)
    assert scores["J&F"] == scores["always_empty/J&F"] and 0 < scores["J&F"] < 1
    assert (scores["N_acc"], scores["T_acc"]) == (1, 0)


def test_groups_of_sentences():
    accumulator = METRIC.accumulator()
    for num_targets, truths in ((1, [HALF, HALF]), (2, [HALF, EMPTY]), (1, [EMPTY, EMPTY]), (0, [EMPTY, EMPTY])):
        reference = {"masks": truths, "no_target": not num_targets, "num_targets": num_targets}
        accumulator.add(prediction={"masks": [HALF, HALF]}, reference=reference)
    groups = accumulator.breakdown()
    samples = {name: group["samples"] for name, group in groups.items()}
    assert samples == {
        "targeted": 3,
        "num_targets=0": 1,
        "num_targets=1": 2,
        "num_targets=2": 1,
        "visible=never": 1,
        "visible=>=50%": 1,
        "visible=always": 1,
    }
    assert groups["visible=always"]["J&F"] == 1 and groups["visible=>=50%"]["J"] == 0.5
    assert groups["num_targets=0"]["rejected"] == 0


@pytest.mark.parametrize(
    ("masks", "fault"),
    [
        ([], "lacks 2 masks"),
        (None, "lacks 2 masks"),
        ([HALF], "lacks 1 masks"),
        ([HALF, None], "lacks the mask of frame 1"),
        ([HALF] * 3, "has 3 masks; its video has 2 frames"),
        ([HALF, METRIC.encode(np.eye(3))], r"frame 1 is \[3, 3\]"),
        ([HALF, {"size": [1, 2], "counts": "1P"}], "frame 1 is no RLE string"),
        ([HALF, "mask"], "frame 1 is 'mask'"),
    ],
)
def test_answers_that_are_not_complete_are_named(masks, fault):
    reference = {"masks": [HALF, FULL], "no_target": False, "video_id": "cats", "exp_id": "7"}
    good = {"masks": [HALF, FULL]}
    with pytest.raises(ValueError, match=f"video cats sentence 7.*{fault}"):
        METRIC.compute(predictions=[good, {"masks": masks}], references=[reference | {"exp_id": "0"}, reference])


@pytest.mark.parametrize(
    ("compat", "no_masks", "no_frame"),
    [("original", 0.5, 1.0), ("momentseg", 1.0, 1.0), ("visa", 0.5, 0.5)],
)
def test_modes_differ_in_answers_that_are_not_complete(compat, no_masks, no_frame):
    reference = {"masks": [HALF, HALF], "no_target": False}
    for masks, expected in (([], no_masks), ([HALF, None], no_frame)):
        predictions = [{"masks": [HALF, HALF]}, {"masks": masks}]
        scores = METRIC.compute(predictions=predictions, references=[reference] * 2, compat=compat)
        assert scores["J&F"] == expected
    METRIC.add_batch(predictions=predictions, references=[reference] * 2)
    assert METRIC.compute(compat=compat)["J&F"] == no_frame


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ({"masks": [], "no_target": False}, "has no masks"),
        ({"masks": [HALF], "no_target": True}, "no_target and a true mask with pixels"),
        ({"masks": [HALF], "no_target": 3}, "must be true or false"),
        ({"masks": [HALF], "no_target": False, "exp": "0"}, "has exp"),
        ({"masks": [HALF]}, "lacks no_target"),
    ],
)
def test_broken_references_are_named(reference, fault):
    with pytest.raises(ValueError, match=fault):
        METRIC.accumulator().add(prediction={"masks": [HALF]}, reference=reference)


def test_nothing_and_unknown_options():
    assert METRIC.accumulator().compute()["J&F"] == 0
    with pytest.raises(ValueError, match="none of published, original"):
        METRIC.accumulator(compat="davis")
    with pytest.raises(ValueError, match="unknown option ap"):
        METRIC.compute(predictions=[], references=[], ap=True)

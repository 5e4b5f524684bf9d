"""Masks of the data set: polygons and run lengths are checked, merged, encoded and decoded."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from grefcoco_data import masks
from tests.json_values import NUMBERS, VALUES
from tests.tiny_grefcoco import HEIGHT, WIDTH


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-20, 80), st.floats(-20, 60)), min_size=3, max_size=8), min_size=1, max_size=3
    )
)
@settings(max_examples=60, deadline=None)
def test_valid_polygons_give_the_masks_of_pycocotools(rings):
    polygons = [[float(x) for point in ring for x in point] for ring in rings]
    rle, fault = masks.to_rle(polygons, HEIGHT, WIDTH)
    assert fault is None
    assert rle["counts"].encode() == coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))["counts"]


@pytest.mark.slow
@given(st.lists(st.one_of(VALUES, st.lists(NUMBERS, max_size=12)), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_polygons_give_a_mask_of_the_image(segmentation):
    rle, fault = masks.to_rle(segmentation, HEIGHT, WIDTH)
    mask = coco_mask.decode(rle)
    assert mask.shape == (HEIGHT, WIDTH)
    assert fault or len(segmentation) > 0


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["size", "counts"]), VALUES))
@settings(max_examples=200, deadline=None)
def test_any_rle_gives_a_mask_of_the_image(segmentation):
    rle, fault = masks.to_rle(segmentation, HEIGHT, WIDTH)
    assert coco_mask.decode(rle).shape == (HEIGHT, WIDTH)
    assert fault


@given(st.binary(min_size=HEIGHT * WIDTH // 8, max_size=HEIGHT * WIDTH // 8))
@settings(max_examples=50, deadline=None)
def test_rle_round_trip(packed):
    mask = np.unpackbits(np.frombuffer(packed, np.uint8)).reshape(HEIGHT, WIDTH)
    rle = coco_mask.encode(np.asfortranarray(mask))
    for counts in (rle["counts"].decode(), masks._decoded_counts(rle["counts"].decode())):
        copy, fault = masks.to_rle({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
        assert fault is None and copy["counts"].encode() == rle["counts"]


def compressed(counts: list[int], digits: list[int]) -> str:
    """Text of run lengths, each number with at least this many digits."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        width = digits[i]
        while not -(1 << 5 * width - 1) <= value < 1 << 5 * width - 1:
            width += 1
        text += "".join(chr(48 + (value >> 5 * n & 31 | 32 * (n < width - 1))) for n in range(width))
    return text


RUNS = st.one_of(st.integers(0, 40), st.integers(0, masks.MAX_PIXELS), st.integers(-(1 << 34), 1 << 34))
TEXTS = st.lists(st.tuples(RUNS, st.integers(1, 8)), min_size=1, max_size=8).map(
    lambda pairs: (compressed(*map(list, zip(*pairs))), sum(run for run, _ in pairs))
)


@pytest.mark.slow
@given(st.lists(st.tuples(TEXTS, st.sampled_from([0, 0, 0, 1])), max_size=12), st.sampled_from([1, 30, 1 << 18]))
@settings(max_examples=200, deadline=None)
def test_rles_of_many_digits_are_checked_as_by_hand(drawn, block):
    texts = [text for (text, _), _ in drawn]
    pixels = [(area + more) % (1 << 32) % masks.MAX_PIXELS + 1 - (area > 0) for (_, area), more in drawn]

    def covers(text: str, area: int) -> bool:
        counts = masks._decoded_counts(text)
        return bool(counts) and counts[0] >= 0 and all(run > 0 for run in counts[1:]) and sum(counts) == area

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "BLOCK", block)
        checked = masks.rle_covers_image(pa.array(texts, pa.string()), np.array(pixels, np.int64))
    assert checked.tolist() == list(map(covers, texts, pixels))


def test_numbers_of_eight_digits_are_refused():
    texts = [compressed([0, 5], [1, digits]) for digits in range(1, 10)]
    texts += [compressed([0, 5 << 5], [1, 8]), compressed([0, 5 << 10], [1, 9])]  # without their lowest digits 5
    assert masks.rle_covers_image(pa.array(texts), np.full(11, 5)).tolist() == [True] * 7 + [False] * 4


def test_sums_beyond_64_bits_are_refused():
    """Runs of 2^28, 2 * 2^28, 3 * 2^28, ... whose sum is 2^64, between runs of 1."""
    steps = 1
    while steps * (steps + 1) // 2 < 1 << 36:
        steps += 1
    excess = steps * (steps + 1) // 2 - (1 << 36)  # one step of 0 before the last runs takes it away
    step = compressed([1 << 28], [1])
    numbers = [step + "0"] * steps
    numbers[0], numbers[steps - excess] = step + "1", "00"
    assert not masks.rle_covers_image(pa.array(["0" + "".join(numbers)]), np.array([steps])).any()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12).filter(any))
@settings(max_examples=100, deadline=None)
def test_empty_runs_are_joined(counts):
    height = sum(counts)
    rle, fault = masks.to_rle({"size": [height, 1], "counts": counts}, height, 1)
    expected = np.repeat(np.arange(len(counts)) % 2, counts)
    assert fault is None and np.array_equal(masks.decode_mask(rle)[:, 0], expected)
    assert rle == masks.encode_mask(expected[:, None])
    whole = compressed(counts, [1] * len(counts))
    assert masks.rle_covers_image(pa.array([whole]), np.array([height])).tolist() == [0 not in counts[1:]]


@given(st.text(alphabet=st.characters(min_codepoint=30, max_codepoint=130), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_compressed_counts_are_checked(counts):
    rle, _ = masks.to_rle({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
    assert coco_mask.decode(rle).shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "no polygon"),
        ([[1, 2, 3, 4]], "3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "odd"),
        ([[1, 2, 3, 4, 5, float("inf")]], "finite"),
        ([[1, 2, 3, 4, 5, "6"]], "numbers"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "far outside"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 1]}, "cover"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]}, "run lengths"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "size"),
        ({"size": [2 * 10**9, 2 * 10**9], "counts": [1]}, "size"),
    ],
)
def test_bad_segmentations_are_named(segmentation, reason):
    assert reason in masks.to_rle(segmentation, HEIGHT, WIDTH)[1]


def test_crowds_count_only_without_other_targets():
    def rle(*counts: int) -> dict:
        return masks.to_rle({"size": [4, 1], "counts": list(counts)}, 4, 1)[0]

    one, other, crowd = rle(0, 1, 3), rle(1, 1, 2), rle(2, 2)
    assert masks.merge_rles([one, other, crowd], [False, False, True], 4, 1) == rle(0, 2, 2)
    assert masks.merge_rles([crowd], [True], 4, 1) == crowd
    assert masks.merge_rles([], [], 4, 1) == rle(4)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_mask_round_trip(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    rle = masks.encode_mask(mask)
    assert rle["size"] == [height, width] and type(rle["counts"]) is str
    assert masks.decode_mask(rle).dtype == np.uint8 and np.array_equal(masks.decode_mask(rle), mask)
    assert masks.encode_mask(mask * 7) == masks.encode_mask(mask.astype(np.float32)) == rle
    assert not masks.decode_mask(masks.empty_rle(height, width)).any()


def test_boxes_from_xywh_to_xyxy():
    boxes = masks.xywh_to_xyxy([[1, 2, 3, 4], [0.5, 0, 1, 0]])
    assert boxes.dtype == np.float32 and boxes.tolist() == [[1, 2, 4, 6], [0.5, 0, 1.5, 0]]
    assert masks.xywh_to_xyxy([]).shape == (0, 4)

"""Augmented rows: image, masks, boxes and sentence agree; a hard negative is untrue of its image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from training.augmentation import COLOURS, Augmentation, Donors, swap_colour, swap_sides

WIDTH, HEIGHT = 60, 40
NOBODY = Donors(["a giraffe", "the dog"], ["a giraffe", "The dog"], [[9], [2]], [7, 7])


def thing(ann_id: int, category_id: int, box: tuple[int, int, int, int]) -> dict:
    x, y, w, h = box
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    segmentation = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    return {
        "ann_id": ann_id,
        "category_id": category_id,
        "bbox": [float(side) for side in box],
        "area": float(w * h),
        "iscrowd": False,
        "segmentation": segmentation,
    }


@pytest.fixture
def row() -> dict:
    objects = [thing(1, 1, (5, 8, 12, 10)), thing(2, 2, (40, 20, 10, 15))]
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    pixels[8:18, 5:17] = (250, 20, 20)
    return {
        "image": Image.fromarray(pixels),
        "image_id": 7,
        "width": WIDTH,
        "height": HEIGHT,
        "sent_id": 3,
        "sentence": "the red thing on the left",
        "raw": "The red thing on the LEFT",
        "no_target": False,
        "ann_ids": [1],
        "category_ids": [1],
        "boxes": [objects[0]["bbox"]],
        "masks": [objects[0]["segmentation"]],
        "mask": objects[0]["segmentation"],
        "objects": objects,
    }


def box_of(rle: dict) -> np.ndarray:
    mask = coco_mask.decode(rle)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]])


def test_nothing_is_on_by_default():
    assert not Augmentation().active
    assert Augmentation(flip=0.5).active


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.5"])
def test_a_wrong_share_is_named(value):
    with pytest.raises(ValueError, match="augmentation: flip is"):
        Augmentation(flip=value)


def test_a_mirrored_row_is_mirrored_in_every_part(row):
    (seen,) = Augmentation(flip=1.0)([row], NOBODY, seed=0, epoch=0)
    assert seen["sentence"] == "the red thing on the right" and seen["raw"] == "The red thing on the RIGHT"
    assert np.array_equal(np.asarray(seen["image"]), np.asarray(row["image"])[:, ::-1])
    assert np.array_equal(coco_mask.decode(seen["mask"]), coco_mask.decode(row["mask"])[:, ::-1])
    assert seen["boxes"] == [[WIDTH - 5 - 12, 8, 12, 10]] and seen["masks"] == [seen["mask"]]
    assert [item["bbox"][0] for item in seen["objects"]] == [43, 10]
    assert row["sentence"] == "the red thing on the left", "the given row has changed"


@pytest.mark.parametrize("mirror", [0.0, 1.0])
@pytest.mark.parametrize("epoch", range(8))
def test_a_scaled_row_keeps_every_object_whole_and_boxes_on_their_masks(row, mirror, epoch):
    (seen,) = Augmentation(scale=0.5, flip=mirror)([row], NOBODY, seed=1, epoch=epoch)
    assert seen["image"].size == (WIDTH, HEIGHT)
    scale = seen["objects"][0]["bbox"][2] / 12
    assert 0.5 <= scale <= 1.5
    for before, after in zip(row["objects"], seen["objects"]):
        assert np.abs(box_of(after["segmentation"]) - after["bbox"]).max() <= 1.5
        assert after["bbox"][2] / before["bbox"][2] == pytest.approx(scale)
    red = np.asarray(seen["image"]).astype(int)
    red = (red[..., 0] - red[..., 1]) > 100
    truth = coco_mask.decode(seen["mask"]).astype(bool)
    assert (red & truth).sum() / (red | truth).sum() > 0.8


def test_colours_change_nothing_but_the_image(row):
    (seen,) = Augmentation(colour=0.5)([row], NOBODY, seed=0, epoch=0)
    assert not np.array_equal(np.asarray(seen["image"]), np.asarray(row["image"]))
    assert {k: v for k, v in seen.items() if k != "image"} == {k: v for k, v in row.items() if k != "image"}


def test_random_numbers_depend_on_seed_epoch_and_row_alone(row):
    options = Augmentation(flip=0.5, colour=0.5, scale=0.3, hard_negatives=0.5)
    other = {**row, "sent_id": 4, "image_id": 8}
    together = options([row, other], NOBODY, seed=5, epoch=2)
    alone = [options([one], NOBODY, seed=5, epoch=2)[0] for one in (row, other)]
    for first, second in zip(together, alone):
        assert first["sentence"] == second["sentence"] and first["mask"] == second["mask"]
        assert np.array_equal(np.asarray(first["image"]), np.asarray(second["image"]))
    sentences = {options([row], NOBODY, seed=5, epoch=epoch)[0]["sentence"] for epoch in range(20)}
    assert len(sentences) > 3


def test_sentences_of_one_image_share_its_view(row):
    rows = [{**row, "sent_id": number} for number in range(4)]
    seen = Augmentation(flip=0.5, colour=0.3)(rows, NOBODY, seed=0, epoch=0)
    assert len({id(one["image"]) for one in seen}) == 1


def test_hard_negatives_refer_to_nothing_and_say_something_else(row):
    kinds = set()
    for epoch in range(40):
        (seen,) = Augmentation(hard_negatives=1.0)([row], NOBODY, seed=0, epoch=epoch)
        assert seen["no_target"] and seen["ann_ids"] == seen["boxes"] == seen["masks"] == []
        assert coco_mask.area(seen["mask"]) == 0
        assert seen["sentence"] != row["sentence"] and seen["sentence"] != "the dog", "a dog is in the image"
        kinds.add(seen["sentence"] == "a giraffe")
    assert kinds == {True, False}, "both kinds of hard negatives appear"


def test_another_sentence_of_the_image_is_no_hard_negative(row):
    sentences = [f"the {colour} thing on the left" for colour in COLOURS]
    donors = Donors(sentences, sentences, [[1]] * len(sentences), [7] * len(sentences))
    (seen,) = Augmentation(hard_negatives=1.0)([row], donors, seed=0, epoch=0)
    assert seen == row, "there is nothing to borrow either: the row stays as it is"


def test_share_of_hard_negatives(row):
    options = Augmentation(hard_negatives=0.15)
    rows = [{**row, "sent_id": number} for number in range(2000)]
    share = np.mean([seen["no_target"] for seen in options(rows, NOBODY, seed=0, epoch=0)])
    assert share == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize(
    ("sentence", "mirrored"),
    [
        ("leftmost cat", "rightmost cat"),
        ("Left-hand side, not right", "Right-hand side, not left"),
        ("man standing right behind the car", "man standing right behind the car"),
        ("the man on the right behind the car", "the man on the left behind the car"),
        ("bright lights on the LEFT", "bright lights on the RIGHT"),
        ("two dogs", "two dogs"),
    ],
)
def test_sides(sentence, mirrored):
    assert swap_sides(sentence) == mirrored


WORDS = ["the", "man", "on", "left", "right", "LEFT", "Rightmost", "leftmost", "side", ",", "right-hand"]


@given(st.lists(st.sampled_from(WORDS)))
def test_mirrored_twice_is_the_sentence_again(words):
    sentence = " ".join(words)
    assert swap_sides(swap_sides(sentence)) == sentence


@given(st.lists(st.sampled_from(["the", "red", "blue,", "Grey", "dog"]), min_size=1), st.integers(0, 99))
def test_a_swapped_colour_was_not_named(words, seed):
    sentence = " ".join(words)
    swapped = swap_colour(sentence, np.random.default_rng(seed))
    if swapped is None:
        assert not {"red", "blue,", "Grey"} & set(words)
    else:
        (new,) = [new for old, new in zip(words, swapped.split(" ")) if old != new]
        assert new.strip(",") in COLOURS and new.strip(",") not in sentence.lower()

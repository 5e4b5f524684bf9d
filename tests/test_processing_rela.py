"""Images, sentences and masks on their way in and out of the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from grefcoco_data import pictures
from modeling.image_inputs import to_rgb
from modeling.image_processing_rela import RelaImageProcessor
from modeling.modeling_rela import RelaOutput
from modeling.processing_rela import RelaCollator, decode_mask, encode_mask
from modeling.referring_processor import group_by_image
from tests.tiny_rela import WORDS, expression_rows, tiny_processor

LONG = "the red square on the left and the blue square on the right and all green squares of the left on right"


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), dtype=np.uint8))


def test_squash_and_normalisation_are_the_published_ones(picture: Image.Image) -> None:
    pixel_values = RelaImageProcessor()(picture, return_tensors="pt")["pixel_values"]
    resized = np.asarray(picture.resize((480, 480), Image.Resampling.BILINEAR)).astype(np.float64)
    expected = (resized - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    assert pixel_values.shape == (1, 3, 480, 480) and pixel_values.dtype == torch.float32
    torch.testing.assert_close(
        pixel_values[0].permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-5, rtol=0
    )


def kinds_of(picture: Image.Image) -> dict[str, object]:
    array = np.array(picture)
    return {
        "PIL": picture,
        "array": array,
        "channels first": array.transpose(2, 0, 1),
        "tensor": torch.from_numpy(array),
        "tensor channels first": torch.from_numpy(array).permute(2, 0, 1),
        "RGBA array": np.dstack([array, np.full(array.shape[:2], 255, dtype=np.uint8)]),
        "floats": array / 255.0,
        "integers": array.astype(np.int64),
        "tensor with gradient": (torch.from_numpy(array) / 255.0).permute(2, 0, 1).requires_grad_(),
        "RGBA": picture.convert("RGBA"),
    }


@pytest.mark.parametrize("kind", [*kinds_of(Image.new("RGB", (4, 4)))])
def test_every_kind_of_the_same_image_gives_the_same_pixels(kind: str, picture: Image.Image) -> None:
    processor = RelaImageProcessor(size={"height": 24, "width": 24})
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(kinds_of(picture)[kind], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "I;16"])
def test_other_modes_become_rgb(mode: str, picture: Image.Image) -> None:
    image = Image.new("I;16", (50, 30)) if mode == "I;16" else picture.convert(mode)
    assert RelaImageProcessor()(image, return_tensors="pt")["pixel_values"].isfinite().all()


def test_sixteen_bits_become_eight() -> None:
    grey = np.linspace(0, 2**16 - 1, 64).astype(np.uint16).reshape(8, 8)
    processor = RelaImageProcessor(size={"height": 8, "width": 8}, do_normalize=False, do_rescale=False)
    pixel_values = processor(Image.fromarray(grey), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixel_values[0], [grey // 256] * 3)


def pictures_of_modes(picture: Image.Image) -> dict[str, Image.Image]:
    ramp = np.linspace(0, 1, 1500, dtype=np.float32).reshape(30, 50)
    simple = {mode: picture.convert(mode) for mode in ("L", "P", "CMYK", "1", "LA", "RGBA")}
    return simple | {
        "I;16": Image.fromarray((ramp * 65_535).astype(np.uint16)),
        "I": Image.fromarray((ramp * 65_535).astype(np.int32)),
        "I of 8 bits": Image.fromarray((ramp * 255).astype(np.int32)),
        "F": Image.fromarray(ramp),
        "F of 8 bits": Image.fromarray(ramp * 255),
    }


@pytest.mark.parametrize("mode", [*pictures_of_modes(Image.new("RGB", (50, 30)))])
def test_rows_and_processors_convert_by_one_rule(mode: str, picture: Image.Image) -> None:
    image = pictures_of_modes(picture)[mode]
    rgb = to_rgb(image)
    assert np.array_equal(np.asarray(rgb), np.asarray(pictures.to_rgb(image))) and rgb.mode == "RGB"
    if mode[0] in "IF":  # neither saturated nor dark
        assert np.asarray(rgb).max() == 255 and 120 < np.asarray(rgb).mean() < 130


def test_floats_of_an_unknown_range_are_one_clear_error() -> None:
    for convert in (to_rgb, pictures.to_rgb):
        with pytest.raises(ValueError, match=r"0\.\.1 or 0\.\.255"):
            convert(Image.fromarray(np.full((4, 4), 1000, np.float32)))


@pytest.mark.parametrize("changed", [False, True])
def test_pictures_are_told_apart_by_their_pixels(picture: Image.Image, changed: bool) -> None:
    """Two data sets whose ids both start at 0, or a row whose picture its user has flipped."""
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if changed else picture.copy()
    rows = [{"image_id": 0, "image": image} for image in (picture, other, picture)]
    first_rows, image_index = group_by_image(rows)
    assert image_index == ([0, 1, 0] if changed else [0, 0, 0])
    assert [row["image"] for row in first_rows] == ([picture, other] if changed else [picture])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("size", [{"height": 64, "width": 64}, {"longest_edge": 64}], ids=["squash", "letterbox"])
def test_the_smallest_and_the_narrowest_images_have_masks_of_their_size(
    shape: tuple[int, int], size: dict[str, int]
) -> None:
    processor = tiny_processor(size=size)
    for image in (Image.new("RGB", shape[::-1]), np.zeros((*shape, 3), dtype=np.uint8), np.ones(shape, dtype=bool)):
        pixel_values = processor(images=image, text="red")["pixel_values"]
        assert pixel_values.shape == (1, 3, 64, 64) and pixel_values.isfinite().all()
    outputs = RelaOutput(pred_masks=torch.ones(1, 2, 16, 16), no_target_logits=torch.zeros(1, 2))
    (result,) = processor.post_process_referring_segmentation(outputs, target_sizes=[shape])
    assert result["mask"].shape == shape


def test_grey_arrays_repeat_their_channel() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    processor = RelaImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
    for image in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        pixel_values = processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixel_values[0], np.stack([grey / 255.0] * 3), atol=1e-6)


def test_exif_rotation_is_applied(picture: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    processor = RelaImageProcessor(size={"height": 24, "width": 24})
    turned = processor(Image.open(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"]
    upright = processor(picture.transpose(Image.Transpose.ROTATE_270), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(turned, upright)


@pytest.mark.parametrize(
    "image",
    [
        np.full((4, 4, 3), 7.0),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), 256),
        np.full((4, 4, 3), -1),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros((8, 8, 7), dtype=np.uint8),
        [],
    ],
)
def test_arrays_that_are_no_image_are_named(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"given to RelaImageProcessor"):
        RelaImageProcessor()(image)


def test_letterbox_keeps_the_ratio_there_and_back(picture: Image.Image) -> None:
    processor = tiny_processor(size={"longest_edge": 64})
    pixel_values = processor(images=picture, text="red")["pixel_values"]
    assert pixel_values.shape == (1, 3, 64, 64)
    assert (pixel_values[0, :, 38:] == 0).all() and (pixel_values[0, :, :38] != 0).any()
    mask = np.zeros((30, 50), dtype=np.uint8)
    mask[:15, 10:40] = 1
    resized = processor.image_processor.resize_mask(mask)
    assert resized.shape == (64, 64) and resized[38:].sum() == 0
    logits = torch.from_numpy(resized).float()[None].repeat_interleave(2, 0) * 20 - 10
    logits[0] *= -1
    outputs = RelaOutput(pred_masks=logits[None, :, 2::4, 2::4], no_target_logits=torch.zeros(1, 2))
    (result,) = processor.post_process_referring_segmentation(outputs, target_sizes=[(30, 50)])
    found = result["mask"].numpy()
    assert found.shape == (30, 50)
    assert (found & (mask == 1)).sum() / (found | (mask == 1)).sum() > 0.85


def test_sentences_are_padded_and_cut_as_published() -> None:
    end = WORDS.index("[SEP]")
    short, long = tiny_processor()(text=["the red square", LONG])["input_ids"]
    assert short.tolist()[:6] == [WORDS.index(word) for word in ("[CLS]", "the", "red", "square", "[SEP]", "[PAD]")]
    assert len(short) == len(long) == 20 and end not in long, "the end token of a long sentence is lost"
    encoded = tiny_processor(keep_end_token=True)(text=["the red square", LONG])
    torch.testing.assert_close(encoded["input_ids"][0], short)
    assert encoded["input_ids"][1].tolist() == [*long.tolist()[:19], end]
    assert encoded["attention_mask"].sum(1).tolist() == [5, 20]


def test_sentences_find_their_images(picture: Image.Image) -> None:
    processor = tiny_processor()
    assert "image_index" not in processor(images=[picture, picture], text=["red", "blue"])
    assert processor(images=picture, text=["red", "blue", "all"])["image_index"].tolist() == [0, 0, 0]
    assert processor(images=[picture] * 3, text=[["red", "blue"], [], ["all"]])["image_index"].tolist() == [0, 0, 2]
    assert processor(images=[picture] * 2, text=["a", "b"], image_index=[1, 1])["image_index"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="3 sentences for 2 images"):
        processor(images=[picture] * 2, text=["red", "blue", "all"])
    with pytest.raises(ValueError, match=r"image_index=\[0, 2\]"):
        processor(images=[picture] * 2, text=["red", "blue"], image_index=[0, 2])


def outputs_of(margins: list[float], no_target: list[float]) -> RelaOutput:
    """Constant masks of the given margins and no-target margins."""
    masks = torch.tensor(margins)[:, None, None, None] * torch.tensor([-0.5, 0.5])[None, :, None, None]
    verdicts = torch.tensor(no_target)[:, None] * torch.tensor([-0.5, 0.5])
    return RelaOutput(pred_masks=masks.expand(-1, -1, 4, 4), no_target_logits=verdicts)


def test_default_thresholds_are_the_larger_of_two_logits() -> None:
    results = tiny_processor().post_process_referring_segmentation(
        outputs_of([-1.0, 0.0, 1e-6], [2.0, 0.0, -1.0]), target_sizes=[(5, 7), (2, 3), (9, 1)]
    )
    assert [tuple(result["mask"].shape) for result in results] == [(5, 7), (2, 3), (9, 1)]
    assert [bool(result["mask"].all()) for result in results] == [False, False, True], "a tie is background"
    assert [result["no_target"] for result in results] == [True, False, False]
    assert results[0]["no_target_score"] == pytest.approx(torch.tensor(2.0).sigmoid().item())


def test_thresholds_rle_and_sizes() -> None:
    processor, outputs = tiny_processor(), outputs_of([1.0], [1.0])
    (strict,) = processor.post_process_referring_segmentation(outputs, threshold=0.8, no_target_threshold=0.8)
    assert not strict["mask"].any() and strict["mask"].shape == (16, 16) and not strict["no_target"]
    (coded,) = processor.post_process_referring_segmentation(outputs, target_sizes=[(5, 7)], return_rle=True)
    assert json.loads(json.dumps(coded["mask"]))["size"] == [5, 7]
    assert decode_mask(coded["mask"]).all()
    with pytest.raises(ValueError, match="2 target_sizes for 1 sentences"):
        processor.post_process_referring_segmentation(outputs, target_sizes=[(5, 7)] * 2)


def test_a_batch_shares_images_and_carries_its_labels() -> None:
    rows = expression_rows()
    batch = RelaCollator(tiny_processor(), category_ids=[10, 20])(rows)
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["image_index"].tolist() == [0, 0, 1, 1]
    labels = batch["labels"]
    assert labels["no_target"].tolist() == [False, True, False, False]
    assert labels["masks"].flatten(1).sum(1).tolist() == [400, 0, 800, 400]
    assert labels["categories"].shape == (2, 64, 64) and labels["categories"][1, 35, 7] == 1
    assert "categories" not in RelaCollator(tiny_processor())(rows)["labels"]
    shuffled = RelaCollator(tiny_processor())([rows[i] for i in (2, 0, 3, 1)])
    assert shuffled["image_index"].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(shuffled["pixel_values"].flip(0), batch["pixel_values"])


def test_small_objects_lie_on_large_ones_and_crowds_are_ignored() -> None:
    row = expression_rows()[0]
    whole = np.ones((64, 64), dtype=bool)
    row["objects"] += [{"category_id": 30, "area": 4096.0, "iscrowd": 0, "segmentation": encode_mask(whole)}]
    row["objects"][1]["iscrowd"] = 1
    categories = RelaCollator(tiny_processor(), category_ids=[10, 20, 30])([row])["labels"]["categories"][0]
    assert categories[0, 0] == 3 and categories[10, 10] == 1 and categories[35, 40] == -100


def test_instances_are_labelled_on_request_and_nothing_else_changes() -> None:
    rows, plain = expression_rows(), RelaCollator(tiny_processor(), category_ids=[10, 20])(expression_rows())
    batch = RelaCollator(tiny_processor(), category_ids=[10, 20], instances=True)(rows)
    labels = batch["labels"]
    for name, value in {**plain, **plain["labels"]}.items():
        if name != "labels":
            torch.testing.assert_close(batch[name] if name in batch else labels[name], value, rtol=0, atol=0)
    assert set(labels) - set(plain["labels"]) == {"object_boxes", "object_masks", "num_objects", "targets"}
    assert labels["num_objects"].tolist() == [2, 2]
    assert labels["targets"].tolist() == [[False, True], [False, False], [True, True], [True, False]]
    torch.testing.assert_close(labels["object_boxes"][0, 0] * 64, torch.tensor([14.0, 18.0, 20.0, 20.0]))
    assert labels["object_masks"].shape == (2, 2, 16, 16) and labels["object_masks"].dtype == torch.uint8
    assert labels["object_masks"][0, 0].nonzero().amin(0).tolist() == [2, 1]
    assert labels["object_masks"].sum((2, 3)).tolist() == [[25, 30], [32, 25]], "half a cell counts, a quarter not"


def test_without_objects_the_sentences_targets_are_the_objects() -> None:
    rows = [{name: value for name, value in row.items() if name != "objects"} for row in expression_rows()]
    labels = RelaCollator(tiny_processor(), instances=True)(rows)["labels"]
    assert labels["num_objects"].tolist() == [1, 2]
    assert labels["targets"].tolist() == [[True, False], [False, False], [True, True], [True, False]]
    nothing = RelaCollator(tiny_processor(), instances=True)([rows[1]])["labels"]
    assert nothing["num_objects"].tolist() == [0] and nothing["object_boxes"].shape == (1, 1, 4)


@pytest.mark.parametrize("size", [{"height": 64, "width": 128}, {"longest_edge": 64}])
def test_boxes_and_masks_go_there_and_back(size: dict[str, int]) -> None:
    box, mask = [10.0, 3.0, 30.0, 15.0], np.zeros((30, 50), dtype=np.uint8)
    mask[3:18, 10:40] = 1
    row = {**expression_rows()[0], "image": Image.new("RGB", (50, 30)), "width": 50, "height": 30}
    row["objects"] = [{"ann_id": 1, "bbox": box, "segmentation": encode_mask(mask)}]
    row |= {"ann_ids": [1], "mask": encode_mask(mask)}
    processor = tiny_processor(size=size)
    labels = RelaCollator(processor, instances=True)([row])["labels"]
    outputs = RelaOutput(
        pred_masks=torch.zeros(1, 2, *labels["object_masks"].shape[2:]),
        no_target_logits=torch.zeros(1, 2),
        pred_boxes=labels["object_boxes"],
        pred_scores=torch.ones(1, 1),
        instance_masks=labels["object_masks"] * 20.0 - 10,
    )
    (answer,) = processor.post_process_referring_detection(outputs, target_sizes=[(30, 50)], return_masks=True)
    torch.testing.assert_close(answer["boxes"], torch.tensor([[10.0, 3.0, 40.0, 18.0]]), atol=1e-4, rtol=0)
    found = decode_mask(answer["masks"][0])
    assert found.shape == (30, 50) and (found & mask).sum() / (found | mask).sum() > 0.8


def detections(scores: list[float], no_target: float = -9.0) -> RelaOutput:
    """One sentence; boxes of the given scores side by side, each with its mask."""
    n = len(scores)
    boxes = torch.tensor([[[(i + 0.5) / n, 0.5, 1 / n, 0.5] for i in range(n)]])
    masks = torch.full((1, n, 4, 4 * n), -5.0)
    for i in range(n):
        masks[0, i, 1:3, 4 * i : 4 * i + 4] = 5.0
    return RelaOutput(
        pred_masks=torch.zeros(1, 2, 4, 4 * n),
        no_target_logits=torch.tensor([[0.0, no_target]]),
        pred_boxes=boxes,
        pred_scores=torch.tensor([scores]),
        instance_masks=masks,
    )


def test_detections_are_sorted_cut_at_the_threshold_and_agree_with_their_masks() -> None:
    processor = tiny_processor(size={"height": 16, "width": 48})
    (answer,) = processor.post_process_referring_detection(
        detections([0.8, 0.69, 0.9]), target_sizes=[(32, 96)], return_masks=True
    )
    assert answer["scores"].tolist() == pytest.approx([0.9, 0.8]) and not answer["no_target"]
    torch.testing.assert_close(answer["boxes"], torch.tensor([[64.0, 8.0, 96.0, 24.0], [0.0, 8.0, 32.0, 24.0]]))
    for box, mask in zip(answer["boxes"], answer["masks"]):
        ys, xs = decode_mask(mask).nonzero()
        tight = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        torch.testing.assert_close(box, tight.float(), atol=2.0, rtol=0)
    (all_three,) = processor.post_process_referring_detection(
        detections([0.8, 0.69, 0.9]), threshold=0.5, return_masks=True
    )
    assert len(all_three["boxes"]) == len(all_three["masks"]) == 3 and all_three["masks"][0]["size"] == [16, 48]


def test_where_there_is_none_there_is_no_box() -> None:
    processor, outputs = tiny_processor(size={"height": 16, "width": 48}), detections([0.8, 0.9, 0.1], no_target=2.0)
    (answer,) = processor.post_process_referring_detection(outputs, target_sizes=[(32, 96)], return_masks=True)
    assert answer["no_target"] and answer["boxes"].shape == (0, 4)
    assert answer["masks"] == [] and answer["scores"].shape == (0,)
    (sure,) = processor.post_process_referring_detection(outputs, target_sizes=[(32, 96)], no_target_threshold=0.95)
    assert not sure["no_target"] and len(sure["boxes"]) == 2
    (unsure,) = processor.post_process_referring_detection(detections([0.1, 0.2, 0.3]), target_sizes=[(32, 96)])
    assert not unsure["no_target"] and unsure["boxes"].shape == (0, 4)
    with pytest.raises(ValueError, match="num_instance_queries"):
        processor.post_process_referring_detection(outputs_of([1.0], [1.0]))
    with pytest.raises(ValueError, match="2 target_sizes for 1 sentences"):
        processor.post_process_referring_detection(outputs, target_sizes=[(5, 7)] * 2)


def test_raw_sentences_can_be_the_input() -> None:
    rows = [{**row, "raw": "all squares"} for row in expression_rows()]
    batch = RelaCollator(tiny_processor(), text_column="raw")(rows)
    assert len(batch["input_ids"].unique(dim=0)) == 1


def test_masks_are_shrunk_by_the_larger_part_of_each_pixel() -> None:
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:, :64] = 1
    small = RelaImageProcessor(size={"height": 32, "width": 32}).resize_mask(mask)
    assert small.shape == (32, 32) and small[:, :16].all() and not small[:, 16:].any()


def test_processor_survives_saving(tmp_path: Path, picture: Image.Image) -> None:
    processor = tiny_processor(size={"longest_edge": 64}, max_length=12, keep_end_token=True)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    for name, value in processor(images=picture, text=[LONG]).items():
        torch.testing.assert_close(loaded(images=picture, text=[LONG])[name], value)


def test_sizes_of_boxes_may_be_an_iterator():
    outputs, processor = detections([0.8, 0.69, 0.9]), tiny_processor()
    process = processor.post_process_referring_detection
    (expected,), (found,) = (process(outputs, target_sizes=sizes) for sizes in ([(32, 96)], iter([(32, 96)])))
    torch.testing.assert_close(found["boxes"], expected["boxes"])

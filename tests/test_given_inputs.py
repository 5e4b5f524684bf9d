"""What people give processors, collators and pipelines: the right answer, or one error that names the value."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Pipeline, PreTrainedModel, pipeline

from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.modeling_vlt import VltModel
from modeling.referring_processor import ReferringProcessor
from tests import tiny_mdetr, tiny_rela, tiny_vlt

FAMILIES = ("rela", "mdetr", "vlt")
PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), dtype=np.uint8))
SENTENCES = ["the red square", "all squares"]
OPTIONS = {"no_target_threshold": 1.0}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, ReferringProcessor]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vlt")
    return {
        "rela": (RelaModel(tiny_rela.tiny_config(**tiny_rela.INSTANCES)).eval(), tiny_rela.tiny_processor()),
        "mdetr": (MdetrModel(tiny_mdetr.tiny_config()).eval(), tiny_mdetr.tiny_processor()),
        "vlt": (VltModel(tiny_vlt.tiny_config()).eval(), tiny_vlt.tiny_processor(folder)),
    }


@pytest.fixture(params=FAMILIES)
def processor(request: pytest.FixtureRequest, families: dict) -> ReferringProcessor:
    return families[request.param][1]


@pytest.fixture(params=FAMILIES)
def segment(request: pytest.FixtureRequest, families: dict) -> Pipeline:
    model, processor = families[request.param]
    return pipeline("referring-segmentation", model=model, processor=processor)


def equal(one: object, other: object) -> bool:
    """Whether two batches or answers hold the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "items"):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    return one == other


def test_arguments_of_other_processors_are_taken(processor: ReferringProcessor) -> None:
    plain = processor(PICTURE, SENTENCES)
    assert equal(processor(PICTURE, SENTENCES, padding=True, truncation=True), plain)
    assert equal(processor(PICTURE, SENTENCES, padding="max_length", max_length=100), plain)
    short, long = (processor(PICTURE, "the red square on the left", max_length=length) for length in (3, None))
    assert not equal(short, long)
    if "input_ids" in short:
        assert short["input_ids"].shape == (1, 3) == short["attention_mask"].shape
    else:
        assert short["word_vectors"][:, :3].any() and not short["word_vectors"][:, 3:].any()
    for options, word in (
        ({"padding": False}, "switched off"),
        ({"truncation": "do_not_truncate"}, "switched off"),
        ({"max_length": 0}, "max_length=0"),
    ):
        with pytest.raises(ValueError, match=word):
            processor(PICTURE, SENTENCES, **options)


def test_pictures_of_every_kind_are_one_picture(processor: ReferringProcessor, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "picture.png")
    plain = processor(PICTURE, "the red square")
    floats = np.asarray(PICTURE, np.float32) / 255
    for image in (
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        np.asarray(PICTURE),
        torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1),
        floats,
        [[PICTURE]],
    ):
        assert equal(processor(image, "the red square"), plain)
    assert equal(processor(floats, "the red square", do_rescale=False), plain)
    assert equal(processor([floats], "the red square", do_rescale=False), plain)
    with pytest.raises(ValueError, match="floats and of integers"):
        processor([floats, np.asarray(PICTURE)], SENTENCES, do_rescale=False)


@pytest.mark.parametrize(
    ("images", "word"),
    [(None, "neither images nor text"), ([], "empty list"), ([None], "NoneType"), ("no.png", "no.png"), (7, "int")],
)
def test_pictures_that_cannot_be_read_are_one_error(processor: ReferringProcessor, images: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        processor(images, None if images is None else "the red square")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ([], "no sentences"),
        ([[]], "no sentences"),
        (["all squares", None], "sentence 1 is None"),
        ([["all squares", 7]], "sentence 1 is 7"),
        ([["all squares"], "red"], "sentence 0 is"),
        (b"all squares", "sentence 0 is"),
        (7, "sentence 0 is 7"),
        (["half \ud83d"], "sentence 0.*surrogate"),
    ],
)
def test_texts_that_are_no_sentences_are_one_error(
    processor: ReferringProcessor, segment: Pipeline, text: object, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        processor(PICTURE, text)
    with pytest.raises(ValueError, match=word):
        segment(PICTURE, text=text)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (5, 5, 5)])
def test_target_sizes_of_nothing_are_one_error(families: dict, size: tuple[int, ...]) -> None:
    for name, (model, processor) in families.items():
        with torch.no_grad():
            outputs = model(**processor(PICTURE, "the red square"))
        for kind in ("segmentation", "detection"):
            if (name, kind) not in {("mdetr", "segmentation"), ("vlt", "detection")}:
                with pytest.raises(ValueError, match="target size"):
                    getattr(processor, f"post_process_referring_{kind}")(outputs, target_sizes=[size])


def test_a_collator_names_what_its_rows_lack(processor: ReferringProcessor) -> None:
    rows = tiny_rela.expression_rows()
    collate = processor.collator()
    with pytest.raises(ValueError, match="no rows"):
        collate([])
    with pytest.raises(ValueError, match="row 1 has no column 'width'"):
        collate([rows[0], {name: value for name, value in rows[1].items() if name != "width"}])
    with pytest.raises(ValueError, match="sentence 1 is None"):
        collate([rows[0], {**rows[1], "sentence": None}])


def test_a_pipeline_batches_images_with_any_number_of_sentences(segment: Pipeline) -> None:
    second = PICTURE.resize((40, 44))
    items = [
        {"image": PICTURE, "text": SENTENCES},
        {"image": np.asarray(second), "text": "the red square"},
        {"image": PICTURE, "text": ["all squares"]},
    ]
    single = segment(items, **OPTIONS)
    assert [len(answers) if isinstance(answers, list) else 0 for answers in single] == [2, 0, 1]
    for batch_size in (2, 3):
        for one, other in zip(single, segment(items, batch_size=batch_size, **OPTIONS), strict=True):
            one, other = (x if isinstance(x, list) else [x] for x in (one, other))
            for a, b in zip(one, other, strict=True):
                assert a["sentence"] == b["sentence"]
                assert math.isclose(a["no_target_score"], b["no_target_score"], abs_tol=1e-3)  # MDETR sees padding
                if "mask" in a:
                    assert (a["mask"] != b["mask"]).float().mean() < 0.01
    streamed = segment((item for item in items), batch_size=2, **OPTIONS)
    assert [a[0]["sentence"] if isinstance(a, list) else a["sentence"] for a in streamed] == [
        "the red square", "the red square", "all squares",
    ]  # fmt: skip


def test_a_pipeline_takes_paths_and_arrays_and_gives_json(segment: Pipeline, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "picture.png")
    expected = segment(PICTURE, text=SENTENCES, box_threshold=0.0, **OPTIONS)
    for image in (tmp_path / "picture.png", np.asarray(PICTURE), np.asarray(PICTURE, np.float32) / 255):
        assert equal(segment(image, text=SENTENCES, box_threshold=0.0, **OPTIONS), expected)
    answers = segment(PICTURE, text=SENTENCES, box_threshold=0.0, return_rle=True, **OPTIONS)
    assert json.loads(json.dumps(answers)) == answers
    if "boxes" in answers[0]:
        assert len(answers[0]["boxes"]) == len(answers[0]["scores"]) > 0


def test_a_pipeline_without_text_or_with_two_meanings_is_one_error(segment: Pipeline) -> None:
    for image, text, word in (
        (PICTURE, None, "an image without text"),
        ([PICTURE], None, "an image without text"),
        ({"image": PICTURE}, None, "an image without text"),
        ([PICTURE, PICTURE], "the red square", "text for a list of images"),
    ):
        with pytest.raises(ValueError, match=word):
            segment(image, text=text)

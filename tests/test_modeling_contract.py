"""What every family's processor offers: batches, columns, answers, the no-target rule and scores for Trainer."""

import re
from pathlib import Path

import evaluate
import pytest
import torch
from transformers import AutoProcessor, PreTrainedModel, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling.image_processing_mdetr import MdetrImageProcessor
from modeling.image_processing_rela import RelaImageProcessor
from modeling.modeling_mdetr import MdetrModel, MdetrOutput
from modeling.modeling_rela import RelaModel, RelaOutput
from modeling.referring_processor import BASE_COLUMNS, ReferringProcessor
from tests import tiny_mdetr, tiny_rela

ROOT = Path(__file__).parent.parent
FAMILIES = pytest.mark.parametrize("family", ["rela", "instances", "mdetr"])
MEASURING = {"no_target", "sent_id", "image_id", "num_targets", "num_words", "sizes", "target_boxes"}


def make(family: str) -> tuple[PreTrainedModel, ReferringProcessor, list[dict]]:
    """A model, its processor, and rows with every column."""
    torch.manual_seed(0)
    if family == "mdetr":
        model, processor = MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor()
    else:
        changes = {"num_categories": 2, **tiny_rela.INSTANCES} if family == "instances" else {}
        model, processor = RelaModel(tiny_rela.tiny_config(**changes)), tiny_rela.tiny_processor()
    rows = [{**row, "sent_id": 7 + i, "raw": row["sentence"]} for i, row in enumerate(tiny_rela.expression_rows())]
    return model.eval(), processor, rows


@FAMILIES
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_the_collator_needs_no_more_than_its_columns(family: str, training: bool, with_config: bool) -> None:
    model, processor, rows = make(family)
    config = model.config if with_config else None
    columns = processor.columns(training, config)
    assert set(BASE_COLUMNS) <= set(columns) and len(columns) == len(set(columns))
    batch = processor.collator(config, training=training)([{name: row[name] for name in columns} for row in rows])
    labels = batch["labels"]
    assert set(labels) >= MEASURING - ({"target_boxes"} if "boxes" not in columns else set())
    assert "boxes" in columns or (training and with_config), "boxes are measured"
    assert ("masks" in labels) == (family != "mdetr")
    assert labels["sent_id"].tolist() == [7, 8, 9, 10] and labels["image_id"].tolist() == [0, 0, 1, 1]
    assert labels["num_targets"].tolist() == [1, 0, 2, 1] and labels["num_words"].tolist() == [3, 3, 3, 5]
    assert labels["no_target"].tolist() == [False, True, False, False] and labels["sizes"].tolist() == [[64, 64]] * 4
    if "target_boxes" in labels:
        boxes = labels["target_boxes"]
        assert boxes[0].tolist() == [[36, 30, 56, 50], [-100] * 4] and (boxes[1] == -100).all()
    learns_objects = family == "instances" or (family == "rela" and not with_config)
    assert ("object_boxes" in labels) == (training and learns_objects)
    assert ("positive_map" in labels) == (training and family == "mdetr")
    if training and with_config:
        assert model(**batch).loss.isfinite()


def test_training_columns_are_those_the_model_learns_from() -> None:
    for family, extra in {"rela": {"mask"}, "instances": {"mask", "objects"}, "mdetr": {"boxes", "objects"}}.items():
        model, processor, _ = make(family)
        assert set(processor.columns(True, model.config)) == {*BASE_COLUMNS, *extra}


def test_a_category_that_the_collator_does_not_know_is_one_clear_error() -> None:
    _, processor, rows = make("rela")
    assert "categories" in processor.collator(category_ids=[10, 20])(rows)["labels"]
    with pytest.raises(ValueError, match=r"category 20 of an object in image 0 .*category_ids"):
        processor.collator(category_ids=[10])(rows)


@FAMILIES
def test_a_calibrated_threshold_stays_with_the_processor(family: str, tmp_path: Path) -> None:
    processor = make(family)[1]
    assert processor.no_target_threshold == 0.5
    processor.no_target_threshold = 0.37
    processor.save_pretrained(tmp_path)
    module = type(processor).__module__.removeprefix("modeling.")
    remote_class = get_class_from_dynamic_module(f"{module}.{type(processor).__name__}", str(tmp_path))
    assert remote_class is not type(processor), "not the code beside the weights"
    local, remote = (x.from_pretrained(tmp_path, trust_remote_code=True) for x in (type(processor), remote_class))
    outputs = {  # a no-target score of 0.4, and a box that scores 0.6
        "pred_masks": torch.zeros(1, 2, 4, 4),
        "no_target_logits": torch.tensor([[0.6, 0.4]]).log(),
        "pred_boxes": torch.full((1, 1, 4), 0.5),
        "pred_scores": torch.tensor([[0.6]]),
        "logits": torch.tensor([[[0.6, 0.4]]]).log(),
    }
    for loaded in (local, remote):
        assert loaded.no_target_threshold == 0.37
        (calibrated,) = loaded.post_process_referring_detection(outputs, 0.5)
        (by_hand,) = loaded.post_process_referring_detection(outputs, 0.5, no_target_threshold=0.5)
        assert calibrated["no_target"] and not by_hand["no_target"]
        assert calibrated["no_target_score"] == pytest.approx(0.4, abs=1e-6)
        if family != "mdetr":
            assert loaded.post_process_referring_segmentation(outputs)[0]["no_target"]
    with pytest.raises(ValueError, match=r"no_target_threshold=1.5"):
        type(processor)(processor.image_processor, processor.tokenizer, no_target_threshold=1.5)


def test_number_of_positions_stays_with_the_processor(tmp_path: Path) -> None:
    tiny_mdetr.tiny_processor(num_positions=64).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.positive_map("the red square", [(4, 7)]).shape == (64,)
    assert loaded(text="red " * 100)["input_ids"].shape == (1, 64)


def test_every_logit_above_zero_is_target_at_the_default_threshold() -> None:
    logits = torch.tensor([1e-9, 0.0, -1e-9])[:, None, None, None] * torch.tensor([0, 1])[:, None, None]
    outputs = RelaOutput(pred_masks=logits.expand(-1, -1, 4, 4), no_target_logits=torch.zeros(3, 2))
    processor = tiny_rela.tiny_processor()
    answers = processor.post_process_referring_segmentation(outputs)
    assert [answer["mask"].float().mean() for answer in answers] == [1, 0, 0]
    for threshold, covered in ((0.0, 1), (0.49, 1), (0.51, 0), (1.0, 0)):
        answers = processor.post_process_referring_segmentation(outputs, threshold)
        assert [answer["mask"].float().mean() for answer in answers] == [covered] * 3
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        processor.post_process_referring_segmentation(outputs, 1.5)


def test_mdetr_has_no_masks_and_says_so() -> None:
    processor, outputs = tiny_mdetr.tiny_processor(), MdetrOutput(logits=torch.zeros(1, 1, 2))
    for call in (processor.mask_logits, processor.post_process_referring_segmentation):
        with pytest.raises(ValueError, match="answers with boxes; use post_process_referring_detection"):
            call(outputs)


def test_mdetr_has_no_target_where_no_query_is_an_object() -> None:
    processor = tiny_mdetr.tiny_processor()
    scores = torch.tensor([[0.1, 0.9], [0.6, 0.3], [0.2, 0.1]])
    logits = torch.stack([scores, 1 - scores], dim=-1).log()
    outputs = MdetrOutput(logits=logits, pred_boxes=torch.full((3, 2, 4), 0.5))
    torch.testing.assert_close(processor.no_target_scores(outputs), torch.tensor([0.1, 0.4, 0.8]))

    def verdicts(*arguments: float) -> list[tuple[bool, int]]:
        answers = processor.post_process_referring_detection(outputs, arguments[0], None, *arguments[1:])
        return [(answer["no_target"], len(answer["boxes"])) for answer in answers]

    assert verdicts(0.7) == [(False, 1), (True, 0), (True, 0)], "as published: none where no box is kept"
    assert verdicts(0.5) == [(False, 1), (False, 1), (True, 0)]
    assert verdicts(0.0, 0.3) == [(False, 2), (True, 2), (True, 2)], "boxes are kept by their score alone"


@FAMILIES
def test_trainers_tuple_has_the_names_that_the_processor_gives(family: str) -> None:
    model, processor, rows = make(family)
    batch = processor.collator()(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = model(**batch)
    gathered = {name: outputs[name] for name in outputs if name not in model.config.keys_to_ignore_at_inference}
    assert tuple(gathered) == processor.output_names[: len(gathered)]
    metrics = processor.trainer_metrics(*(evaluate.load(str(ROOT / "evaluate" / name)) for name in ("gres", "grec")))
    counts = metrics.reduce(tuple(gathered.values()), labels)
    assert torch.equal(counts, metrics.reduce(outputs, labels)) and counts.dtype == torch.float64
    assert counts.shape == (4, {"rela": 4, "instances": 4 + 6 * 5, "mdetr": 6 * 5}[family])
    metrics.add(counts, labels)
    expected = {"rela": {"gres"}, "instances": {"gres", "grec"}, "mdetr": {"grec"}}[family]
    assert set(metrics.compute(expected=[7, 8, 9, 10])) == expected
    if "gres" in expected:
        table = metrics.accumulators["gres"].table()
        assert table["image_id"] == [0, 0, 1, 1] and table["num_targets"] == [1, 0, 2, 1]
        assert {"num_targets=2", "num_words=5-8"} <= metrics.accumulators["gres"].breakdown().keys()
    if "grec" in expected:
        assert metrics.accumulators["grec"].table()["image_id"] == [0, 0, 1, 1]
        assert metrics.accumulators["grec"].table()["num_targets"] == [1, 0, 2, 1]


def test_the_pipeline_serves_a_family_without_masks(tmp_path: Path) -> None:
    model, processor, rows = make("mdetr")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    refer = pipeline("referring-segmentation", model=str(tmp_path), trust_remote_code=True)
    image, sentences = rows[0]["image"], ["the red square", "all squares"]
    answers = refer(image, text=sentences, box_threshold=0.0)
    with torch.no_grad():
        outputs = model(**processor(images=image, text=sentences))
    expected = processor.post_process_referring_detection(outputs, 0.0, [(64, 64)] * 2)
    for answer, known, sentence in zip(answers, expected, sentences, strict=True):
        assert set(answer) == {"sentence", "boxes", "scores", "no_target", "no_target_score"}
        assert answer["sentence"] == sentence and answer["no_target"] == known["no_target"]
        assert torch.equal(answer["boxes"], known["boxes"]) and answer["boxes"].shape == (6, 4)


def test_the_pipeline_keeps_a_calibrated_threshold_and_both_names_of_the_masks(tmp_path: Path) -> None:
    model, processor, rows = make("instances")
    processor.no_target_threshold = 0.0
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    segment = pipeline("referring-segmentation", model=str(tmp_path), trust_remote_code=True)
    image = rows[0]["image"]
    assert (
        segment(image, text="red")["no_target"]
        and not segment(image, text="red", no_target_threshold=1.0)["no_target"]
    )
    for options in ({"threshold": 0.0}, {"mask_threshold": 0.0}):
        assert segment(image, text="red", **options)["mask"].all()


def test_no_family_imports_another() -> None:
    files = [path for path in (ROOT / "modeling").glob("*.py") if not path.name.startswith("__")]
    owners = {
        path.stem: next((name for name in ("rela", "mdetr") if path.stem.endswith(name)), None) for path in files
    }
    assert {"rela", "mdetr", None} == set(owners.values())
    for path in files:
        for imported in re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert owners[imported] in (None, owners[path.stem]), f"{path.name} imports {imported}"


def test_image_processors_share_reading_and_nothing_else() -> None:
    assert not issubclass(MdetrImageProcessor, RelaImageProcessor)
    assert hasattr(RelaImageProcessor, "resize_mask") and not hasattr(MdetrImageProcessor, "resize_mask")
    with pytest.raises(ValueError, match="given to MdetrImageProcessor"):
        MdetrImageProcessor()(torch.full((3, 4, 4), 7.0))

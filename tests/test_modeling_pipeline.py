"""pipeline("referring-segmentation") from a saved folder, and fine-tuning by the stock Trainer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Pipeline, Trainer, TrainingArguments, pipeline

from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator
from tests import tiny_peers
from tests.tiny_rela import BETTER_LOSS, INSTANCES, expression_rows, tiny_config, tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    RelaModel(tiny_config()).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segment(folder: Path) -> Pipeline:
    return pipeline("referring-segmentation", model=str(folder), trust_remote_code=True)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 50, 3), dtype=np.uint8))


def test_pipeline_answers_as_model_and_processor_do(segment: Pipeline, folder: Path, picture: Image.Image) -> None:
    sentences = ["the red square", "all squares"]
    model, processor = RelaModel.from_pretrained(folder), tiny_processor()
    with torch.no_grad():
        outputs = model(**processor(images=picture, text=sentences))
    expected = processor.post_process_referring_segmentation(outputs, target_sizes=[(30, 50)] * 2)
    answers = segment(picture, text=sentences)
    for answer, sentence, known in zip(answers, sentences, expected, strict=True):
        assert answer["sentence"] == sentence and answer["no_target"] == known["no_target"]
        assert (answer["mask"] == known["mask"]).all()
    assert (segment(picture, text=sentences[0])["mask"] == answers[0]["mask"]).all()


def test_pipeline_takes_files_lists_and_options(segment: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "picture.png")
    one = segment(str(tmp_path / "picture.png"), text="red", threshold=0.0, return_rle=True, no_target_threshold=1.0)
    assert one["mask"]["size"] == [30, 50] and not one["no_target"]
    several = segment([{"image": picture, "text": "red"}, {"image": picture, "text": ["red", "blue"]}])
    assert several[0]["sentence"] == "red" and len(several[1]) == 2
    with pytest.raises(ValueError, match="'treshold' is not an option"):
        segment(picture, text="red", treshold=0.3)


def test_pipeline_names_the_command_for_other_models(tmp_path: Path) -> None:
    tiny_peers.save(tmp_path, "grounding-dino")
    with pytest.raises(ValueError, match=f"{tmp_path} is a grounding-dino model.*python -m scoring predict"):
        pipeline("referring-segmentation", model=str(tmp_path))


def test_pipeline_survives_saving(segment: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    segment.save_pretrained(tmp_path)
    again = pipeline("referring-segmentation", model=str(tmp_path), trust_remote_code=True)
    assert (again(picture, text="red")["mask"] == segment(picture, text="red")["mask"]).all()


def test_pipeline_gives_boxes_where_the_model_has_them(picture: Image.Image, tmp_path: Path) -> None:
    torch.manual_seed(0)
    RelaModel(tiny_config(**INSTANCES)).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    segment = pipeline("referring-segmentation", model=str(tmp_path), trust_remote_code=True)
    options = {"box_threshold": 0.0, "no_target_threshold": 1.0}
    answers = segment(picture, text=["the red square", "all squares"], **options)
    for answer in answers:
        assert answer["boxes"].shape == (6, 4) and len(answer["masks"]) == 6
        assert (answer["boxes"][:, 2:] <= torch.tensor([50, 30])).all() and answer["masks"][0]["size"] == [30, 50]
        assert answer["mask"].shape == (30, 50) and not answer["no_target"]
    assert segment(picture, text="red", no_target_threshold=0.0)["boxes"].shape == (0, 4)


@pytest.mark.slow
def test_trainer_fine_tunes_and_evaluates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = expression_rows()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        RelaModel(tiny_config(**BETTER_LOSS, **INSTANCES)),
        arguments,
        data_collator=RelaCollator(tiny_processor(), instances=True),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_processor(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    trainer.save_model(str(tmp_path / "tuned"))
    assert (tmp_path / "tuned" / "processing_rela.py").is_file()
    assert pipeline("referring-segmentation", model=str(tmp_path / "tuned"), trust_remote_code=True)

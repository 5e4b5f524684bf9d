"""VLT's processor: what the original did with OpenCV and spaCy, rows to batches, outputs to masks, and training."""

import json
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoProcessor, pipeline

from modeling.image_processing_vlt import resize_bicubic
from modeling.masks import encode_mask
from modeling.modeling_vlt import VltModel, VltOutput
from modeling.processing_vlt import VltProcessor
from modeling.referring_processor import BASE_COLUMNS
from modeling.tokenization_vlt import TABLE, VltTokenizer
from modeling.training_vlt import new_model, parameter_groups, random_words
from tests import tiny_rela
from tests.tiny_training import ROOT, train_here
from tests.tiny_vlt import SMALL, tiny_config, tiny_processor, tiny_tokenizer

CASES = pytest.mark.parametrize("case", [0, 1])  # an image that is wide, and one that is high


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Inputs and results of the original's loader and evaluation with cv2, at 64 instead of 416 pixels."""
    return load_file(Path(__file__).parent / "goldens" / "vlt" / "opencv.safetensors")


@pytest.fixture
def processor(tmp_path: Path) -> VltProcessor:
    return tiny_processor(tmp_path)


@CASES
def test_pixels_equal_the_original_loader(case: int, golden: dict[str, np.ndarray], processor: VltProcessor) -> None:
    pixels = processor(images=[golden[f"image{case}"]])["pixel_values"][0].permute(1, 2, 0).numpy()
    inner, (top, left) = golden[f"pixels{case}"], golden[f"corner{case}"]
    expected = np.full((64, 64, 3), 0.5)
    expected[top : top + len(inner), left : left + inner.shape[1]] = inner / 255
    difference = np.abs(pixels - expected)
    assert difference.max() < 1.01 / 255 and (difference > 1e-6).mean() < 0.05
    padding = expected == 0.5
    assert padding.any() and (pixels[padding] == 0.5).all()


@CASES
def test_masks_equal_the_original_loader(case: int, golden: dict[str, np.ndarray], processor: VltProcessor) -> None:
    truth = processor.image_processor.resize_mask(golden[f"mask{case}"])
    assert truth.shape == (32, 32) and ((truth > 0) & (truth < 1)).any()
    assert np.abs(truth - golden[f"truth{case}"]).max() < 1.01 / 255


@CASES
def test_answers_equal_the_original_evaluation(
    case: int, golden: dict[str, np.ndarray], processor: VltProcessor
) -> None:
    outputs = VltOutput(pred_masks=torch.from_numpy(golden[f"logits{case}"])[None, None])
    sizes = [golden[f"mask{case}"].shape]
    (answer,) = processor.post_process_referring_segmentation(outputs, target_sizes=sizes)
    expected, certain = golden[f"answer{case}"], golden[f"certain{case}"]  # not within 1e-4 of the threshold
    assert 0.2 < expected.mean() < 0.8 and certain.mean() > 0.99
    assert (answer["mask"].numpy() == expected)[certain].all()
    assert answer["no_target"] is False and answer["no_target_score"] == 0
    (rle,) = processor.post_process_referring_segmentation(outputs, target_sizes=sizes, return_rle=True)
    assert rle["mask"] == encode_mask(answer["mask"].numpy())
    (fewer,) = processor.post_process_referring_segmentation(outputs, 0.5, sizes)
    assert fewer["mask"].sum() < answer["mask"].sum()
    assert processor.post_process_referring_segmentation(outputs)[0]["mask"].shape == (64, 64)


def test_bicubic_of_the_same_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert (resize_bicubic(image, (9, 7)) == image).all()
    assert (resize_bicubic(np.full((5, 5, 1), 255, np.uint8), (13, 2)) == 255).all()


def test_vlt_never_says_none_and_has_no_boxes(processor: VltProcessor) -> None:
    outputs = VltOutput(pred_masks=torch.full((2, 1, 32, 32), -9.0))
    assert processor.no_target_scores(outputs).tolist() == [0, 0]
    answers = processor.post_process_referring_segmentation(outputs, no_target_threshold=0.0)
    assert [answer["no_target"] for answer in answers] == [False, False]
    with pytest.raises(ValueError, match="VLT answers with masks"):
        processor.post_process_referring_detection(outputs)
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        processor.post_process_referring_segmentation(outputs, 1.5)
    with pytest.raises(ValueError, match="1 target_sizes for 2 sentences"):
        processor.post_process_referring_segmentation(outputs, target_sizes=[(3, 4)])


def test_mask_logits_are_zero_at_the_published_threshold(processor: VltProcessor) -> None:
    probabilities = torch.tensor([0.34, 0.36])[:, None, None, None].expand(-1, 1, 32, 32)
    logits = processor.mask_logits(VltOutput(pred_masks=probabilities.logit()))
    assert logits.shape == (2, 32, 32) and (logits[0] < 0).all() and (logits[1] > 0).all()


def test_words_are_the_mean_over_their_parts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, ["man", "'s", "left", "-", "most", "woman", ",", "do", "n't", "Man"], size=3)
    vector = dict(zip(tokenizer.words, tokenizer.vectors))
    sentence = "man's left-most  woman, don't Man unknown unknown-man past-the-end"
    (vectors,) = tokenizer.word_vectors([sentence], max_words=7)
    expected = [
        (vector["man"] + vector["'s"]) / 2,
        (vector["left"] + vector["-"] + vector["most"]) / 3,
        (vector["woman"] + vector[","]) / 2,
        (vector["do"] + vector["n't"]) / 2,
        vector["Man"],
        np.zeros(3),
        (vector["-"] + vector["man"]) / 3,
    ]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert not tokenizer.word_vectors(["man", ""], 4)[:, 1:].any()
    parts = {"2nd": ["2nd"], "blue/white": ["blue", "/", "white"], "2.5": ["2.5"], "it...": ["it", "..."]}
    assert {word: tokenizer.tokenize(word) for word in parts} == parts


def test_the_table_is_saved_with_the_processor(processor: VltProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "glove.txt").unlink()
    assert (tmp_path / "saved" / TABLE).is_file() and (tmp_path / "saved" / "tokenization_vlt.py").is_file()
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    sentences = ["the red square", "all green squares, please"]
    for name, value in processor(text=sentences).items():
        assert torch.equal(loaded(text=sentences)[name], value)
    assert loaded.max_words == 6 and loaded.image_processor.size["height"] == 64
    assert (tmp_path / "saved" / "tokenizer_config.json").read_text().count(str(tmp_path)) == 0
    again = VltTokenizer(tmp_path / "saved" / TABLE)
    assert again.words == processor.tokenizer.words and (again.vectors == processor.tokenizer.vectors).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a 1 2\nb 1\n", "line 2 has"), ("a 1 x\n", "x"), ("", "0 words|size|reshape"), ("a\n", "line 1 has 0")],
)
def test_a_table_that_contradicts_itself_is_one_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"bad.txt.*({message})"):
        VltTokenizer(tmp_path / "bad.txt")
    with pytest.raises(ValueError, match=r"none.txt does not exist"):
        VltTokenizer(tmp_path / "none.txt")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    with pytest.raises(ValueError, match=r"bad.safetensors cannot be read"):
        VltTokenizer(tmp_path / "bad.safetensors")


def test_glove_keeps_the_first_of_equal_words_and_spaces(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("a 1 2\n. . . 3 4\na 5 6\n")
    tokenizer = VltTokenizer(tmp_path / "glove.txt")
    assert tokenizer.words == ["a", ". . ."] and tokenizer.vectors.tolist() == [[1, 2], [3, 4]]


def rows() -> list[dict]:
    return [{**row, "sent_id": 7 + i, "raw": row["sentence"]} for i, row in enumerate(tiny_rela.expression_rows())]


@pytest.mark.parametrize("training", [False, True])
def test_the_collator_needs_no_more_than_its_columns(training: bool, processor: VltProcessor) -> None:
    columns = processor.columns(training)
    assert set(BASE_COLUMNS) <= set(columns)
    collate = processor.collator(tiny_config(), training=training, share_images=True)
    batch = collate([{name: row[name] for name in columns} for row in rows()])
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["image_index"].tolist() == [0, 0, 1, 1]
    labels = batch["labels"]
    assert labels["masks"].shape == (4, 32, 32) and labels["masks"].amax((1, 2)).tolist() == [1, 0, 1, 1]
    assert labels["no_target"].tolist() == [False, True, False, False] and ("target_boxes" in labels) != training
    torch.manual_seed(0)
    model = VltModel(tiny_config()).eval()
    assert model(**batch).loss.isfinite()
    targeted = {name: value[[0, 2, 3]] for name, value in labels.items()}
    fewer = {"word_vectors": batch["word_vectors"][[0, 2, 3]], "image_index": torch.tensor([0, 1, 1])}
    alone = model(batch["pixel_values"], **fewer, labels=targeted)
    assert model(**batch).loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)


def test_scores_for_trainer(processor: VltProcessor) -> None:
    metrics = processor.trainer_metrics(evaluate.load(str(ROOT / "evaluate" / "gres")))
    labels = processor.collator()(rows())["labels"]
    outputs = VltOutput(pred_masks=torch.where(labels["masks"] > 0.5, 9.0, -9.0)[:, None])
    metrics.add(metrics.reduce(outputs, labels), labels)
    scores = metrics.compute()["gres"]
    assert scores["T_acc"] == 1 and scores["N_acc"] == 0 and scores["cIoU"] == 100


def test_the_pipeline_answers_at_the_published_threshold(tmp_path: Path, processor: VltProcessor) -> None:
    torch.manual_seed(0)
    VltModel(tiny_config()).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    segment = pipeline("referring-segmentation", str(tmp_path / "model"), trust_remote_code=True)
    answers = segment(rows()[0]["image"], text=["the red square", "all squares"])
    assert [answer["mask"].shape for answer in answers] == [(64, 64)] * 2
    segment.model.mask_head.bias.data.fill_(-0.5)  # a probability of 0.378
    segment.model.mask_head.weight.data.zero_()
    (answer,) = segment(rows()[0]["image"], text=["the red square"])
    assert answer["mask"].all() and not answer["no_target"]
    (answer,) = segment(rows()[0]["image"], text=["the red square"], mask_threshold=0.5)
    assert not answer["mask"].any()


def test_a_new_model_reads_the_words_of_its_training(tmp_path: Path) -> None:
    sentences = ["the red square", "a man's hat"]
    table = random_words(sentences, 8)
    assert table.words == sorted({"the", "red", "square", "a", "man", "'s", "hat"})
    assert (random_words(sentences[::-1], 8).vectors == table.vectors).all()
    tiny_tokenizer(tmp_path, size=20)
    fields = {name: value for name, value in SMALL.items() if name not in ("word_size", "image_size")}
    model, processor = new_model(fields, lambda: sentences, str(tmp_path / "glove.txt"), image_size=64)
    assert model.config.word_size == 20 and model.config.image_size == 64 and processor.max_words == 6
    with pytest.raises(ValueError, match="'depth' is not a field of VltConfig"):
        new_model({"depth": 1}, lambda: sentences)
    with pytest.raises(ValueError, match="image_size=100 in VltConfig: choose a multiple of 32"):
        new_model({}, lambda: sentences, image_size=100)


def test_parameter_groups_have_the_rates_and_the_epsilon() -> None:
    model = VltModel(tiny_config())
    model.backbone.stem.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.0, {"text_encoder": 1e-4})
    assert sorted(group["lr"] for group in groups) == [1e-4, 1e-3] and all(group["eps"] == 1e-7 for group in groups)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.stem")}


def test_the_recipe_freezes_the_first_56_convolutions() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "vlt_refcoco.yaml").read_text())
    names = [name for name, _ in VltModel(tiny_config()).named_parameters() if name.endswith("conv.weight")]
    assert [name.startswith(tuple(recipe["frozen"])) for name in names] == [True] * 56 + [False] * (len(names) - 56)
    assert [step / 332 for step in (*recipe["lr_decay_steps"], recipe["max_train_steps"])] == [39, 44, 49, 50]


@pytest.mark.slow
def test_training_from_rows_to_scores(scenes_dataset: Path, tmp_path: Path) -> None:
    """train.py with the recipe, on rows with and without targets; the saved model gives the same scores."""
    recipe = yaml.safe_load((ROOT / "recipes" / "vlt_refcoco.yaml").read_text())
    model = {name: value for name, value in SMALL.items() if name != "image_size"} | {"model_type": "vlt"}
    recipe |= {"dataset": str(scenes_dataset), "output_dir": str(tmp_path / "out"), "image_size": 64}
    recipe |= {"model": model, "max_train_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 8}
    recipe |= {"report_to": "none", "dataloader_num_workers": 0, "lr_decay_steps": [3]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train_here(tmp_path / "recipe.yaml") == 0
    flags = ["--dataset", recipe["dataset"], "--output_dir", tmp_path / "again", "--report_to", "none"]
    assert train_here("--eval_only", "--checkpoint", tmp_path / "out" / "checkpoint", *flags) == 0
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "again"))
    assert first["gres"] == pytest.approx(again["gres"]) and first["gres"]["N_acc"] == 0
    losses = [record["loss"] for record in first["history"] if "loss" in record]
    assert all(np.isfinite(losses)) and re.search(
        r"model_type: vlt", (tmp_path / "out/checkpoint/README.md").read_text()
    )

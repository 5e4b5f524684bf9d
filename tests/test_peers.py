"""Models of other projects: the real classes of transformers, tiny and random, loaded from folders by their type."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.sam3.modeling_sam3 import Sam3Model

import grefcoco
from grefcoco_data.masks import decode_mask
from scoring import peers
from scoring.__main__ import main
from scoring.answers import Answer
from scoring.peers import FAMILIES, Segmented, Segmenter, load_peer, once_per_image
from tests import tiny_peers
from tests.processes import start_group
from tests.tiny_grefcoco import write_genuine
from tests.tiny_training import train_here

SENTENCES = ["red cat", "the man no. 5, on the left side of all the others? that are really there", "a"]
SIZES = [(64, 48), (40, 64)]
BOXED = ["grounding-dino", "mm-grounding-dino", "owlvit", "owlv2", "omdet-turbo", "sam3"]
MASKED = ["clipseg", "sam3"]
WRITERS = ["florence2", "kosmos-2", "paligemma"]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """Model type, folder and predictor."""
    folder = tiny_peers.save(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder, load_peer(str(folder), AutoConfig.from_pretrained(folder).model_type)


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> Segmenter:
    return Segmenter(str(tiny_peers.save(tmp_path_factory.mktemp("sam"), "sam")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    genuine = write_genuine(folder / "genuine")
    grefcoco.build(genuine, genuine / "train2014", folder / "built")
    return folder / "built"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(peers, "NEW_TOKENS", 12)


def rows() -> list[dict]:
    """Three sentences of two images, one of which is grey."""
    images = []
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels[..., 0] if number else pixels))
    sizes = [
        {"image_id": i, "image": image, "width": image.width, "height": image.height} for i, image in enumerate(images)
    ]
    return [size | {"sent_id": 10 * i + j, "sentence": SENTENCES[j]} for j in range(3) for i, size in enumerate(sizes)]


def same(answer: Answer, other: Answer) -> None:
    assert (answer.sent_id, answer.answer, answer.unreadable) == (other.sent_id, other.answer, other.unreadable)
    np.testing.assert_allclose(answer.boxes or [], other.boxes or [], atol=0.02)
    np.testing.assert_allclose(answer.scores or [], other.scores or [], atol=1e-5)
    if answer.mask:
        assert answer.mask["size"] == other.mask["size"]
        assert (decode_mask(answer.mask) != decode_mask(other.mask)).mean() < 0.01
        assert answer.no_target == pytest.approx(other.no_target, abs=1e-5)


def test_sentences_of_a_batch_are_answered_as_one_by_one(family):
    name, _, predictor = family
    answers = predictor(rows())
    assert [answer.sent_id for answer in answers] == [row["sent_id"] for row in rows()]
    for answer, row in zip(answers, rows()):
        same(answer, predictor([row])[0])
    kinds = {"boxes": BOXED + WRITERS, "mask": MASKED, "no_target": MASKED, "answer": WRITERS}
    for key, families in kinds.items():
        assert (getattr(answers[0], key) is not None) == (name in families), key
    contents = {answer.to_json().partition(",")[2] for answer in answers}
    assert len(contents) > 1, "answers depend on the sentence or the image"


def test_boxes_are_of_the_image_and_best_first(family):
    if family[0] not in BOXED:
        pytest.skip("no box head")
    for answer, row in zip(family[2](rows()), rows()):
        boxes = np.array(answer.boxes)
        assert len(boxes) and (boxes >= 0).all() and (boxes <= [row["width"], row["height"]] * 2).all()
        assert (np.diff(answer.scores) <= 0).all() and max(answer.scores) <= 1


def test_more_boxes_than_a_hundred_are_left_out(family, monkeypatch):
    if family[0] not in BOXED:
        pytest.skip("no box head")
    whole = family[2](rows()[:1])[0]
    monkeypatch.setattr(peers, "MOST_BOXES", 3)
    assert len(family[2](rows()[:1])[0].boxes) == 3 and family[2](rows()[:1])[0].scores == whole.scores[:3]


def test_an_image_is_looked_at_once_for_its_sentences(family):
    name, _, predictor = family
    vision = predictor.model.vision_model if name == "kosmos-2" else predictor.model.get_submodule(predictor.vision)
    backbone = next(module for module in vision.modules() if isinstance(module, torch.nn.Conv2d))
    images = []
    hook = backbone.register_forward_hook(lambda module, args, output: images.append(len(output)))
    predictor(rows())
    hook.remove()
    assert sum(images) == 2, "six sentences, two images"


def test_once_per_image_gives_what_each_sentence_gives():
    layer = torch.nn.Linear(3, 2)
    inputs = torch.randn(2, 3)[[0, 1, 0, 0]]
    alone = layer(inputs)
    with once_per_image(layer, [0, 1, 0, 0]):
        assert torch.allclose(layer(inputs), alone)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.parametrize("name", ["grounding-dino", "owlvit"])
def test_scores_and_boxes_are_those_of_the_familys_own_processor(name, tmp_path):
    folder = tiny_peers.save(tmp_path, name)
    predictor, processor = load_peer(str(folder), name), AutoProcessor.from_pretrained(folder)
    row = rows()[0]
    text, options = ("red cat.", {}) if name == "grounding-dino" else ([["red cat"]], {"max_length": 16})
    inputs = processor(images=[row["image"]], text=text, return_tensors="pt", **options)
    with torch.inference_mode():
        outputs = predictor.model(**inputs)
    cut = {"text_threshold": 0.0, "input_ids": inputs["input_ids"]} if name == "grounding-dino" else {}
    sizes = [(row["height"], row["width"])]
    theirs = processor.post_process_grounded_object_detection(outputs, threshold=-1.0, target_sizes=sizes, **cut)[0]
    order = theirs["scores"].argsort(descending=True)
    answer = predictor([row])[0]
    np.testing.assert_allclose(answer.scores, theirs["scores"][order], atol=1e-5)
    boxes = theirs["boxes"][order].numpy().clip(0, [64, 48, 64, 48])
    np.testing.assert_allclose(np.sort(answer.boxes, 0), np.sort(boxes, 0), atol=0.01)


def test_sentences_are_one_phrase_of_grounding_dino(tmp_path):
    predictor = load_peer(str(tiny_peers.save(tmp_path, "grounding-dino")), "grounding-dino")
    assert predictor.words("The man no. 5, left? ") == "the man no 5, left."


def test_sam3_scores_with_presence(tmp_path):
    predictor = load_peer(str(tiny_peers.save(tmp_path, "sam3")), "sam3")
    torch.nn.init.constant_(predictor.model.detr_decoder.presence_head.layer3.weight, 0.0)
    torch.nn.init.constant_(predictor.model.detr_decoder.presence_head.layer3.bias, -10.0)
    assert isinstance(predictor.model, Sam3Model)
    answer = predictor(rows()[:1])[0]
    assert max(answer.scores) < 1e-4 and answer.no_target == pytest.approx(1, abs=1e-4)


def test_overlapping_boxes_of_omdet_are_left_out(tmp_path):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [20, 20, 30, 30]])
    kept, scores = peers._without_overlaps(boxes, torch.tensor([0.5, 0.9, 0.3, 0.1]))
    assert kept.tolist() == [[0, 0, 10, 9], [0, 0, 10, 4], [20, 20, 30, 30]]
    np.testing.assert_allclose(scores, [0.9, 0.3, 0.1])


# ---- masks of boxes


class Boxes:
    """A predictor whose answers are given."""

    columns, origin = peers.Peer.columns, {}

    def __init__(self, *answers: Answer) -> None:
        self.given = {answer.sent_id: answer for answer in answers}

    def __call__(self, some: list[dict]) -> list[Answer]:
        return [self.given[row["sent_id"]] for row in some]


def test_masks_are_made_of_the_boxes_above_the_threshold(sam):
    some = rows()[:4]
    boxes = [[1, 1, 30, 30], [20, 5, 40, 40]]
    answers = [Answer(0, boxes=boxes, scores=[0.9, 0.4]), Answer(10, boxes=[], scores=[])]
    answers += [Answer(1, boxes=boxes, scores=[0.2, 0.1]), Answer(11, boxes=[], scores=[], unreadable=True)]
    masked = Segmented(Boxes(*answers), sam, 0.3)(some)
    alone = sam(some[0]["image"], np.array(boxes, np.float32))
    assert alone.shape == (2, 48, 64) and alone[0].any() and (alone[0] != alone[1]).any()
    np.testing.assert_array_equal(decode_mask(masked[0].mask), alone.any(0))
    np.testing.assert_array_equal(decode_mask(masked[2].mask), alone[0], "no box above the threshold: the best one")
    assert decode_mask(masked[1].mask).shape == (64, 40) and not decode_mask(masked[1].mask).any()
    assert [answer.no_target for answer in masked] == pytest.approx([0.1, 1, 0.8, 0])


def test_many_boxes_are_made_into_masks_in_parts(sam, monkeypatch):
    boxes = np.array([[i, i, i + 20, i + 25] for i in range(7)], np.float32)
    whole = sam(rows()[0]["image"], boxes)
    monkeypatch.setattr(peers, "BOXES_AT_ONCE", 3)
    np.testing.assert_array_equal(sam(rows()[0]["image"], boxes), whole)


def test_points_are_segmented_too(sam):
    points = np.array([[5, 5, 5, 5], [40, 30, 40, 30]], np.float32)
    assert sam(rows()[0]["image"], points).shape == (2, 48, 64)


# ---- commands


def test_any_model_is_one_command_from_its_scores(dataset, tmp_path, capsys):
    model, segmenter = (tiny_peers.save(tmp_path / name, name) for name in ("grounding-dino", "sam"))
    out = tmp_path / "gdino" / "val.jsonl"
    options = [str(dataset), "--split", "val"]
    predict = ["predict", str(model), *options, "--segmenter", str(segmenter), "--seen", "none", "--out", str(out)]
    assert main(predict) == 0, capsys.readouterr().err
    origin = json.loads(out.with_name("val.jsonl.json").read_text())
    assert (
        origin["seen"] == "none" and origin["segmenter_box_threshold"] == 0.25 and "transformers" in origin["versions"]
    )
    scores = tmp_path / "gdino" / "scores.json"
    assert main(["score", str(out), *options, "--details", "--out", str(scores)]) == 0, capsys.readouterr().err
    result = json.loads(scores.read_text())
    assert {"gres", "grec"} < result.keys() and result["origin"]["checkpoint"] == str(model)
    assert main(["table", str(scores), "--out", str(tmp_path / "table")]) == 0, capsys.readouterr().err
    assert "always empty" in capsys.readouterr().out


def predict(arguments: list[str]) -> int:
    from scoring.__main__ import main

    return main(arguments)


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(dataset, tmp_path):
    model = tiny_peers.save(tmp_path / "clipseg", "clipseg")
    command = ["predict", str(model), str(dataset), "--split", "train", "--batch-size", "4", "--out"]
    assert main([*command, str(tmp_path / "one.jsonl")]) == 0
    for process in start_group(2, predict, [*command, str(tmp_path / "two.jsonl")]):
        done = process.wait()
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob("two.jsonl.part*"))


def test_models_that_no_class_loads_are_one_line(dataset, tmp_path, capsys):
    config = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = [str(dataset), "--split", "val", "--out", str(tmp_path / "a.jsonl")]
    assert main(["predict", str(tmp_path), *data]) == 2
    error = capsys.readouterr().err
    assert "is a qwen3_vl model" in error and "URL and --grammar" in error and error.count("\n") == 1
    assert main(["predict", str(tmp_path), *data, "--grammar", "qwen3"]) == 2
    assert "needs --model and --grammar" in capsys.readouterr().err


def test_train_py_names_the_command_for_other_models(dataset, tmp_path, capsys):
    tiny_peers.save(tmp_path / "model", "grounding-dino")
    flags = ["--eval_only", "--checkpoint", tmp_path / "model", "--dataset", dataset, "--report_to", "none"]
    capsys.readouterr()
    assert train_here(*flags, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is a grounding-dino model, not one of rela, mdetr, vlt" in error
    assert "measure it with `python -m scoring predict`" in error


def test_a_missing_library_is_one_line(dataset, tmp_path, capsys):
    tiny_peers.save(tmp_path / "sam3", "sam3")
    kind = {"image_processor_type": "Sam3ImageProcessor"}
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "sam3" / name).unlink(missing_ok=True)
    (tmp_path / "sam3" / "preprocessor_config.json").write_text(json.dumps(kind))
    capsys.readouterr()
    if find_spec("torchvision") is None:
        data = [str(dataset), "--split", "val", "--out", str(tmp_path / "a.jsonl")]
        assert main(["predict", str(tmp_path / "sam3"), *data]) == 2
        error = capsys.readouterr().err
        assert error.startswith("scoring predict: ") and "torchvision" in error and error.count("\n") == 1


def test_auto_model_would_drop_the_head(tmp_path):
    """Why each family names its auto class."""
    folder = tiny_peers.save(tmp_path, "owlvit")
    assert type(AutoModel.from_pretrained(folder)) is not FAMILIES["owlvit"].auto

"""Towers of transformers inside ReLA: every backbone and text encoder by name, alone and inside the model alike."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling.configuration_rela import RelaConfig
from modeling.modeling_rela import RelaModel
from modeling.new_models import word_tokenizer
from modeling.processing_rela import RelaCollator, RelaProcessor
from modeling.towers_rela import AutoTrunk, map_shapes, resampling, text_encoder
from modeling.training_rela import new_model, parameter_groups
from tests.fresh_process import outputs_elsewhere
from tests.tiny_rela import INSTANCES, SMALL, WORDS, expression_rows, tiny_processor
from tests.tiny_towers import BACKBONES, ENCODERS, VISION, towers
from tests.tiny_training import ROOT, tiny, train_here

NOT_CHECKPOINTED = ("convnext", "convnextv2", "resnet")  # by transformers
EVERY_ENCODER = pytest.mark.parametrize("encoder", ENCODERS)
# each backbone and each encoder once
PAIRS = list(zip(BACKBONES, itertools.cycle(ENCODERS)))
EVERY_PAIR = pytest.mark.parametrize(("backbone", "encoder"), PAIRS)
# the fast suite takes one of any size, one of a fixed size, and patches of 14 and 16 pixels
FAST = ("convnext", "hiera", "dinov2", "dinov3_vit")
SLOW = pytest.mark.slow
SOME_BACKBONES = pytest.mark.parametrize(
    "backbone", [name if name in FAST else pytest.param(name, marks=SLOW) for name in BACKBONES]
)
SOME_PAIRS = pytest.mark.parametrize(
    ("backbone", "encoder"), [pair if pair[0] == "dinov2" else pytest.param(*pair, marks=SLOW) for pair in PAIRS]
)


@pytest.fixture(scope="module")
def batch() -> dict:
    return RelaCollator(tiny_processor(), share_images=True)(expression_rows())


@pytest.fixture(scope="module")
def inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def model_of(*names: str | None, **changes: object) -> RelaModel:
    torch.manual_seed(0)
    return RelaModel(towers(*names, **changes)).eval()


def alone(kind: type[PreTrainedModel], tower: PreTrainedModel) -> PreTrainedModel:
    """A stand-alone model with the configuration and the weights of a tower."""
    config = type(tower.config).from_dict(tower.config.to_dict())
    model = kind(config, **({"add_pooling_layer": False} if tower.config.model_type in ("bert", "roberta") else {}))
    model.load_state_dict(tower.state_dict())
    return model.eval()


@SOME_BACKBONES
@torch.no_grad()
def test_a_backbone_gives_the_features_that_it_gives_alone(backbone: str) -> None:
    trunk = AutoTrunk(towers(backbone)).eval()
    height, width = 60, 45  # divided by no stride and no patch
    pixels = torch.randn(2, 3, height, width)
    stock = alone(MODEL_FOR_BACKBONE_MAPPING[type(trunk.backbone.config)], trunk.backbone)
    patch = 14 if backbone == "dinov2" else 16 if backbone == "dinov3_vit" else 32
    side = [128, 128] if backbone == "hiera" else [-(-x // patch) * patch for x in (height, width)]
    padded = nn.functional.pad(pixels, (0, side[1] - width, 0, side[0] - height))
    theirs, ours = stock(padded).feature_maps, trunk(pixels)
    assert [tuple(x.shape[:3]) for x in ours] == [(2, 15, 12), (2, 8, 6), (2, 4, 3), (2, 2, 2)]
    assert [x.shape[-1] for x in ours] == trunk.channels
    if patch == 32:
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x.permute(0, 3, 1, 2), y[..., : x.shape[1], : x.shape[2]])
    elif patch == 16:
        assert torch.equal(ours[2].permute(0, 3, 1, 2), theirs[0][..., :4, :3])
        assert torch.equal(ours[3].permute(0, 3, 1, 2), nn.functional.max_pool2d(theirs[0], 2, ceil_mode=True))
    else:
        rows, columns = resampling(4, 5, 16 / 14, pixels), resampling(3, 4, 16 / 14, pixels)
        assert torch.equal(ours[2].permute(0, 3, 1, 2), rows @ theirs[0] @ columns.T)


@EVERY_ENCODER
@torch.no_grad()
def test_a_text_encoder_gives_the_features_that_it_gives_alone(encoder: str, inputs: dict) -> None:
    model = model_of(None, encoder)
    kind = MODEL_MAPPING.get(type(model.config.text_config), transformers.SiglipTextModel)
    stock = alone(kind, model.text_encoder)
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = model(**inputs, output_hidden_states=True).text_hidden_state
    assert torch.equal(found, stock(**words).last_hidden_state) and found.shape == (4, 20, 16)


@SOME_PAIRS
def test_both_towers_learn_and_give_the_same_after_saving(
    backbone: str, encoder: str, batch: dict, inputs: dict, tmp_path: Path
) -> None:
    model = model_of(backbone, encoder, **INSTANCES, language_gate="published")
    model(**batch).loss.backward()
    for tower in (model.vision_encoder.trunk.backbone, model.text_encoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.stage_channels == model.config.stage_channels
    assert loaded.config.backbone_config.out_features == model.config.backbone_config.out_features
    with torch.no_grad():
        expected, found = model(**inputs), loaded(**inputs)
    assert torch.equal(found.pred_masks, expected.pred_masks) and torch.equal(found.pred_boxes, expected.pred_boxes)


@pytest.mark.slow
@EVERY_PAIR
def test_checkpointed_activations_change_no_gradient(backbone: str, encoder: str, batch: dict) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of(backbone, encoder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            checkpointed = any(getattr(x, "gradient_checkpointing", False) for x in model.vision_encoder.modules())
            assert checkpointed == (backbone not in NOT_CHECKPOINTED)
        torch.manual_seed(1)
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.slow
@EVERY_PAIR
@torch.no_grad()
def test_half_precision_is_that_of_the_backbone_alone(
    backbone: str, encoder: str, inputs: dict, tmp_path: Path
) -> None:
    model = model_of(backbone, encoder)
    model.save_pretrained(tmp_path)
    half = RelaModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(half.vision_encoder.trunk.backbone.parameters()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.text_encoder.parameters()} == {torch.float32}
    pixels, trunk = torch.randn(1, 3, 128, 128), model.vision_encoder.trunk
    stock = alone(MODEL_FOR_BACKBONE_MAPPING[type(trunk.backbone.config)], trunk.backbone)
    last = nn.functional.pad(pixels, (0, 12, 0, 12)) if backbone == "dinov2" else pixels
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trunk.backbone(last).feature_maps[-1], stock(last).feature_maps[-1])
        assert model(**inputs).pred_masks.isfinite().all()
    assert half(**inputs).pred_masks.isfinite().all()


@pytest.mark.slow
@EVERY_PAIR
@torch.no_grad()
def test_compiled_towers_give_equal_features(backbone: str, encoder: str, inputs: dict) -> None:
    model = model_of(backbone, encoder)
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch._dynamo.reset()
    stages = torch.compile(model.vision_encoder.stages, backend="aot_eager")(inputs["pixel_values"])
    for found, expected in zip(stages, model.vision_encoder.stages(inputs["pixel_values"]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    text = torch.compile(model.text_encoder, backend="aot_eager")(**words).last_hidden_state
    torch.testing.assert_close(text, model.text_encoder(**words).last_hidden_state, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@EVERY_PAIR
@torch.no_grad()
def test_remote_code_gives_the_same_in_a_fresh_process(
    backbone: str, encoder: str, inputs: dict, tmp_path: Path
) -> None:
    model, folder = model_of(backbone, encoder), tmp_path / "saved"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    expected = model(**inputs)
    for name, value in outputs_elsewhere(folder, inputs, tmp_path).items():
        assert torch.equal(value, expected[name]), name


@SOME_BACKBONES
def test_backbone_weights_come_from_a_folder(backbone: str, tmp_path: Path) -> None:
    kind = CONFIG_MAPPING[backbone]
    whole = AutoModel.from_config(kind(**BACKBONES[backbone]))
    whole.save_pretrained(tmp_path)
    size = 96 if backbone == "hiera" else 64
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    fields = {name: value for name, value in SMALL.items() if name != "stage_channels"}
    model, processor = new_model({**fields, "backbone": "auto"}, lambda: ["a word"], None, str(tmp_path), size)
    ours, theirs = model.vision_encoder.trunk.backbone.state_dict(), list(whole.state_dict().values())
    new = [name for name, x in ours.items() if not any(x.shape == y.shape and torch.equal(x, y) for y in theirs)]
    # norms of the maps start as 1 and 0, which are also values of other norms
    assert new == (["embeddings.position_embeddings"] if backbone == "hiera" else [])
    assert list(processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(processor.image_processor.image_std) == [0.2, 0.2, 0.2]
    with torch.no_grad():
        outputs = model(**processor(images=expression_rows()[0]["image"], text=["a word"]))
    assert outputs.pred_masks.shape == (1, 2, size // 4, size // 4)


@pytest.mark.parametrize("encoder", [*ENCODERS, "clip", "siglip"])
def test_text_weights_and_tokenizer_come_from_a_folder(encoder: str, tmp_path: Path) -> None:
    words = word_tokenizer(["the red square on the left", "all blue squares"])
    text = {**ENCODERS.get(encoder, {**ENCODERS["siglip_text_model"], "projection_dim": 16}), "vocab_size": len(words)}
    if encoder in ("clip", "siglip"):
        vision = {**VISION, "projection_dim": 16}
        whole = AutoModel.from_config(CONFIG_MAPPING[encoder](text_config=text, vision_config=vision))
    else:
        whole = text_encoder(CONFIG_MAPPING[encoder](**text))
    whole.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    fields = {name: value for name, value in SMALL.items() if name != "text_config"}
    model, processor = new_model(fields, lambda: [], str(tmp_path), None, 64)
    theirs = whole.state_dict()
    for name, value in model.text_encoder.state_dict().items():
        same = [y for other, y in theirs.items() if other.endswith(name) and y.shape == value.shape]
        assert any(torch.equal(value, y) for y in same), name
    assert processor.keep_end_token == (encoder != "bert") and processor.max_length == 20
    with pytest.raises(ValueError, match="Without text_config in the recipe"):
        new_model({**fields, "text_config": {"vocab_size": 50}}, lambda: [], str(tmp_path), None, 64)


def fast_tokenizer(**rules: object) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with the special tokens of CLIP and SigLIP: no first one, padding is not 0."""
    vocabulary = {"</s>": 0, "<pad>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate(WORDS[5:])}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **rules)


def test_the_tokenizers_own_padding_length_and_mask(tmp_path: Path) -> None:
    images = tiny_processor().image_processor
    sentences = ["the red square on the left", "all"]
    clip = RelaProcessor(images, fast_tokenizer(model_max_length=5), keep_end_token=True)
    made = clip(text=sentences)
    assert made["input_ids"].tolist() == [[3, 4, 7, 14, 0], [10, 0, 1, 1, 1]]
    assert made["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]] and set(made) == {
        "input_ids",
        "attention_mask",
    }
    siglip = RelaProcessor(images, fast_tokenizer(model_max_length=64, model_input_names=["input_ids"]), max_length=8)
    siglip.save_pretrained(tmp_path)
    for processor in (siglip, RelaProcessor.from_pretrained(tmp_path)):
        made = processor(text=sentences)
        assert made["input_ids"][1].tolist() == [10, 0, 1, 1, 1, 1, 1, 1] and made["attention_mask"].all()


def test_rates_frozen_towers_and_names_for_adapters() -> None:
    model = model_of("dinov3_vit", "roberta")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not name.startswith(("text_encoder.embeddings", "vision_encoder.trunk.backbone.embed"))
        )
    rates = {"text_encoder": 1e-5, "vision_encoder.trunk.backbone": 2e-5}
    groups = parameter_groups(model, 1e-3, 0.05, rates)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rate = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert not any("embeddings" in name for name in rate)
    backbone = {name: value for name, value in rate.items() if name.startswith("vision_encoder.trunk.backbone")}
    assert {value[0] for value in backbone.values()} == {2e-5}
    decayed = {name.rpartition(".")[2] for name, value in backbone.items() if value[1]}
    assert decayed == {"weight"} and all(not rate[name][1] for name in backbone if "norm" in name or "lambda" in name)
    assert {value[0] for name, value in rate.items() if name.startswith("vision_encoder.trunk.levels")} == {1e-3}
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in (r"text_encoder\..*\.(query|value)", r"vision_encoder\.trunk\.backbone\..*\.[qv]_proj"):
        assert len([name for name in modules if re.fullmatch(pattern, name)]) >= 2, pattern


@torch.no_grad()
def test_levels_lie_where_the_image_is() -> None:
    # a map of stride 14 whose cells hold the position of their centre is resampled to the centres of other cells
    for stride in (4, 8, 16, 32):
        centres = (torch.arange(8) + 0.5) * 14
        count = 96 // stride
        found = resampling(count, 8, stride / 14, centres) @ centres
        expected = (torch.arange(count) + 0.5) * stride
        inside = (expected > centres[0] + stride / 2) & (expected < centres[-1] - stride / 2)
        assert inside.any()
        torch.testing.assert_close(found[inside], expected[inside], atol=1e-4 if stride < 14 else 2.0, rtol=0)


def test_fewer_maps_fill_four_levels() -> None:
    config = towers("convnext")
    config.backbone_config.out_features = ["stage2", "stage4"]
    trunk = AutoTrunk(config)
    assert trunk.sources == [0, 0, 1, 1] and trunk.channels == [6, 12, 12, 24]
    assert [x.shape[1:] for x in trunk(torch.randn(1, 3, 64, 64))] == [(16, 16, 6), (8, 8, 12), (4, 4, 12), (2, 2, 24)]
    every = towers("dinov3_vit")
    every.backbone_config.out_features = ["stem", "stage1", "stage2"]
    assert map_shapes(every.backbone_config) == [(16, 16)] * 3


HUGE = {"model_type": "swin", "embed_dim": 10**9}
BAD = {
    "is a backbone without its configuration": ({"backbone": "auto"}, "without a backbone_config"),
    "is a configuration without its backbone": ({"backbone_config": {"model_type": "swin"}}, "with a backbone_config"),
    "is unknown": ({"backbone": "auto", "backbone_config": {"model_type": "swim"}}, 'model_type is "swim"'),
    "has no name": ({"backbone": "auto", "backbone_config": {}}, 'model_type is "None"'),
    "has no maps": ({"backbone": "auto", "backbone_config": {"model_type": "vit"}}, "has no feature maps"),
    "needs timm": ({"backbone": "auto", "backbone_config": {"model_type": "timm_backbone"}}, "has no feature maps"),
    "is huge": ({"backbone": "auto", "backbone_config": HUGE}, "embed_dim=1000000000"),
    "has a huge ratio": (
        {"backbone": "auto", "backbone_config": {"model_type": "swin", "mlp_ratio": 1e9}},
        "mlp_ratio",
    ),
    "has no number": ({"backbone": "auto", "backbone_config": {"model_type": "swin", "depths": "4"}}, "is damaged"),
    "has five maps": (
        {"backbone": "auto", "backbone_config": {"model_type": "dinov2", "out_indices": [1, 2, 3, 4, 5]}},
        "choose 4 or fewer",
    ),
    "reads the sentence": (
        {"backbone": "auto", "backbone_config": {"model_type": "swin"}, "language_gate": "open"},
        "language_gate",
    ),
    "has a decoder": ({"text_config": {"model_type": "t5"}}, "has an encoder and a decoder"),
    "reads no text": ({"text_config": {"model_type": "vit"}}, "reads no text"),
    "hides huge words": (
        {"text_config": {"model_type": "clip", "text_config": {"hidden_size": 10**9}}},
        "hidden_size",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_a_bad_tower_is_one_clear_line(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RelaConfig(**{**SMALL, **fields})
    assert "\n" not in str(error.value)


def test_a_backbone_that_cannot_run_is_one_clear_line() -> None:
    config = RelaConfig(
        **SMALL | {"backbone": "auto", "backbone_config": {"model_type": "swin", "depths": [1, 1, 1, 1]}}
    )
    config.backbone_config.num_heads = [5, 5, 5, 5]
    with pytest.raises(ValueError, match=r'model_type "swin" gives no maps') as error:
        RelaModel(config)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"a side of 160 pixels for a backbone that works at image_size"):
        model_of("hiera").vision_encoder.stages(torch.zeros(1, 3, 160, 64))


@pytest.mark.slow
def test_a_run_starts_from_two_folders_and_its_model_needs_neither(
    scenes_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    AutoModel.from_config(CONFIG_MAPPING["dinov2"](**BACKBONES["dinov2"])).save_pretrained(tmp_path / "vision")
    words = word_tokenizer(["the red circle on the left", "all blue squares"])
    text_encoder(CONFIG_MAPPING["roberta"](**{**ENCODERS["roberta"], "vocab_size": len(words)})).save_pretrained(
        tmp_path / "text"
    )
    words.save_pretrained(tmp_path / "text")
    (recipe,) = tiny(scenes_dataset, tmp_path / "out", max_train_steps=3)
    fields = yaml.safe_load(Path(recipe).read_text())
    for name in ("text_config", "stage_channels", "stem_channels", "depths"):
        del fields["model"][name]
    fields["model"]["backbone"] = "auto"
    Path(recipe).write_text(yaml.safe_dump(fields))
    assert train_here(recipe, "--backbone", tmp_path / "vision", "--tokenizer", tmp_path / "text") == 0
    for folder in ("vision", "text"):
        shutil.rmtree(tmp_path / folder)
    loaded = AutoModel.from_pretrained(tmp_path / "out" / "checkpoint")
    assert type(loaded.text_encoder).__name__ == "RobertaModel"
    assert type(loaded.vision_encoder.trunk.backbone).__name__ == "Dinov2Backbone"
    capfd.readouterr()
    assert train_here(recipe) == 2  # no weights, so no configuration
    assert "without a backbone_config" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_lines_of_the_readme(capsys: pytest.CaptureFixture) -> None:
    pattern = r"```python\n([^`]*RelaConfig[^`]*)```\n\n```\n([^`]*)```"
    code, printed = re.search(pattern, (ROOT / "README.md").read_text()).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed

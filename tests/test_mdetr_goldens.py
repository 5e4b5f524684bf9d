"""The published MDETR: converted weights give what the original code gave, and every key of it has a place."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from modeling.configuration_mdetr import MdetrConfig
from modeling.convert_mdetr import DROPPED, convert_state_dict, infer_config, main
from modeling.loss_mdetr import match
from modeling.modeling_mdetr import MdetrModel, MdetrOutput
from tests.tiny_mdetr import tiny_processor

PARTS = {
    "transformer.encoder": "encoder.",
    "transformer.decoder": "decoder",
    "transformer.text_encoder": "text_encoder.",
    "transformer.resizer": ("text_projection.", "text_norm."),
    "class_embed": "token_head.",
    "bbox_embed": "box_head.",
    "query_embed": "query_position.",
    "input_proj": "image_projection.",
    "backbone": "backbone.",
    "contrastive_align_projection_image": "align_queries.",
    "contrastive_align_projection_text": "align_tokens.",
}


class Golden:
    """Inputs and outputs of the original network, and its weights."""

    def __init__(self) -> None:
        with safe_open(Path(__file__).parent / "goldens" / "mdetr" / "tiny.safetensors", "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no iterator)
            self.facts = json.loads(stored.metadata()["facts"])
        parts = {"weights": {}, "inputs": {}, "outputs": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.weights, self.outputs = parts["weights"], parts["outputs"]
        self.inputs = self._inputs(parts["inputs"])

    def _inputs(self, stored: dict[str, torch.Tensor]) -> dict[str, object]:
        images, boxes = ([stored[f"{name}{i}"] for i in range(3)] for name in ("image", "boxes"))
        pixel_values = torch.zeros(3, 3, *(max(x.shape[axis] for x in images) for axis in (1, 2)))
        pixel_mask = torch.zeros(len(images), *pixel_values.shape[2:], dtype=torch.long)
        for i, image in enumerate(images):
            pixel_values[i, :, : image.shape[1], : image.shape[2]] = image
            pixel_mask[i, : image.shape[1], : image.shape[2]] = 1
        num_targets = [len(x) for x in boxes]
        pad = torch.nn.utils.rnn.pad_sequence
        labels = {
            "boxes": pad(boxes, batch_first=True),
            "positive_map": pad(stored["positive_map"].split(num_targets), batch_first=True),
            "num_boxes": torch.tensor(num_targets),
        }
        input_ids = stored["input_ids"].long()
        attention_mask = (input_ids != 1).long()
        texts = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, **texts, "labels": labels}

    def model(self) -> MdetrModel:
        heads = self.facts["heads"]
        model = MdetrModel(infer_config(self.weights, heads, text_num_attention_heads=4))
        model.load_state_dict(convert_state_dict(self.weights))
        return model.eval()


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def assert_near(ours: torch.Tensor, original: torch.Tensor) -> None:
    torch.testing.assert_close(ours, original, rtol=0, atol=1e-5 * original.abs().max().item())


def test_outputs_losses_pairs_and_gradients_equal_the_original(golden: Golden) -> None:
    model = golden.model()
    output = model(**golden.inputs)
    for name in ("logits", "pred_boxes", "proj_queries", "proj_tokens"):
        assert_near(output[name], golden.outputs[name])
    assert len(output.auxiliary_outputs) == 2
    for i, layer in enumerate(output.auxiliary_outputs):
        assert_near(layer["logits"], golden.outputs[f"logits_{i}"])
        assert_near(layer["pred_boxes"], golden.outputs[f"pred_boxes_{i}"])
    assert output.loss.item() == pytest.approx(golden.facts["loss"], rel=1e-5)
    terms = {name: term.item() for name, term in output.loss_terms.items()}
    assert terms == pytest.approx(golden.facts["loss_terms"], rel=1e-5)
    sample, query, target = match([output], golden.inputs["labels"], model.config)[0]
    pairs = [[side[sample == b].tolist() for side in (query, target)] for b in range(3)]
    assert pairs == golden.facts["pairs"]
    output.loss.backward()
    for part, prefix in PARTS.items():
        gradients = [p.grad for name, p in model.named_parameters() if name.startswith(prefix) and p.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
        assert norm == pytest.approx(golden.facts["gradient_norm"][part], rel=1e-4), part


def test_boxes_and_scores_equal_the_original(golden: Golden) -> None:
    outputs = MdetrOutput(logits=golden.outputs["logits"], pred_boxes=golden.outputs["pred_boxes"])
    sizes = golden.facts["target_sizes"]
    results = tiny_processor().post_process_referring_detection(outputs, threshold=0.0, target_sizes=sizes)
    for b, result in enumerate(results):
        torch.testing.assert_close(result["boxes"], golden.outputs["post_boxes"][b])
        torch.testing.assert_close(result["scores"], golden.outputs["post_scores"][b])


def test_words_and_positive_maps_equal_the_original(golden: Golden) -> None:
    processor, labels = tiny_processor(words=golden.facts["vocab"]), golden.inputs["labels"]
    texts = processor(text=golden.facts["captions"])
    for name in ("input_ids", "attention_mask"):
        assert (texts[name] == golden.inputs[name]).all()
    for b, spans in enumerate(golden.facts["tokens_positive"]):
        for t, span in enumerate(spans):
            torch.testing.assert_close(
                processor.positive_map(golden.facts["captions"][b], [span]), labels["positive_map"][b, t]
            )


def test_every_key_of_the_published_checkpoint_has_a_place() -> None:
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in published_shapes().items()}
    with torch.device("meta"):
        model = MdetrModel(infer_config(state_dict))
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in convert_state_dict(state_dict).items()} == ours
    assert model.config.to_diff_dict() == MdetrConfig().to_diff_dict(), "the defaults are the published network"
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 184.8


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published ResNet-101 checkpoint."""
    modules = {
        "transformer.decoder.norm": (256,),
        "transformer.resizer.fc": (256, 768),
        "transformer.resizer.layer_norm": (256,),
        "class_embed": (256, 256),
        "input_proj": (256, 2048, 1, 1),
        "contrastive_align_projection_image": (64, 256),
        "contrastive_align_projection_text": (64, 256),
        "transformer.text_encoder.pooler.dense": (768, 768),
        "transformer.text_encoder.embeddings.LayerNorm": (768,),
    }
    shapes = {"query_embed.weight": (100, 256)}
    for name, size in {"word": 50265, "position": 514, "token_type": 1}.items():
        shapes[f"transformer.text_encoder.embeddings.{name}_embeddings.weight"] = (size, 768)
    for i, size in enumerate((256, 256, 4)):
        modules[f"bbox_embed.layers.{i}"] = (size, 256)
    for side, norms, attentions in (
        ("encoder", (1, 2), ["self_attn"]),
        ("decoder", (1, 3, 4), ["self_attn", "cross_attn_image"]),
    ):
        for layer in (f"transformer.{side}.layers.{i}." for i in range(6)):
            modules |= {f"{layer}norm{i}": (256,) for i in norms}
            modules |= {f"{layer}linear1": (2048, 256), f"{layer}linear2": (256, 2048)}
            for attention in attentions:
                modules[f"{layer}{attention}.out_proj"] = (256, 256)
                shapes |= {
                    f"{layer}{attention}.in_proj_weight": (768, 256),
                    f"{layer}{attention}.in_proj_bias": (768,),
                }
    for layer in (f"transformer.text_encoder.encoder.layer.{i}." for i in range(12)):
        modules |= {f"{layer}attention.self.{name}": (768, 768) for name in ("query", "key", "value")}
        modules |= {f"{layer}{name}.LayerNorm": (768,) for name in ("attention.output", "output")}
        modules |= {f"{layer}attention.output.dense": (768, 768)}
        modules |= {f"{layer}intermediate.dense": (3072, 768), f"{layer}output.dense": (768, 3072)}
    for module, shape in modules.items():
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    return shapes | resnet_shapes()


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    convolutions = {"conv1": ("bn1", (64, 3, 7, 7))}
    before = 64
    for stage, blocks in enumerate((3, 4, 23, 3)):
        inner = 64 * 2**stage
        for block in (f"layer{stage + 1}.{i}." for i in range(blocks)):
            convolutions[f"{block}conv1"] = (f"{block}bn1", (inner, before, 1, 1))
            convolutions[f"{block}conv2"] = (f"{block}bn2", (inner, inner, 3, 3))
            convolutions[f"{block}conv3"] = (f"{block}bn3", (4 * inner, inner, 1, 1))
            if block.endswith(".0."):
                convolutions[f"{block}downsample.0"] = (f"{block}downsample.1", (4 * inner, before, 1, 1))
            before = 4 * inner
    shapes = {f"backbone.0.body.{name}.weight": shape for name, (_, shape) in convolutions.items()}
    for norm, shape in convolutions.values():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.0.body.{norm}.{leaf}"] = shape[:1]
    return shapes


def test_unknown_key_is_an_error_and_known_leftovers_are_not() -> None:
    leftovers = ["pooler.dense.weight", "embeddings.position_ids"]
    for name in (*(f"transformer.text_encoder.{leftover}" for leftover in leftovers), "answer_type_head.weight"):
        assert DROPPED.fullmatch(name)
        assert convert_state_dict({name: torch.zeros(1)}) == {}
    for name in ("transformer.CLS.weight", "transformer.encoder.norm.weight", "mask_head.lay1.weight"):
        with pytest.raises(ValueError, match=name):
            convert_state_dict({name: torch.zeros(1)})


def test_final_head_and_missing_alignment_are_read_from_the_keys(golden: Golden) -> None:
    weights = {name: value for name, value in golden.weights.items() if "contrastive" not in name}
    weights |= {"isfinal_embed.weight": torch.zeros(1, 32), "isfinal_embed.bias": torch.zeros(1)}
    config = infer_config(weights, 4, 4)
    assert (config.predict_final, config.contrastive_size) == (True, 0)
    model = MdetrModel(config)
    model.load_state_dict(convert_state_dict(weights))
    output = model.eval()(**{**golden.inputs, "labels": None})
    assert output.pred_isfinal.shape == (3, 12, 1) and output.proj_tokens is None
    assert_near(output.logits, golden.outputs["logits"])


@pytest.mark.parametrize(
    ("options", "bias"), [([], 2.0), (["--weights", "model"], 1.0), (["--weights", "model_ema"], 2.0)]
)
def test_command_takes_averaged_weights_where_present(
    golden: Golden, options: list[str], bias: float, tmp_path: Path
) -> None:
    checkpoint = {
        name: {**golden.weights, "bbox_embed.layers.2.bias": torch.full((4,), value)}
        for name, value in (("model", 1.0), ("model_ema", 2.0))
    }
    torch.save({**checkpoint, "epoch": 4, "args": argparse.Namespace(lr=5e-5)}, tmp_path / "best.pth")
    folder = command(tmp_path / "best.pth", tmp_path, options)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert (model.box_head[4].bias == bias).all()
    assert ("model_ema" in (folder / "README.md").read_text()) == (bias == 2.0)


def command(checkpoint: Path, tmp_path: Path, options: list[str] = ()) -> Path:
    tiny_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    heads = ["--num-attention-heads", "4", "--text-num-attention-heads", "4"]
    folder = tmp_path / "converted" / "mdetr"
    assert main([str(checkpoint), str(folder), "--tokenizer", str(tmp_path / "tokenizer"), *heads, *options]) == 0
    return folder


def test_command_writes_a_folder_that_auto_classes_load(golden: Golden, tmp_path: Path) -> None:
    torch.save({"model": golden.weights}, tmp_path / "model.pth")
    folder = command(tmp_path / "model.pth", tmp_path)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor.image_processor.size["shortest_edge"] == 800
    with torch.no_grad():
        assert_near(model(**golden.inputs).logits, golden.outputs["logits"])


class Malice:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("canary"),)


BAD = {
    "missing": None,
    "empty": b"",
    "noise": b"no weights",
    "malice": pickle.dumps({"model": {"a": Malice()}}, protocol=2),
    "no weights": {"model": 3},
    "half": {"model": {"query_embed.weight": torch.zeros(2, 4)}},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_command_reports_a_bad_file_in_one_line(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main([str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "canary").exists()


def test_absent_weights_are_named(golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": golden.weights}, tmp_path / "model.pth")
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "out"), "--weights", "model_ema"]) == 2
    assert "use --weights model" in capsys.readouterr().err

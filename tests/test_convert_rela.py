"""The published network: converted weights give what the original code gave, and every key of it has a place."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from modeling.convert_rela import DROPPED, convert_state_dict, infer_config, main
from modeling.modeling_rela import RelaModel
from modeling.weight_files import read_weights
from tests.made_weights import made_weights, parse_keys
from tests.tiny_rela import tiny_processor

GOLDENS = Path(__file__).parent / "goldens" / "rela"
PARTS = {
    "backbone": "vision_encoder.",
    "text_encoder": "text_encoder.",
    "sem_seg_head.pixel_decoder": "pixel_decoder.",
    "sem_seg_head.predictor": "region_decoder.",
}


class Golden:
    """Inputs and outputs of the original network, and the weights it had."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as stored:
            self.tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no iterator)
            self.facts = json.loads(stored.metadata()["facts"])
            self.weights = made_weights(parse_keys(stored.metadata()["keys"]), self.facts["seed"])
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        self.inputs = {
            "pixel_values": (self.tensors["image"].float() - mean) / std,
            "input_ids": self.tensors["input_ids"].long(),
            "attention_mask": self.tensors["attention_mask"].long(),
            "labels": {"masks": self.tensors["masks"], "no_target": self.tensors["no_target"]},
        }

    def model(self, region_gate: str = "stored") -> RelaModel:
        model = RelaModel(infer_config(self.weights, num_attention_heads=self.facts["heads"]))
        model.load_state_dict(convert_state_dict(self.weights, region_gate))
        return model.eval()


@pytest.fixture(scope="module", params=["swin_w7_square", "swin_w12_wide", "swin_w5_odd", "r50_wide"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_near(ours: torch.Tensor, original: torch.Tensor) -> None:
    torch.testing.assert_close(ours, original, rtol=0, atol=2e-4 * original.abs().max().item())


def test_outputs_losses_and_gradients_equal_the_original(golden: Golden) -> None:
    model = golden.model()
    output = model(**golden.inputs, output_hidden_states=True)
    assert_near(output.vision_hidden_states[3], golden.tensors["stride32_backbone"])
    assert_near(output.pixel_hidden_states[0], golden.tensors["stride32_pixels"])
    for name in ("pred_masks", "no_target_logits", "minimap_logits"):
        assert_near(output[name], golden.tensors[name])
    assert output.loss.item() == pytest.approx(golden.facts["loss"], rel=1e-4)
    assert {name: term.item() for name, term in output.loss_terms.items()} == pytest.approx(
        golden.facts["loss_terms"], rel=1e-4
    )
    output.loss.backward()
    for part, prefix in PARTS.items():
        gradients = [p.grad for name, p in model.named_parameters() if name.startswith(prefix) and p.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
        assert norm == pytest.approx(golden.facts["gradient_norm"][part], rel=1e-3), part


def test_published_gate_is_half_open_and_matters() -> None:
    golden = Golden("r50_wide")
    with pytest.raises(ValueError, match="region_gate='open'"):
        golden.model("open")
    stored, published = golden.model("stored"), golden.model("published")
    assert published.region_decoder.layers[0].language.region_gate.sigmoid().item() == 0.5
    with torch.no_grad():
        change = stored(**golden.inputs).pred_masks - published(**golden.inputs).pred_masks
    assert change.abs().max() > 1e-3


def test_every_key_of_the_swin_base_checkpoint_has_a_place() -> None:
    keys = parse_keys((GOLDENS / "swin_base_keys.tsv").read_text())
    assert len(keys) == 912
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    with torch.device("meta"):
        model = RelaModel(infer_config(state_dict))
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in convert_state_dict(state_dict).items()} == ours
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 225.5
    assert model.config.to_diff_dict() == type(model.config)().to_diff_dict(), "the defaults are the published Swin-B"


def test_swin_tiny_has_its_published_size() -> None:
    config = type(Golden("r50_wide").model().config)(
        stage_channels=[96, 192, 384, 768], depths=[2, 2, 6, 2], window_heads=[3, 6, 12, 24], window_size=7
    )
    with torch.device("meta"):
        model = RelaModel(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 162.6


def test_unknown_key_is_an_error_and_known_leftovers_are_not() -> None:
    for name in ("criterion.empty_weight", "pixel_mean", "text_encoder.pooler.dense.weight"):
        assert DROPPED.fullmatch(name)
        assert convert_state_dict({name: torch.zeros(1)}) == {}
    for name in (
        "backbone.layers.0.surprise.weight",
        "backbone.layers.0.blocks.1.attn.surprise",
        "backbone.res6.0.conv1.weight",
        "text_encoder.surprise.weight",
        "text_encoder.encoder.layer.0.output.dense.surprise",
        "sem_seg_head.predictor.RLA_extra.0.norm.weight",
        "sem_seg_head.pixel_decoder.adapter_2.weight",
    ):
        with pytest.raises(ValueError, match=name):
            convert_state_dict({name: torch.zeros(1)})
    older = convert_state_dict({"sem_seg_head.predictor.static_query.weight": torch.zeros(4, 2)})
    assert list(older) == ["region_decoder.query.weight"]


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_command_writes_a_folder_that_auto_classes_load(suffix: str, tmp_path: Path) -> None:
    golden = Golden("r50_wide")
    checkpoint = write_weights(golden.weights, tmp_path / f"model{suffix}")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "converted" / "rela"
    arguments = [str(checkpoint), str(folder), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*arguments, "--num-attention-heads", str(golden.facts["heads"]), "--region-gate", "stored"]) == 0
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert_near(model(**golden.inputs).pred_masks, golden.tensors["pred_masks"])
    assert "stored" in (folder / "README.md").read_text()


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.suffix == ".pkl":
        path.write_bytes(
            pickle.dumps({"model": {k: v.numpy() for k, v in weights.items()}, "matching_heuristics": True})
        )
    else:
        torch.save({"model": weights, "iteration": 7}, path)
    return path


@pytest.mark.slow
def test_whatever_surrounds_the_weights_in_a_file_is_left_out(tmp_path: Path) -> None:
    weights = Golden("r50_wide").weights
    wrapped = {f"module.{name}": value.half() for name, value in weights.items()}
    states = {"optimizer": {"state": {0: {"step": 3}}}, "iteration": 7, "args": argparse.Namespace(lr=1e-5)}
    torch.save({"model": wrapped, **states}, tmp_path / "parallel.pth")
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "third party"}))
    torch.save(weights, tmp_path / "bare.pth")
    for name in ("parallel.pth", "tensors.pkl", "bare.pth"):
        found = read_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        for key, value in found.items():
            torch.testing.assert_close(value.float(), weights[key], atol=1e-2, rtol=1e-3)
    assert infer_config(found, 4).to_dict() == infer_config(read_weights(tmp_path / "parallel.pth"), 4).to_dict()


@pytest.mark.slow
def test_command_names_what_is_missing_or_does_not_fit_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    golden = Golden("r50_wide")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    first, second = "sem_seg_head.predictor.query_embed.weight", "sem_seg_head.predictor.decoder_norm.weight"
    changes = {
        "headless": ({first: None}, first),
        "incomplete": ({second: None}, "region_decoder.heads.norm.weight"),
        "misshapen": ({second: torch.zeros(3)}, "region_decoder.heads.norm.weight"),
        "foreign": ({"backbone.surprise.weight": torch.zeros(1)}, "backbone.surprise.weight"),
    }
    for name, (change, named) in changes.items():
        weights = {key: value for key, value in {**golden.weights, **change}.items() if value is not None}
        path = write_weights(weights, tmp_path / f"{name}.pth")
        arguments = [str(path), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
        assert main([*arguments, "--num_attention_heads", "4"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and str(path) in message and named in message
        assert not (tmp_path / "out").exists()


def test_command_lists_the_keys_it_leaves_out(tmp_path: Path) -> None:
    golden = Golden("r50_wide")
    path = write_weights({**golden.weights, "criterion.empty_weight": torch.zeros(2)}, tmp_path / "model.pth")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [str(path), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*arguments, "--num-attention-heads", "4"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not part of the network: criterion.empty_weight." in card and "gate: published." in card
    assert RelaModel.from_pretrained(tmp_path / "out").region_decoder.layers[0].language.region_gate.item() == 0


class Malice:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_checkpoint_cannot_run_code(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"model": {"a": Malice()}}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [None, b"", b"no weights", pickle.dumps({"model": {"a": 1}})])
def test_command_reports_a_bad_file_in_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "model.pkl"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "model.pkl" in message
    assert not (tmp_path / "out").exists()

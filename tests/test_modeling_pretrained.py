"""Pretrained backbones and language models: every key style fills the trunk, and the trunk is the stock Swin."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, SwinBackbone, SwinConfig

from modeling.modeling_rela import RelaModel
from modeling.pretrained_rela import load_backbone, load_text_encoder, resize_position_table
from tests.tiny_rela import RESNET, SMALL, SWIN, tiny_config

CHANNELS = [8, 16, 32, 64]


def swin(window: int = 4) -> RelaModel:
    torch.manual_seed(0)
    changes = {**SWIN, "stage_channels": CHANNELS, "depths": [2, 2, 2, 2], "window_size": window}
    return RelaModel(tiny_config(**changes)).eval()


def stock_swin() -> SwinBackbone:
    torch.manual_seed(1)
    config = SwinConfig(
        embed_dim=8,
        depths=[2, 2, 2, 2],
        num_heads=SWIN["window_heads"],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    stock = SwinBackbone(config).eval()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return stock


def legacy(name: str) -> str:
    """Name of a transformers Swin weight as its Hub files have it."""
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.{letter}_proj", f"attention.self.{word}")
    name = name.replace("attention.o_proj", "attention.output.dense").replace("mlp.fc1", "intermediate.dense")
    name = name.replace("attention.relative_position_bias.", "attention.self.").replace("mlp.fc2", "output.dense")
    return name if name.startswith("swin.") else f"swin.{name}"


@pytest.mark.parametrize("style", ["transformers", "Hub files"])
@pytest.mark.parametrize("size", [(64, 64), (52, 90)])
def test_trunk_equals_the_stock_swin(style: str, size: tuple[int, int], tmp_path: Path) -> None:
    stock, model = stock_swin(), swin()
    rename = legacy if style == "Hub files" else str
    save_file({rename(name): value for name, value in stock.state_dict().items()}, tmp_path / "model.safetensors")
    load_backbone(model, tmp_path)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs = stock(pixel_values).feature_maps
        for i, x in enumerate(model.vision_encoder.stages(pixel_values)):
            norm = stock.hidden_states_norms[f"stage{i + 1}"]
            torch.testing.assert_close(norm(x).permute(0, 3, 1, 2), theirs[i], atol=2e-5, rtol=1e-4)


def official(name: str) -> str:
    return re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)


def torchvision(name: str) -> str:
    name = re.sub(r"layers\.(\d)\.(\d+)\.(conv\d)\.conv", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{m[3]}", name)
    name = re.sub(r"layers\.(\d)\.(\d+)\.conv(\d)\.norm", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{m[3]}", name)
    name = re.sub(r"layers\.(\d)\.(\d+)\.shortcut\.conv", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0", name)
    name = re.sub(r"layers\.(\d)\.(\d+)\.shortcut\.norm", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1", name)
    return name.replace("conv1.conv", "conv1").replace("conv1.norm", "bn1")


def detectron2(name: str) -> str:
    name = re.sub(r"layers\.(\d)", lambda m: f"res{int(m[1]) + 2}", name)
    return re.sub(r"^conv1", "stem.conv1", name).replace(".conv.weight", ".weight")


@pytest.mark.parametrize(
    ("changes", "rename"),
    [(SWIN, official), (SWIN, str), (RESNET, torchvision), (RESNET, detectron2)],
    ids=["official", "timm", "torchvision", "detectron2"],
)
def test_every_key_style_fills_the_trunk(changes: dict, rename: callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = RelaModel(tiny_config(**changes)), RelaModel(tiny_config(**changes))
    weights = source.vision_encoder.trunk.state_dict()
    stored = {rename(name): value + 0.5 for name, value in weights.items()} | {"head.weight": torch.zeros(3)}
    torch.save({"model": stored}, tmp_path / "backbone.pth")
    load_backbone(target, tmp_path / "backbone.pth")
    for name, value in target.vision_encoder.trunk.state_dict().items():
        torch.testing.assert_close(value, weights[name] + 0.5, msg=name)


def test_position_tables_of_another_window_are_interpolated(tmp_path: Path) -> None:
    save_file(dict(stock_swin().state_dict()), tmp_path / "model.safetensors")
    model = swin(window=6)
    load_backbone(model, tmp_path / "model.safetensors")
    assert model.vision_encoder.trunk.layers[0].blocks[0].attn.relative_position_bias_table.shape == (121, 1)
    table = torch.randn(49, 3)
    torch.testing.assert_close(resize_position_table(table, 4), table)
    torch.testing.assert_close(resize_position_table(torch.full((49, 3), 2.5), 12), torch.full((529, 3), 2.5))
    column = torch.arange(7.0).repeat(7)[:, None]  # grows to the right: so must the enlarged one
    assert (resize_position_table(column, 12).view(23, 23).diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_come_from_a_folder_or_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {legacy(key): value for key, value in stock_swin().state_dict().items()}
    torch.save(weights, tmp_path / name) if name.endswith(".bin") else save_file(weights, tmp_path / name)

    def download(repository: str, file: str) -> str:
        assert repository == "someone/swin-large.v2"
        if file != name:
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("modeling.pretrained_rela.hf_hub_download", download)
    tables = []
    for source in (tmp_path, "someone/swin-large.v2"):
        model = swin()
        load_backbone(model, source)
        tables.append(model.vision_encoder.trunk.layers[3].blocks[1].attn.relative_position_bias_table)
    assert torch.equal(*tables) and tables[0].std() > 0.1


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    save_file({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fill the swin trunk"):
        load_backbone(swin(), tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(swin(), tmp_path / "nowhere.pth")


def test_text_encoder_loads_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    bert = BertModel(BertConfig(**SMALL["text_config"]))
    bert.save_pretrained(tmp_path / "bert")
    model = swin()
    load_text_encoder(model, tmp_path / "bert")
    torch.testing.assert_close(
        model.text_encoder.embeddings.word_embeddings.weight, bert.embeddings.word_embeddings.weight
    )
    BertModel(BertConfig(**{**SMALL["text_config"], "hidden_size": 16})).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="text_config"):
        load_text_encoder(model, tmp_path / "other")

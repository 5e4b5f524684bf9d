"""Loads published single-modality weights to start training from: an ImageNet backbone and a language model.

`load_backbone` reads Swin weights with the official key names, timm's and transformers' (old and new), and ResNet
weights with detectron2's and torchvision's; position tables of another window size are interpolated. Trunks of
transformers are read by transformers.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from .modeling_rela import RelaModel
from .towers_rela import FIXED_SIZE, without_pooling
from .weight_files import Rules, read_weights, rename

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
POSITIONS = "embeddings.position_embeddings"  # of a backbone that works at one size alone
_ATTENTION = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v"}
_HF_PARTS = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
    "attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def load_backbone(model: RelaModel, source: str | Path) -> None:
    """Copy backbone weights into the vision trunk.

    Args:
        model: with a "swin", "resnet" or "auto" trunk of the same sizes; the window may differ.
        source: a weight file, or a folder or Hub id with model.safetensors or pytorch_model.bin; for "auto" a folder
            or Hub id of transformers.

    Raises:
        ValueError: when the source cannot be read or does not fill the trunk.
    """
    if model.config.backbone == "auto":
        backbone = model.vision_encoder.trunk.backbone
        _load_tower(backbone, source, "backbone_config", out_features=backbone.config.out_features)
        return
    weights = read_weights(_locate(source))
    renamed = _swin_names(weights) if model.config.backbone == "swin" else _resnet_names(weights)
    trunk = model.vision_encoder.trunk
    ours = trunk.state_dict()
    for name, value in renamed.items():
        if name.endswith("relative_position_bias_table") and name in ours and value.shape != ours[name].shape:
            renamed[name] = resize_position_table(value, model.config.window_size)
    wrong = [name for name, value in ours.items() if name not in renamed or renamed[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"{source} does not fill the {model.config.backbone} trunk: {len(wrong)} of {len(ours)} weights are "
            f"missing or of another shape, {wrong[0]} first. Name a backbone of depths {model.config.depths} and "
            f"channels {model.config.stage_channels}"
        )
    trunk.load_state_dict({name: renamed[name] for name in ours})


def load_text_encoder(model: RelaModel, source: str | Path) -> None:
    """Copy a text encoder of transformers, by Hub id or folder, into that of the model.

    Raises:
        ValueError: when its sizes differ from `model.config.text_config`.
    """
    _load_tower(model.text_encoder, source, "text_config", **without_pooling(type(model.text_encoder)))


def _load_tower(tower: PreTrainedModel, source: str | Path, field: str, **options: object) -> None:
    """Copy the weights of a folder or Hub id of transformers; new are only the norms of a backbone's maps."""
    loaded, report = type(tower).from_pretrained(source, output_loading_info=True, **options)
    ours, theirs = tower.state_dict(), loaded.state_dict()
    if tower.config.model_type in FIXED_SIZE:
        theirs[POSITIONS] = resize_positions(theirs[POSITIONS], ours[POSITIONS].shape[1])
    wrong = [name for name in report["missing_keys"] if not name.startswith("hidden_states_norms")]
    wrong += [name for name, value in ours.items() if name not in theirs or theirs[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f'{source} is not the "{tower.config.model_type}" of {field}: {wrong[0]} is missing or of another shape. '
            f"Without {field} in the recipe, the tower has the sizes of its weights"
        )
    tower.load_state_dict({name: theirs[name] for name in ours})


def resize_positions(table: torch.Tensor, count: int) -> torch.Tensor:
    """(1, side * side, channels) -> (1, count, channels), bicubic over the square of positions."""
    old, new = math.isqrt(table.shape[1]), math.isqrt(count)
    grid = table.float().transpose(1, 2).unflatten(2, (old, old))
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def resize_position_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """((2 * old - 1) ** 2, heads) -> ((2 * window - 1) ** 2, heads), bicubic over the relative positions."""
    old, new = round(table.shape[0] ** 0.5), 2 * window - 1
    grid = table.float().T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.to(table.dtype)


def _locate(source: str | Path) -> Path:
    """The weight file of a file, folder or Hub repository; older ones have only the second of `WEIGHT_FILES`."""
    path = Path(source)
    if path.is_file() or path.suffix in (".pth", ".pt", ".bin", ".pkl", ".safetensors"):
        return path
    if path.is_dir():
        return next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path / WEIGHT_FILES[0])
    try:
        return Path(hf_hub_download(str(source), WEIGHT_FILES[0]))
    except EntryNotFoundError:
        return Path(hf_hub_download(str(source), WEIGHT_FILES[1]))


def _swin_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official names, but each patch merging is part of the stage after it; separate q, k and v are joined."""
    bare = {re.sub(r"^(backbone\.|swin\.)?(encoder\.)?", "", name): value for name, value in weights.items()}
    merges_at_end = "layers.0.downsample.norm.weight" in bare
    renamed, parts = {}, {}
    for name, value in bare.items():
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.norm", "patch_embed.norm")
        for theirs, ours in _HF_PARTS.items():
            name = re.sub(rf"(blocks\.\d+)\.{re.escape(theirs)}(?=\.|$)", rf"\1.{ours}", name)
        if merges_at_end:
            name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        split = re.fullmatch(r"(.+)\.attention\.(?:self\.)?(\w+)\.(weight|bias)", name)
        if split and split[2] in _ATTENTION:
            parts.setdefault(f"{split[1]}.attn.qkv.{split[3]}", {})[_ATTENTION[split[2]]] = value
        else:
            renamed[name] = value
    joined = {name: torch.cat([three[letter] for letter in "qkv"]) for name, three in parts.items()}
    return {**renamed, **joined}


# detectron2's, then torchvision's ResNet names.
_RESNET_RULES: Rules = [
    (r"stem\.conv1", "conv1.conv"),
    (r"stem\.conv1\.norm", "conv1.norm"),
    (r"res(\d)\.(\d+)\.(\w+)", lambda m: f"layers.{int(m[1]) - 2}.{m[2]}.{m[3]}.conv"),
    (r"res(\d)\.(\d+)\.(\w+)\.norm", lambda m: f"layers.{int(m[1]) - 2}.{m[2]}.{m[3]}.norm"),
    (r"conv1", "conv1.conv"),
    (r"bn1", "conv1.norm"),
    (r"layer(\d)\.(\d+)\.conv(\d)", lambda m: f"layers.{int(m[1]) - 1}.{m[2]}.conv{m[3]}.conv"),
    (r"layer(\d)\.(\d+)\.bn(\d)", lambda m: f"layers.{int(m[1]) - 1}.{m[2]}.conv{m[3]}.norm"),
    (r"layer(\d)\.(\d+)\.downsample\.0", lambda m: f"layers.{int(m[1]) - 1}.{m[2]}.shortcut.conv"),
    (r"layer(\d)\.(\d+)\.downsample\.1", lambda m: f"layers.{int(m[1]) - 1}.{m[2]}.shortcut.norm"),
]


def _resnet_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {rename(name.removeprefix("backbone."), _RESNET_RULES): value for name, value in weights.items()}
    return {name: value for name, value in renamed.items() if name is not None}

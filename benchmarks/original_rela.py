"""The original ReLA network from its own source files, without detectron2, fvcore, timm or a compiled operator.

This module replaces only the few functions and classes that the three files import from those libraries. Every forward
pass is the original code.
"""

import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel


@dataclass
class Sizes:
    """Sizes of the original network; the defaults are the published Swin-B."""

    channels: int = 128  # of the first stage; doubled at each stage
    depths: Sequence[int] = (2, 2, 18, 2)
    window_heads: Sequence[int] = (4, 8, 16, 32)
    window: int = 12
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    hidden: int = 256  # channels of the pixel decoder, the mask features and the regions
    heads: int = 8
    region_layers: int = 9
    region_ffn: int = 2048
    text: Mapping[str, int | float] = field(default_factory=dict)  # of BertConfig


class OriginalRela(nn.Module):
    """ReLA as published, with the parameter names of its checkpoints.

    Args:
        source: folder of the original repository.
        sizes: of the network; None for the published Swin-B.

    Raises:
        ValueError: `source` is not the original repository.
    """

    def __init__(self, source: Path, sizes: Sizes | None = None) -> None:
        super().__init__()
        if not (source / "gres_model" / "GRES.py").is_file():
            raise ValueError(f"{source} has no gres_model/GRES.py: give a checkout of the original ReLA repository")
        swin, pixels, regions = _import_parts(source)
        sizes = sizes or Sizes()
        channels = {f"res{i + 2}": _Shape(sizes.channels * 2**i, 4 * 2**i) for i in range(4)}
        self.text_encoder = BertModel(BertConfig(**sizes.text), add_pooling_layer=False)
        self.backbone = swin.MultiModalSwinTransformer(
            embed_dim=sizes.channels,
            depths=list(sizes.depths),
            num_heads=list(sizes.window_heads),
            window_size=sizes.window,
            drop_path_rate=0.3,
        )
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = pixels.MSDeformAttnPixelDecoder(
            channels,
            transformer_dropout=0.0,
            transformer_nheads=sizes.heads,
            transformer_dim_feedforward=sizes.pixel_ffn,
            transformer_enc_layers=sizes.pixel_layers,
            conv_dim=sizes.hidden,
            mask_dim=sizes.hidden,
            norm="GN",
            transformer_in_features=["res3", "res4", "res5"],
            common_stride=4,
        )
        self.sem_seg_head.predictor = regions.MultiScaleMaskedReferringDecoder(
            in_channels=sizes.hidden,
            num_classes=1,
            hidden_dim=sizes.hidden,
            num_queries=100,
            nheads=sizes.heads,
            dim_feedforward=sizes.region_ffn,
            dec_layers=sizes.region_layers,
            pre_norm=False,
            mask_dim=sizes.hidden,
            enforce_input_project=False,
        )

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        text = self.text_encoder(input_ids, attention_mask=attention_mask)[0].permute(0, 2, 1)
        features = self.backbone(pixel_values, text, attention_mask.unsqueeze(-1))
        mask_features, _, levels = self.sem_seg_head.pixel_decoder.forward_features(features)
        return self.sem_seg_head.predictor(levels, mask_features, text)


class DropPath(nn.Module):
    """timm's stochastic depth: whole samples of a branch are dropped, the others divided by what is kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.drawn(len(x), 1 - self.rate).view(-1, *[1] * (x.ndim - 1))
        return x * keep / (1 - self.rate)

    @staticmethod
    def drawn(samples: int, probability: float) -> torch.Tensor:
        """1 for samples that stay, else 0."""
        return torch.empty(samples).bernoulli_(probability)


class _Shape:
    """detectron2's ShapeSpec: channels and stride of a feature map."""

    def __init__(self, channels: int, stride: int) -> None:
        self.channels, self.stride = channels, stride


class _Conv2d(nn.Conv2d):
    """detectron2's Conv2d: a convolution with optional norm and activation."""

    def __init__(
        self, *args: int, norm: nn.Module | None = None, activation: Callable | None = None, **kwargs: int
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class _Registry:
    """A registry that registers nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def register(self) -> Callable:
        return lambda decorated: decorated


def _import_parts(source: Path) -> list[types.ModuleType]:
    """Import the original Swin, pixel decoder and region decoder modules, with replacements for their imports."""
    weight_init = types.SimpleNamespace(c2_xavier_fill=lambda module: None, c2_msra_fill=lambda module: None)
    registry = _Registry("")
    replacements = {
        "timm.models.layers": {
            "DropPath": DropPath,
            "to_2tuple": lambda x: x if isinstance(x, tuple) else (x, x),
            "trunc_normal_": nn.init.trunc_normal_,
        },
        "fvcore.nn": {"weight_init": weight_init},
        "fvcore.nn.weight_init": vars(weight_init),
        "detectron2.config": {"configurable": lambda function: function},
        "detectron2.layers": {
            "Conv2d": _Conv2d,
            "Linear": nn.Linear,
            "ShapeSpec": _Shape,
            "get_norm": lambda norm, channels: nn.GroupNorm(32, channels),
        },
        "detectron2.modeling": {
            "BACKBONE_REGISTRY": registry,
            "SEM_SEG_HEADS_REGISTRY": registry,
            "Backbone": nn.Module,
            "ShapeSpec": _Shape,
        },
        "detectron2.utils.registry": {"Registry": _Registry},
        "MultiScaleDeformableAttention": {},
    }
    for name, content in replacements.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(content)
    # Packages without their __init__ modules, which need all of detectron2.
    for name in ("gres_model", "gres_model.modeling"):
        package = types.ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = package
    files = ("backbone.swin", "pixel_decoder.msdeformattn", "transformer_decoder.referring_transformer_decoder")
    return [importlib.import_module(f"gres_model.modeling.{name}") for name in files]

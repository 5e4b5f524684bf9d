"""Towers of transformers: any AutoBackbone as vision trunk, any encoder of AutoModel for the sentence."""

import inspect
import math

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .configuration_rela import RelaConfig

STRIDES = (4, 8, 16, 32)
FIXED_SIZE = ("hiera",)  # works at its `image_size` alone: the order of its tokens is made for it
PROBED_PATCHES = 32  # side of the image whose maps are looked at, in patches


def text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a text configuration, without a pooling layer where it can be left out.

    Raises:
        ValueError: when the configuration cannot be built.
    """
    name = type(config).__name__.removesuffix("Config") + "Model"
    kind = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f'text_config of model_type "{config.model_type}" has no model in transformers')
    try:
        return kind(config, **without_pooling(kind))
    except Exception as error:  # every encoder has its own
        reason = " ".join(str(error).split())
        raise ValueError(f'text_config of model_type "{config.model_type}" cannot be built: {reason}') from error


def without_pooling(kind: type[PreTrainedModel]) -> dict[str, bool]:
    """The argument that leaves out the pooling layer of a text encoder, where it has one."""
    has_pooling = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if has_pooling else {}


class AutoTrunk(nn.Module):
    """Any AutoBackbone of transformers; its maps are brought to strides 4, 8, 16 and 32, channels last.

    Four maps are the four levels in order; of fewer, each level is made from the map of the nearest stride. A map of a
    level's stride is used as it is. Others are enlarged by transposed convolutions and reduced by max pooling, as in
    the simple feature pyramid of ViTDet (arXiv 2203.16527); where patches are no power of two, such as 14 pixels, they
    are then resampled.

    Any image size works: images are padded with zeros at the right and bottom to whole patches, and the maps are cut.
    """

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        shapes = map_shapes(config.backbone_config)
        sources = range(4) if len(shapes) == 4 else [_nearest(shapes, stride) for stride in STRIDES]
        self.backbone = MODEL_FOR_BACKBONE_MAPPING[type(config.backbone_config)](config.backbone_config)
        self.levels = nn.ModuleList(
            Level(*shapes[source], stride) for source, stride in zip(sources, STRIDES, strict=True)
        )
        self.sources = list(sources)
        self.channels = [level.channels for level in self.levels]
        self.multiple = math.lcm(*(stride for _, stride in shapes))
        self.fixed_size = _sides(config.backbone_config) if config.backbone_config.model_type in FIXED_SIZE else None

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(images, 3, height, width) -> four (images, height, width, channels) at `STRIDES`.

        Raises:
            ValueError: when the image is larger than the size of a backbone that has only one.
        """
        height, width = pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, self._missing(1, width), 0, self._missing(0, height)))
        maps = self.backbone(padded).feature_maps
        return [
            level(maps[source], (-(-height // stride), -(-width // stride))).permute(0, 2, 3, 1)
            for level, source, stride in zip(self.levels, self.sources, STRIDES, strict=True)
        ]

    def _missing(self, axis: int, side: int) -> int:
        """Pixels of padding."""
        if self.fixed_size is None:
            return -side % self.multiple
        if side > self.fixed_size[axis]:
            raise ValueError(
                f"a side of {side} pixels for a backbone that works at image_size {self.fixed_size} alone: resize the "
                "images to it"
            )
        return self.fixed_size[axis] - side


class Level(nn.Module):
    """Brings a map of one stride to another: in steps of two, then by resampling."""

    def __init__(self, channels: int, stride: int, target: int) -> None:
        super().__init__()
        steps = round(math.log2(stride / target))
        self.halvings, self.ratio = max(0, -steps), target / stride * 2**steps  # of a cell's side to the map's, after
        layers = []
        for i in range(steps):
            layers += [ChannelNorm(channels), nn.GELU()] if i else []
            layers.append(nn.ConvTranspose2d(channels, max(1, channels // 2), 2, stride=2))
            channels = max(1, channels // 2)
        self.enlarge = nn.Sequential(*layers)
        self.channels = channels

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(images, channels, height, width), which covers the image and its padding -> (images, channels, *size)."""
        x = self.enlarge(x)
        for _ in range(self.halvings):
            x = nn.functional.max_pool2d(x, 2, ceil_mode=True)
        if self.ratio == 1:
            return x[..., : size[0], : size[1]]
        rows = resampling(size[0], x.shape[-2], self.ratio, x)
        return rows @ x @ resampling(size[1], x.shape[-1], self.ratio, x).T


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (images, channels, height, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resampling(count: int, cells: int, ratio: float, like: torch.Tensor) -> torch.Tensor:
    """Weights of linear interpolation along a side: (count, cells), rows sum to 1, dtype and device of `like`.

    Output i covers `ratio` cells from i * ratio on. (A matrix product has a gradient that is summed in a fixed order.)
    """
    centre = ((torch.arange(count, device=like.device) + 0.5) * ratio - 0.5).clamp(0, cells - 1)
    distance = (centre[:, None] - torch.arange(cells, device=like.device)).abs()
    weights = (1 - distance / max(1.0, ratio)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def map_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """(channels, stride) of the maps of a backbone, by running it on the meta device, which allocates nothing.

    Raises:
        ValueError: when the configuration cannot be built, or gives no maps of whole strides.
    """
    if config.model_type in FIXED_SIZE:
        height, width = _sides(config)
    else:
        patch = getattr(config, "patch_size", 4)
        height = width = PROBED_PATCHES * (patch if isinstance(patch, int) else 4)
    try:
        with torch.device("meta"):
            backbone = MODEL_FOR_BACKBONE_MAPPING[type(config)](config).eval()
            maps = backbone(torch.zeros(1, 3, height, width)).feature_maps
    except Exception as error:  # every backbone has its own
        reason = " ".join(str(error).split())
        raise ValueError(f'backbone_config of model_type "{config.model_type}" gives no maps: {reason}') from error
    shapes = [(x.shape[1], height // x.shape[2]) for x in maps if x.ndim == 4]
    if len(shapes) < len(maps) or any((height % x.shape[2], width % x.shape[3]) != (0, 0) for x in maps):
        raise ValueError(
            f'backbone_config of model_type "{config.model_type}" gives maps of {[tuple(x.shape[1:]) for x in maps]} '
            f"for an image of {height} x {width}: (channels, height, width) of whole strides are needed"
        )
    return shapes


def _nearest(shapes: list[tuple[int, int]], stride: int) -> int:
    """Index of the map whose stride is nearest; of several, the last."""
    distances = [abs(math.log2(other / stride)) for _, other in shapes]
    return max(i for i, distance in enumerate(distances) if distance == min(distances))


def _sides(config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) of a configuration's `image_size`."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)

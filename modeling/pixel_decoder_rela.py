"""Pixel decoder: multi-scale deformable attention over strides 8, 16 and 32, then one pyramid step to stride 4.

Source: Mask2Former (CVPR 2022) section 3.2 and the original msdeformattn.py; in torch without a compiled op.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rela import RelaConfig
from .device_tensors import made_once, upload
from .fusion_rela import one_by_one


class PixelDecoder(nn.Module):
    """Turns backbone features into mask features and a three-level memory; runs in fp32."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size, groups = config.pixel_decoder_size, config.norm_groups
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, size, 1), nn.GroupNorm(groups, size))
            for channels in reversed(config.stage_channels[1:])
        )
        self.level_embed = nn.Embedding(3, size) if config.pixel_decoder_layers else None
        self.layers = nn.ModuleList(DeformableLayer(config) for _ in range(config.pixel_decoder_layers))
        self.fine_lateral = nn.Sequential(
            nn.Conv2d(config.stage_channels[0], size, 1, bias=False), nn.GroupNorm(groups, size)
        )
        self.fine_output = nn.Sequential(
            nn.Conv2d(size, size, 3, padding=1, bias=False), nn.GroupNorm(groups, size), nn.ReLU()
        )
        self.mask_features = nn.Conv2d(size, config.mask_size, 1)

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Backbone features at strides 4, 8, 16, 32 -> mask features and the memory at strides 32, 16, 8.

        All are (batch, channels, height, width); the mask features have `mask_size` channels at stride 4.
        """
        if one_by_one(features[0], features[0].shape[0]):
            decoded = [self._decode([x[i : i + 1] for x in features]) for i in range(len(features[0]))]
            return torch.cat([masks for masks, _ in decoded]), [torch.cat(x) for x in zip(*(x for _, x in decoded))]
        return self._decode(features)

    def _decode(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        fine, *coarse = features
        levels = [lateral(x) for lateral, x in zip(self.laterals, reversed(coarse), strict=True)]
        levels = self._attend(levels) if self.layers else _top_down(levels)
        fine = self.fine_output(_upsample_add(self.fine_lateral(fine), levels[-1]))
        return self.mask_features(fine), levels

    def _attend(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        shapes = [tuple(x.shape[-2:]) for x in levels]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (batch, pixels, channels)
        positions = torch.cat(
            [
                sine_positions(*shape, x.shape[-1], x.device).to(x.dtype) + self.level_embed.weight[i]
                for i, shape in enumerate(shapes)
            ]
        )
        for layer in self.layers:
            x = layer(x, positions, shapes)
        parts = x.split([height * width for height, width in shapes], dim=1)
        return [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)]


class DeformableLayer(GradientCheckpointingLayer):
    """Deformable self-attention and a feed-forward layer, each followed by its norm."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size = config.pixel_decoder_size
        self.attention = DeformableAttention(size, config.num_attention_heads, 3, config.pixel_decoder_points)
        self.attention_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, config.pixel_decoder_ffn_size)
        self.fc2 = nn.Linear(config.pixel_decoder_ffn_size, size)
        self.ffn_norm = nn.LayerNorm(size)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, shapes: list[tuple[int, int]]) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x + positions, x, shapes))
        return self.ffn_norm(x + self.fc2(self.fc1(x).relu()))


class DeformableAttention(nn.Module):
    """Each pixel samples a few learned points on every level. Source: Deformable DETR (ICLR 2021), equation 3."""

    def __init__(self, size: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(size, heads * levels * points * 2)
        self.weights = nn.Linear(size, heads * levels * points)
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, query: torch.Tensor, pixels: torch.Tensor, shapes: list[tuple[int, int]]) -> torch.Tensor:
        """(batch, pixels, channels) x 2 -> the same; `shapes` are (height, width) of the levels in pixel order."""
        offsets = self.offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        points = reference_points(tuple(shapes), query.device, query.dtype)[:, None, :, None] + offsets
        weights = self.weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        values = self.value(pixels).unflatten(-1, (self.heads, -1))
        return self.out(gather_points(values, shapes, points, weights).flatten(2))

    def reset(self) -> None:
        """Initialise: heads sample in evenly spread directions, point p at distance p + 1, with equal weights."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1)[:, None]
        bias = (directions[:, None, None] * distances).expand(-1, self.levels, -1, -1)
        init.zeros_(self.offsets.weight)
        init.copy_(self.offsets.bias, bias.flatten())
        init.zeros_(self.weights.weight)
        init.zeros_(self.weights.bias)


def gather_points(
    values: torch.Tensor, shapes: list[tuple[int, int]], points: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of bilinear samples, zero outside the maps, by one `embedding_bag` over all levels.

    Args:
        values: (batch, pixels of all levels, heads, channels).
        shapes: (height, width) of each level.
        points: (batch, queries, heads, levels, points, 2) x and y in pixels of each level.
        weights: (batch, queries, heads, levels, points).

    Returns:
        (batch, queries, heads, channels).
    """
    batch, _, heads, channels = values.shape
    # 1. A table with one row per pixel. Each level is padded with zeros by one pixel on all sides, so that a point
    # outside of a map samples zeros and needs no mask.
    levels = zip(values.split([height * width for height, width in shapes], dim=1), shapes, strict=True)
    padded = [nn.functional.pad(x.unflatten(1, shape), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2) for x, shape in levels]
    # Rows after the last level, for the right and lower neighbours of its last pixel; their weight is 0.
    table = torch.cat([*padded, values.new_zeros(batch, shapes[-1][1] + 4, heads, channels)], dim=1)
    # 2. Row of pixel (x, y) of a level: y * stride + x + start; (levels * points,) each.
    stride, start, height, width = level_layout(tuple(shapes), points.shape[-2], values.device)
    x, y = (coordinate.flatten(3) for coordinate in points.unbind(-1))
    x, y = (u.clamp(min=torch.full_like(side, -1), max=side) for u, side in ((x, width), (y, height)))
    left, top = x.detach().floor(), y.detach().floor()
    # 3. One bag per query and head. Rows of the flattened table are ordered (sample, padded pixel, head).
    whole = {"device": values.device, "dtype": torch.int32}
    first = torch.arange(batch, **whole)[:, None] * table.shape[1] * heads
    first = (first + torch.arange(heads, **whole))[:, None, :, None]
    top_left = (top.int() * stride + left.int() + start) * heads + first  # (batch, queries, heads, levels * points)
    # From the top left pixel to the four pixels around the point: itself, right, below, below right.
    steps = torch.stack([torch.zeros_like(stride), torch.ones_like(stride), stride, stride + 1]) * heads
    # 4. Bilinear weights of the four pixels, times the attention weight of the point.
    right, lower = x - left, (y - top) * weights.flatten(3)
    upper = weights.flatten(3) - lower
    bilinear = torch.stack([upper - upper * right, upper * right, lower - lower * right, lower * right], dim=-2)
    sums = nn.functional.embedding_bag(
        (top_left[..., None, :] + steps).flatten(3).flatten(0, 2),
        table.reshape(-1, channels),
        per_sample_weights=bilinear.flatten(3).flatten(0, 2),
        mode="sum",
    )
    return sums.view(batch, -1, heads, channels)


@made_once
def level_layout(
    shapes: tuple[tuple[int, int], ...], points: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stride and start of each level's rows in the table of `gather_points`, and its height and width, for each point.

    (levels * points,) int32 each.
    """
    stride = [width + 2 for _, width in shapes]
    start = [sum((h + 2) * (w + 2) for h, w in shapes[:i]) + stride[i] + 1 for i in range(len(shapes))]
    per_level = upload([stride, start, *zip(*shapes, strict=True)], device, torch.int32)[..., None]
    return per_level.expand(-1, -1, points).flatten(1).unbind()


@made_once
def reference_points(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Where the centre of each pixel of all levels lies on each level, in its pixels: (pixels, levels, 2) x and y.

    On a level of width w, coordinate u of 0..1 lies at pixel u * w - 0.5.
    """
    sides = upload([(width, height) for height, width in shapes], device, dtype)
    return pixel_centres(shapes, sides)[:, None] * sides - 0.5


def pixel_centres(shapes: Sequence[tuple[int, int]], like: torch.Tensor) -> torch.Tensor:
    """Centres of all pixels of all levels, in 0..1: (pixels, 2) x and y, dtype and device of `like`."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1))
    return torch.cat(centres)


@made_once
def sine_positions(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """DETR's sine positions of a map, y in the first half of the channels: (height * width, channels), fp32."""
    half = channels // 2
    frequency = 10000 ** (2 * (torch.arange(half, device=device) // 2) / half)
    halves = []
    for side in (height, width):
        position = torch.arange(1, side + 1, device=device) / (side + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequency
        halves.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1))
    y = halves[0][:, None].expand(-1, width, -1)
    x = halves[1][None, :].expand(height, -1, -1)
    return torch.cat([y, x], dim=-1).flatten(0, 1)


def _top_down(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add each level, coarse first, to the next finer one."""
    merged = [levels[0]]
    for level in levels[1:]:
        merged.append(_upsample_add(level, merged[-1]))
    return merged


def _upsample_add(fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    return fine + nn.functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)

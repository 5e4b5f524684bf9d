"""Convolutional trunks: the published ResNet-50 variant and a small one that learns from scratch on a CPU.

Both keep the interface of the Swin trunk, channels last; the convolutions see the same memory as NCHW views.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rela import RelaConfig


class ResNetTrunk(nn.Module):
    """Bottleneck ResNet with frozen batch norm, stride in the 3 x 3 convolution (detectron2's R-50)."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        self.conv1 = FrozenConv(3, config.stem_channels, 7, stride=2)
        inputs = [config.stem_channels, *config.stage_channels[:3]]
        self.layers = nn.ModuleList(
            ChannelsLast(
                Bottleneck(
                    inputs[i] if j == 0 else config.stage_channels[i],
                    config.bottleneck_channels * 2**i,
                    config.stage_channels[i],
                    stride=2 if i > 0 and j == 0 else 1,
                )
                for j in range(config.depths[i])
            )
            for i in range(4)
        )

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, height / 4, width / 4, channels)."""
        x = self.conv1(pixel_values.contiguous(memory_format=torch.channels_last)).relu()
        return nn.functional.max_pool2d(x, 3, stride=2, padding=1).permute(0, 2, 3, 1)


class ConvTrunk(nn.Module):
    """3 x 3 convolutions, group norm, ReLU; a stage's first block halves the resolution, the others are residual."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        channels = [config.stem_channels, *config.stage_channels]
        self.conv1 = ConvBlock(3, channels[0], config.norm_groups, stride=2)
        self.layers = nn.ModuleList(
            ChannelsLast(
                ConvBlock(channels[i + (j > 0)], channels[i + 1], config.norm_groups, stride=1 if j else 2)
                for j in range(config.depths[i])
            )
            for i in range(4)
        )

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, height / 2, width / 2, channels)."""
        return self.conv1(pixel_values.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class ChannelsLast(nn.Sequential):
    """A sequence of NCHW modules that takes and gives (images, height, width, channels)."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Bottleneck(GradientCheckpointingLayer):
    def __init__(self, before: int, inner: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut = FrozenConv(before, channels, 1, stride=stride) if before != channels else None
        self.conv1 = FrozenConv(before, inner, 1)
        self.conv2 = FrozenConv(inner, inner, 3, stride=stride)
        self.conv3 = FrozenConv(inner, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.conv2(self.conv1(x).relu()).relu()
        return (self.conv3(x) + shortcut).relu()


class FrozenConv(nn.Module):
    """Convolution without bias, then batch normalisation whose statistics and affine never change."""

    def __init__(self, before: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = FrozenBatchNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class FrozenBatchNorm(nn.Module):
    epsilon = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.epsilon).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class ConvBlock(nn.Module):
    def __init__(self, before: int, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(groups, channels), channels)
        self.residual = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv(x)).relu()
        return x + out if self.residual else out

"""Convolutional trunks: the published ResNet-50 variant and a small one that learns from scratch on a CPU.

Both have the interface of the Swin trunk, channels last; the convolutions read the same memory as NCHW views.
"""

import math

import torch
from torch import nn

from .configuration_rela import RelaConfig
from .resnet import ChannelsLast, ResNet


class ResNetTrunk(ResNet):
    """The bottleneck ResNet with frozen batch norm; inner channels double at each stage."""

    def __init__(self, config: RelaConfig) -> None:
        inner_channels = [config.bottleneck_channels * 2**i for i in range(4)]
        super().__init__(config.stem_channels, inner_channels, config.stage_channels, config.depths)


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


class ConvBlock(nn.Module):
    """3 x 3 convolution, group norm and ReLU; residual where the resolution stays."""

    def __init__(self, in_channels: int, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(groups, channels), channels)
        self.residual = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv(x)).relu()
        return x + out if self.residual else out

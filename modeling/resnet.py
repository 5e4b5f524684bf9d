"""ResNet trunk with frozen batch norm, shared by ReLA's ResNet-50 variant and MDETR.

The stride is in the 3 x 3 convolution, as in torchvision and in detectron2's R-50. Feature maps are channels last: the
convolutions read the same memory as NCHW views.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class ResNet(nn.Module):
    """A stem and four stages of bottleneck blocks at strides 4, 8, 16 and 32.

    Args:
        stem_channels: channels of the first convolution.
        bottleneck_channels: inner channels of the blocks of each stage.
        stage_channels: channels of each stage.
        depths: blocks in each stage.
    """

    def __init__(
        self,
        stem_channels: int,
        bottleneck_channels: Sequence[int],
        stage_channels: Sequence[int],
        depths: Sequence[int],
    ) -> None:
        super().__init__()
        self.conv1 = FrozenConv(3, stem_channels, 7, stride=2)
        inputs = [stem_channels, *stage_channels[:3]]
        self.layers = nn.ModuleList(
            ChannelsLast(
                Bottleneck(
                    stage_channels[i] if j else inputs[i],
                    bottleneck_channels[i],
                    stage_channels[i],
                    stride=2 if i > 0 and j == 0 else 1,
                )
                for j in range(depths[i])
            )
            for i in range(4)
        )

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, height / 4, width / 4, channels)."""
        x = self.conv1(pixel_values.contiguous(memory_format=torch.channels_last)).relu()
        return nn.functional.max_pool2d(x, 3, stride=2, padding=1).permute(0, 2, 3, 1)


class ChannelsLast(nn.Sequential):
    """A sequence of NCHW modules whose input and output are (images, height, width, channels)."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Bottleneck(GradientCheckpointingLayer):
    """1 x 1, 3 x 3 and 1 x 1 convolution with a shortcut, which is projected where the shape changes."""

    def __init__(self, in_channels: int, inner_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        projected = in_channels != channels or stride != 1
        self.shortcut = FrozenConv(in_channels, channels, 1, stride=stride) if projected else None
        self.conv1 = FrozenConv(in_channels, inner_channels, 1)
        self.conv2 = FrozenConv(inner_channels, inner_channels, 3, stride=stride)
        self.conv3 = FrozenConv(inner_channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.conv2(self.conv1(x).relu()).relu()
        return (self.conv3(x) + shortcut).relu()


class FrozenConv(nn.Module):
    """Convolution without bias, then batch normalisation with frozen statistics and frozen affine."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = FrozenBatchNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class FrozenBatchNorm(nn.Module):
    """Batch normalisation as a fixed scale and shift per channel."""

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

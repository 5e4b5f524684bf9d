"""MDETR's vision trunk: a ResNet with frozen batch norm, of which stem and first stage never train.

Source: the original backbone.py over torchvision's ResNet, whose stride is in the 3 x 3 convolution.
"""

import torch
from torch import nn

from .configuration_mdetr import MdetrConfig
from .convolution_rela import Bottleneck, FrozenConv


class ResNet(nn.Module):
    """Bottleneck ResNet; gives the stride-32 feature map."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__()
        self.freeze_stem = config.freeze_stem
        self.conv1 = FrozenConv(3, config.stem_channels, 7, stride=2)
        before = [config.stem_channels, *config.stage_channels[:3]]
        self.layers = nn.ModuleList(_stage(config, i, before[i]) for i in range(4))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, channels, height / 32, width / 32), both rounded up."""
        # not `requires_grad`, which does not survive `from_pretrained`
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_stem):
            x = self.conv1(pixel_values.contiguous(memory_format=torch.channels_last)).relu()
            x = self.layers[0](nn.functional.max_pool2d(x, 3, stride=2, padding=1))
        for layer in self.layers[1:]:
            x = layer(x)
        return x


def _stage(config: MdetrConfig, i: int, before: int) -> nn.Sequential:
    channels, inner = config.stage_channels[i], config.bottleneck_channels[i]
    first = Bottleneck(before, inner, channels, stride=2 if i else 1)
    if i and first.shortcut is None:  # as wide as the stage before, but half its resolution
        first.shortcut = FrozenConv(before, channels, 1, stride=2)
    return nn.Sequential(
        first, *(Bottleneck(channels, inner, channels, stride=1) for _ in range(config.depths[i] - 1))
    )

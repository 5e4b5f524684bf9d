"""Swin trunk: four stages of windowed attention at strides 4, 8, 16 and 32, channels last.

Parameter names follow the official Swin release, so that its ImageNet weights load by name.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_rela import attend
from .configuration_rela import RelaConfig


class SwinTrunk(nn.Module):
    """Patch embedding and four stages. Each stage takes and gives (images, height, width, channels).

    Any image size works: patches, windows and mergings pad with zeros at the right and bottom, as the published code.
    """

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        channels = config.stage_channels
        self.patch_embed = PatchEmbedding(channels[0])
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        self.layers = nn.ModuleList(
            SwinStage(config, channels[i - 1] if i else None, channels[i], config.window_heads[i], rates[i].tolist())
            for i in range(4)
        )

    def stem(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, height / 4, width / 4, channels)."""
        return self.patch_embed(pixel_values)


class PatchEmbedding(nn.Module):
    def __init__(self, channels: int, patch: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, channels, patch, stride=patch)
        self.norm = nn.LayerNorm(channels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, -width % self.patch, 0, -height % self.patch))
        return self.norm(self.proj(padded).permute(0, 2, 3, 1))


class SwinStage(nn.Module):
    """Patch merging (but for the first stage) and a run of blocks, every second one with shifted windows."""

    def __init__(
        self, config: RelaConfig, before: int | None, channels: int, heads: int, drop_path: list[float]
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(before, channels) if before else None
        self.blocks = nn.ModuleList(
            SwinBlock(config, channels, heads, shifted=i % 2 == 1, drop_path=rate) for i, rate in enumerate(drop_path)
        )
        self.window = config.window_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.downsample is None else self.downsample(x)
        height, width = (side + -side % self.window for side in x.shape[1:3])
        regions = shift_mask(height, width, self.window, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, regions)
        return x


class PatchMerging(nn.Module):
    """Joins each 2 x 2 patches: (.., height, width, channels) -> (.., height / 2, width / 2, channels out)."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * before)
        self.reduction = nn.Linear(4 * before, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinBlock(GradientCheckpointingLayer):
    def __init__(self, config: RelaConfig, channels: int, heads: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(config, channels, heads, shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        """(images, height, width, channels) -> the same; `regions` is `shift_mask` of the padded size."""
        x = x + self._drop(self.attn(self.norm1(x), regions))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = torch.empty(len(branch), 1, 1, 1, device=branch.device).bernoulli_(1 - self.drop_path)
        return branch * (keep / (1 - self.drop_path)).to(branch.dtype)


class Mlp(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class WindowAttention(nn.Module):
    """Attention inside windows of `window_size` patches, with a learned bias per relative position.

    Padding takes part as in the published code: a padded patch is zero before the projection, its bias after it.
    """

    is_causal = False

    def __init__(self, config: RelaConfig, channels: int, heads: int, shifted: bool) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.window = config.window_size
        self.shift = self.window // 2 if shifted else 0
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(self.window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        """(images, height, width, channels) -> the same."""
        images, height, width, _ = x.shape
        # Projecting before padding spares the padded patches; the bias, added after, is what they would have become.
        qkv = nn.functional.pad(
            nn.functional.linear(x, self.qkv.weight), (0, 0, 0, -width % self.window, 0, -height % self.window)
        )
        qkv = (qkv + self.qkv.bias).roll((-self.shift, -self.shift), dims=(1, 2))
        rows, columns = qkv.shape[1] // self.window, qkv.shape[2] // self.window
        windows = qkv.view(images, rows, self.window, columns, self.window, 3, self.heads, -1)
        # (3, images, windows * heads, patches of a window, channels per head)
        q, k, v = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)
        out = attend(self, self.config, q, k, v, self._bias(regions, rows * columns).to(q.dtype))
        out = out.view(images, self.window, self.window, rows, columns, self.heads, -1)
        out = out.permute(0, 3, 1, 4, 2, 5, 6).reshape(images, rows * self.window, columns * self.window, -1)
        out = out.roll((self.shift, self.shift), dims=(1, 2))
        return self.proj(out[:, :height, :width])

    def _bias(self, regions: torch.Tensor, windows: int) -> torch.Tensor:
        """Logit bias (1, windows * heads, patches, patches)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        bias = bias + regions[:, None] if self.shift else bias.expand(windows, -1, -1, -1)
        return bias.flatten(0, 1)[None]


def relative_position_index(window: int) -> torch.Tensor:
    """Row of the bias table for each pair of patches in a window: (window ** 2, window ** 2)."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down, right = row[:, None] - row[None, :] + window - 1, column[:, None] - column[None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(height: int, width: int, window: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """-100 between patches that only the cyclic shift brought into one window: (windows, patches, patches).

    `height` and `width` are multiples of `window`, in patches.
    """
    shift = window // 2
    bands = []
    for side in (height, width):
        place = torch.arange(side, device=device)
        bands.append((place >= side - window).long() + (place >= side - shift).long())
    region = 3 * bands[0][:, None] + bands[1][None, :]
    region = region.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window**2)
    return (region[:, None, :] != region[:, :, None]).to(dtype) * -100.0

"""Swin trunk: four stages of windowed attention at strides 4, 8, 16 and 32, channels last.

Parameter names follow the official Swin release, so that its ImageNet weights load by name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend
from .configuration_rela import RelaConfig
from .device_tensors import made_once


class SwinTrunk(nn.Module):
    """Patch embedding and four stages. Input and output of a stage are (images, height, width, channels).

    Any image size works: patches, windows and mergings are padded with zeros at the right and bottom, as published.
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
    """Projects each patch of `patch` x `patch` pixels."""

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
    """Patch merging (except in the first stage) and a sequence of blocks, every second one with shifted windows."""

    def __init__(
        self, config: RelaConfig, in_channels: int | None, channels: int, heads: int, drop_path: list[float]
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(in_channels, channels) if in_channels else None
        self.blocks = nn.ModuleList(SwinBlock(config, channels, heads, rate) for rate in drop_path)
        self.window = config.window_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.downsample is None else self.downsample(x)
        height, width = x.shape[1:3]
        partitions = [partition(height, width, self.window, shift, x.device) for shift in (0, self.window // 2)]
        for i, block in enumerate(self.blocks):
            x = block(x, partitions[i % 2])
        return x


class PatchMerging(nn.Module):
    """Merges each 2 x 2 patches: (.., height, width, in_channels) -> (.., height / 2, width / 2, channels)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = nn.Linear(4 * in_channels, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, dim=-1)))


class SwinBlock(GradientCheckpointingLayer):
    """Window attention and an MLP, pre-norm, with stochastic depth on both branches."""

    def __init__(self, config: RelaConfig, channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(config, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor, windows: "Windows") -> torch.Tensor:
        """(images, height, width, channels) -> the same."""
        x = self._add(x, lambda y: self.attn(self.norm1(y), windows))
        return self._add(x, lambda y: self.mlp(self.norm2(y)))

    def _add(self, x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x plus a branch of it, which in training is computed only for the images that stochastic depth keeps."""
        if not self.training or self.drop_path == 0.0:
            return x + branch(x)
        probability, compiling = 1 - self.drop_path, torch.compiler.is_compiling()
        # Eager: drawn on the CPU, so that nothing waits for the device. A compiler needs a fixed number of images.
        kept = self.kept_samples(len(x), probability, x.device if compiling else torch.device("cpu"))
        index = None if compiling else kept.nonzero()[:, 0]
        if index is None or len(index) in (0, len(x)):  # without any image, the parameters still get gradients
            y = branch(x)
            factor = kept.to(y.device, y.dtype, non_blocking=True) / probability
            return x + y * factor.view(-1, 1, 1, 1)
        index = index.to(x.device, non_blocking=True)
        y = branch(x.index_select(0, index)) / probability
        dtype = torch.promote_types(x.dtype, y.dtype)
        return x.to(dtype).index_add(0, index, y.to(dtype))

    @staticmethod
    def kept_samples(samples: int, probability: float, device: torch.device) -> torch.Tensor:
        """1 for samples that are kept, else 0."""
        return torch.empty(samples, device=device).bernoulli_(probability)


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class WindowAttention(nn.Module):
    """Attention inside windows of `window_size` patches, with a learned bias per relative position.

    Padding is not masked, as in the published code: a padded patch is zero before the projection, and the projection's
    bias after it.
    """

    is_causal = False

    def __init__(self, config: RelaConfig, channels: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.window = config.window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(self.window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, windows: "Windows") -> torch.Tensor:
        """(images, height, width, channels) -> the same."""
        images, height, width, channels = x.shape
        patches = x.flatten(1, 2)
        if len(windows.patches) > patches.shape[1]:
            patches = nn.functional.pad(patches, (0, 0, 0, 1))  # one zero patch is projected for all padding
        qkv = GatherPatches.apply(self.qkv(patches), windows.patches, windows.slots)
        qkv = qkv.view(images, -1, self.window**2, 3, self.heads, channels // self.heads)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if windows.mask is None:  # every window has the same bias: (1, heads, patches, patches)
            q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)
        else:  # windows and heads in one dimension: images share the bias (1, windows * heads, patches, patches)
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
            bias = (bias + windows.mask[:, None]).flatten(0, 1)
        out = attend(self, self.config, q, k, v, bias[None].to(q.dtype))
        if windows.mask is not None:
            out = out.unflatten(2, (-1, self.heads)).transpose(1, 2)
        out = GatherSlots.apply(out.reshape(images, -1, channels), windows.slots, windows.patches)
        return self.proj(out).view(images, height, width, channels)


class GatherPatches(torch.autograd.Function):
    """x[:, patches], (images, patches, channels) -> (images, slots, channels), with a backward pass that gathers too.

    That of `index_select` adds into the gradient slot by slot, in no fixed order on a GPU. Here each patch has one
    slot; only the last, which stands for all padding where there is any, sums several.
    """

    @staticmethod
    def forward(x: torch.Tensor, patches: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, patches)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        x, patches, slots = inputs
        ctx.save_for_backward(patches, slots)
        ctx.padded = x.shape[1] > len(slots)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple:
        patches, slots = ctx.saved_tensors
        of_patches = gradient.index_select(1, slots)
        if ctx.padded:
            is_padding = (patches == len(slots)).to(gradient.dtype)
            of_patches = torch.cat([of_patches, (is_padding @ gradient)[:, None]], dim=1)
        return of_patches, None, None


class GatherSlots(torch.autograd.Function):
    """x[:, slots], (images, slots, channels) -> (images, patches, channels); see `GatherPatches`."""

    @staticmethod
    def forward(x: torch.Tensor, slots: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, slots)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        _, slots, patches = inputs
        ctx.save_for_backward(patches)
        ctx.padded = len(patches) > len(slots)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple:
        (patches,) = ctx.saved_tensors
        if ctx.padded:  # a slot of padding has no gradient
            gradient = nn.functional.pad(gradient, (0, 0, 0, 1))
        return gradient.index_select(1, patches), None, None


class Windows(NamedTuple):
    """How a map of patches is partitioned into windows; a slot is a position inside a window."""

    patches: torch.Tensor  # (windows * slots of a window,) index of the patch in each slot; height * width is padding
    slots: torch.Tensor  # (height * width,) index of the slot of each patch
    mask: torch.Tensor | None  # (windows, slots, slots) -100 between patches that are no neighbours; None unshifted


@made_once
def partition(height: int, width: int, window: int, shift: int, device: torch.device) -> Windows:
    """Partition a map of height x width patches, padded at the right and bottom and shifted cyclically by `shift`."""
    down, right = -height % window, -width % window
    rows, columns = (height + down) // window, (width + right) // window
    patches = torch.arange(height * width, device=device).view(1, height, width)
    patches = nn.functional.pad(patches, (0, right, 0, down), value=height * width)[0].roll((-shift, -shift), (0, 1))
    patches = patches.view(rows, window, columns, window).transpose(1, 2).flatten()
    # The inverse: number the slots, undo the partition and the shift, and drop the padding.
    slots = torch.arange(len(patches), device=device).view(rows, columns, window, window).transpose(1, 2)
    slots = slots.reshape(height + down, width + right).roll((shift, shift), (0, 1))[:height, :width].flatten()
    mask = shift_mask(height + down, width + right, window, device) if shift else None
    return Windows(patches, slots, mask)


def relative_position_index(window: int) -> torch.Tensor:
    """Row of the bias table for each pair of patches in a window: (window ** 2, window ** 2)."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down, right = row[:, None] - row[None, :] + window - 1, column[:, None] - column[None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(height: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """-100 between patches that are in one window only because of the cyclic shift: (windows, patches, patches).

    `height` and `width` are multiples of `window`, in patches.
    """
    shift = window // 2
    bands = []
    for side in (height, width):
        position = torch.arange(side, device=device)
        # 0, 1 or 2: before the last window, in its first part, in the part that was shifted in from the other side
        bands.append((position >= side - window).long() + (position >= side - shift).long())
    region = 3 * bands[0][:, None] + bands[1][None, :]
    region = region.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window**2)
    return (region[:, None, :] != region[:, :, None]) * -100.0

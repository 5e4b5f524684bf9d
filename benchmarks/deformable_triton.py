"""The deformable core as one Triton kernel each way: a candidate of `benchmarks.gpu`; see `gather_points`.

It saves no indices and no bilinear weights, and adds the gradients of the values by atomics, in no fixed order. Its
logic is tested by Triton's interpreter on a CPU. No GPU has run it yet: the model does not use it.
"""
# ruff: noqa: ANN001, ANN202 (what a kernel is given has no type in Python)

import torch
import triton
import triton.language as tl

from modeling.device_tensors import made_once, upload

QUERIES = 32  # of one program


@triton.jit
def _place(base, line, column, height, width, stride, channel, inside):
    """Where the values (queries, channels) of a pixel are, and a mask that is false outside of the map."""
    there = inside & (line >= 0) & (line < height) & (column >= 0) & (column < width)
    return base + (line * width + column)[:, None] * stride + channel[None, :], there[:, None]


@triton.jit
def _load(values, base, line, column, height, width, stride, channel, inside):
    place, there = _place(base, line, column, height, width, stride, channel, inside)
    return tl.load(values + place, mask=there, other=0.0)


@triton.jit
def _add(values, base, line, column, height, width, stride, channel, inside, amount):
    place, there = _place(base, line, column, height, width, stride, channel, inside)
    tl.atomic_add(values + place, amount, mask=there)


@triton.jit
def _sample(values, points, place, base, height, width, stride, channel, inside):
    """A point's four pixels, from the top left one in reading order, with its place among them."""
    x = tl.load(points + 2 * place, mask=inside, other=0.0)
    y = tl.load(points + 2 * place + 1, mask=inside, other=0.0)
    left, top = tl.floor(x), tl.floor(y)
    column, line = left.to(tl.int32), top.to(tl.int32)
    v00 = _load(values, base, line, column, height, width, stride, channel, inside)
    v01 = _load(values, base, line, column + 1, height, width, stride, channel, inside)
    v10 = _load(values, base, line + 1, column, height, width, stride, channel, inside)
    v11 = _load(values, base, line + 1, column + 1, height, width, stride, channel, inside)
    return v00, v01, v10, v11, (x - left)[:, None], (y - top)[:, None], line, column


@triton.jit
def _forward(
    values, points, weights, layout, out, queries, pixels, heads,
    channels: tl.constexpr, levels: tl.constexpr, points_per_level: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query, channel = tl.program_id(0) * block + tl.arange(0, block), tl.arange(0, channels)
    inside, stride = query < queries, heads * channels
    row = (sample * queries + query) * heads + head
    total = tl.zeros((block, channels), dtype=out.dtype.element_ty)
    for level in range(levels):
        height, width = tl.load(layout + level * 3), tl.load(layout + level * 3 + 1)
        base = ((sample * pixels + tl.load(layout + level * 3 + 2)) * heads + head) * channels
        for point in range(points_per_level):
            place = (row * levels + level) * points_per_level + point
            v00, v01, v10, v11, right, lower, _, _ = _sample(
                values, points, place, base, height, width, stride, channel, inside
            )
            weight = tl.load(weights + place, mask=inside, other=0.0)[:, None]
            above, below = v00 + right * (v01 - v00), v10 + right * (v11 - v10)
            total += weight * (above + lower * (below - above))
    tl.store(out + (row * channels)[:, None] + channel[None, :], total, mask=inside[:, None])


@triton.jit
def _backward(
    values, points, weights, layout, gradient, of_values, of_points, of_weights, queries, pixels, heads,
    channels: tl.constexpr, levels: tl.constexpr, points_per_level: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query, channel = tl.program_id(0) * block + tl.arange(0, block), tl.arange(0, channels)
    inside, stride = query < queries, heads * channels
    row = (sample * queries + query) * heads + head
    g = tl.load(gradient + (row * channels)[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
    for level in range(levels):
        height, width = tl.load(layout + level * 3), tl.load(layout + level * 3 + 1)
        base = ((sample * pixels + tl.load(layout + level * 3 + 2)) * heads + head) * channels
        for point in range(points_per_level):
            place = (row * levels + level) * points_per_level + point
            v00, v01, v10, v11, right, lower, line, column = _sample(
                values, points, place, base, height, width, stride, channel, inside
            )
            weight = tl.load(weights + place, mask=inside, other=0.0)
            above, below = v00 + right * (v01 - v00), v10 + right * (v11 - v10)
            to_right, down = v01 - v00 + lower * (v11 - v10 - v01 + v00), below - above
            tl.store(of_weights + place, tl.sum(g * (above + lower * down), axis=1), mask=inside)
            tl.store(of_points + 2 * place, weight * tl.sum(g * to_right, axis=1), mask=inside)
            tl.store(of_points + 2 * place + 1, weight * tl.sum(g * down, axis=1), mask=inside)
            upper_share, lower_share = weight[:, None] * g * (1 - lower), weight[:, None] * g * lower
            _add(of_values, base, line, column, height, width, stride, channel, inside, upper_share * (1 - right))
            _add(of_values, base, line, column + 1, height, width, stride, channel, inside, upper_share * right)
            _add(of_values, base, line + 1, column, height, width, stride, channel, inside, lower_share * (1 - right))
            _add(of_values, base, line + 1, column + 1, height, width, stride, channel, inside, lower_share * right)


@made_once
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """Height, width and first pixel of each level: (levels, 3)."""
    starts = [sum(height * width for height, width in shapes[:i]) for i in range(len(shapes))]
    return upload([(*shape, start) for shape, start in zip(shapes, starts)], device, torch.int32)


class GatherPoints(torch.autograd.Function):
    """`gather_points` for contiguous values, points and weights of one dtype; heads of 2 ** n channels."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        values: torch.Tensor,
        points: torch.Tensor,
        weights: torch.Tensor,
        shapes: tuple[tuple[int, int], ...],
    ) -> torch.Tensor:
        values, points, weights = values.contiguous(), points.contiguous(), weights.contiguous()
        ctx.save_for_backward(values, points, weights)
        ctx.layout = _layout(shapes, values.device)
        out = values.new_empty(*points.shape[:3], values.shape[-1])
        _forward[_grid(values, points)](values, points, weights, ctx.layout, out, *_sizes(values, points))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple:
        values, points, weights = ctx.saved_tensors
        gradients = torch.zeros_like(values), torch.empty_like(points), torch.empty_like(weights)
        tensors = (values, points, weights, ctx.layout, gradient.contiguous(), *gradients)
        _backward[_grid(values, points)](*tensors, *_sizes(values, points))
        return *gradients, None


def _grid(values: torch.Tensor, points: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(points.shape[1], QUERIES), values.shape[0] * values.shape[2]


def _sizes(values: torch.Tensor, points: torch.Tensor) -> tuple[int, ...]:
    """What both kernels take after their tensors."""
    _, pixels, heads, channels = values.shape
    return points.shape[1], pixels, heads, channels, *points.shape[3:5], QUERIES

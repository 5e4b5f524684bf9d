"""The Triton kernels of the deformable core in Triton's interpreter: values and gradients of the reference.

The interpreter is chosen when Triton is imported: the test is this file as a program of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from modeling.pixel_decoder_rela import gather_points
from tests.tiny_training import ROOT


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_values_and_gradients_are_those_of_the_reference():
    command = [sys.executable, "-m", "tests.test_deformable_triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]


def compare(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, tolerance: float) -> None:
    from benchmarks.deformable_triton import GatherPoints

    torch.manual_seed(0)
    pixels, heads, channels = sum(height * width for height, width in shapes), 2, 8
    values = torch.randn(2, pixels, heads, channels, dtype=dtype, requires_grad=True)
    points = (12 * torch.rand(2, pixels, heads, 3, 4, 2, dtype=dtype) - 2).requires_grad_()
    weights = torch.rand(2, pixels, heads, 3, 4, dtype=dtype, requires_grad=True)
    inputs, expected = (values, points, weights), gather_points(values, list(shapes), points, weights)
    actual = GatherPoints.apply(*inputs, shapes)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    first, second = (torch.autograd.grad((y * upstream).sum(), inputs) for y in (actual, expected))
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    print("equal")


if __name__ == "__main__":
    compare(((1, 2), (2, 3), (5, 7)), torch.float64, 1e-11)

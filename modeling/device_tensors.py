"""Small tensors of known numbers, made without waiting for the device and not again in every step."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def upload(numbers: Sequence, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a few Python numbers; unlike `torch.tensor(..., device=device)` it does not wait for the device."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def made_once(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Keep what a function of sizes, dtypes and a device gives, for the 32 newest arguments; nobody writes into it."""
    kept = lru_cache(maxsize=32)(function)

    @wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        # a compiler needs the operations, and tensors of a mode (fake ones) mean nothing outside of it
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
            return function(*arguments, **named)
        with torch.inference_mode(False):  # a tensor of inference mode could not be used in training
            return kept(*arguments, **named)

    return call

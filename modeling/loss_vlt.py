"""The published loss of VLT."""

import torch
from torch import nn

from .boxes import mean_over_processes


def mask_loss(logits: torch.Tensor, masks: torch.Tensor, no_target: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross entropy summed over the pixels, not averaged, and averaged over the sentences with a target.

    The published training has no sentences without target; here they have weight 0. The number of targets is that of
    all processes of a distributed run: they must call this together.

    Args:
        logits: (B, 1, h, w).
        masks: (B, h, w), 0..1; pixels at an edge may lie between.
        no_target: (B,) bool; None where every sentence has a target.
    """
    losses = nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), masks.float(), reduction="none")
    losses = losses.sum((1, 2))  # (B,)
    if no_target is None:
        return losses.mean()
    targets = mean_over_processes((~no_target).sum().float())
    return (losses * ~no_target).sum() / targets.clamp(min=1e-6)  # 0 / 1e-6 without any target


def kernel_squares(model: nn.Module) -> torch.Tensor:
    """Sum of the squares of all convolution kernels, without biases; published: frozen ones included."""
    kernels = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return torch.stack([kernel.float().square().sum() for kernel in kernels]).sum()

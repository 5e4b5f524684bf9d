"""The loss of GRES (CVPR 2023) section 4.4 as the original criterion.py computes it, and its named alternatives."""

import math

import torch
from torch import nn

from .boxes import upload
from .configuration_rela import RelaConfig
from .fusion_rela import full_precision
from .region_decoder_rela import RegionOutput


def referring_loss(
    outputs: list[RegionOutput], masks: torch.Tensor, no_target: torch.Tensor, config: RelaConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum over `outputs`, and the unweighted terms "mask", "minimap", "no_target" of the last one.

    Args:
        outputs: of the last layer alone, or of every layer for auxiliary supervision.
        masks: (batch, height, width) merged target masks, 0 or 1.
        no_target: (batch,) whether the sentence refers to nothing.
        config: names the loss and its weights.
    """
    masks = masks.to(outputs[-1].masks.dtype)
    weights = {
        "mask": config.mask_loss_weight,
        "minimap": config.minimap_loss_weight,
        "no_target": config.no_target_loss_weight,
    }
    total = masks.new_zeros(())
    for output in outputs:
        terms = _terms(output, masks, no_target, config)
        total = total + sum(weights[name] * term for name, term in terms.items())
    return total, terms


def category_loss(logits: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
    """Cross entropy of (images, categories + 1, h, w) with (images, height, width) indices; -100 is ignored."""
    target = nn.functional.interpolate(categories[:, None].float(), logits.shape[-2:], mode="nearest-exact")
    target = target[:, 0].long()
    total = nn.functional.cross_entropy(full_precision(logits), target, ignore_index=-100, reduction="sum")
    return total / (target != -100).sum().clamp(min=1)


def _terms(
    output: RegionOutput, masks: torch.Tensor, no_target: torch.Tensor, config: RelaConfig
) -> dict[str, torch.Tensor]:
    """The unweighted terms of one layer."""
    weight = upload(config.class_weights, masks.device, masks.dtype)
    if config.mask_loss == "bce_dice":
        mask_loss = _bce_dice(output.masks, masks)
    else:
        mask_loss = nn.functional.cross_entropy(_enlarge(output.masks, masks), masks.long(), weight)
    return {
        "mask": mask_loss,
        "minimap": _minimap_loss(full_precision(output.minimap), masks, weight, config.soft_minimap),
        "no_target": nn.functional.cross_entropy(full_precision(output.no_target), no_target.long(), weight),
    }


def _bce_dice(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy plus dice of the margin between the two classes, averaged over the sentences."""
    margin = _enlarge(logits[:, 1:] - logits[:, :1], masks)[:, 0].flatten(1)
    masks = masks.flatten(1)
    covered = margin.sigmoid()
    dice = 1 - (2 * overlap(covered, masks) + 1) / (covered.sum(1) + masks.sum(1) + 1)
    # binary cross entropy; the threshold is high enough for softplus to be exact in fp64, and exp to be finite in fp32
    entropy = nn.functional.softplus(margin, threshold=50).mean() - overlap(margin, masks).sum() / margin.numel()
    return entropy + dice.mean()


def _minimap_loss(minimap: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor, soft: bool) -> torch.Tensor:
    """Cross entropy of the minimap (batch, regions, 2) with the target resized to its grid of regions.

    The published target is the mask interpolated at each cell's centre and truncated to an integer: a cell is 1 where
    all pixels around its centre are 1. With `soft` it is the covered fraction of the cell.
    """
    side = math.isqrt(minimap.shape[1])
    masks, size = masks.float()[:, None], (side, side)
    if soft:
        covered = nn.functional.interpolate(masks, size, mode="area").flatten(1).to(minimap.dtype)
        target = torch.stack([1 - covered, covered], dim=1)
    else:
        target = nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(1).long()
    return nn.functional.cross_entropy(minimap.transpose(1, 2), target, weight)


def overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The sums of the products of (batch, pixels) x 2, without a tensor of the products: (batch,)."""
    with torch.autocast(first.device.type, enabled=False):
        return torch.bmm(first[:, None], second[:, :, None])[:, 0, 0]


def _enlarge(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Logits (batch, classes, h, w) at the size of `masks`."""
    if logits.device.type == "cpu":  # two matrix products, whose backward pass is four times as fast there
        rows, columns = (_weights(*sides, logits.dtype) for sides in zip(logits.shape[-2:], masks.shape[-2:]))
        with torch.autocast("cpu", enabled=False):
            return rows.T @ (logits @ columns)
    return nn.functional.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)


def _weights(side: int, larger: int, dtype: torch.dtype) -> torch.Tensor:
    """Bilinear weights of the pixels of one side for those of a larger one: (side, larger)."""
    identity = torch.eye(side, dtype=dtype)[None]
    return nn.functional.interpolate(identity, larger, mode="linear", align_corners=False)[0]

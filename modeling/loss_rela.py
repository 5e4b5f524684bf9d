"""The loss of GRES (CVPR 2023) section 4.4 as the original criterion.py computes it, and its named alternatives."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .boxes import mean_over_processes
from .configuration_rela import RelaConfig
from .device_tensors import upload
from .fusion_rela import full_precision
from .region_decoder_rela import RegionOutput


def referring_loss(
    outputs: list[RegionOutput], masks: torch.Tensor, no_target: torch.Tensor, config: RelaConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum over `outputs`, and the unweighted terms "mask", "minimap", "no_target" of the last one.

    Class weights are averaged over the processes of a distributed run: all processes must call this together.

    Args:
        outputs: of the last layer alone, or of every layer for auxiliary supervision.
        masks: (batch, height, width) merged target masks, 0 or 1.
        no_target: (batch,) whether the sentence refers to nothing.
        config: names the loss and its weights.
    """
    masks = masks.to(outputs[-1].masks.dtype)
    minimap = _minimap_target(masks, outputs[-1].minimap.shape[1], config.soft_minimap)
    truth = Truth(masks, minimap, no_target.long())
    class_weights = upload(config.class_weights, masks.device, masks.dtype)
    divisors = _divisors(truth, class_weights)
    weights = {
        "mask": config.mask_loss_weight,
        "minimap": config.minimap_loss_weight,
        "no_target": config.no_target_loss_weight,
    }
    total = masks.new_zeros(())
    for output in outputs:
        terms = _terms(output, truth, class_weights, divisors, config.mask_loss)
        total = total + sum(weights[name] * term for name, term in terms.items())
    return total, terms


def category_loss(logits: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
    """Cross entropy of (images, categories + 1, h, w) with (images, height, width) indices; -100 is ignored.

    The number of pixels is averaged over the processes of a distributed run: all processes must call this together.
    """
    target = nn.functional.interpolate(categories[:, None].float(), logits.shape[-2:], mode="nearest-exact")
    target = target[:, 0].long()
    total = nn.functional.cross_entropy(full_precision(logits), target, ignore_index=-100, reduction="sum")
    pixels = mean_over_processes((target != -100).sum().to(total.dtype))
    return total / pixels.clamp(min=1e-6)  # 0 / 1e-6 where all is ignored


def _terms(
    output: RegionOutput, truth: "Truth", class_weights: torch.Tensor, divisors: "Truth", mask_loss: str
) -> dict[str, torch.Tensor]:
    """The unweighted terms of one layer."""
    entropy = partial(nn.functional.cross_entropy, weight=class_weights, reduction="sum")
    if mask_loss == "bce_dice":
        mask = _bce_dice(output.masks, truth.masks)
    else:
        mask = entropy(_enlarge(output.masks, truth.masks), truth.masks.long()) / divisors.masks
    minimap = entropy(full_precision(output.minimap).transpose(1, 2), truth.minimap) / divisors.minimap
    no_target = entropy(full_precision(output.no_target), truth.no_target) / divisors.no_target
    return {"mask": mask, "minimap": minimap, "no_target": no_target}


class Truth(NamedTuple):
    """The targets of the three terms, or a number for each."""

    masks: torch.Tensor  # (batch, height, width) 0 or 1
    minimap: torch.Tensor  # (batch, regions) 0 or 1, or (batch, 2, regions) fractions
    no_target: torch.Tensor  # (batch,) 0 or 1


def _divisors(truth: Truth, class_weights: torch.Tensor) -> Truth:
    """What each sum of cross entropies is divided by: the class weights of all its targets, a mean over processes.

    Otherwise a batch would have another loss when its sentences are divided among processes. Fractions are divided by
    their number, as torch does.
    """

    def weight_of(target: torch.Tensor) -> torch.Tensor:
        ones = target.sum()
        return class_weights[0] * (target.numel() - ones) + class_weights[1] * ones

    is_soft = truth.minimap.ndim == 3
    cells = class_weights.new_full((), truth.minimap[:, 0].numel()) if is_soft else weight_of(truth.minimap)
    return Truth(*mean_over_processes(torch.stack([weight_of(truth.masks), cells, weight_of(truth.no_target)])))


def _bce_dice(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy plus dice of the margin between the two classes, averaged over the sentences."""
    margin = _enlarge(logits[:, 1:] - logits[:, :1], masks)[:, 0].flatten(1)
    masks = masks.flatten(1)
    covered = margin.sigmoid()
    dice = 1 - (2 * overlap(covered, masks) + 1) / (covered.sum(1) + masks.sum(1) + 1)
    # binary cross entropy; the threshold is high enough for softplus to be exact in fp64, and exp to be finite in fp32
    entropy = nn.functional.softplus(margin, threshold=50).mean() - overlap(margin, masks).sum() / margin.numel()
    return entropy + dice.mean()


def _minimap_target(masks: torch.Tensor, regions: int, soft: bool) -> torch.Tensor:
    """The masks resized to the grid of regions.

    The published target is the mask interpolated at each cell's centre and truncated to an integer: a cell is 1 where
    all pixels around its centre are 1; (batch, regions). With `soft` it is the fraction of the cell that is not
    covered and that which is: (batch, 2, regions).
    """
    masks, size = full_precision(masks)[:, None], (math.isqrt(regions),) * 2
    if not soft:
        return nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(1).long()
    covered = nn.functional.interpolate(masks, size, mode="area").flatten(1)
    return torch.stack([1 - covered, covered], dim=1)


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

"""MDETR's matcher and losses, as the original matcher.py and mdetr.py compute them (MDETR, ICCV 2021, section 2).

Labels of B sentences, with up to T targets each, are a dictionary of tensors:

- "boxes": (B, T, 4) cxcywh relative to the image, 0..1;
- "positive_map": (B, T, positions), for each target a distribution over the tokens that name it;
- "num_targets": (B,) how many of the T are real, 0 where the sentence refers to nothing;
- "is_final": (B, T), with `predict_final` only: 1 where the sentence is about the box, 0 where it mentions it.
"""

import numpy as np
import torch
from torch import nn

from .boxes_rela import assign, corners, generalized_iou, mean_number
from .configuration_mdetr import MdetrConfig

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
Prediction = dict[str, torch.Tensor]


def grounding_loss(
    predictions: list[Prediction],
    proj_tokens: torch.Tensor | None,
    labels: dict[str, torch.Tensor],
    config: MdetrConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum over all layers, and the unweighted terms under the original's names.

    The number of targets is averaged over the processes of a distributed run: all of them must call this together.

    Args:
        predictions: for each decoder layer, the last one last, "logits" (B, queries, positions), "pred_boxes" (B,
            queries, 4), and where the model has those heads "proj_queries" (B, queries, d), "pred_isfinal" (B,
            queries, 1).
        proj_tokens: (B, tokens, d), or None without alignment.
        labels: see the module.
        config: holds the weights.

    Returns:
        the sum, and "loss_ce", "loss_bbox", "loss_giou", "loss_contrastive_align", "loss_isfinal" and the unweighted
        "cardinality_error" of the last layer; those of layer i before it end in `_i`.
    """
    weights = {
        "loss_ce": config.class_loss_weight,
        "loss_bbox": config.box_loss_weight,
        "loss_giou": config.giou_loss_weight,
        "loss_contrastive_align": config.align_loss_weight,
        "loss_isfinal": config.final_loss_weight,
        "cardinality_error": 0.0,
    }
    total, all_terms = predictions[-1]["pred_boxes"].new_zeros((), dtype=torch.float32), {}
    num_boxes = mean_number(labels["num_targets"])
    for i, prediction in enumerate(predictions):
        prediction = {name: value.float() for name, value in prediction.items()}
        terms = _terms(prediction, proj_tokens, labels, num_boxes, config)
        total = total + sum(weights[name] * term for name, term in terms.items() if weights[name])
        suffix = "" if i + 1 == len(predictions) else f"_{i}"
        all_terms |= {name + suffix: term for name, term in terms.items()}
    return total, all_terms


@torch.no_grad()
def match(prediction: Prediction, labels: dict[str, torch.Tensor], config: MdetrConfig) -> Pairs:
    """The cheapest one-to-one pairs of queries and targets, for each sentence (queries ascending, their targets).

    Raises:
        ValueError: when a cost is not finite: the model has diverged.
    """
    boxes, targets = prediction["pred_boxes"].float(), labels["boxes"].float()
    agreement = prediction["logits"].float().softmax(-1) @ labels["positive_map"].float().transpose(1, 2)
    costs = (
        config.box_cost * torch.cdist(boxes, targets, p=1)
        - config.class_cost * agreement
        - config.giou_cost * generalized_iou(corners(boxes)[:, :, None], corners(targets)[:, None])
    )  # (B, queries, T)
    pairs = []
    for b, (cost, count) in enumerate(zip(costs.cpu().double().numpy(), labels["num_targets"].tolist(), strict=True)):
        if not np.isfinite(cost[:, :count]).all():
            raise ValueError(
                f"matching cost of sentence {b} is not finite: the model has diverged, or a box has no area"
            )
        pairs.append(tuple(torch.from_numpy(side).to(boxes.device) for side in assign(cost[:, :count])))
    return pairs


def _terms(
    prediction: Prediction,
    proj_tokens: torch.Tensor | None,
    labels: dict[str, torch.Tensor],
    num_boxes: torch.Tensor,
    config: MdetrConfig,
) -> dict[str, torch.Tensor]:
    """One layer's terms."""
    pairs = match(prediction, labels, config)
    sentence = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(pairs)])
    query, target = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    positive_map = labels["positive_map"][sentence, target].float()  # (pairs, positions)
    boxes, targets = prediction["pred_boxes"][sentence, query], labels["boxes"][sentence, target].float()
    sums = {
        "loss_ce": _soft_token_loss(prediction["logits"], (sentence, query), positive_map, config.no_object_weight),
        "loss_bbox": (boxes - targets).abs().sum(),
        "loss_giou": (1 - generalized_iou(corners(boxes), corners(targets))).sum(),
    }
    if proj_tokens is not None:
        similarity = prediction["proj_queries"] @ proj_tokens.float().transpose(1, 2) / config.temperature
        named = torch.zeros_like(similarity, dtype=torch.bool)
        named[sentence, query] = positive_map[:, : named.shape[2]] > 0
        sums["loss_contrastive_align"] = (_contrast(similarity, named, 2) + _contrast(similarity, named, 1)) / 2
    if "pred_isfinal" in prediction:
        logits, truth = prediction["pred_isfinal"][sentence, query, 0], labels["is_final"][sentence, target]
        sums["loss_isfinal"] = nn.functional.binary_cross_entropy_with_logits(logits, truth.float(), reduction="sum")
    return {name: value / num_boxes for name, value in sums.items()} | {
        "cardinality_error": _cardinality_error(prediction["logits"], labels["num_targets"])
    }


def _soft_token_loss(
    logits: torch.Tensor, matched: tuple[torch.Tensor, torch.Tensor], positive_map: torch.Tensor, no_object: float
) -> torch.Tensor:
    """Cross entropy with the matched targets' token distributions; elsewhere "no object", at weight `no_object`."""
    truth = torch.zeros_like(logits)
    truth[..., -1] = no_object
    truth[matched] = positive_map
    return -(logits.log_softmax(-1) * truth).sum()


def _contrast(similarity: torch.Tensor, named: torch.Tensor, dim: int) -> torch.Tensor:
    """InfoNCE along `dim` of (B, queries, tokens): named pairs' mean similarity against all, padding included."""
    count = named.sum(dim)
    pull = similarity.masked_fill(~named, 0).sum(dim) / (count + 1e-6)
    return (similarity.logsumexp(dim) - pull)[count > 0].sum()


@torch.no_grad()
def _cardinality_error(logits: torch.Tensor, num_targets: torch.Tensor) -> torch.Tensor:
    """Mean difference between the number of queries whose best class is a token and the number of targets."""
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    return (found - num_targets).abs().float().mean()

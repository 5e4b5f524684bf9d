"""MDETR's matcher and losses, as the original matcher.py and mdetr.py compute them (MDETR, ICCV 2021, section 2).

Labels of B sentences with up to T targets each are a dictionary of tensors:

- "boxes": (B, T, 4) cxcywh relative to the image, 0..1;
- "positive_map": (B, T, positions), for each target a distribution over the tokens that name it;
- "num_boxes": (B,) how many of the T are real, 0 where the sentence has no target;
- "is_final": (B, T), read with `predict_final` only: 1 where the sentence is about the box, 0 if it is a mention.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .boxes import Matches, cxcywh_to_xyxy, generalized_iou, match_layers, mean_count
from .configuration_mdetr import MdetrConfig

LayerOutput = dict[str, torch.Tensor]
Labels = dict[str, torch.Tensor]


def grounding_loss(
    outputs: list[LayerOutput], proj_tokens: torch.Tensor | None, labels: Labels, config: MdetrConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum over all layers, and the unweighted terms under the original's names.

    The number of boxes is averaged over the processes of a distributed run: all processes must call this together.

    Args:
        outputs: for each decoder layer, the last one last, "logits" (B, queries, positions), "pred_boxes" (B,
            queries, 4), and where the model has those heads "proj_queries" (B, queries, d), "pred_isfinal" (B,
            queries, 1).
        proj_tokens: (B, tokens, d), or None without alignment.
        labels: see the module.
        config: holds the weights.

    Returns:
        the sum, and "loss_ce", "loss_bbox", "loss_giou", "loss_contrastive_align", "loss_isfinal" and the unweighted
        "cardinality_error" of the last layer; the names of layer i before it end in `_i`.

    Raises:
        ValueError: when the positive map has another number of positions than the model.
    """
    positions = labels["positive_map"].shape[-1]
    if positions != config.num_positions:
        raise ValueError(
            f"positive_map has {positions} positions and the model num_positions={config.num_positions}: make the "
            f"processor with num_positions={config.num_positions}"
        )
    weights = {
        "loss_ce": config.class_loss_weight,
        "loss_bbox": config.box_loss_weight,
        "loss_giou": config.giou_loss_weight,
        "loss_contrastive_align": config.align_loss_weight,
        "loss_isfinal": config.final_loss_weight,
        "cardinality_error": 0.0,
    }
    total, all_terms = outputs[-1]["pred_boxes"].new_zeros((), dtype=torch.float32), {}
    num_boxes = mean_count(labels["num_boxes"])
    outputs = [{name: value.float() for name, value in output.items()} for output in outputs]
    for i, (output, matches) in enumerate(zip(outputs, match(outputs, labels, config), strict=True)):
        terms = _terms(output, matches, proj_tokens, labels, num_boxes, config)
        total = total + sum(weights[name] * term for name, term in terms.items() if weights[name])
        suffix = "" if i + 1 == len(outputs) else f"_{i}"
        all_terms |= {name + suffix: term for name, term in terms.items()}
    return total, all_terms


@torch.compiler.disable  # NumPy, which a compiler would cut into several graphs
@torch.no_grad()
def match(outputs: Sequence[LayerOutput], labels: Labels, config: MdetrConfig) -> list[Matches]:
    """For each layer the cheapest one-to-one pairs of queries and targets; a match's `sample` is a sentence."""
    return match_layers([_costs(output, labels, config) for output in outputs], labels["num_boxes"])


def _costs(output: LayerOutput, labels: Labels, config: MdetrConfig) -> torch.Tensor:
    """(B, queries, T) costs of pairing queries and targets."""
    boxes, targets = output["pred_boxes"].float(), labels["boxes"].float()
    agreement = output["logits"].float().softmax(-1) @ labels["positive_map"].float().transpose(1, 2)
    return (
        config.box_cost * torch.cdist(boxes, targets, p=1)
        - config.class_cost * agreement
        - config.giou_cost * generalized_iou(cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(targets)[:, None])
    )


def _terms(
    output: LayerOutput,
    matches: Matches,
    proj_tokens: torch.Tensor | None,
    labels: Labels,
    num_boxes: torch.Tensor,
    config: MdetrConfig,
) -> dict[str, torch.Tensor]:
    """The unweighted terms of one layer."""
    sentence, query, target = matches
    positive_map = labels["positive_map"][sentence, target].float()  # (pairs, positions)
    boxes, targets = output["pred_boxes"][sentence, query], labels["boxes"][sentence, target].float()
    sums = {
        "loss_ce": _soft_token_loss(output["logits"], (sentence, query), positive_map, config.no_object_weight),
        "loss_bbox": (boxes - targets).abs().sum(),
        "loss_giou": (1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))).sum(),
    }
    if proj_tokens is not None:
        similarity = output["proj_queries"] @ proj_tokens.float().transpose(1, 2) / config.temperature
        named = torch.zeros_like(similarity, dtype=torch.bool)
        named[sentence, query] = positive_map[:, : named.shape[2]] > 0
        sums["loss_contrastive_align"] = (_contrast(similarity, named, 2) + _contrast(similarity, named, 1)) / 2
    if "pred_isfinal" in output:
        logits, truth = output["pred_isfinal"][sentence, query, 0], labels["is_final"][sentence, target]
        sums["loss_isfinal"] = nn.functional.binary_cross_entropy_with_logits(logits, truth.float(), reduction="sum")
    return {name: value / num_boxes for name, value in sums.items()} | {
        "cardinality_error": _cardinality_error(output["logits"], labels["num_boxes"])
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
    mean_similarity = similarity.masked_fill(~named, 0).sum(dim) / (count + 1e-6)
    return torch.where(count > 0, similarity.logsumexp(dim) - mean_similarity, 0).sum()


@torch.no_grad()
def _cardinality_error(logits: torch.Tensor, num_boxes: torch.Tensor) -> torch.Tensor:
    """Mean difference between the number of queries whose best class is a token and the number of targets."""
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
    return (predicted - num_boxes).abs().float().mean()

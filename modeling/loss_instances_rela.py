"""The losses of the instance branch.

Labels of B sentences about a number of images with up to N objects each are a dictionary of tensors:

- "object_boxes": (images, N, 4) cxcywh relative to the processed image, 0..1;
- "object_masks": (images, N, height / 4, width / 4), 1 where the object is;
- "num_objects": (images,) how many of the N are real;
- "targets": (B, N) bool, which objects of its image a sentence refers to.
"""

import torch
from torch import nn

from .boxes import Matches, cxcywh_to_xyxy, generalized_iou, match_costs, mean_count
from .configuration_rela import RelaConfig
from .fusion_rela import full_precision
from .image_index import per_sentence
from .instances_rela import Choice, Objects

Labels = dict[str, torch.Tensor]
Terms = dict[str, torch.Tensor]


def instance_loss(
    objects: Objects,
    choice: Choice | None,
    labels: Labels,
    image_index: torch.Tensor | None,
    config: RelaConfig,
) -> tuple[torch.Tensor, Terms]:
    """Weighted sum, and the unweighted terms "centre", "box", "giou", "instance_mask", "relevance", "count".

    Queries and objects of an image are matched once, for all sentences and layers. The number of objects is averaged
    over the processes of a distributed run: all processes must call this together.

    Args:
        objects: detected in the images.
        choice: of the sentences; None without sentences.
        labels: see the module.
        image_index: (B,) which image each sentence is about; None for one each.
        config: holds the weights.
    """
    objects = Objects(*map(full_precision, objects))
    number = mean_count(labels["num_objects"])
    matches = match(objects, choice, labels, image_index, config)
    image, query, item = matches
    boxes, masks = objects.boxes[image, query], objects.masks[image, query].flatten(1)
    true_boxes = labels["object_boxes"][image, item].to(boxes.dtype)
    true_masks = labels["object_masks"][image, item].flatten(1).to(masks.dtype)
    terms = {
        "centre": _focal(objects.centres, centre_map(objects.centres.shape, labels)) / number,
        "box": (boxes - true_boxes).abs().sum() / number,
        "giou": (1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(true_boxes))).sum() / number,
        "instance_mask": _mask_loss(masks, true_masks).sum() / number,
    }
    weights = {
        "centre": config.centre_loss_weight,
        "box": config.box_loss_weight,
        "giou": config.giou_loss_weight,
        "instance_mask": config.instance_mask_loss_weight,
        "relevance": config.relevance_loss_weight,
        "count": config.count_loss_weight,
    }
    total = sum(weights[name] * term for name, term in terms.items())
    if choice is not None:
        truth = _true_relevance(matches, labels, image_index, choice.relevance[-1].shape[1])
        sentences = mean_count(per_sentence(labels["num_objects"], image_index))
        for logits in choice.relevance:
            loss = nn.functional.binary_cross_entropy_with_logits(full_precision(logits), truth, reduction="sum")
            terms["relevance"] = loss / sentences
            total = total + weights["relevance"] * terms["relevance"]
        if choice.counts is not None:
            counts = labels["targets"].sum(1).clamp(max=config.max_count)
            terms["count"] = nn.functional.cross_entropy(full_precision(choice.counts), counts)
            total = total + weights["count"] * terms["count"]
    return total, terms


@torch.compiler.disable  # NumPy, which a compiler would cut into several graphs
@torch.no_grad()
def match(
    objects: Objects, choice: Choice | None, labels: Labels, image_index: torch.Tensor | None, config: RelaConfig
) -> Matches:
    """The cheapest one-to-one pairs of queries and objects in each image, by box, mask and relevance.

    The cost of relevance is its mean error over the sentences about the image. The `sample` of a match is an image.
    """
    targets = labels["object_boxes"].to(objects.boxes.dtype)
    masks, truth = objects.masks.sigmoid().flatten(2), labels["object_masks"].flatten(2).to(objects.masks.dtype)
    overlap = 2 * masks @ truth.transpose(1, 2) + 1
    dice = 1 - overlap / (masks.sum(-1)[:, :, None] + truth.sum(-1)[:, None] + 1)
    giou = generalized_iou(cxcywh_to_xyxy(objects.boxes)[:, :, None], cxcywh_to_xyxy(targets)[:, None])
    costs = config.box_loss_weight * torch.cdist(objects.boxes, targets, p=1)
    costs = costs - config.giou_loss_weight * giou + config.instance_mask_loss_weight * dice
    if choice is not None:
        relevance, chosen = choice.relevance[-1].sigmoid(), labels["targets"].to(costs.dtype)
        error = (relevance[:, :, None] - chosen[:, None]).abs()  # (B, queries, N)
        image = torch.arange(len(error), device=error.device) if image_index is None else image_index
        sentences = costs.new_zeros(len(costs)).index_add(0, image, costs.new_ones(len(image)))
        sentences = sentences.clamp(min=1)[:, None, None]
        costs = costs + config.relevance_loss_weight * torch.zeros_like(costs).index_add(0, image, error) / sentences
    return match_costs(costs, labels["num_objects"])


def centre_map(shape: tuple[int, int, int], labels: Labels) -> torch.Tensor:
    """1 on the pixel of each object's centre, a Gaussian around it: (images, height, width).

    Its standard deviation is a tenth of the box's side, at least 0.3 pixels.
    """
    boxes = labels["object_boxes"].float()
    _, height, width = shape
    x, y = (torch.arange(side, device=boxes.device, dtype=boxes.dtype) for side in (width, height))
    centre_x, centre_y = (boxes[..., 0, None] * width).floor(), (boxes[..., 1, None] * height).floor()
    spread_x, spread_y = ((0.1 * boxes[..., i, None] * n).clamp(min=0.3) for i, n in ((2, width), (3, height)))
    bell_x, bell_y = (-0.5 * ((x - centre_x) / spread_x) ** 2).exp(), (-0.5 * ((y - centre_y) / spread_y) ** 2).exp()
    bells = bell_y[..., :, None] * bell_x[..., None, :]  # (images, N, height, width)
    real = torch.arange(bells.shape[1], device=bells.device) < labels["num_objects"][:, None]
    return (bells * real[..., None, None]).amax(1)


def _focal(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """CornerNet's focal loss (ECCV 2018, equation 1), summed; reduced near a centre, where `truth` is close to 1."""
    p = logits.sigmoid()
    at_centre = (1 - p) ** 2 * nn.functional.logsigmoid(logits)
    elsewhere = (1 - truth) ** 4 * p**2 * nn.functional.logsigmoid(-logits)
    return -torch.where(truth == 1, at_centre, elsewhere).sum()


def _mask_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy plus dice of each (n, pixels)."""
    covered = logits.sigmoid()
    dice = 1 - (2 * (covered * truth).sum(1) + 1) / (covered.sum(1) + truth.sum(1) + 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1) + dice


def _true_relevance(
    matches: Matches, labels: Labels, image_index: torch.Tensor | None, num_queries: int
) -> torch.Tensor:
    """1 for queries whose matched object is a target of the sentence: (B, queries)."""
    image, query, item = matches
    matched = labels["object_boxes"].new_zeros(len(labels["object_boxes"]), num_queries, dtype=torch.long)
    matched[image, query] = item + 1  # 0: no object, which is never a target
    targets = nn.functional.pad(labels["targets"], (1, 0))  # (B, 1 + N)
    return targets.gather(1, per_sentence(matched, image_index)).float()

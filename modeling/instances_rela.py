"""Instance branch: detects the objects of an image independently of the sentence, then chooses the sentence's targets.

`ObjectFinder` runs once per image: the strongest peaks of a map of object centres (CenterNet, arXiv 1904.07850) become
queries with a box and a mask. `InstanceChooser` runs once per sentence: the queries pool the sentence's mask features
inside their masks, then attend to each other, to the words and to the regions. The regions do not attend to the
queries, so the branch does not change their outputs.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .attention import Attention
from .configuration_rela import RelaConfig
from .fusion_rela import full_precision
from .image_index import per_sentence
from .region_decoder_rela import RegionOutput

INITIAL_SIZE = 0.2  # initial side of a query's box, as a fraction of the image's side
OUTSIDE_PENALTY = 16.0  # subtracted from a mask logit per half box side of distance from its box


class Objects(NamedTuple):
    """The objects detected in images."""

    centres: torch.Tensor  # (images, height / 4, width / 4) logits of the map of object centres
    boxes: torch.Tensor  # (images, queries, 4) cxcywh, 0..1
    masks: torch.Tensor  # (images, queries, height / 4, width / 4) logits
    features: torch.Tensor  # (images, queries, channels)


class Choice(NamedTuple):
    """The relevance of objects to sentences."""

    relevance: list[torch.Tensor]  # (sentences, queries) logits of each layer
    counts: torch.Tensor | None  # (sentences, max_count + 1) logits of the number of targets


class ObjectFinder(nn.Module):
    """The strongest object centres in an image, each with a box and a mask."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size, self.num_queries = config.pixel_decoder_size, config.num_instance_queries
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, size), nn.LayerNorm(size)) for channels in config.stage_channels
        )
        self.pixels = nn.Sequential(
            nn.Conv2d(size, size, 3, padding=1, bias=False), nn.GroupNorm(config.norm_groups, size), nn.ReLU()
        )
        self.centre = nn.Conv2d(size, 1, 1)
        self.box = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 4))
        self.mask_embed = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self, stages: list[torch.Tensor]) -> Objects:
        """Stage outputs (images, height, width, channels) at strides 4 to 32 -> `Objects`."""
        levels = [lateral(x).permute(0, 3, 1, 2) for lateral, x in zip(self.laterals, stages, strict=True)]
        x = levels[-1]
        for level in levels[-2::-1]:
            x = level + nn.functional.interpolate(x, level.shape[-2:], mode="bilinear", align_corners=False)
        pixels = self.pixels(x)  # (images, channels, height / 4, width / 4)
        centres = self.centre(pixels)[:, 0]
        peaks = self.peaks(centres.detach())
        flat = pixels.flatten(2)
        features = flat.transpose(1, 2).take_along_dim(peaks[..., None], dim=1)
        boxes = self._boxes(features, peaks, centres.shape[-2:])
        masks = (self.mask_embed(features) @ flat).unflatten(2, centres.shape[-2:])
        return Objects(centres, boxes, masks - OUTSIDE_PENALTY * outside(boxes.detach(), centres.shape[-2:]), features)

    def peaks(self, centres: torch.Tensor) -> torch.Tensor:
        """Flat positions of the strongest centres, local maxima before all others: (images, queries)."""
        highest = nn.functional.max_pool2d(centres[:, None], 3, stride=1, padding=1)[:, 0]
        # A logit minus 100 is below the logit of every local maximum.
        ranked = torch.where(centres == highest, centres, centres - 100).flatten(1)
        return ranked.topk(self.num_queries).indices

    def _boxes(self, features: torch.Tensor, peaks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        height, width = shape
        x, y = (peaks % width + 0.5) / width, (peaks // width + 0.5) / height
        initial = torch.stack([x, y, torch.full_like(x, INITIAL_SIZE), torch.full_like(x, INITIAL_SIZE)], dim=-1)
        return (initial.logit() + self.box(features)).sigmoid()

    def reset(self) -> None:
        """Initialise: few centres, boxes of `INITIAL_SIZE` and small mask logits."""
        init.xavier_uniform_(self.centre.weight, gain=0.1)
        init.constant_(self.centre.bias, -4.0)
        init.zeros_(self.box[-1].weight)
        init.xavier_uniform_(self.mask_embed[-1].weight, gain=0.1)


class InstanceChooser(nn.Module):
    """The objects that a sentence refers to."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.object_projection = nn.Linear(config.pixel_decoder_size, size)
        self.sentence_projection = nn.Linear(config.mask_size, size)
        self.position = nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, size))
        self.word_projection = nn.Linear(config.text_config.hidden_size, size)
        self.layers = nn.ModuleList(ChoiceLayer(config) for _ in range(config.instance_layers))
        self.norm = nn.LayerNorm(size)
        self.relevance = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))
        self.region_weight = nn.Parameter(torch.ones(1))  # of the regions' mask logits in the relevance
        counts = config.max_count + 1 if config.count_loss_weight else 0
        self.count = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, counts)) if counts else None

    def forward(
        self,
        objects: Objects,
        regions: RegionOutput,
        mask_features: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> Choice:
        """The `Choice` of B sentences.

        Args:
            objects: of their images.
            regions: the last layer's output of the region decoder.
            mask_features: (B, mask channels, height / 4, width / 4).
            text: (B, tokens, text channels).
            attention_mask: (B, tokens), 1 for words and 0 for padding.
            image_index: (B,) which image each sentence is about; None for one each.
        """
        # Pool the sentence's mask features and the regions' mask logits over the mask of each object.
        pooling = objects.masks.detach().sigmoid().flatten(2)
        pooling = per_sentence(pooling / pooling.sum(-1, keepdim=True).clamp(min=1e-6), image_index)
        pooled = pooling @ full_precision(mask_features).flatten(2).transpose(1, 2)  # (B, queries, mask channels)
        margin = regions.masks[:, 1] - regions.masks[:, 0]
        margin = (pooling @ full_precision(margin).flatten(1)[..., None])[..., 0]  # (B, queries)
        query = per_sentence(self.object_projection(objects.features), image_index)
        query = query + self.sentence_projection(pooled.to(text.dtype))
        position = per_sentence(self.position(objects.boxes.detach().to(text.dtype)), image_index)
        context = torch.cat([self.word_projection(text), regions.regions], dim=1)
        # (B, 1, 1, tokens + regions): padding words are masked, regions never
        context_mask = nn.functional.pad(attention_mask.bool(), (0, regions.regions.shape[1]), value=True)
        context_mask = context_mask[:, None, None]
        relevance = []
        for layer in self.layers:
            query = layer(query, position, context, context_mask)
            normed = self.norm(query)
            relevance.append(self.relevance(normed)[..., 0] + self.region_weight * margin)
        return Choice(relevance, self._count(normed, relevance[-1], regions.regions))

    def _count(self, query: torch.Tensor, relevance: torch.Tensor, regions: torch.Tensor) -> torch.Tensor | None:
        if self.count is None:
            return None
        return self.count((relevance.sigmoid().to(query.dtype)[..., None] * query).sum(1) + regions.mean(1))


class ChoiceLayer(nn.Module):
    """Objects attend to each other, then to words and regions; post-norm."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attention = Attention(config, size, config.num_attention_heads)
        self.self_norm = nn.LayerNorm(size)
        self.cross_attention = Attention(config, size, config.num_attention_heads)
        self.cross_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, config.decoder_ffn_size)
        self.fc2 = nn.Linear(config.decoder_ffn_size, size)
        self.ffn_norm = nn.LayerNorm(size)

    def forward(
        self, query: torch.Tensor, position: torch.Tensor, context: torch.Tensor, context_mask: torch.Tensor
    ) -> torch.Tensor:
        """Queries, positions (batch, queries, hidden) -> queries; `context_mask` (batch, 1, 1, tokens)."""
        located = query + position
        query = self.self_norm(query + self.self_attention(located, located, query))
        query = self.cross_norm(query + self.cross_attention(query + position, context, context, context_mask))
        return self.ffn_norm(query + self.fc2(self.fc1(query).relu()))


def outside(boxes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Distance of each pixel from each box, in half sides of the box: (..., 4) cxcywh -> (..., height, width)."""
    height, width = shape
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    centre_x, centre_y, box_width, box_height = boxes[..., None].unbind(-2)
    dx = (x - centre_x).abs() / (box_width / 2)  # (..., width)
    dy = (y - centre_y).abs() / (box_height / 2)
    return (torch.maximum(dy[..., :, None], dx[..., None, :]) - 1).clamp(min=0)

"""Instance branch: finds every object of the image whatever is said of it, then chooses those a sentence is about.

`ObjectFinder` sees the image alone and works once per image, however many sentences there are about it: the strongest
peaks of a map of object centres (CenterNet, arXiv 1904.07850) become queries with a box and a mask. `InstanceChooser`
works per sentence: the queries gather what the sentence's mask features say inside their masks, look at each other,
at the words and at the regions. The regions never look back: a branch changes none of their outputs.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .attention_rela import Attention
from .configuration_rela import RelaConfig
from .fusion_rela import full_precision, per_sentence
from .region_decoder_rela import Prediction

FIRST_SIZE = 0.2  # side of a query's box before anything is learnt, as a part of the image's
WINDOW = 16.0  # what a mask logit loses per half box side outside its box


class Objects(NamedTuple):
    """What is found in images, whatever is said of them."""

    centres: torch.Tensor  # (images, height / 4, width / 4) logits of the map of object centres
    boxes: torch.Tensor  # (images, queries, 4) cxcywh, 0..1
    masks: torch.Tensor  # (images, queries, height / 4, width / 4) logits
    features: torch.Tensor  # (images, queries, channels)


class Choice(NamedTuple):
    """What sentences say about the objects of their images."""

    relevance: list[torch.Tensor]  # of each layer (sentences, queries) logits
    counts: torch.Tensor | None  # (sentences, max_count + 1) logits of the number of targets


class ObjectFinder(nn.Module):
    """The strongest centres in the image, each with its box and mask."""

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
        places = self.peaks(centres.detach())
        flat = pixels.flatten(2)
        features = flat.transpose(1, 2).take_along_dim(places[..., None], dim=1)
        boxes = self._boxes(features, places, centres.shape[-2:])
        masks = (self.mask_embed(features) @ flat).unflatten(2, centres.shape[-2:])
        return Objects(centres, boxes, masks - WINDOW * outside(boxes.detach(), centres.shape[-2:]), features)

    def peaks(self, centres: torch.Tensor) -> torch.Tensor:
        """Positions of the strongest centres, those above all their neighbours first: (images, queries)."""
        highest = nn.functional.max_pool2d(centres[:, None], 3, stride=1, padding=1)[:, 0]
        ranked = torch.where(centres == highest, centres, centres - 100).flatten(1)
        return ranked.topk(self.num_queries).indices

    def _boxes(self, features: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        height, width = shape
        x, y = (places % width + 0.5) / width, (places // width + 0.5) / height
        first = torch.stack([x, y, torch.full_like(x, FIRST_SIZE), torch.full_like(x, FIRST_SIZE)], dim=-1)
        return (first.logit() + self.box(features)).sigmoid()

    def reset(self) -> None:
        """Start with few centres, boxes of `FIRST_SIZE` and small mask logits."""
        init.xavier_uniform_(self.centre.weight, gain=0.1)
        init.constant_(self.centre.bias, -4.0)
        init.zeros_(self.box[-1].weight)
        init.xavier_uniform_(self.mask_embed[-1].weight, gain=0.1)


class InstanceChooser(nn.Module):
    """Which of the objects a sentence is about."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.seen = nn.Linear(config.pixel_decoder_size, size)
        self.said = nn.Linear(config.mask_size, size)
        self.position = nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, size))
        self.words = nn.Linear(config.text_config.hidden_size, size)
        self.layers = nn.ModuleList(ChoiceLayer(config) for _ in range(config.instance_layers))
        self.norm = nn.LayerNorm(size)
        self.relevance = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))
        self.trust = nn.Parameter(torch.ones(1))
        counts = config.max_count + 1 if config.count_loss_weight else 0
        self.count = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, counts)) if counts else None

    def forward(
        self,
        objects: Objects,
        regions: Prediction,
        mask_features: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> Choice:
        """`Choice` of B sentences.

        Args:
            objects: of their images.
            regions: the last layer's prediction of the region decoder.
            mask_features: (B, mask channels, height / 4, width / 4).
            text: (B, tokens, text channels).
            attention_mask: (B, tokens), 1 for words and 0 for padding.
            image_index: (B,) which image each sentence is about; None for one each.
        """
        inside = objects.masks.detach().sigmoid().flatten(2)
        inside = per_sentence(inside / inside.sum(-1, keepdim=True).clamp(min=1e-6), image_index)
        margin = regions.masks[:, 1] - regions.masks[:, 0]
        said = inside @ full_precision(mask_features).flatten(2).transpose(1, 2)  # (B, queries, mask channels)
        margin = (inside @ full_precision(margin).flatten(1)[..., None])[..., 0]  # (B, queries)
        query = per_sentence(self.seen(objects.features), image_index) + self.said(said.to(text.dtype))
        position = per_sentence(self.position(objects.boxes.detach().to(text.dtype)), image_index)
        context = torch.cat([self.words(text), regions.regions], dim=1)
        visible = nn.functional.pad(attention_mask.bool(), (0, regions.regions.shape[1]), value=True)[:, None, None]
        relevance = []
        for layer in self.layers:
            query = layer(query, position, context, visible)
            found = self.norm(query)
            relevance.append(self.relevance(found)[..., 0] + self.trust * margin)
        return Choice(relevance, self._count(found, relevance[-1], regions.regions))

    def _count(self, found: torch.Tensor, relevance: torch.Tensor, regions: torch.Tensor) -> torch.Tensor | None:
        if self.count is None:
            return None
        return self.count((relevance.sigmoid().to(found.dtype)[..., None] * found).sum(1) + regions.mean(1))


class ChoiceLayer(nn.Module):
    """Objects look at each other, then at words and regions; post-norm."""

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
        self, query: torch.Tensor, position: torch.Tensor, context: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Queries, positions (batch, queries, hidden) -> queries; `visible` (batch, 1, 1, tokens) of the context."""
        placed = query + position
        query = self.self_norm(query + self.self_attention(placed, placed, query))
        query = self.cross_norm(query + self.cross_attention(query + position, context, context, visible))
        return self.ffn_norm(query + self.fc2(self.fc1(query).relu()))


def outside(boxes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """How far each pixel lies outside each box, in half sides of the box: (..., 4) cxcywh -> (..., height, width)."""
    height, width = shape
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    centre_x, centre_y, box_width, box_height = boxes[..., None].unbind(-2)
    dx = (x - centre_x).abs() / (box_width / 2)  # (..., width)
    dy = (y - centre_y).abs() / (box_height / 2)
    return (torch.maximum(dy[..., :, None], dx[..., None, :]) - 1).clamp(min=0)

"""Region decoder: a grid of region queries that look at the image, once at the sentence, and at each other.

Source: GRES (CVPR 2023) section 4 and the original referring_transformer_decoder.py.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_rela import Attention
from .configuration_rela import RelaConfig
from .fusion_rela import full_precision
from .pixel_decoder_rela import sine_positions


class Prediction(NamedTuple):
    """What the heads say of a batch of sentences; class 1 of each pair is target, of `no_target` "nothing here"."""

    masks: torch.Tensor  # (batch, 2, height / 4, width / 4)
    minimap: torch.Tensor  # (batch, regions, 2)
    no_target: torch.Tensor  # (batch, 2)
    regions: torch.Tensor  # (batch, regions, hidden), what the three are made of


class RegionDecoder(nn.Module):
    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.query = nn.Embedding(config.num_queries, size)
        self.query_position = nn.Embedding(config.num_queries, size)
        self.level_embed = nn.Embedding(3, size)
        same = config.pixel_decoder_size == size
        self.projections = nn.ModuleList(
            nn.Identity() if same else nn.Linear(config.pixel_decoder_size, size) for _ in range(3)
        )
        self.layers = nn.ModuleList(RegionLayer(config, reads=i == 0) for i in range(config.decoder_layers))
        self.heads = Heads(config)

    def forward(
        self,
        levels: list[torch.Tensor],
        mask_features: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        every_layer: bool,
    ) -> list[Prediction]:
        """The last layer's prediction, or with `every_layer` those of all layers, first to last.

        Args:
            levels: memory at strides 32, 16, 8, each (batch, channels, height, width).
            mask_features: (batch, mask channels, height / 4, width / 4), fp32.
            text: (batch, tokens, text channels).
            attention_mask: (batch, tokens), 1 for words and 0 for padding.
            every_layer: whether to predict after each layer.
        """
        memory = [self._tokens(i, level) for i, level in enumerate(levels)]
        # Interpolation and the product with the regions are both linear: down-sampling the features once per level
        # gives the same masks as down-sampling every layer's masks.
        small = [
            nn.functional.interpolate(mask_features, x.shape[-2:], mode="bilinear", align_corners=False).detach()
            for x in levels
        ]
        query = self.query.weight.expand(text.shape[0], -1, -1)
        predictions = []
        for i, layer in enumerate(self.layers):
            seen = self.heads.visible(query, small[i % 3])
            query = layer(query, self.query_position.weight, *memory[i % 3], seen, text, attention_mask)
            if every_layer and i + 1 < len(self.layers):
                predictions.append(self.heads(query, mask_features))
        return [*predictions, self.heads(query, mask_features)]

    def _tokens(self, i: int, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a level: (batch, pixels, hidden) with and without positions."""
        value = self.projections[i](level.flatten(2).transpose(1, 2)) + self.level_embed.weight[i]
        return value + sine_positions(*level.shape[-2:], value.shape[-1], value.device).to(value.dtype), value


class RegionLayer(GradientCheckpointingLayer):
    """Regions look at the pixels their masks cover, in the first layer at the words, then at each other; post-norm."""

    def __init__(self, config: RelaConfig, reads: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.cross_attention = Attention(config, size, config.num_attention_heads)
        self.cross_norm = nn.LayerNorm(size)
        self.language = RegionLanguage(config) if reads else None
        self.self_attention = Attention(config, size, config.num_attention_heads)
        self.self_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, config.decoder_ffn_size)
        self.fc2 = nn.Linear(config.decoder_ffn_size, size)
        self.ffn_norm = nn.LayerNorm(size)

    def forward(
        self,
        query: torch.Tensor,
        position: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seen: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Queries (batch, regions, hidden) -> the same; `seen` (batch, 1, regions, pixels): where they may look."""
        query = self.cross_norm(query + self.cross_attention(query + position, key, value, seen))
        if self.language is not None:
            query = query + self.language(query, text, attention_mask)
        placed = query + position
        query = self.self_norm(query + self.self_attention(placed, placed, query))
        return self.ffn_norm(query + self.fc2(self.fc1(query).relu()))


class RegionLanguage(nn.Module):
    """What the regions take from the words: a gated, down-weighted attention."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.text_config.hidden_size, config.hidden_size, bias=False)
        self.attention = Attention(config, config.hidden_size, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))  # not a scalar, which FSDP cannot shard
        self.weight, self.masked = config.region_language_weight, config.region_language_mask

    def forward(self, query: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, regions, hidden), (batch, tokens, text channels), (batch, tokens) -> (batch, regions, hidden)."""
        words = self.project(text)
        mask = attention_mask[:, None, None].bool() if self.masked else None
        return self.norm(query + self.attention(query, words, words, mask)) * self.gate.sigmoid() * self.weight


class Heads(nn.Module):
    """Region embeddings, the minimap that weighs them into one target mask, and the no-target verdict."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size, self.num_regions = config.hidden_size, config.num_queries
        self.norm = nn.LayerNorm(size)
        self.mask_embed = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.mask_size)
        )
        self.minimap = nn.Linear(size, 2)
        self.no_target = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))

    def forward(self, query: torch.Tensor, mask_features: torch.Tensor) -> Prediction:
        """(batch, regions, hidden), (batch, mask channels, height, width) -> `Prediction`."""
        with torch.autocast(query.device.type, enabled=False):
            regions = self._regions(query)
            minimap = self.minimap(regions)
            target = minimap.transpose(1, 2) @ self.mask_embed(regions)  # (batch, 2, mask channels)
            masks = _mask_products(target, mask_features).unflatten(2, mask_features.shape[-2:])
            return Prediction(masks, minimap, self.no_target(regions).mean(dim=1), regions)

    @torch.no_grad()
    def visible(self, query: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
        """Pixels each region's own mask covers; all of them where it covers none: (batch, 1, regions, pixels) bool."""
        with torch.autocast(query.device.type, enabled=False):
            masks = _mask_products(self.mask_embed(self._regions(query)), mask_features)
        covered = masks.sigmoid() >= 0.5
        return (covered | ~covered.any(-1, keepdim=True))[:, None]

    def _regions(self, query: torch.Tensor) -> torch.Tensor:
        return self.norm(query.to(self.norm.weight.dtype))

    def reset(self) -> None:
        """Start from small mask logits: the target's are a sum over all regions, and would be in the hundreds."""
        init.xavier_uniform_(self.mask_embed[-1].weight, gain=0.1)
        init.xavier_uniform_(self.minimap.weight, gain=1 / self.num_regions)


def _mask_products(embeddings: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
    """(batch, n, mask channels), (batch, mask channels, height, width) -> (batch, n, height * width), never half."""
    return full_precision(embeddings) @ full_precision(mask_features).flatten(2)

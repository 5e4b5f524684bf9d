"""Region decoder: a grid of region queries that attend to the image, once to the sentence, and to each other.

Source: GRES (CVPR 2023) section 4 and the original referring_transformer_decoder.py.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .configuration_rela import RelaConfig
from .fusion_rela import full_precision
from .pixel_decoder_rela import sine_positions


class RegionOutput(NamedTuple):
    """Outputs of the heads for a batch of sentences; class 1 of each pair is "target", of `no_target` "no target"."""

    masks: torch.Tensor  # (batch, 2, height / 4, width / 4)
    minimap: torch.Tensor  # (batch, regions, 2)
    no_target: torch.Tensor  # (batch, 2)
    regions: torch.Tensor  # (batch, regions, hidden) from which the three are computed


class RegionDecoder(nn.Module):
    """`decoder_layers` region layers that cycle through strides 32, 16 and 8, and the heads."""

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
        self.layers = nn.ModuleList(RegionLayer(config, with_language=i == 0) for i in range(config.decoder_layers))
        self.heads = Heads(config)

    def forward(
        self,
        levels: list[torch.Tensor],
        mask_features: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        every_layer: bool,
    ) -> list[RegionOutput]:
        """The last layer's output, or with `every_layer` those of all layers, first to last.

        Args:
            levels: memory at strides 32, 16, 8, each (batch, channels, height, width).
            mask_features: (batch, mask channels, height / 4, width / 4), fp32.
            text: (batch, tokens, text channels).
            attention_mask: (batch, tokens), 1 for words and 0 for padding.
            every_layer: whether to predict after each layer.
        """
        memory = [self._tokens(i, level) for i, level in enumerate(levels)]
        # Interpolation and the product with the regions are both linear: down-sampling the mask features once per
        # level gives the same attention masks as down-sampling the masks of every layer.
        small = [
            nn.functional.interpolate(mask_features, x.shape[-2:], mode="bilinear", align_corners=False).detach()
            for x in levels
        ]
        query = self.query.weight.expand(text.shape[0], -1, -1)
        queries = []
        for i, layer in enumerate(self.layers):
            mask = self.heads.attention_mask(query, small[i % 3])
            query = layer(query, self.query_position.weight, *memory[i % 3], mask, text, attention_mask)
            queries.append(query)
        return self.heads(torch.stack(queries if every_layer else queries[-1:], dim=1), mask_features)

    def _tokens(self, i: int, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a level: (batch, pixels, hidden) with and without positions."""
        value = self.projections[i](level.flatten(2).transpose(1, 2)) + self.level_embed.weight[i]
        return value + sine_positions(*level.shape[-2:], value.shape[-1], value.device).to(value.dtype), value


class RegionLayer(GradientCheckpointingLayer):
    """Regions attend to the pixels of their masks, in the first layer to the words, then to each other; post-norm."""

    def __init__(self, config: RelaConfig, with_language: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.cross_attention = Attention(config, size, config.num_attention_heads)
        self.cross_norm = nn.LayerNorm(size)
        self.language = RegionLanguage(config) if with_language else None
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
        mask: torch.Tensor,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Queries (batch, regions, hidden) -> the same; `mask` (batch, 1, regions, pixels) bool, False is masked."""
        query = self.cross_norm(query + self.cross_attention(query + position, key, value, mask))
        if self.language is not None:
            query = query + self.language(query, text, attention_mask)
        located = query + position
        query = self.self_norm(query + self.self_attention(located, located, query))
        return self.ffn_norm(query + self.fc2(self.fc1(query).relu()))


class RegionLanguage(nn.Module):
    """Region-language attention, times a learned gate and a fixed weight."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.text_config.hidden_size, config.hidden_size, bias=False)
        self.attention = Attention(config, config.hidden_size, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.region_gate = nn.Parameter(torch.zeros(1))  # not a scalar, which FSDP cannot shard
        self.weight, self.masked = config.region_language_weight, config.region_language_mask

    def forward(self, query: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, regions, hidden), (batch, tokens, text channels), (batch, tokens) -> (batch, regions, hidden)."""
        words = self.project(text)
        mask = attention_mask[:, None, None].bool() if self.masked else None
        return self.norm(query + self.attention(query, words, words, mask)) * self.region_gate.sigmoid() * self.weight


class Heads(nn.Module):
    """Region embeddings, the minimap that weights them into one target mask, and the no-target logits."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        size, self.num_regions = config.hidden_size, config.num_queries
        self.norm = nn.LayerNorm(size)
        self.mask_embed = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.mask_size)
        )
        self.minimap = nn.Linear(size, 2)
        self.no_target = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))

    def forward(self, query: torch.Tensor, mask_features: torch.Tensor) -> list[RegionOutput]:
        """(batch, layers, regions, hidden), (batch, mask channels, height, width) -> the output of each layer."""
        with torch.autocast(query.device.type, enabled=False):
            regions = self._regions(query)
            minimap = self.minimap(regions)
            # The minimap's weighted sum over regions before the mask product: one map per class, not one per region.
            target = minimap.transpose(2, 3) @ self.mask_embed(regions)  # (batch, layers, 2, mask channels)
            masks = _mask_products(target.flatten(1, 2), mask_features)  # one product for all layers
            masks = masks.unflatten(2, mask_features.shape[-2:]).unflatten(1, (-1, 2))
            outputs = (masks, minimap, self.no_target(regions).mean(dim=2), regions)
            return [RegionOutput(*layer) for layer in zip(*(x.unbind(1) for x in outputs))]

    @torch.no_grad()
    def attention_mask(self, query: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
        """The pixels of each region's own mask, or all pixels where it is empty: (batch, 1, regions, pixels) bool."""
        with torch.autocast(query.device.type, enabled=False):
            masks = _mask_products(self.mask_embed(self._regions(query)), mask_features)
        covered = masks.sigmoid() >= 0.5
        return (covered | ~covered.any(-1, keepdim=True))[:, None]

    def _regions(self, query: torch.Tensor) -> torch.Tensor:
        return self.norm(query.to(self.norm.weight.dtype))

    def reset(self) -> None:
        """Initialise with small weights: target logits are a sum over all regions, and would be in the hundreds."""
        init.xavier_uniform_(self.mask_embed[-1].weight, gain=0.1)
        init.xavier_uniform_(self.minimap.weight, gain=1 / self.num_regions)


def _mask_products(embeddings: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
    """(batch, n, mask channels), (batch, mask channels, height, width) -> (batch, n, height * width); fp32 or fp64."""
    return full_precision(embeddings) @ full_precision(mask_features).flatten(2)

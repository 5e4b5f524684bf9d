"""MDETR's encoder over pixels and words together, and its decoder of queries: post-norm, as in the original."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_rela import Attention
from .configuration_mdetr import MdetrConfig


class EncoderLayer(GradientCheckpointingLayer):
    """Tokens look at each other."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__()
        self.attention = DropoutAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, position: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) x 2 -> (batch, tokens, hidden); `seen` (batch, 1, 1, tokens), False on padding."""
        placed = x + position
        x = self.attention_norm(x + self.dropout(self.attention(placed, placed, x, seen)))
        return self.ffn_norm(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(GradientCheckpointingLayer):
    """Queries look at each other, then at all tokens."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__()
        self.self_attention = DropoutAttention(config)
        self.self_norm = nn.LayerNorm(config.hidden_size)
        self.cross_attention = DropoutAttention(config)
        self.cross_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        query: torch.Tensor,
        query_position: torch.Tensor,
        memory: torch.Tensor,
        position: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """(batch, queries, hidden) with (queries, hidden), (batch, tokens, hidden) x 2 -> (batch, queries, hidden)."""
        placed = query + query_position
        query = self.self_norm(query + self.dropout(self.self_attention(placed, placed, query)))
        found = self.cross_attention(query + query_position, memory + position, memory, seen)
        query = self.cross_norm(query + self.dropout(found))
        return self.ffn_norm(query + self.dropout(self.feed_forward(query)))


class FeedForward(nn.Module):
    def __init__(self, config: MdetrConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.fc1(x).relu()))


class DropoutAttention(Attention):
    """Multi-head attention that drops attention weights while it trains."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__(config, config.hidden_size, config.num_attention_heads)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, queries, hidden), (batch, keys, hidden) x 2 -> (batch, queries, hidden); `mask` False on padding."""
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.dropout if self.training else 0.0
        found, _ = function(self, q, k, v, mask, scaling=q.shape[-1] ** -0.5, dropout=dropout, is_causal=False)
        return self.out_proj(found.flatten(2))


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention written out, with the interface of transformers' attention functions."""
    logits = (query * scaling) @ key.transpose(-2, -1)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    weights = nn.functional.dropout(logits.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sine_positions(seen: torch.Tensor, channels: int) -> torch.Tensor:
    """Sine embedding of where each pixel lies within its image, padding left out.

    Args:
        seen: (batch, height, width) bool, True on the image.
        channels: a multiple of 4; the first half tells rows, the second columns.

    Returns:
        (batch, height * width, channels) fp32.
    """
    period = 10000 ** (torch.arange(channels // 4, device=seen.device, dtype=torch.float32) * (4 / channels))
    halves = []
    for axis in (1, 2):
        place = seen.cumsum(axis, dtype=torch.float32)
        last = place.narrow(axis, place.shape[axis] - 1, 1)
        angle = (place / (last + 1e-6) * (2 * torch.pi))[..., None] / period  # (batch, height, width, channels / 4)
        halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))
    return torch.cat(halves, dim=-1).flatten(1, 2)

"""MDETR's encoder over pixels and words together, and its decoder of queries: post-norm, as in the original."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .configuration_mdetr import MdetrConfig


class EncoderLayer(GradientCheckpointingLayer):
    """Tokens attend to each other."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__()
        self.attention = DropoutAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) x 2 -> (batch, tokens, hidden); `mask` (batch, 1, 1, tokens), False on padding."""
        located = x + position
        x = self.attention_norm(x + self.dropout(self.attention(located, located, x, mask)))
        return self.ffn_norm(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(GradientCheckpointingLayer):
    """Queries attend to each other, then to all tokens."""

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
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """(batch, queries, hidden) with (queries, hidden), (batch, tokens, hidden) x 2 -> (batch, queries, hidden)."""
        located = query + query_position
        query = self.self_norm(query + self.dropout(self.self_attention(located, located, query)))
        attended = self.cross_attention(query + query_position, memory + position, memory, mask)
        query = self.cross_norm(query + self.dropout(attended))
        return self.ffn_norm(query + self.dropout(self.feed_forward(query)))


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between them."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.fc1(x).relu()))


class DropoutAttention(Attention):
    """Multi-head attention with dropout of the attention weights in training."""

    def __init__(self, config: MdetrConfig) -> None:
        super().__init__(config, config.hidden_size, config.num_attention_heads)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, queries, hidden), (batch, keys, hidden) x 2 -> (batch, queries, hidden); `mask` False on padding."""
        return super().forward(query, key, value, mask, self.config.dropout if self.training else 0.0)


def sine_positions(padding_mask: torch.Tensor, channels: int) -> torch.Tensor:
    """Sine embedding of the position of each pixel within its image, without the padding.

    Args:
        padding_mask: (batch, height, width) bool, False on padding.
        channels: a multiple of 4; the first half encodes rows, the second columns.

    Returns:
        (batch, height * width, channels) fp32.
    """
    period = 10000 ** (torch.arange(channels // 4, device=padding_mask.device, dtype=torch.float32) * (4 / channels))
    halves = []
    for axis in (1, 2):
        position = padding_mask.cumsum(axis, dtype=torch.float32)
        last = position.narrow(axis, position.shape[axis] - 1, 1)
        angle = (position / (last + 1e-6) * (2 * torch.pi))[..., None] / period  # (batch, height, width, channels / 4)
        halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))
    return torch.cat(halves, dim=-1).flatten(1, 2)

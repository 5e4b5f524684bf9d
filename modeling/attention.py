"""Multi-head attention through transformers' attention interface (eager, sdpa, ...)."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MASKED = 1e4  # subtracted from the logit of a masked token: its weight is 0 in every type, and the logit finite


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values may come from three different tensors.

    Args:
        config: names the attention implementation.
        hidden_size: channels of all inputs and of the output.
        num_heads: heads, a divisor of `hidden_size`.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Attend from queries to keys.

        Args:
            query: (batch, queries, channels).
            key, value: (batch, keys, channels).
            mask: broadcasts to (batch, heads, queries, keys); True where a query attends to a key.
            dropout: probability of dropping an attention weight.

        Returns:
            (batch, queries, channels).
        """
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        return self.out_proj(attend(self, self.config, q, k, v, mask, dropout).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, tokens, channels per head)


def attend(
    module: nn.Module,
    config: PreTrainedConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) v by `config`'s attention implementation.

    (batch, heads, tokens, d) each -> (batch, query tokens, heads, d). A boolean `mask` is True where a query attends
    to a key, a floating one is added to the logits.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
    scaling = query.shape[-1] ** -0.5
    return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=False)[0]


def text_mask(attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The padding mask (batch, tokens) of a text encoder as what is added to its logits: (batch, 1, 1, tokens).

    From a mask of two dimensions transformers reads whether any token is padding, for which the host waits.
    """
    return None if attention_mask is None else (attention_mask[:, None, None].to(dtype) - 1) * MASKED


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
    """Attention step by step, with the interface of transformers' attention functions."""
    logits = (query * scaling) @ key.transpose(-2, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    elif attention_mask is not None:
        logits = logits + attention_mask
    weights = nn.functional.dropout(logits.softmax(-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights

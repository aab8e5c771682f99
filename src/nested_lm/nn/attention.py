"""Causal softmax attention with rotary positions: the mixer of Transformer++.

Shapes: B batch, T tokens of this call, S tokens cached and new, H heads, K head width, D model width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.mixers import FullAttention
from nested_lm.nn.layers import StepContext, rotate


class AttentionState(NamedTuple):
    """Keys and values of every token so far. Grows with the stream, unlike the fast weights of Hope."""

    keys: Float[Tensor, "B H S K"]
    values: Float[Tensor, "B H S K"]
    documents: Int[Tensor, "B S"]


class Attention(nn.Module):
    """Multi-head causal attention over torch's scaled_dot_product_attention."""

    has_constant_state = False
    """The cache grows with every token."""

    def __init__(self, width: int, config: FullAttention) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_base = config.rope_base
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def initial_state(self, batch_size: int) -> AttentionState:
        """Make an empty cache."""
        weight = self.qkv.weight
        empty = weight.new_zeros(batch_size, self.num_heads, 0, weight.shape[1] // self.num_heads)
        documents = torch.zeros(batch_size, 0, dtype=torch.long, device=weight.device)
        return AttentionState(empty, empty, documents)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: AttentionState
    ) -> tuple[Float[Tensor, "B T D"], AttentionState, dict[str, Tensor]]:
        """Mix tokens; a token sees itself and earlier tokens of its own document."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, K)
        q = rotate(q, context.position, self.rope_base)
        k = rotate(k, context.position, self.rope_base)
        documents = context.documents
        if documents is None:
            documents = torch.zeros(batch, tokens, dtype=torch.long, device=x.device)
        state = AttentionState(
            torch.cat([state.keys.to(k.dtype), k], dim=2),
            torch.cat([state.values.to(v.dtype), v], dim=2),
            torch.cat([state.documents, documents], dim=1),
        )
        mixed = functional.scaled_dot_product_attention(
            q, state.keys, state.values, **self._mask(context, state, tokens)
        )
        return self.out(mixed.transpose(1, 2).reshape(x.shape)), state, {}

    @staticmethod
    def _mask(context: StepContext, state: AttentionState, tokens: int) -> dict[str, Tensor | bool]:
        """Choose the cheapest exact form of the causal, same-document mask."""
        total = state.keys.shape[2]
        if context.documents is None and total == tokens:
            return {"is_causal": True}
        if context.documents is None and tokens == 1:
            return {}
        device = state.keys.device
        query = torch.arange(total - tokens, total, device=device)
        mask = query[:, None] >= torch.arange(total, device=device)  # (T, S)
        if context.documents is not None:
            mask = mask & (context.documents[:, :, None] == state.documents[:, None, :])  # (B, T, S)
            mask = mask[:, None]
        return {"attn_mask": mask}

"""Causal softmax attention with rotary positions: the mixer of Transformer++.

Shapes: B batch, T tokens of this call, S tokens cached and new, H heads of queries, G heads of keys and values,
K head width, D model width.
"""

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.mixers import FullAttention
from nested_lm.nn.layers import StepContext, rotate
from nested_lm.nn.mixers.attention_cache import AttentionState, BranchedState, attend_in_branches, branched
from nested_lm.nn.mixers.base import Mixer, zeros_for
from nested_lm.nn.mixers.window import attend_in_window


def last_tokens(state: AttentionState, window: int) -> AttentionState:
    """Forget what no later token sees; keep one token at least, whose document number later ones go on from."""
    kept = -max(window - 1, 1)
    keys, values, documents = state
    return AttentionState(
        keys[:, :, kept:].contiguous(), values[:, :, kept:].contiguous(), documents[:, kept:].contiguous()
    )


class Attention(Mixer):
    """Causal attention over torch's scaled_dot_product_attention; H / G neighbouring queries share keys and values.

    Source: Llama 2, arXiv 2307.09288, for the sharing (grouped-query attention, arXiv 2305.13245).
    """

    has_fast_weights = False

    def __init__(self, width: int, config: FullAttention) -> None:
        super().__init__()
        self.num_heads, self.key_heads = config.num_heads, config.key_heads
        self.head_width = width // config.num_heads
        self.rope_base, self.rope_scaling = config.rope_base, config.rope_scaling
        self.window = config.window
        self.has_constant_state = config.window is not None  # otherwise the cache grows with every token
        self.qkv = nn.Linear(width, width + 2 * self.key_heads * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @classmethod
    def build(cls, width: int, config: FullAttention, *, epsilon: float, recompute: bool) -> Self:  # type: ignore[override]  # noqa: ARG003
        """Make the mixer; it has no norms and keeps little for backward."""
        return cls(width, config)

    def initial_state(self, batch_size: int) -> AttentionState:
        """Make an empty cache."""
        empty = zeros_for(self.qkv.weight, batch_size, self.key_heads, 0, self.head_width)
        documents = torch.zeros(batch_size, 0, dtype=torch.long, device=empty.device)
        return AttentionState(empty, empty, documents)

    def documents(self, state: AttentionState | BranchedState) -> Int[Tensor, "B S"]:
        """Document of each cached token."""
        return state.documents

    def output_projections(self) -> list[nn.Linear]:
        """The projection of what the heads read."""
        return [self.out]

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: AttentionState | BranchedState
    ) -> tuple[Float[Tensor, "B T D"], AttentionState | BranchedState, dict[str, Tensor]]:
        """Mix tokens; a token sees itself and earlier tokens of its own document."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, self.head_width).transpose(1, 2)
        q, k, v = qkv.split([self.num_heads, self.key_heads, self.key_heads], dim=1)  # (B, H or G, T, K)
        q = rotate(q, context.position, self.rope_base, self.rope_scaling)
        k = rotate(k, context.position, self.rope_base, self.rope_scaling)
        documents = context.documents
        if documents is None:
            documents = torch.zeros(batch, tokens, dtype=torch.long, device=x.device)
        mixed, state = self._attend(q, k, v, documents, context, state)
        return self.out(mixed.transpose(1, 2).reshape(x.shape)), state, {}

    def _attend(
        self,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B G T K"],
        v: Float[Tensor, "B G T K"],
        documents: Int[Tensor, "B T"],
        context: StepContext,
        state: AttentionState | BranchedState,
    ) -> tuple[Float[Tensor, "B H T K"], AttentionState | BranchedState]:
        """Attend over the cache and the new tokens. Returns the answers and the cache of later calls."""
        tokens = q.shape[2]
        if self.window is None and context.documents is None:
            state = branched(state, tokens)
            if isinstance(state, BranchedState):
                state = BranchedState(state.trunk, state.own.extended(k, v, documents))
                return attend_in_branches(q, state), state
        elif isinstance(state, BranchedState):
            state = state.whole()
        state = state.extended(k, v, documents)
        if self.window is not None:
            seen = None if context.documents is None else state.documents
            mixed = attend_in_window(q, state.keys, state.values, seen, window=self.window)
            return mixed, last_tokens(state, self.window)
        mixed = functional.scaled_dot_product_attention(
            q,
            state.keys,
            state.values,
            enable_gqa=self.key_heads < self.num_heads,
            **self._mask(context, state, tokens),
        )
        return mixed, state

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

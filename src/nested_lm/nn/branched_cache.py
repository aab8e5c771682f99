"""Attention of streams that were forked from one: what they have in common is kept, and met, once.

Shapes: B streams, T tokens of this call, S cached tokens of a stream's own, U tokens they have in common, H heads of
queries, G heads of keys and values, K head width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


class AttentionState(NamedTuple):
    """Keys, already rotated, and values of every token so far, or of the last ones when attention has a window.

    Without a window it grows with the stream, unlike the fast weights of Hope.
    """

    keys: Float[Tensor, "B G S K"]
    values: Float[Tensor, "B G S K"]
    documents: Int[Tensor, "B S"]

    def extended(
        self, keys: Float[Tensor, "B G T K"], values: Float[Tensor, "B G T K"], documents: Int[Tensor, "B T"]
    ) -> "AttentionState":
        """Put new tokens behind the old ones."""
        return AttentionState(
            torch.cat([self.keys.to(keys.dtype), keys], dim=2),
            torch.cat([self.values.to(values.dtype), values], dim=2),
            torch.cat([self.documents, documents], dim=1),
        )


class BranchedState(NamedTuple):
    """The cache of forked streams.

    trunk: what all rows have read before the fork, one document; the rows are views of one.
    own: what each has read since.
    """

    trunk: AttentionState
    own: AttentionState

    @property
    def documents(self) -> Int[Tensor, "B S"]:
        """Running number of each token's document, in trunk and branches."""
        return torch.cat([self.trunk.documents, self.own.documents], dim=1)

    def whole(self) -> AttentionState:
        """Copy the trunk into every row."""
        return self.trunk.extended(*self.own)


def branched(state: AttentionState | BranchedState, tokens: int) -> AttentionState | BranchedState:
    """Keep apart what the rows of a fork have in common, where that is most of what they are about to read.

    tokens: of the next call. Below that, one call over the tokens of all branches would cost more than it saves.
    """
    if isinstance(state, BranchedState):
        return state
    rows, _, cached, _ = state.keys.shape
    if rows == 1 or cached < rows * tokens or state.keys.stride(0) != 0:
        return state
    return BranchedState(state, AttentionState(state.keys[:, :, :0], state.values[:, :, :0], state.documents[:, :0]))


def attend_in_branches(query: Float[Tensor, "B H T K"], state: BranchedState) -> Float[Tensor, "B H T K"]:
    """Let the last T tokens of every branch see the trunk and, causally, their own branch.

    All branches are one row of queries, whose keys are the trunk's, once, and those of every branch.

    state: with the T tokens in it.
    """
    rows, heads, tokens, width = query.shape
    trunk, own = state
    shared, cached = trunk.keys.shape[2], own.keys.shape[2]

    def in_one_row(x: Float[Tensor, "B X L K"]) -> Float[Tensor, "1 X BL K"]:
        return x.transpose(0, 1).flatten(1, 2)[None]

    position = torch.arange(cached, device=query.device)
    causal = position[cached - tokens :, None] >= position  # (T, S)
    mask = torch.zeros(rows, tokens, rows, cached, dtype=torch.bool, device=query.device)
    index = torch.arange(rows, device=query.device)
    mask[index, :, index] = causal
    mixed = functional.scaled_dot_product_attention(
        in_one_row(query),
        torch.cat([trunk.keys[:1], in_one_row(own.keys)], dim=2),
        torch.cat([trunk.values[:1], in_one_row(own.values)], dim=2),
        attn_mask=functional.pad(mask.view(rows * tokens, rows * cached), (shared, 0), value=True),
        enable_gqa=own.keys.shape[1] < heads,
    )
    return mixed.view(heads, rows, tokens, width).transpose(0, 1)

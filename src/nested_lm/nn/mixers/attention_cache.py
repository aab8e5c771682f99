"""What attention remembers: keys and values of every token, once for streams that were forked from one.

Shapes: B streams, T tokens of a call, S cached tokens, U of them in the trunk of a fork, H heads of queries, G heads of
keys and values, K head width.
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

    trunk: U tokens that all rows have read before the fork, of one document; the rows are views of one.
    own: S - U tokens that each has read since.
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
    """Keep apart what the rows of a fork have in common, as long as it is longer than the rows' own tokens together.

    Queries of all rows meet the keys of all rows, see `attend_in_branches`: with more of those, rows with a copy of the
    trunk each are faster.

    tokens: of each row in the next call, which read one document.
    """
    if isinstance(state, AttentionState):
        if state.keys.shape[0] == 1 or state.keys.stride(0) != 0:
            return state
        none = AttentionState(state.keys[:, :, :0], state.values[:, :, :0], state.documents[:, :0])
        state = BranchedState(state, none)
    rows, _, own, _ = state.own.keys.shape
    return state if rows * (own + tokens) <= state.trunk.keys.shape[2] else state.whole()


def attend_in_branches(query: Float[Tensor, "B H T K"], state: BranchedState) -> Float[Tensor, "B H T K"]:
    """Let the last T tokens of every branch see the trunk and, causally, their own branch.

    All branches are one row of queries, whose keys are the trunk's, once, and those of every branch.

    state: with the T tokens in it.
    """
    rows, heads, tokens, width = query.shape
    trunk, own = state
    dtype, in_trunk, in_branch = own.keys.dtype, trunk.keys.shape[2], own.keys.shape[2]

    def in_one_row(x: Float[Tensor, "B X L K"]) -> Float[Tensor, "1 X BL K"]:
        return x.transpose(0, 1).flatten(1, 2)[None]

    position = torch.arange(in_branch, device=query.device)
    causal = position[in_branch - tokens :, None] >= position  # (T, S - U)
    mask = torch.zeros(rows, tokens, rows, in_branch, dtype=torch.bool, device=query.device)
    index = torch.arange(rows, device=query.device)
    mask[index, :, index] = causal
    mixed = functional.scaled_dot_product_attention(
        in_one_row(query),
        torch.cat([trunk.keys[:1].to(dtype), in_one_row(own.keys)], dim=2),
        torch.cat([trunk.values[:1].to(dtype), in_one_row(own.values)], dim=2),
        attn_mask=functional.pad(mask.view(rows * tokens, rows * in_branch), (in_trunk, 0), value=True),
        enable_gqa=own.keys.shape[1] < heads,
    )
    return mixed.view(heads, rows, tokens, width).transpose(0, 1)

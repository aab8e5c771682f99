"""The gated delta rule and linear attention, one token at a time: what every backend must reproduce.

Shapes: B batch, T tokens, H heads, K key width, V value width.

Source: arXiv 2512.24695 eqs. 14-18 (linear attention) and 65 (delta rule); Gated DeltaNet, arXiv 2412.06464 eq. 10.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nested_lm.ops.delta_rule.chunked import DeltaRuleOutput


def gated_delta_rule(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    rate: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
) -> DeltaRuleOutput:
    """S <- alpha S; S <- S + rate k (v - k S); read q S. See `delta_rule.gated_delta_rule` for the arguments."""
    reads = []
    for t in range(key.shape[1]):
        state = _fresh(state, resets, t)
        if log_decay is not None:
            state = state * log_decay[:, t, :, None, None].exp()
        answer = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        write = rate[:, t, :, None] * (value[:, t] - answer)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], write)
        reads.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return DeltaRuleOutput(torch.stack(reads, dim=1), state)


def linear_attention(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
) -> DeltaRuleOutput:
    """S <- S + k v; read q S."""
    reads = []
    for t in range(key.shape[1]):
        state = _fresh(state, resets, t) + torch.einsum("bhk,bhv->bhkv", key[:, t], value[:, t])
        reads.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return DeltaRuleOutput(torch.stack(reads, dim=1), state)


def _fresh(state: Tensor, resets: Tensor | None, t: int) -> Tensor:
    """Empty the memory of the rows whose document starts with token t."""
    if resets is None:
        return state
    return torch.where(resets[:, t, None, None, None], torch.zeros_like(state), state)

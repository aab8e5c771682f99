"""Softmax attention in a sliding window, at a cost that grows with the window and not with the stream.

Queries are taken in blocks of at most a window; a block's keys are its own tokens and those a window before them.

Shapes: B batch, T new tokens, S cached and new tokens, H heads of queries, G heads of keys and values, K head width,
P persistent tokens, N blocks, C tokens of a block, U tokens a block can see.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


class Persistent(NamedTuple):
    """Learned tokens that every token sees. They have no position, so queries meet them without rotation.

    query: the queries before rotation. keys, values: of the learned tokens.
    """

    query: Float[Tensor, "B H T K"]
    keys: Float[Tensor, "H P K"]
    values: Float[Tensor, "H P K"]


def attend_in_window(
    query: Float[Tensor, "B H T K"],
    keys: Float[Tensor, "B G S K"],
    values: Float[Tensor, "B G S K"],
    documents: Int[Tensor, "B S"] | None,
    *,
    window: int,
    persistent: Persistent | None = None,
) -> Float[Tensor, "B H T K"]:
    """Let each of the last T tokens see itself, the `window - 1` before it and the persistent tokens.

    documents: running number of each token's document, which it does not look beyond; None: there is one.
    """
    batch, heads, tokens, width = query.shape
    size = min(tokens, window)
    missing = -tokens % size
    ahead = keys.shape[2] - tokens - (window - 1)  # cached tokens too many, or (negative) too few
    seen = size + window - 1
    edges = (-ahead, missing)  # a negative width cuts off
    blocks = (tokens + missing) // size

    def in_blocks(x: Tensor) -> Tensor:
        """(B, G, S, X) to (B N, G, U, X)."""
        padded = functional.pad(x, (0, 0, *edges)).unfold(2, seen, size)  # (B, G, N, X, U)
        return padded.permute(0, 2, 1, 4, 3).flatten(0, 1)

    def of_queries(x: Tensor) -> Tensor:
        """(B, H, T, K) to (B N, H, C, K)."""
        padded = functional.pad(x, (0, 0, 0, missing)).unflatten(2, (blocks, size))
        return padded.transpose(1, 2).flatten(0, 1)

    mask = _mask(documents, size=size, blocks=blocks, window=window, edges=edges, like=query)
    mask = mask.expand(batch, *mask.shape[1:]).flatten(0, 1)[:, None]  # (B N, 1, C, U)
    if persistent is not None:
        persistent = persistent._replace(query=of_queries(persistent.query))
    mixed = attend(of_queries(query), in_blocks(keys), in_blocks(values), mask, persistent)
    return mixed.unflatten(0, (batch, blocks)).transpose(1, 2).reshape(batch, heads, -1, width)[:, :, :tokens]


def attend(
    query: Float[Tensor, "B H T K"],
    keys: Float[Tensor, "B G S K"],
    values: Float[Tensor, "B G S K"],
    mask: Bool[Tensor, "#B 1 T S"],
    persistent: Persistent | None,
) -> Float[Tensor, "B H T K"]:
    """Softmax attention under a mask, over the persistent tokens as well."""
    shares_keys = keys.shape[1] < query.shape[1]
    if persistent is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=shares_keys)
    batch, width = query.shape[0], query.shape[-1]
    learned = persistent.keys.shape[1]
    # One softmax over both kinds of keys: queries carry their rotated and their plain form side by side, and each
    # kind of key is zero where the other form stands.
    both = torch.cat([query, persistent.query], dim=-1)
    plain = functional.pad(persistent.keys, (width, 0)).expand(batch, -1, -1, -1)
    keys = torch.cat([plain.to(keys.dtype), functional.pad(keys, (0, width))], dim=2)
    values = torch.cat([persistent.values.expand(batch, -1, -1, -1).to(values.dtype), values], dim=2)
    mask = functional.pad(mask, (learned, 0), value=True)
    return functional.scaled_dot_product_attention(both, keys, values, attn_mask=mask, scale=width**-0.5)


def _mask(
    documents: Int[Tensor, "B S"] | None,
    *,
    size: int,
    blocks: int,
    window: int,
    edges: tuple[int, int],
    like: Tensor,
) -> Bool[Tensor, "#B N C U"]:
    """Which of a block's keys each of its queries sees: in the window, there at all, and of its document."""
    token = torch.arange(size, device=like.device)[:, None]
    key = torch.arange(size + window - 1, device=like.device)
    in_window = (token <= key) & (key < token + window)  # (C, U)
    first = torch.arange(blocks, device=like.device)[:, None, None] * size
    mask = (in_window & (first + key >= edges[0]))[None]  # (1, N, C, U)
    if documents is None:
        return mask
    padded = functional.pad(documents, edges, value=-1).unfold(1, size + window - 1, size)  # (B, N, U)
    return mask & (padded[:, :, window - 1 :, None] == padded[:, :, None, :])

"""The gated delta rule and linear attention, a chunk of tokens at a time, in matrix products.

One matrix S a head, written by every token and then read by it:

    S <- alpha S;  S <- S + beta k (v - k S);  read q S        (linear attention: S <- S + k v)

Inside a chunk the writes w = beta (v - alpha k S) solve one unit lower-triangular system, as those of the memories do
(docs/equations.md). With gamma_t = alpha_1 ... alpha_t, S_0 the matrix before the chunk and rows for tokens:

    (I + L) W = beta (V - gamma K S_0)        L_ti = beta_t (gamma_t / gamma_i) k_t . k_i   for i < t
    reads     = gamma Q S_0 + (Gamma * Q K') W        Gamma_ti = gamma_t / gamma_i   for i <= t
    S_C       = gamma_C S_0 + (gamma_C / gamma_i K)' W

Everything but S_0 is known for all chunks at once; only `S_C` runs over them in turn. A document start inside a chunk
sets to zero what would reach across it, so documents may start at any token.

Shapes: B batch, T tokens, H heads, N chunks, C tokens of a chunk, K key width, V value width.

Source: arXiv 2412.06464 eq. 10 with arXiv 2406.06484 section 3 (WY form); arXiv 2512.24695 eqs. 14-18, 65. Letters:
alpha is the decay, beta the rate.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.triangular import unit_lower_inverse

CHUNK = 64
"""Tokens of a chunk. Any number gives the same result; the triangular solve grows with its square a token."""


class DeltaRuleOutput(NamedTuple):
    """Reads for every token, each after its own write, and the matrix after the last one."""

    reads: Float[Tensor, "B T H V"]
    state: Float[Tensor, "B H K V"]


class _Chunks(NamedTuple):
    """The call cut into chunks, padded at its end with tokens that change nothing."""

    query: Float[Tensor, "B H N C K"]
    key: Float[Tensor, "B H N C K"]
    value: Float[Tensor, "B H N C V"]
    document: Int[Tensor, "B 1 N C"]  # document starts in the chunk so far
    log_kept: Float[Tensor, "B H N C"]  # log gamma

    @property
    def ratio(self) -> Float[Tensor, "B H N C C"]:
        """gamma_t / gamma_i where token i is not after token t and of its document, else 0."""
        seen = (self.document[..., :, None] == self.document[..., None, :]).tril()
        powers = self.log_kept[..., :, None] - self.log_kept[..., None, :]
        return powers.masked_fill(~seen, -torch.inf).exp()

    @property
    def before(self) -> Float[Tensor, "B H N C 1"]:
        """gamma_t where the matrix before the chunk is still of the token's document, else 0."""
        return (self.log_kept.exp() * (self.document == 0))[..., None]

    @property
    def to_end(self) -> Float[Tensor, "B H N C 1"]:
        """gamma_C / gamma_i where token i is of the document that the chunk ends with, else 0."""
        last = self.document == self.document[..., -1:]
        return (self.log_kept[..., -1:] - self.log_kept).masked_fill(~last, -torch.inf).exp()[..., None]


def gated_delta_rule(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    rate: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
    chunk: int = CHUNK,
) -> DeltaRuleOutput:
    """Write every token into its head's matrix and read it; the numbers of `delta_rule_reference`.

    Computed in the dtype of `state` or wider, whatever the autocast. Gradients reach every tensor argument.

    Args:
        query: reads; scaled by the caller.
        key: unit vectors. Longer ones make the write overshoot.
        rate: beta, step of the write, in [0, 2]; above 1 it changes the sign of what it replaces.
        log_decay: logarithm of alpha, the share of the matrix that is kept; at most 0. None: all is kept.
        state: matrix before the first token.
        resets: True at the first token of a document, which finds an empty matrix; None: no start in this call.
        chunk: tokens computed together.
    """
    dtype = torch.promote_types(query.dtype, state.dtype)
    with torch.autocast(query.device.type, enabled=False):
        chunks = _cut(query, key, value, log_decay, resets, dtype, chunk)
        beta = _split(rate.to(dtype)[..., None], chunks.key.shape[-2])  # (B, H, N, C, 1)
        ratio = chunks.ratio
        inverse = unit_lower_inverse(beta * ratio * (chunks.key @ chunks.key.mT))
        known = inverse @ (beta * chunks.value)
        reader = inverse @ (beta * chunks.before * chunks.key)
        return _run(chunks, ratio, known, reader, state.to(dtype), query.shape[1])


def linear_attention(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    *,
    state: Float[Tensor, "B H K V"],
    resets: Bool[Tensor, "B T"] | None,
    chunk: int = CHUNK,
) -> DeltaRuleOutput:
    """Add k v to the matrix for every token and read it: the rule without erase and decay. Arguments as above."""
    dtype = torch.promote_types(query.dtype, state.dtype)
    with torch.autocast(query.device.type, enabled=False):
        chunks = _cut(query, key, value, None, resets, dtype, chunk)
        return _run(chunks, chunks.ratio, chunks.value, None, state.to(dtype), query.shape[1])


def _run(
    chunks: _Chunks,
    ratio: Float[Tensor, "B H N C C"],
    known: Float[Tensor, "B H N C V"],
    reader: Float[Tensor, "B H N C K"] | None,
    state: Float[Tensor, "B H K V"],
    tokens: int,
) -> DeltaRuleOutput:
    """Carry the matrix over the chunks, then read them all. Writes are `known - reader S_0`."""
    carried = (chunks.key * chunks.to_end).mT  # (B, H, N, K, C)
    faded = chunks.before[..., -1:, :]  # (B, H, N, 1, 1)
    starts, writes = [], []
    for index in range(known.shape[2]):
        starts.append(state)
        write = known[:, :, index]
        if reader is not None:
            write = write - reader[:, :, index] @ state
        writes.append(write)
        state = faded[:, :, index] * state + carried[:, :, index] @ write
    attention = ratio * (chunks.query @ chunks.key.mT)
    reads = chunks.before * (chunks.query @ torch.stack(starts, dim=2)) + attention @ torch.stack(writes, dim=2)
    return DeltaRuleOutput(reads.flatten(2, 3)[:, :, :tokens].transpose(1, 2), state)


def _cut(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    resets: Tensor | None,
    dtype: torch.dtype,
    chunk: int,
) -> _Chunks:
    batch, tokens, heads, _ = query.shape
    size = min(chunk, tokens)
    starts = torch.zeros(batch, tokens, dtype=torch.bool, device=query.device) if resets is None else resets
    if log_decay is None:
        log_decay = query.new_zeros(batch, tokens, heads)
    return _Chunks(
        _split(query.to(dtype), size),
        _split(key.to(dtype), size),
        _split(value.to(dtype), size),
        _split(starts.long()[..., None, None], size)[..., 0].cumsum(-1),
        _split(log_decay.to(dtype)[..., None], size)[..., 0].cumsum(-1),
    )


def _split(x: Float[Tensor, "B T H X"], size: int) -> Float[Tensor, "B H N C X"]:
    """Heads first, tokens in chunks, the last one filled with zeros: keys, rates and log decays that change nothing."""
    batch, tokens, heads, width = x.shape
    missing = -tokens % size
    if missing:
        x = functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.transpose(1, 2).reshape(batch, heads, (tokens + missing) // size, size, width)

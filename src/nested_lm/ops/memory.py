"""What every backend of the self-modifying memories shares: names, shapes, and the rule that is followed.

A head owns five memories, each a residual two-layer network M(x) = x + W_out silu(W_in x) on vectors of the
head's width. Two of them generate the key and the value of a token, two its inner learning rate and its retention,
and the fifth is the memory that is read. All five are written for every token, with the same key, towards a target
that each one generates for itself. Written weights are kept as their distance from a learned start.

Shapes: B batch, T tokens, H heads, M memories (5), K head width, E hidden width of a memory.

Source: arXiv 2512.24695, eqs. 83-91. `inner` is W_2 there, `outer` is W_1, k/eta/alpha/v/memory the squares.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MEMORIES = ("k", "eta", "alpha", "v", "memory")
"""Order along the memory dimension: first those that read the key input, then v, then the one that is read out."""

KEY, RATE, DECAY, VALUE, MEMORY = range(5)

NORM_FLOOR = 1e-6
"""Smallest norm a vector is divided by when it is made unit length."""


GRADIENT_FLOOR = 1e-12
"""Added to the squared norm of an inner gradient before dividing by it."""


class MemoryWeights(NamedTuple):
    """Both layers of all memories: the learned start (no batch dimension) or a distance from it."""

    inner: Float[Tensor, "... H M E K"]
    outer: Float[Tensor, "... H M K E"]


class MemoryState(NamedTuple):
    """Fast weights between two calls, as distances from the start.

    border: of each memory at its own last chunk border; keys, values, rates, decays, targets and gradients come from
        these. current: after the last token; reads come from these.
    """

    border: MemoryWeights
    current: MemoryWeights


class MemoryInputs(NamedTuple):
    """What the slow weights hand to the memories.

    key: unit vectors read by the k, eta and alpha memories. value: unit vectors read by the v memory.
    query: unit vectors that read `memory`; rate, decay: slow part of the gates before their squashing.
    """

    key: Float[Tensor, "B T H K"]
    value: Float[Tensor, "B T H K"]
    query: Float[Tensor, "B T H K"]
    rate: Float[Tensor, "B T H"]
    decay: Float[Tensor, "B T H"]


class GateReadout(NamedTuple):
    """Learned vectors that turn the outputs of the eta and alpha memories into gate logits."""

    rate: Float[Tensor, "H K"]
    decay: Float[Tensor, "H K"]


class MemoryOutput(NamedTuple):
    """Reads for every token, the state after the last one, and the gates that were used."""

    reads: Float[Tensor, "B T H K"]
    state: MemoryState
    rate: Float[Tensor, "B T H"]
    """eta of `memory`, per token."""
    decay: Float[Tensor, "B T H"]
    """alpha: share of the fast weights kept, per token."""


@dataclass(frozen=True)
class WriteRule:
    """The choices the paper leaves open.

    chunk, chunk_generators: tokens between two borders of `memory`, and of the four generators (section 8.2 has two
        sizes). Keys, values and gates come from the generators' last border, and every memory's gradient and
        target from its own (eq. 90). One of the two divides the other.
    erase: layers whose fast weights also forget along the written direction (the DGD term of eq. 88).
    read: whether a token reads the memory after (`inclusive`) or before (`exclusive`) its own write.
    rate_memory, rate_generators: largest inner learning rate of `memory` and of the four generators.
    """

    chunk: int
    chunk_generators: int
    erase: Literal["both", "input", "none"]
    read: Literal["inclusive", "exclusive"]
    rate_memory: float
    rate_generators: float

    @property
    def alignment(self) -> int:
        """Tokens between two moments that are a border of every memory: where a document may start."""
        return max(self.chunk, self.chunk_generators)


def unit(x: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """Scale to Euclidean length 1; vectors shorter than NORM_FLOOR stay shorter."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(NORM_FLOOR)


def zero_state(start: MemoryWeights, batch_size: int) -> MemoryState:
    """State of streams that have read nothing: no distance from the start."""
    zero = MemoryWeights(
        start.inner.new_zeros(batch_size, *start.inner.shape),
        start.outer.new_zeros(batch_size, *start.outer.shape),
    )
    return MemoryState(zero, zero)


def damping(
    moved: Float[Tensor, "... C K"], gradient_squared: Float[Tensor, "... C 1"]
) -> tuple[Float[Tensor, "... C 1"], Float[Tensor, "... C 1"]]:
    """Factor that keeps a write from overshooting, and the curvature it comes from.

    The curvature of the inner loss along its own gradient is |dM(k)|^2 / |gradient|^2, where dM(k) is how the memory's
    answer moves when its weights move by the gradient. The factor is 1 / max(1, curvature): the plain gradient step
    where that cannot overshoot, a normalised step elsewhere. With the erase term the coefficient of the old content
    after any number of writes of one key then stays in [-1, 1] for rates up to 1.

    moved: dM(k). gradient_squared: squared norm of the gradient, over both layers.

    Deviation: eq. 88 takes the plain gradient. Training makes the second layers grow, the curvature passes 1, and the
    fast weights of the first layers then explode (docs/stability_journal.md).
    """
    curvature = moved.square().sum(dim=-1, keepdim=True) / (gradient_squared + GRADIENT_FLOOR)
    return curvature.clamp_min(1.0).reciprocal(), curvature


def reset_rows(weights: MemoryWeights, keep: Float[Tensor, " B"]) -> MemoryWeights:
    """Set the fast weights of the rows where `keep` is 0 back to the start."""
    factor = keep.view(-1, 1, 1, 1, 1)
    return MemoryWeights(weights.inner * factor, weights.outer * factor)


def add(start: MemoryWeights, distance: MemoryWeights) -> MemoryWeights:
    """Weights at a distance from the start."""
    return MemoryWeights(start.inner + distance.inner, start.outer + distance.outer)


def move_border(border: MemoryWeights, current: MemoryWeights, *, generators: bool, memory: bool) -> MemoryWeights:
    """Bring the border of the generators, of `memory`, or of both up to the current weights."""
    if generators and memory:
        return current
    if not generators and not memory:
        return border
    newer, older = (current, border) if generators else (border, current)
    return MemoryWeights(
        *(torch.cat([a[:, :, :MEMORY], b[:, :, MEMORY:]], dim=2) for a, b in zip(newer, older, strict=True))
    )


def rate_limits(rule: WriteRule, like: Tensor) -> Float[Tensor, " M"]:
    """Largest rate of each memory, in the order of MEMORIES."""
    limits = [rule.rate_generators] * 4 + [rule.rate_memory]
    return torch.tensor(limits, dtype=like.dtype, device=like.device)

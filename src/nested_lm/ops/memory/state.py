"""What every backend of the self-modifying memories shares: names, shapes, and the rule that is followed.

A head owns up to six memories. Five generate what the writing needs: the key, the value and the query of a token, its
inner learning rate and its retention; the sixth is the memory that is read. All are written for every token, with the
same key. A memory is a residual two-layer network M(x) = x + W_out silu(W_in x) on vectors of the head's width, or one
matrix, M(x) = W_in x. Written weights are kept as their distance from a learned start.

Shapes: B batch, T tokens, H heads, M memories that adapt, K head width, E hidden width of a memory.

Source: arXiv 2512.24695, eqs. 83-93. `inner` is W_2 there, `outer` is W_1, k/eta/alpha/v/q/memory the squares.
"""

from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nested_lm.ops.memory.rule import WriteRule

NORM_FLOOR = 1e-6
"""Smallest norm a vector is divided by when it is made unit length."""

ROOM_FLOOR = 1e-4
"""Smallest room for a gradient step beside the erase term."""

GRADIENT_FLOOR = 1e-12
"""Added to the squared norm of an inner gradient before dividing by it."""

LAYER_NORM_FLOOR = 1e-6
"""Added to the variance inside a normalised memory."""


class MemoryWeights(NamedTuple):
    """Both layers of all memories: the learned start (no batch dimension) or a distance from it.

    A memory of depth 1 has a square `inner` and an `outer` of hidden width 0.
    """

    inner: Float[Tensor, "... H M E K"]
    outer: Float[Tensor, "... H M K E"]


class MemoryState(NamedTuple):
    """Fast weights between two calls, as distances from the start.

    border: of each memory at its own last chunk border; keys, values, rates, decays, targets and gradients come from
        these. current: after the last token; reads come from these. momentum: the running sum or mean of
        writes, None without.
    """

    border: MemoryWeights
    current: MemoryWeights
    momentum: MemoryWeights | None = None


class MemoryInputs(NamedTuple):
    """What the slow weights hand to the memories.

    key: unit vectors read by the k, eta and alpha memories. value: vectors read by the v memory, unit where the rule
        says so. query: unit vectors read by the q memory. An absent k, v or q memory leaves its input as it is.
    rate, decay: slow part of the gates before their squashing. momentum: that of the momentum's decay, None without.
    """

    key: Float[Tensor, "B T H K"]
    value: Float[Tensor, "B T H K"]
    query: Float[Tensor, "B T H K"]
    rate: Float[Tensor, "B T H"]
    decay: Float[Tensor, "B T H"]
    momentum: Float[Tensor, "B T H"] | None = None


class GateReadout(NamedTuple):
    """Learned vectors that are never written.

    rate, decay: turn the outputs of the eta and alpha memories into gate logits; None where the memory is absent.
    gain: scale of each memory's normalised second layer; None without normalisation.
    """

    rate: Float[Tensor, "H K"] | None
    decay: Float[Tensor, "H K"] | None
    gain: Float[Tensor, "H M K"] | None = None


class MemoryOutput(NamedTuple):
    """Reads for every token, the state after the last one, and the gates that were used."""

    reads: Float[Tensor, "B T H K"]
    state: MemoryState
    rate: Float[Tensor, "B T H"]
    """eta of `memory`, per token."""
    decay: Float[Tensor, "B T H"]
    """alpha: share of the fast weights kept, per token."""


class MemoryCall(NamedTuple):
    """What is asked of a call, beside its tensors.

    position: tokens of the stream before it; says where the borders lie.
    resets: True where a token starts a document: its row's fast weights go back to the start. Only on a border of every
        memory; the caller guarantees it.
    recompute: keep only the border states for backward and compute each chunk again.
    differentiable_twice: the gradients will be differentiated again.
    final: no call follows and no gradients are asked for: the state of the output is not to be used.
    rows: in a final call, the stream of the state that each row goes on from; None: its own.
    branches: in a final call, where the branches of each row begin, and the last one ends (see `check_branches`); None:
        rows do not branch.
    """

    position: int = 0
    resets: Bool[Tensor, "B T"] | None = None
    recompute: bool = False
    differentiable_twice: bool = False
    final: bool = False
    rows: Int[Tensor, " B"] | None = None
    branches: Int[Tensor, "B N"] | None = None


def constant(values: tuple[float, ...], like: Tensor) -> Float[Tensor, " n"]:
    """Numbers of a rule as a tensor. Each lives on its device once: nothing is copied there while a model runs."""
    if isinstance(like, FakeTensor) or torch.compiler.is_compiling():
        return _filled(values, like.dtype, like.device)
    return _kept(values, like.dtype, like.device)


@cache
def _kept(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or later calls could not take gradients with it
        return _filled(values, dtype, device)


def _filled(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made on the device: torch.tensor would make it on the host, and wait for the copy."""
    runs = [(float(value), len(list(run))) for value, run in groupby(values)]
    return torch.cat([torch.full((count,), value, dtype=dtype, device=device) for value, count in runs])


def unit(x: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """Scale to Euclidean length 1; vectors shorter than NORM_FLOOR stay shorter."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(NORM_FLOOR)


def zero_state(start: MemoryWeights, batch_size: int, *, momentum: bool = False) -> MemoryState:
    """State of streams that have read nothing: no distance from the start."""
    # torch.zeros, not new_zeros: starts that are sharded over devices would make a sharded state.
    zero = MemoryWeights(
        *(torch.zeros(batch_size, *part.shape, dtype=part.dtype, device=part.device) for part in start)
    )
    return MemoryState(zero, zero, zero if momentum else None)


def damping(
    moved: Float[Tensor, "... C K"], gradient_squared: Float[Tensor, "... C 1"], room: Float[Tensor, "... C 1"]
) -> tuple[Float[Tensor, "... C 1"], Float[Tensor, "... C 1"]]:
    """Factor that keeps a write from overshooting, and how far it would.

    The curvature of the inner loss along its own gradient is |dM(k)|^2 / |gradient|^2, where dM(k) is how the memory's
    answer moves when its weights move by the gradient. The factor is 1 / max(1, curvature / room): the plain gradient
    step where that cannot overshoot, a normalised step elsewhere.

    moved: dM(k). gradient_squared: squared norm of the gradient, over both layers. room: see `room_beside_erase`.

    Deviation: eq. 88 takes the plain gradient. Training makes the second layers grow, the curvature passes 1, and the
    fast weights of the first layers then explode (reports/stability_journal.md).
    """
    steepness = moved.square().sum(dim=-1, keepdim=True) / (gradient_squared + GRADIENT_FLOOR) / room
    return steepness.clamp_min(1.0).reciprocal(), steepness


def room_beside_erase(rate: Tensor, rule: WriteRule) -> Tensor:
    """Largest product of damping factor and curvature at which the gradient step is safe.

    A write of rate r turns the old content of its key into 1 - r times that by erasing, and into less by the gradient
    step, r times factor times curvature. Their sum keeps the coefficient in [-1, 1], after any number of writes of one
    key, when factor times curvature is at most (2 - r) / r: at rate 1 the whole step, at rate 2, where erasing alone
    reflects, none. Without the erase term the plain limit, 1, holds for rates up to 2.

    Also the share of what the border held that erasing since the border leaves to the gradient.
    """
    if not any(rule.erased_layers):
        return torch.ones_like(rate)
    return ((2 - rate) / rate.clamp_min(1.0)).clamp(ROOM_FLOOR, 1.0)


def generated_shares(rule: WriteRule, like: Tensor) -> Float[Tensor, "M 1 1"]:
    """1 for memories whose targets are their own answers to the value, 0 for those that are taught the value."""
    return constant(rule.generated_targets, like)[:, None, None]


def room_slope(room: Tensor) -> Tensor:
    """Derivative of `room_beside_erase` by the rate, from its value; 0 where it is cut."""
    return -0.5 * (room + 1).square() * ((room > ROOM_FLOOR) & (room < 1))


def check_momentum(rule: WriteRule, inputs: MemoryInputs, state: MemoryState) -> None:
    """Refuse a gate or a state that has momentum where the rule has none, or lacks it where it has.

    Raises:
        ValueError: with what was given.
    """
    for what, given in (("inputs", inputs.momentum is not None), ("state", state.momentum is not None)):
        if given != bool(rule.momentum):
            raise ValueError(
                f"the {what} of the memories {'have' if given else 'lack'} momentum, and the write rule says "
                f"momentum={rule.momentum}; make the state with zero_state(..., momentum={bool(rule.momentum)}), "
                "and the gate with the rule's own model"
            )


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Take rows by index, without a copy when they are of one stream."""
    streams = tensor.shape[0]
    if streams != 1 and (tensor.stride(0) != 0 or not tensor.numel()):
        return tensor.index_select(0, rows.to(tensor.device))
    check_rows(rows, streams)
    return tensor[:1].expand(len(rows), *tensor.shape[1:])


def check_rows(rows: Int[Tensor, " B"], streams: int) -> None:
    """Refuse rows that are not there.

    Raises:
        IndexError: with the rows, and what is allowed.
    """
    if any(not 0 <= row < streams for row in rows.tolist()):
        raise IndexError(f"rows {rows.tolist()} of a state of {streams} streams; allowed are 0 to {streams - 1}")


def check_branches(branches: Int[Tensor, "B N"], rows: int, tokens: int) -> Int[Tensor, "B N"]:
    """Return where rows of tokens branch as the C library wants it; refuse what are no branches.

    Args:
        branches: where the branches of each row begin, and the last one ends. What comes before the first one, in the
            same place of all rows, is the stem; every branch goes on from there as if it came right behind it, and may
            be empty.
        rows, tokens: numbers of rows, and of tokens of each.

    Raises:
        ValueError: with what is wrong.
    """
    if branches.dim() != 2 or branches.shape[0] != rows:
        raise ValueError(f"branches of shape {tuple(branches.shape)} for {rows} rows; a line for each row is needed")
    branches = branches.to("cpu", torch.long).contiguous()
    first = branches[:, 0].tolist()
    if branches.shape[1] < 2 or min(first) < 1 or min(first) != max(first):
        raise ValueError(f"first branches at {first}: they begin behind a stem, of one length in all rows")
    if bool((branches.diff() < 0).any()) or int(branches[:, -1].max()) > tokens:
        raise ValueError(f"branches {branches.tolist()} do not rise, or leave the {tokens} tokens of a row")
    return branches


def reset_rows(weights: MemoryWeights, keep: Float[Tensor, " B"]) -> MemoryWeights:
    """Set the fast weights of the rows where `keep` is 0 back to the start."""
    factor = keep.view(-1, 1, 1, 1, 1)
    return MemoryWeights(weights.inner * factor, weights.outer * factor)


def add(start: MemoryWeights, distance: MemoryWeights) -> MemoryWeights:
    """Weights at a distance from the start."""
    return MemoryWeights(start.inner + distance.inner, start.outer + distance.outer)


def subtract(weights: MemoryWeights, start: MemoryWeights) -> MemoryWeights:
    """Distance of weights from the start."""
    return MemoryWeights(weights.inner - start.inner, weights.outer - start.outer)


def decay_base(start: MemoryWeights, rule: WriteRule) -> MemoryWeights:
    """What retention shrinks the weights towards: the start, or zero."""
    if rule.decay_towards == "start":
        return start
    return MemoryWeights(torch.zeros_like(start.inner), torch.zeros_like(start.outer))


def move_border(border: MemoryWeights, current: MemoryWeights, *, generators: bool, memory: bool) -> MemoryWeights:
    """Bring the border of the generators, of `memory`, or of both up to the current weights."""
    if generators and memory:
        return current
    if not generators and not memory:
        return border
    newer, older = (current, border) if generators else (border, current)
    return MemoryWeights(*(torch.cat([a[:, :, :-1], b[:, :, -1:]], dim=2) for a, b in zip(newer, older, strict=True)))


def shares_of_heads(rule: WriteRule, like: Float[Tensor, "B H *_"]) -> Float[Tensor, "H *_"]:
    """How much of the largest rate each head reaches, with as many trailing dimensions of size 1 as `like` has."""
    heads, groups = like.shape[1], rule.shares
    shares = tuple(groups[head * len(groups) // heads] for head in range(heads))
    return constant(shares, like).view(heads, *(1 for _ in like.shape[2:]))


def rate_share(logit: Float[Tensor, "B H *_"], rule: WriteRule) -> Float[Tensor, "B H *_"]:
    """Learning rate as a share of the largest: a sigmoid, stretched by `rate_stretch` at both ends and cut at 0 and 1,
    times what the head reaches.

    Section 8.1 leaves the range open. A plain sigmoid never reaches its ends, so what should be kept or turned over
    exactly fades with the number of writes (reports/stability_journal.md). The stretch is that of the hard concrete
    distribution (arXiv 1712.01312 eq. 11).
    """
    stretch = rule.rate_stretch
    share = ((1 + 2 * stretch) * torch.sigmoid(logit) - stretch).clamp(0, 1)
    return share * shares_of_heads(rule, logit)


def rate_share_slope(share: Float[Tensor, "B H *_"], rule: WriteRule) -> Float[Tensor, "B H *_"]:
    """Derivative of `rate_share` by the logit, from its value; 0 where it is cut."""
    stretch, reached = rule.rate_stretch, shares_of_heads(rule, share)
    share = share / reached
    if stretch == 0:
        return share * (1 - share) * reached
    slope = (share + stretch) * (1 + stretch - share) / (1 + 2 * stretch)
    return slope * ((share > 0) & (share < 1)) * reached


def rate_limits(rule: WriteRule, like: Tensor) -> Float[Tensor, " M"]:
    """Largest rate of each memory."""
    return constant(rule.limits, like)

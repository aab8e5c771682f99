"""One chunk of the self-modifying memories in matrix products.

Inside a chunk every gradient is taken at the border (or is linear in the weights), so each layer of each memory becomes
a gated delta rule with rank-one writes, which `memory_writes` solves. The first layers of all memories of equal rate
share their directions, the keys, and so share the triangular factor. Inner gradients are closed forms. Everything here
is differentiable by autograd; the commonest rules have a backward written by hand as well (`memory_backward`).

Shapes: B batch, H heads, C tokens of a chunk, M memories that adapt, K head width, E hidden width.

Source: arXiv 2512.24695 eqs. 83-93 in the parallel form derived in docs/equations.md.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    LAYER_NORM_FLOOR,
    NORM_FLOOR,
    GateReadout,
    MemoryWeights,
    damping,
    generated_shares,
    rate_limits,
    rate_share,
    room_beside_erase,
    unit,
)
from nested_lm.ops.memory.writes import (
    Decays,
    Spread,
    Writes,
    joined,
    joined_pushes,
    product,
    running_decays,
    solve_with_momentum,
    solve_writes,
    spread_of_momentum,
)
from nested_lm.ops.triangular import full_product, unit_lower_inverse


class ChunkInputs(NamedTuple):
    """Inputs of one chunk, heads before tokens."""

    key: Float[Tensor, "B H C K"]
    value: Float[Tensor, "B H C K"]
    query: Float[Tensor, "B H C K"]
    rate: Float[Tensor, "B H C"]
    decay: Float[Tensor, "B H C"]
    momentum: Float[Tensor, "B H C"] | None


class Answers(NamedTuple):
    """What the generating memories that read one input answer, with what the backward needs."""

    pre: Float[Tensor, "B H N C E"]
    out: Float[Tensor, "B H N C K"]


class Generated(NamedTuple):
    """What the memories generate from the border weights (eq. 83)."""

    key: Float[Tensor, "B H C K"]
    value: Float[Tensor, "B H C K"]
    query: Float[Tensor, "B H C K"]
    rate: Float[Tensor, "B H C"]  # before scaling by the largest rate
    log_decay: Float[Tensor, "B H C"]
    log_momentum: Float[Tensor, "B H C"] | None
    answers: tuple[Answers | None, Answers | None, Answers | None]  # of those that read key, value, query


class Errors(NamedTuple):
    """Closed-form inner gradients at the border (eqs. 84-85): rank one a token, error times direction."""

    pre_key: Float[Tensor, "B H M C E"]
    pre_value: Float[Tensor, "B H M C E"] | None
    difference: Float[Tensor, "B H M C E"]  # hidden activations at k minus those at v, if targets are generated
    error: Float[Tensor, "B H M C K"]  # gradient at the output of the second layer; M(k) - target when not normalised
    back: Float[Tensor, "B H M C E"]  # error carried back through the second layer
    slope: Float[Tensor, "B H M C E"]  # derivative of silu at k
    squared: Float[Tensor, "B H M C 1"]  # squared length of the hidden activations at k
    direction: Float[Tensor, "B H M C E"]  # the same activations at unit length
    moved: Float[Tensor, "B H M C K"]  # how M(k) moves along the gradient
    damped: Float[Tensor, "B H M C 1"]  # factor of the write, see `damping`
    steepness: Float[Tensor, "B H M C 1"]
    room: Float[Tensor, "B H M C 1"]  # see `room_beside_erase`


class ChunkWeights(NamedTuple):
    """Weights a chunk starts from.

    anchor: full weights at the last border. base: what decay goes towards (no batch dimension). distance: from the
    base, before the first token. border: the same at the last border, where the erase term leaves that to the gradient
    (`erase_since`), else None. momentum: None without.
    """

    anchor: MemoryWeights
    base: MemoryWeights
    distance: MemoryWeights
    border: MemoryWeights | None
    momentum: MemoryWeights | None


class Chunk(NamedTuple):
    """Everything one chunk computed: its results and what its backward reads."""

    after: MemoryWeights
    momentum: MemoryWeights | None
    made: Generated
    errors: Errors | None  # None for linear memories
    decays: Decays
    inner: tuple[Writes, ...]  # one entry a group
    outer: tuple[Writes, ...]  # none for linear memories


class Layer(NamedTuple):
    """One layer of all two-layer memories, as its writes see it."""

    error: Float[Tensor, "B H M C X"]  # damped gradient at the output
    direction: Float[Tensor, "B H G C Y"]  # unit input; G is 1 when all memories share it
    old: Float[Tensor, "B H M X Y"]  # distance before the chunk
    border: Float[Tensor, "B H M X Y"] | None  # see `ChunkWeights`
    momentum: Float[Tensor, "B H M X Y"] | None
    erase: bool


class Group(NamedTuple):
    """Neighbouring memories that are written alike, and so share the factor of their first layers."""

    members: slice
    rate: float  # the largest
    since_border: bool
    generated: bool  # their targets are their own answers to the value


def write_groups(rule: WriteRule) -> tuple[Group, ...]:
    """All memories, in as few groups as their rules allow."""
    rules = list(zip(rule.limits, rule.since_border, rule.generated_targets, strict=True))
    changes = [i for i, (a, b) in enumerate(pairwise(rules), start=1) if a != b]
    return tuple(Group(slice(a, b), *rules[a]) for a, b in pairwise([0, *changes, len(rules)]))


def readers(rule: WriteRule) -> tuple[slice, slice, slice]:
    """Memories that read the key input, the value input and the query input."""
    of_key = sum(name in ("k", "eta", "alpha") for name in rule.adapt)
    of_value = of_key + ("v" in rule.adapt)
    return slice(0, of_key), slice(of_key, of_value), slice(of_value, len(rule.adapt) - 1)


def silu_slope(pre: Tensor) -> Tensor:
    """Derivative of silu."""
    gate = torch.sigmoid(pre)
    return torch.addcmul(gate, pre * gate, 1 - gate)


def normalised_rows(branch: Tensor) -> tuple[Tensor, Tensor]:
    """Layer normalisation without gain, and the standard deviation it divided by."""
    centred = branch - branch.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_FLOOR).sqrt()
    return centred / deviation, deviation


def _through_norm(x: Tensor, normalised: Tensor, deviation: Tensor) -> Tensor:
    """Multiply by the (symmetric) Jacobian of layer normalisation."""
    projected = x - x.mean(-1, keepdim=True) - normalised * (x * normalised).mean(-1, keepdim=True)
    return projected / deviation


def _answer(
    x: Float[Tensor, "B H C K"],
    anchor: MemoryWeights,
    members: slice,
    gain: Float[Tensor, "H M K"] | None,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> Answers:
    """M(x) of some memories."""
    given = x[:, :, None]
    pre = product(given, anchor.inner[:, :, members].mT, operands)
    if rule.depth == 1:
        return Answers(pre, pre)
    branch = product(functional.silu(pre), anchor.outer[:, :, members].mT, operands)
    if gain is not None:
        branch = gain[:, members, None] * normalised_rows(branch)[0]
    return Answers(pre, given + branch)


def generate(
    inputs: ChunkInputs, anchor: MemoryWeights, readout: GateReadout, rule: WriteRule, operands: torch.dtype | None
) -> Generated:
    """Let the memories generate keys, values, queries, rates and retentions."""
    answers = [
        _answer(x, anchor, members, readout.gain, rule, operands) if members.stop > members.start else None
        for x, members in zip((inputs.key, inputs.value, inputs.query), readers(rule), strict=True)
    ]
    of_key, of_value, of_query = answers

    def from_key(name: str) -> Tensor | None:
        index = rule.index(name)
        return None if index is None or of_key is None else of_key.out[:, :, index]

    def logit(slow: Tensor, answered: Tensor | None, vector: Tensor | None) -> Tensor:
        if answered is not None and vector is not None:
            slow = slow + (answered * vector[:, None]).sum(-1)
        return slow if rule.gates == "head" else slow.mean(dim=1, keepdim=True).expand_as(slow)

    key = from_key("k")
    value = inputs.value if of_value is None else of_value.out[:, :, 0]
    return Generated(
        inputs.key if key is None else unit(key),
        unit(value) if of_value is not None and rule.unit_values else value,
        inputs.query if of_query is None else unit(of_query.out[:, :, 0]),
        rate_share(logit(inputs.rate, from_key("eta"), readout.rate), rule),
        functional.logsigmoid(logit(inputs.decay, from_key("alpha"), readout.decay)),
        None if inputs.momentum is None else functional.logsigmoid(inputs.momentum),
        (of_key, of_value, of_query),
    )


def inner_errors(
    made: Generated,
    anchor: MemoryWeights,
    gain: Float[Tensor, "H M K"] | None,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> Errors:
    """Gradient of half |M(k) - target|^2 at the border, for every two-layer memory and token."""
    pre_key = product(made.key[:, :, None], anchor.inner.mT, operands)
    hidden = functional.silu(pre_key)
    difference, pre_value = hidden, None
    if any(rule.generated_targets):
        pre_value = product(made.value[:, :, None], anchor.inner.mT, operands)
        difference = hidden - generated_shares(rule, hidden) * functional.silu(pre_value)
    through = None
    if gain is None:
        error = product(difference, anchor.outer.mT, operands) + (made.key - made.value)[:, :, None]
    else:
        normalised, deviation = normalised_rows(product(hidden, anchor.outer.mT, operands))
        apart = normalised
        if pre_value is not None:
            of_value = normalised_rows(product(functional.silu(pre_value), anchor.outer.mT, operands))[0]
            apart = apart - generated_shares(rule, hidden) * of_value
        scale = gain[:, :, None]
        error = _through_norm(scale * (scale * apart + (made.key - made.value)[:, :, None]), normalised, deviation)
        through = (scale, normalised, deviation)
    back = product(error, anchor.outer, operands)
    squared = hidden.square().sum(dim=-1, keepdim=True)
    direction = hidden / (squared + NORM_FLOOR**2).sqrt()
    slope = silu_slope(pre_key)
    gradient = slope * back  # of the first layer; times the key, which has unit length
    moved = product(slope * gradient, anchor.outer.mT, operands) + squared * error
    if through is not None:
        moved = through[0] * _through_norm(moved, *through[1:])
    if rule.damp:
        size = gradient.square().sum(-1, keepdim=True) + squared * error.square().sum(-1, keepdim=True)
        rates = made.rate[:, :, None, :, None] * rate_limits(rule, made.rate)[:, None, None]
        room = room_beside_erase(rates, rule)
        damped, steepness = damping(moved, size, room)
    else:
        damped = steepness = room = torch.ones_like(squared)
    return Errors(
        pre_key, pre_value, difference, error, back, slope, squared, direction, moved, damped, steepness, room
    )


def solve_self_referential(
    made: Generated,
    base: Float[Tensor, "H N K K"],
    old: Float[Tensor, "B H N K K"],
    limit: float,
    decays: Decays,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> Writes:
    """Writes of linear memories whose targets are their own fresh answers: w_t = F_{t-1} u_t - erase.

    The gradient reads the full weights F = base + D, the erase term reads D: w_t = base u'_t + D_{t-1} u_t.
    """
    key, value = made.key[:, :, None], made.value[:, :, None]
    rate = made.rate[:, :, None, :, None] * limit
    toward = rate * (value - key if rule.objective == "l2" else value)
    reader = toward - decays.erased * rate * key if rule.erased_layers[0] else toward
    inverse = unit_lower_inverse(-decays.ratio * product(reader, key.mT, operands))
    known = product(toward, base.mT, operands) + decays.before * product(reader, old.mT, operands)
    return Writes(full_product(inverse, known))


def _write_linear(
    made: Generated,
    weights: ChunkWeights,
    decays: Decays,
    spread: Spread | None,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> tuple[Writes, ...]:
    """Writes of linear memories (eqs. 92-93, and the fresh-gradient and self-referential forms)."""
    key, value = made.key[:, :, None], made.value[:, :, None]
    times = decays.erased if rule.erased_layers[0] else None
    if rule.gradient == "fresh" and rule.objective == "l2":
        times = torch.ones_like(decays.erased) if times is None else times + 1
    writes = []
    for group in write_groups(rule):
        base, old = weights.base.inner[:, group.members], weights.distance.inner[:, :, group.members]
        if rule.gradient == "self_referential":
            writes.append(solve_self_referential(made, base, old, group.rate, decays, rule, operands))
            continue
        anchor = weights.anchor.inner[:, :, group.members]
        target = product(value, anchor.mT, operands) if group.generated else value
        error = -target
        if rule.objective == "l2":
            error = product(key, base.mT if rule.gradient == "fresh" else anchor.mT, operands) - target
        error = error.expand(*error.shape[:2], old.shape[2], *error.shape[3:])
        rate = made.rate[:, :, None, :, None] * group.rate
        held = None
        if group.since_border and weights.border is not None:
            held = product(key, weights.border.inner[:, :, group.members].mT, operands)
        if spread is None or weights.momentum is None:
            writes.append(solve_writes(error, key, old, rate, decays, times, operands, held))
        else:
            running = weights.momentum.inner[:, :, group.members]
            writes.append(solve_with_momentum(error, key, old, running, rate, decays, spread, times, operands, held))
    return tuple(writes)


def _write_layer(
    layer: Layer,
    made: Generated,
    decays: Decays,
    spread: Spread | None,
    room: Float[Tensor, "B H M C 1"],
    rule: WriteRule,
    operands: torch.dtype | None,
) -> tuple[Writes, ...]:
    """Writes of one layer of all two-layer memories, one entry a group."""
    times = decays.erased if layer.erase else None
    writes = []
    for group in write_groups(rule):
        members = group.members
        rate = made.rate[:, :, None, :, None] * group.rate
        at = layer.direction if layer.direction.shape[2] == 1 else layer.direction[:, :, members]
        known, before = layer.error[:, :, members], layer.old[:, :, members]
        held = None
        if layer.erase and group.since_border and layer.border is not None:
            held = room[:, :, members] * product(at, layer.border[:, :, members].mT, operands)
        if spread is None or layer.momentum is None:
            writes.append(solve_writes(known, at, before, rate, decays, times, operands, held))
        else:
            running = layer.momentum[:, :, members]
            writes.append(solve_with_momentum(known, at, before, running, rate, decays, spread, times, operands, held))
    return tuple(writes)


def _carried(
    writes: tuple[Writes, ...],
    direction: Tensor,
    old: Tensor,
    momentum: Tensor | None,
    decays: Decays,
    spread: Spread | None,
    operands: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Distance and momentum of one layer after the chunk: D_C = gamma_C D_0 + sum_t (gamma_C / gamma_t) w_t p_t^T."""
    after = torch.addcmul(product((joined(writes) * decays.to_end).mT, direction, operands), decays.end, old)
    if spread is None or momentum is None:
        return after, None
    pushed = joined_pushes(writes)
    arrived = spread.matrix[..., -1, :, None]
    after = after + product((pushed * arrived).mT, direction, operands) + spread.first[..., -1:, :] * momentum
    left = product((pushed * spread.own_end).mT, direction, operands) + spread.own_first * momentum
    return after, left


def forward_chunk(
    inputs: ChunkInputs,
    weights: ChunkWeights,
    readout: GateReadout,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> Chunk:
    """Write up to a chunk of tokens, none beyond the next border, into all memories."""
    made = generate(inputs, weights.anchor, readout, rule, operands)
    decays = running_decays(made.log_decay, rule)
    spread = None
    if made.log_momentum is not None:
        spread = spread_of_momentum(decays.log_kept, made.log_momentum, rule)
    key = made.key[:, :, None]
    distance, momentum = weights.distance, weights.momentum
    running, border = momentum or (None, None), weights.border or (None, None)
    errors: Errors | None = None
    outer: tuple[Writes, ...] = ()
    if rule.depth == 1:
        inner = _write_linear(made, weights, decays, spread, rule, operands)
    else:
        errors = inner_errors(made, weights.anchor, readout.gain, rule, operands)
        length = errors.squared.add(NORM_FLOOR**2).sqrt()
        erases = rule.erased_layers
        first = Layer(
            errors.damped * (errors.slope * errors.back), key, distance.inner, border[0], running[0], erases[0]
        )
        second = Layer(
            (errors.damped * length) * errors.error,
            errors.direction,
            distance.outer,
            border[1],
            running[1],
            erases[1],
        )
        inner, outer = (
            _write_layer(layer, made, decays, spread, errors.room, rule, operands) for layer in (first, second)
        )
    common = (decays, spread, operands)
    after_inner, left_inner = _carried(inner, key, distance.inner, running[0], *common)
    after_outer, left_outer = distance.outer, running[1]
    if errors is not None:
        after_outer, left_outer = _carried(outer, errors.direction, distance.outer, running[1], *common)
    left = None if left_inner is None or left_outer is None else MemoryWeights(left_inner, left_outer)
    return Chunk(MemoryWeights(after_inner, after_outer), left, made, errors, decays, inner, outer)

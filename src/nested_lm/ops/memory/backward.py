"""The hand-written backward of a chunk, for the rules without the rarer options. Autograd serves the others.

It keeps what the forward computed instead of a graph of every operation. Autograd through the forward gives the same
numbers (tested).

Shapes: B batch, H heads, C tokens of a chunk, M memories that adapt, K head width, E hidden width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory.chunk import (
    Answers,
    Chunk,
    ChunkInputs,
    ChunkWeights,
    readers,
    silu_slope,
    write_groups,
)
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    GRADIENT_FLOOR,
    NORM_FLOOR,
    GateReadout,
    MemoryWeights,
    generated_shares,
    rate_limits,
    rate_share_slope,
    room_slope,
)
from nested_lm.ops.memory.writes import Writes, joined, product
from nested_lm.ops.triangular import full_product


class ChunkGradients(NamedTuple):
    """Gradients of one chunk's inputs."""

    inputs: tuple[Tensor, ...]  # in the order of ChunkInputs, without momentum
    anchor: MemoryWeights
    distance: MemoryWeights
    border: MemoryWeights | None  # of ChunkWeights.border
    readout: tuple[Tensor | None, Tensor | None]


class TraceGradients(NamedTuple):
    """Gradients that reads of `memory` and the reported gates send into one chunk."""

    query: Float[Tensor, "B H C K"]
    inner_key: Float[Tensor, "B H C K"]
    inner_write: Float[Tensor, "B H C E"]
    outer_key: Float[Tensor, "B H C E"]
    outer_write: Float[Tensor, "B H C K"]
    log_kept: Float[Tensor, "B H C"]
    rate: Float[Tensor, "B H C"]  # of the rate of `memory`
    decay: Float[Tensor, "B H C"]


_COMMON = (
    *("chunk", "chunk_generators", "adapt", "rates", "rate_stretch", "rate_shares"),
    *("targets", "targets_generators", "erase", "erase_since", "erase_since_generators", "read"),
)
_RARE = {name: field.default for name, field in WriteRule.model_fields.items() if name not in _COMMON}


def has_closed_backward(rule: WriteRule, *, momentum: bool = False) -> bool:
    """Whether a rule has a hand-written backward: rarer options have their defaults, and reads are not at borders.

    momentum: it may have that as well, whose backward is written in C only.
    """
    rare = (name for name in _RARE if not (momentum and name == "momentum"))
    return rule.read != "border" and all(getattr(rule, name) == _RARE[name] for name in rare)


class _LayerGradients(NamedTuple):
    """What the backward of one layer's writes sends on."""

    error: Tensor  # to the known error
    direction: Tensor  # to the directions
    old: Tensor  # to the weights before the chunk
    border: Tensor | None  # to the weights at the border, where the erase term knows them
    rate: Tensor  # (B, H, C), to the rate before scaling
    log_kept: Tensor  # (B, H, C)
    log_before: Tensor  # (B, H, C)


def _backward_layer(
    grad_after: Tensor,
    grad_write: Tensor,
    groups: tuple[Writes, ...],
    direction: Tensor,
    old: Tensor,
    border: Tensor | None,
    chunk: Chunk,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> _LayerGradients:
    """Backward of the writes of one layer and of its weights after the chunk.

    grad_write: gradient that reads send to the writes of `memory` (B, H, C, X).
    """
    decays, errors = chunk.decays, chunk.errors
    assert errors is not None
    write = joined(groups)
    # after = end * old + (write * to_end)^T direction
    carried = product(direction, grad_after.mT, operands)  # (B, H, M, C, X)
    grad = carried * decays.to_end
    grad[:, :, -1] += grad_write
    grad_to_end = (write * carried).sum((2, 4)) * decays.to_end[:, :, 0, :, 0]  # (B, H, C), times to_end
    grad_direction = product(write * decays.to_end, grad_after, operands)
    grad_old = decays.end * grad_after
    grad_log_end = (grad_old * old).sum((2, 3, 4)) + grad_to_end.sum(-1)
    grad_log_kept = -grad_to_end
    grad_log_kept[..., -1] += grad_log_end
    grad_log_before = torch.zeros_like(grad_log_kept)
    grad_rate = torch.zeros_like(grad_log_kept)
    grad_border = None if border is None else torch.zeros_like(border)
    grad_errors = []
    for (group, limit, since_border, _), found in zip(write_groups(rule), groups, strict=True):
        assert found.known is not None
        rate = chunk.made.rate[:, :, None, :, None] * limit
        right = grad[:, :, group]
        if found.inverse is not None:
            right = full_product(found.inverse.mT, right)
        grad_known = -rate * right
        grad_rate -= limit * (right * found.known).sum((2, 4))
        grad_errors.append(grad_known)
        if found.inverse is None or found.overlap is None or found.faded is None:
            continue
        shared = direction.shape[2] == 1
        at = direction if shared else direction[:, :, group]
        factor = -full_product(right, found.write.mT)  # gradient of the factor; only below the diagonal counts
        if shared:
            factor = factor.sum(2, keepdim=True)
        factor = factor * decays.erased
        weighted = factor * found.overlap
        grad_rate += limit * weighted.sum((2, 4))
        weighted = weighted * rate
        grad_log_before += weighted.sum((2, 4))
        grad_log_kept -= weighted.sum((2, 3))
        grad_overlap = factor * rate * decays.ratio
        grad_faded = grad_known * (decays.before * decays.erased)
        grad_log_before += (grad_faded * found.faded).sum((2, 4))
        grad_old[:, :, group] += product(grad_faded.mT, at, operands)
        along = product(grad_faded, old[:, :, group], operands)
        if since_border and border is not None and grad_border is not None:
            room = errors.room[:, :, group]
            grad_border[:, :, group] = product((-room * grad_known).mT, at, operands)
            held = product(grad_known, border[:, :, group], operands)
            along -= room * held
            grad_rate -= limit * ((held * at).sum(-1, keepdim=True) * room_slope(room)).sum((2, 4))
        mutual = product(grad_overlap + grad_overlap.mT, at, operands)
        if shared:
            grad_direction = grad_direction.sum(2, keepdim=True) if grad_direction.shape[2] > 1 else grad_direction
            grad_direction += along.sum(2, keepdim=True) + mutual
        else:
            grad_direction[:, :, group] += along + mutual
    error = grad_errors[0] if len(grad_errors) == 1 else torch.cat(grad_errors, dim=2)
    return _LayerGradients(error, grad_direction, grad_old, grad_border, grad_rate, grad_log_kept, grad_log_before)


def _backward_errors(
    grad_inner: Tensor,
    grad_outer: Tensor,
    grad_direction: Tensor,
    chunk: Chunk,
    anchor: MemoryWeights,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, MemoryWeights]:
    """Backward of `inner_errors`: gradients of key, value, rate (before scaling) and anchor."""
    errors, made = chunk.errors, chunk.made
    assert errors is not None
    squared, direction, slope, error, damped = (
        errors.squared,
        errors.direction,
        errors.slope,
        errors.error,
        errors.damped,
    )
    length = squared.add(NORM_FLOOR**2).sqrt()
    gradient = slope * errors.back
    # inner = damped * gradient and outer = damped * length * error
    along = (grad_outer * error).sum(-1, keepdim=True)
    grad_damped = (grad_inner * gradient).sum(-1, keepdim=True) + along * length
    grad_gradient = damped * grad_inner
    grad_error = (damped * length) * grad_outer
    # damped = 1 / max(1, steepness), steepness = |moved|^2 / (size room), size = |gradient|^2 + squared |error|^2
    error_squared = error.square().sum(-1, keepdim=True)
    size = gradient.square().sum(-1, keepdim=True) + squared * error_squared + GRADIENT_FLOOR
    grad_steepness = torch.where(errors.steepness > 1, -grad_damped * damped.square(), 0.0)
    grad_moved = (2 * grad_steepness / (size * errors.room)) * errors.moved
    grad_log_steepness = grad_steepness * errors.steepness
    grad_size = -grad_log_steepness / size
    grad_rates = -grad_log_steepness / errors.room * room_slope(errors.room)
    grad_rate = (grad_rates[..., 0] * rate_limits(rule, size)[:, None]).sum(2)
    # moved = (slope * gradient) W_out^T + squared * error
    steep = product(grad_moved, anchor.outer, operands)
    grad_anchor_outer = product(grad_moved.mT, slope * gradient, operands)
    grad_gradient = grad_gradient + slope * steep + (2 * grad_size) * gradient
    grad_error = grad_error + squared * grad_moved + (2 * grad_size * squared) * error
    grad_squared = grad_size * error_squared + (grad_moved * error).sum(-1, keepdim=True)
    grad_squared += (0.5 / length) * (damped * along)
    grad_squared -= 0.5 * (grad_direction * direction).sum(-1, keepdim=True) / length.square()
    grad_hidden = grad_direction / length + (2 * length * grad_squared) * direction
    # gradient = slope * (error W_out)
    grad_back = grad_gradient * slope
    grad_slope = grad_gradient * errors.back + gradient * steep
    grad_error = grad_error + product(grad_back, anchor.outer.mT, operands)
    grad_difference = product(grad_error, anchor.outer, operands)
    grad_anchor_outer += product(error.mT, grad_back, operands)
    grad_anchor_outer += product(grad_error.mT, errors.difference, operands)
    grad_hidden += grad_difference
    gate = torch.sigmoid(errors.pre_key)
    curve = gate * (1 - gate) * (2 + errors.pre_key * (1 - 2 * gate))
    grad_pre_key = torch.addcmul(grad_hidden * slope, grad_slope, curve)
    grad_anchor_inner = product(grad_pre_key.mT, made.key[:, :, None], operands)
    shared = grad_error.sum(2)
    grad_key, grad_value = shared + product(grad_pre_key, anchor.inner, operands).sum(2), -shared
    if errors.pre_value is not None:
        grad_pre_value = -generated_shares(rule, shared) * grad_difference * silu_slope(errors.pre_value)
        grad_anchor_inner += product(grad_pre_value.mT, made.value[:, :, None], operands)
        grad_value = grad_value + product(grad_pre_value, anchor.inner, operands).sum(2)
    return grad_key, grad_value, grad_rate, MemoryWeights(grad_anchor_inner, grad_anchor_outer)


def _backward_unit(grad: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """Backward of scaling to unit length."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    along = (grad * direction).sum(-1, keepdim=True) * direction
    return torch.where(length > NORM_FLOOR, grad - along, grad) / length.clamp_min(NORM_FLOOR)


def _backward_answers(
    grad: Float[Tensor, "B H N C K"],
    answers: Answers,
    x: Float[Tensor, "B H C K"],
    anchor: MemoryWeights,
    members: slice,
    grad_anchor: MemoryWeights,
    operands: torch.dtype | None,
) -> Float[Tensor, "B H C K"]:
    """Backward of M(x) of some memories; adds to `grad_anchor` in place."""
    grad_pre = product(grad, anchor.outer[:, :, members], operands) * silu_slope(answers.pre)
    grad_anchor.outer[:, :, members] += product(grad.mT, functional.silu(answers.pre), operands)
    grad_anchor.inner[:, :, members] += product(grad_pre.mT, x[:, :, None], operands)
    return (grad + product(grad_pre, anchor.inner[:, :, members], operands)).sum(2)


def _backward_key_readers(
    grad_key: Tensor, rate_logit: Tensor, decay_logit: Tensor, readout: GateReadout, chunk: Chunk, rule: WriteRule
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradients of the answers of the k, eta and alpha memories, and of the readout."""
    answers = chunk.made.answers[0]
    assert answers is not None
    parts: list[Tensor] = []
    of_readout: list[Tensor | None] = [None, None]
    for index, name in enumerate(rule.adapt[: answers.out.shape[2]]):
        out = answers.out[:, :, index]
        if name == "k":
            parts.append(_backward_unit(grad_key, out, chunk.made.key))
            continue
        logit, vector = (rate_logit, readout.rate) if name == "eta" else (decay_logit, readout.decay)
        assert vector is not None
        parts.append(logit[..., None] * vector[:, None])
        of_readout[0 if name == "eta" else 1] = (logit[..., None] * out).sum((0, 2))
    return torch.stack(parts, dim=2), (of_readout[0], of_readout[1])


def _backward_generate(
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    inputs: ChunkInputs,
    anchor: MemoryWeights,
    readout: GateReadout,
    chunk: Chunk,
    grad_anchor: MemoryWeights,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, Tensor | None]]:
    """Backward of `generate`, from the gradients of key, value, query, rate and log_decay."""
    made = chunk.made
    grad_key, grad_value, grad_query, grad_rate, grad_log_decay = grads
    rate_logit = grad_rate * rate_share_slope(made.rate, rule)
    decay_logit = -grad_log_decay * torch.expm1(made.log_decay)
    of_key, of_value, of_query = made.answers
    members = readers(rule)
    of_readout: tuple[Tensor | None, Tensor | None] = (None, None)

    def back(grad: Tensor, answers: Answers, x: Tensor, who: slice) -> Tensor:
        return _backward_answers(grad, answers, x, anchor, who, grad_anchor, operands)

    if of_key is not None:
        grad_out, of_readout = _backward_key_readers(grad_key, rate_logit, decay_logit, readout, chunk, rule)
        through = back(grad_out, of_key, inputs.key, members[0])
        grad_key = through if "k" in rule.adapt else grad_key + through
    if of_value is not None:
        grad_out = _backward_unit(grad_value, of_value.out[:, :, 0], made.value)[:, :, None]
        grad_value = back(grad_out, of_value, inputs.value, members[1])
    if of_query is not None:
        grad_out = _backward_unit(grad_query, of_query.out[:, :, 0], made.query)[:, :, None]
        grad_query = back(grad_out, of_query, inputs.query, members[2])
    return (grad_key, grad_value, grad_query, rate_logit, decay_logit), of_readout


def backward_chunk(
    grad_after: MemoryWeights,
    trace: TraceGradients,
    inputs: ChunkInputs,
    weights: ChunkWeights,
    readout: GateReadout,
    chunk: Chunk,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> ChunkGradients:
    """Gradients of one chunk's inputs from those of its results."""
    made, errors = chunk.made, chunk.errors
    assert errors is not None
    common = (chunk, rule, operands)
    old, border = weights.distance, weights.border or (None, None)
    key = made.key[:, :, None]
    inner = _backward_layer(grad_after.inner, trace.inner_write, chunk.inner, key, old.inner, border[0], *common)
    at = errors.direction
    outer = _backward_layer(grad_after.outer, trace.outer_write, chunk.outer, at, old.outer, border[1], *common)
    grad_direction = outer.direction
    grad_direction[:, :, -1] += trace.outer_key
    grad_key, grad_value, grad_rate, grad_anchor = _backward_errors(
        inner.error, outer.error, grad_direction, chunk, weights.anchor, rule, operands
    )
    grad_key = grad_key + inner.direction.sum(2) + trace.inner_key
    grad_rate = grad_rate + inner.rate + outer.rate + trace.rate * rule.rate_memory
    log_before = inner.log_before + outer.log_before
    # log_kept is the running sum of log_decay; the erase term meets gamma_t, or gamma_{t-1}
    running = inner.log_kept + outer.log_kept + trace.log_kept + log_before
    grad_log_decay = running.flip(-1).cumsum(-1).flip(-1)
    if not rule.erase_after_decay:
        grad_log_decay = grad_log_decay - log_before
    grad_log_decay = grad_log_decay + trace.decay * made.log_decay.exp()
    grads = (grad_key, grad_value, trace.query, grad_rate, grad_log_decay)
    grad_inputs, grad_readout = _backward_generate(
        grads, inputs, weights.anchor, readout, chunk, grad_anchor, rule, operands
    )
    to_border = None
    if inner.border is not None and outer.border is not None:
        to_border = MemoryWeights(inner.border, outer.border)
    return ChunkGradients(grad_inputs, grad_anchor, MemoryWeights(inner.old, outer.old), to_border, grad_readout)

"""One chunk of the self-modifying memories in matrix products, and its backward, written by hand.

Inside a chunk every gradient is taken at the border, so it is known before the chunk starts, and each layer of each
memory becomes a gated delta rule with rank-one writes. With distances D from the start, unit directions p_t, known
errors g_t, rates eta_t and retentions alpha_t (gamma_t their running product):

    D_t = alpha_t D_{t-1} - eta_t (g_t + D_{t-1} p_t) p_t^T = gamma_t D_0 + sum_{i<=t} (gamma_t / gamma_i) w_i p_i^T

and the updates w solve one unit lower-triangular system (I + L) W = -eta (G + gamma_{t-1} P D_0^T) with
L_ti = eta_t (gamma_{t-1} / gamma_i) p_t.p_i for i < t. The first layers of all memories of equal rate share p = k and
so share the factor. Inner gradients are closed forms.

Shapes: B batch, H heads, C tokens of a chunk, M memories (5), K head width, E hidden width.

Source: arXiv 2512.24695 eqs. 83-91 in the parallel form derived in docs/equations.md.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory import (
    GRADIENT_FLOOR,
    MEMORY,
    NORM_FLOOR,
    VALUE,
    GateReadout,
    MemoryWeights,
    WriteRule,
    damping,
    unit,
)
from nested_lm.ops.triangular import unit_lower_inverse


class ChunkInputs(NamedTuple):
    """Inputs of one chunk, heads before tokens."""

    key: Float[Tensor, "B H C K"]
    value: Float[Tensor, "B H C K"]
    rate: Float[Tensor, "B H C"]
    decay: Float[Tensor, "B H C"]


class Generated(NamedTuple):
    """What the memories generate from the border weights (eq. 83), with what its backward needs."""

    key: Float[Tensor, "B H C K"]
    value: Float[Tensor, "B H C K"]
    rate: Float[Tensor, "B H C"]  # before scaling by the largest rate
    log_decay: Float[Tensor, "B H C"]
    pre: Float[Tensor, "B H 3 C E"]
    out: Float[Tensor, "B H 3 C K"]  # k, eta, alpha before normalisation and read-out
    pre_value: Float[Tensor, "B H 1 C E"]
    out_value: Float[Tensor, "B H 1 C K"]


class Errors(NamedTuple):
    """Closed-form inner gradients at the border (eqs. 84-85): rank one a token, error times direction."""

    pre_key: Float[Tensor, "B H M C E"]
    pre_value: Float[Tensor, "B H M C E"]
    difference: Float[Tensor, "B H M C E"]  # hidden activations at k minus those at v
    error: Float[Tensor, "B H M C K"]  # M(k) - M(v)
    back: Float[Tensor, "B H M C E"]  # error carried back through the second layer
    slope: Float[Tensor, "B H M C E"]  # derivative of silu at k
    squared: Float[Tensor, "B H M C 1"]  # squared length of the hidden activations at k
    direction: Float[Tensor, "B H M C E"]  # the same activations at unit length
    moved: Float[Tensor, "B H M C K"]  # how M(k) moves along the gradient
    damped: Float[Tensor, "B H M C 1"]  # factor of the write, see `damping`
    curvature: Float[Tensor, "B H M C 1"]


class Writes(NamedTuple):
    """Rank-one writes of one layer of some memories, with what the backward of the solve needs."""

    write: Float[Tensor, "B H N C X"]
    known: Float[Tensor, "B H N C X"]  # right-hand side before the rate and the sign
    faded: Float[Tensor, "B H N C X"] | None  # old content read along the direction
    inverse: Float[Tensor, "B H G C C"] | None
    overlap: Float[Tensor, "B H G C C"] | None  # factor without the rate


class Decays(NamedTuple):
    """Running products of the retention, in the forms the recurrences need. gamma_0 = 1."""

    log_kept: Float[Tensor, "B H C"]  # log gamma_t
    before: Float[Tensor, "B H 1 C 1"]  # gamma_{t-1}
    ratio: Float[Tensor, "B H 1 C C"]  # gamma_{t-1} / gamma_i below the diagonal, 0 elsewhere
    to_end: Float[Tensor, "B H 1 C 1"]  # gamma_C / gamma_t
    end: Float[Tensor, "B H 1 1 1"]  # gamma_C


class Chunk(NamedTuple):
    """Everything one chunk computed: its results and what its backward reads."""

    after: MemoryWeights
    made: Generated
    errors: Errors
    decays: Decays
    inner: tuple[Writes, ...]  # one entry a group of equal rates
    outer: tuple[Writes, ...]


class ChunkGradients(NamedTuple):
    """Gradients of one chunk's inputs."""

    inputs: ChunkInputs
    anchor: MemoryWeights
    current: MemoryWeights
    readout: GateReadout


class TraceGradients(NamedTuple):
    """Gradients that reads of `memory` and the reported gates send into one chunk."""

    inner_key: Float[Tensor, "B H C K"]
    inner_write: Float[Tensor, "B H C E"]
    outer_key: Float[Tensor, "B H C E"]
    outer_write: Float[Tensor, "B H C K"]
    log_kept: Float[Tensor, "B H C"]
    rate: Float[Tensor, "B H C"]  # of the rate of `memory`
    decay: Float[Tensor, "B H C"]


def rate_groups(rule: WriteRule) -> tuple[tuple[slice, float], ...]:
    """Memories of equal largest rate, which share the triangular factor of their first layers, and that rate."""
    if rule.rate_generators == rule.rate_memory:
        return ((slice(0, MEMORY + 1), rule.rate_memory),)
    return ((slice(0, MEMORY), rule.rate_generators), (slice(MEMORY, MEMORY + 1), rule.rate_memory))


def product(a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
    """Matrix product with operands rounded to `operands` (None: as they are); the result keeps a's dtype."""
    if operands is None:
        return a @ b
    return (a.to(operands) @ b.to(operands)).to(a.dtype)


def silu_slope(pre: Tensor) -> Tensor:
    """Derivative of silu."""
    gate = torch.sigmoid(pre)
    return torch.addcmul(gate, pre * gate, 1 - gate)


def generate(
    inputs: ChunkInputs, anchor: MemoryWeights, readout: GateReadout, operands: torch.dtype | None
) -> Generated:
    """Let the memories generate keys, values, rates and retentions."""
    x = inputs.key[:, :, None]
    pre = product(x, anchor.inner[:, :, :VALUE].mT, operands)
    out = x + product(functional.silu(pre), anchor.outer[:, :, :VALUE].mT, operands)
    x = inputs.value[:, :, None]
    pre_value = product(x, anchor.inner[:, :, VALUE:MEMORY].mT, operands)
    out_value = x + product(functional.silu(pre_value), anchor.outer[:, :, VALUE:MEMORY].mT, operands)
    rate = torch.sigmoid(inputs.rate + (out[:, :, 1] * readout.rate[:, None]).sum(-1))
    log_decay = functional.logsigmoid(inputs.decay + (out[:, :, 2] * readout.decay[:, None]).sum(-1))
    key, value = unit(out[:, :, 0]), unit(out_value[:, :, 0])
    return Generated(key, value, rate, log_decay, pre, out, pre_value, out_value)


def inner_errors(made: Generated, anchor: MemoryWeights, operands: torch.dtype | None) -> Errors:
    """Gradient of half |M(k) - v_hat|^2 at the border with v_hat = M(v), for every memory and token."""
    pre_key = product(made.key[:, :, None], anchor.inner.mT, operands)
    pre_value = product(made.value[:, :, None], anchor.inner.mT, operands)
    hidden = functional.silu(pre_key)
    difference = hidden - functional.silu(pre_value)
    error = product(difference, anchor.outer.mT, operands) + (made.key - made.value)[:, :, None]
    back = product(error, anchor.outer, operands)
    squared = hidden.square().sum(dim=-1, keepdim=True)
    direction = hidden / (squared + NORM_FLOOR**2).sqrt()
    slope = silu_slope(pre_key)
    gradient = slope * back  # of the first layer; times the key, which has unit length
    moved = product(slope * gradient, anchor.outer.mT, operands) + squared * error
    size = gradient.square().sum(-1, keepdim=True) + squared * error.square().sum(-1, keepdim=True)
    return Errors(pre_key, pre_value, difference, error, back, slope, squared, direction, moved, *damping(moved, size))


def running_decays(log_decay: Float[Tensor, "B H C"]) -> Decays:
    """Accumulate the retention over the chunk, in logarithms so that nothing overflows."""
    log_kept = log_decay.cumsum(dim=-1)
    log_before = log_kept - log_decay
    ratio = (log_before[..., :, None] - log_kept[..., None, :]).tril_(-1).exp_().tril_(-1)
    last = log_kept[..., -1:]
    return Decays(
        log_kept,
        log_before.exp()[:, :, None, :, None],
        ratio[:, :, None],
        (last - log_kept).exp()[:, :, None, :, None],
        last.exp()[..., None, None],
    )


def solve_writes(
    error: Float[Tensor, "B H N C X"],
    direction: Float[Tensor, "B H G C Y"],
    old: Float[Tensor, "B H N X Y"],
    rate: Float[Tensor, "B H 1 C 1"],
    decays: Decays,
    erase: bool,
    operands: torch.dtype | None,
) -> Writes:
    """Writes of one layer of N memories of equal rate. G is 1 when they share their directions, else N."""
    if not erase:
        return Writes(-rate * error, error, None, None, None)
    overlap = decays.ratio * product(direction, direction.mT, operands)
    inverse = unit_lower_inverse(rate * overlap)
    faded = product(direction, old.mT, operands)
    known = torch.addcmul(error, decays.before, faded)
    return Writes(inverse @ (-rate * known), known, faded, inverse, overlap)


def forward_chunk(
    inputs: ChunkInputs,
    anchor: MemoryWeights,
    current: MemoryWeights,
    readout: GateReadout,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> Chunk:
    """Write up to a chunk of tokens, none beyond the next border, into all memories.

    anchor: full weights at the last border. current: distance from the start before the first token.
    """
    made = generate(inputs, anchor, readout, operands)
    errors = inner_errors(made, anchor, operands)
    decays = running_decays(made.log_decay)
    length = errors.squared.add(NORM_FLOOR**2).sqrt()
    inner_error = errors.damped * (errors.slope * errors.back)
    outer_error = (errors.damped * length) * errors.error
    key = made.key[:, :, None]
    inner, outer = [], []
    for group, limit in rate_groups(rule):
        rate = made.rate[:, :, None, :, None] * limit
        old = MemoryWeights(current.inner[:, :, group], current.outer[:, :, group])
        inner.append(
            solve_writes(inner_error[:, :, group], key, old.inner, rate, decays, rule.erase != "none", operands)
        )
        direction = errors.direction[:, :, group]
        outer.append(
            solve_writes(outer_error[:, :, group], direction, old.outer, rate, decays, rule.erase == "both", operands)
        )
    inner_write, outer_write = joined(inner), joined(outer)
    after = MemoryWeights(
        torch.addcmul(product((inner_write * decays.to_end).mT, key, operands), decays.end, current.inner),
        torch.addcmul(product((outer_write * decays.to_end).mT, errors.direction, operands), decays.end, current.outer),
    )
    return Chunk(after, made, errors, decays, tuple(inner), tuple(outer))


def joined(groups: list[Writes] | tuple[Writes, ...]) -> Float[Tensor, "B H M C X"]:
    """Writes of all memories of one layer."""
    return groups[0].write if len(groups) == 1 else torch.cat([group.write for group in groups], dim=2)


class _LayerGradients(NamedTuple):
    """What the backward of one layer's writes sends on."""

    error: Tensor  # to the known error
    direction: Tensor  # to the directions
    old: Tensor  # to the weights before the chunk
    rate: Tensor  # (B, H, C), to the rate before scaling
    log_kept: Tensor  # (B, H, C)
    log_before: Tensor  # (B, H, C)


def _backward_layer(
    grad_after: Tensor,
    grad_write: Tensor,
    groups: tuple[Writes, ...],
    direction: Tensor,
    old: Tensor,
    chunk: Chunk,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> _LayerGradients:
    """Backward of the writes of one layer and of its weights after the chunk.

    grad_write: gradient that reads send to the writes of `memory` (B, H, C, X).
    """
    decays = chunk.decays
    write = joined(groups)
    # after = end * old + (write * to_end)^T direction
    carried = product(direction, grad_after.mT, operands)  # (B, H, M, C, X)
    grad = carried * decays.to_end
    grad[:, :, MEMORY] += grad_write
    grad_to_end = (write * carried).sum((2, 4)) * decays.to_end[:, :, 0, :, 0]  # (B, H, C), times to_end
    grad_direction = product(write * decays.to_end, grad_after, operands)
    grad_old = decays.end * grad_after
    grad_log_end = (grad_old * old).sum((2, 3, 4)) + grad_to_end.sum(-1)
    grad_log_kept = -grad_to_end
    grad_log_kept[..., -1] += grad_log_end
    grad_log_before = torch.zeros_like(grad_log_kept)
    grad_rate = torch.zeros_like(grad_log_kept)
    grad_errors = []
    for (group, limit), found in zip(rate_groups(rule), groups, strict=True):
        rate = chunk.made.rate[:, :, None, :, None] * limit
        right = grad[:, :, group]
        if found.inverse is not None:
            right = found.inverse.mT @ right
        grad_known = -rate * right
        grad_rate -= limit * (right * found.known).sum((2, 4))
        grad_errors.append(grad_known)
        if found.inverse is None or found.overlap is None or found.faded is None:
            continue
        shared = direction.shape[2] == 1
        at = direction if shared else direction[:, :, group]
        factor = -(right @ found.write.mT)  # gradient of the factor; only below the diagonal counts
        if shared:
            factor = factor.sum(2, keepdim=True)
        weighted = factor * found.overlap
        grad_rate += limit * weighted.sum((2, 4))
        weighted = weighted * rate
        grad_log_before += weighted.sum((2, 4))
        grad_log_kept -= weighted.sum((2, 3))
        grad_overlap = factor * rate * decays.ratio
        grad_faded = grad_known * decays.before
        grad_log_before += (grad_faded * found.faded).sum((2, 4))
        grad_old[:, :, group] += product(grad_faded.mT, at, operands)
        along = product(grad_faded, old[:, :, group], operands)
        mutual = product(grad_overlap + grad_overlap.mT, at, operands)
        if shared:
            grad_direction = grad_direction.sum(2, keepdim=True) if grad_direction.shape[2] > 1 else grad_direction
            grad_direction += along.sum(2, keepdim=True) + mutual
        else:
            grad_direction[:, :, group] += along + mutual
    error = grad_errors[0] if len(grad_errors) == 1 else torch.cat(grad_errors, dim=2)
    return _LayerGradients(error, grad_direction, grad_old, grad_rate, grad_log_kept, grad_log_before)


def _backward_errors(
    grad_inner: Tensor,
    grad_outer: Tensor,
    grad_direction: Tensor,
    chunk: Chunk,
    anchor: MemoryWeights,
    operands: torch.dtype | None,
) -> tuple[Tensor, Tensor, MemoryWeights]:
    """Backward of `inner_errors`: gradients of key, value and anchor."""
    errors, made = chunk.errors, chunk.made
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
    # damped = 1 / max(1, curvature), curvature = |moved|^2 / size, size = |gradient|^2 + squared |error|^2
    error_squared = error.square().sum(-1, keepdim=True)
    size = gradient.square().sum(-1, keepdim=True) + squared * error_squared + GRADIENT_FLOOR
    grad_curvature = torch.where(errors.curvature > 1, -grad_damped * damped.square(), 0.0) / size
    grad_moved = (2 * grad_curvature) * errors.moved
    grad_size = -grad_curvature * errors.curvature
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
    grad_pre_value = -grad_difference * silu_slope(errors.pre_value)
    grad_anchor_inner = product(grad_pre_key.mT, made.key[:, :, None], operands)
    grad_anchor_inner += product(grad_pre_value.mT, made.value[:, :, None], operands)
    shared = grad_error.sum(2)
    grad_key = shared + product(grad_pre_key, anchor.inner, operands).sum(2)
    grad_value = product(grad_pre_value, anchor.inner, operands).sum(2) - shared
    return grad_key, grad_value, MemoryWeights(grad_anchor_inner, grad_anchor_outer)


def _backward_unit(grad: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """Backward of scaling to unit length."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    along = (grad * direction).sum(-1, keepdim=True) * direction
    return torch.where(length > NORM_FLOOR, grad - along, grad) / length.clamp_min(NORM_FLOOR)


def _backward_generate(
    grad_key: Tensor,
    grad_value: Tensor,
    grad_rate: Tensor,
    grad_log_decay: Tensor,
    inputs: ChunkInputs,
    anchor: MemoryWeights,
    readout: GateReadout,
    made: Generated,
    grad_anchor: MemoryWeights,
    operands: torch.dtype | None,
) -> tuple[ChunkInputs, GateReadout]:
    """Backward of `generate`; adds to `grad_anchor` in place."""
    rate_logit = grad_rate * made.rate * (1 - made.rate)
    decay_logit = -grad_log_decay * torch.expm1(made.log_decay)
    out, out_value = made.out, made.out_value
    readout_gradient = GateReadout(
        (rate_logit[..., None] * out[:, :, 1]).sum((0, 2)),
        (decay_logit[..., None] * out[:, :, 2]).sum((0, 2)),
    )
    grad_out = torch.stack(
        [
            _backward_unit(grad_key, out[:, :, 0], made.key),
            rate_logit[..., None] * readout.rate[:, None],
            decay_logit[..., None] * readout.decay[:, None],
        ],
        dim=2,
    )
    grad_out_value = _backward_unit(grad_value, out_value[:, :, 0], made.value)[:, :, None]
    grads = []
    for members, x, pre, grad in (
        (slice(0, VALUE), inputs.key, made.pre, grad_out),
        (slice(VALUE, MEMORY), inputs.value, made.pre_value, grad_out_value),
    ):
        grad_pre = product(grad, anchor.outer[:, :, members], operands) * silu_slope(pre)
        grad_anchor.outer[:, :, members] += product(grad.mT, functional.silu(pre), operands)
        grad_anchor.inner[:, :, members] += product(grad_pre.mT, x[:, :, None], operands)
        grads.append((grad + product(grad_pre, anchor.inner[:, :, members], operands)).sum(2))
    return ChunkInputs(grads[0], grads[1], rate_logit, decay_logit), readout_gradient


def backward_chunk(
    grad_after: MemoryWeights,
    trace: TraceGradients,
    inputs: ChunkInputs,
    anchor: MemoryWeights,
    current: MemoryWeights,
    readout: GateReadout,
    chunk: Chunk,
    rule: WriteRule,
    operands: torch.dtype | None,
) -> ChunkGradients:
    """Gradients of one chunk's inputs from those of its results."""
    made, errors = chunk.made, chunk.errors
    common = (chunk, rule, operands)
    key = made.key[:, :, None]
    inner = _backward_layer(grad_after.inner, trace.inner_write, chunk.inner, key, current.inner, *common)
    outer = _backward_layer(grad_after.outer, trace.outer_write, chunk.outer, errors.direction, current.outer, *common)
    grad_direction = outer.direction
    grad_direction[:, :, MEMORY] += trace.outer_key
    grad_key, grad_value, grad_anchor = _backward_errors(
        inner.error, outer.error, grad_direction, chunk, anchor, operands
    )
    grad_key = grad_key + inner.direction.sum(2) + trace.inner_key
    grad_rate = inner.rate + outer.rate + trace.rate * rule.rate_memory
    log_before = inner.log_before + outer.log_before
    # log_kept is the running sum of log_decay, log_before is log_kept - log_decay
    running = inner.log_kept + outer.log_kept + trace.log_kept + log_before
    grad_log_decay = running.flip(-1).cumsum(-1).flip(-1) - log_before
    grad_log_decay = grad_log_decay + trace.decay * made.log_decay.exp()
    grad_inputs, grad_readout = _backward_generate(
        grad_key, grad_value, grad_rate, grad_log_decay, inputs, anchor, readout, made, grad_anchor, operands
    )
    return ChunkGradients(grad_inputs, grad_anchor, MemoryWeights(inner.old, outer.old), grad_readout)

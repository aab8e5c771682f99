"""Kernels of the inner gradients at the last border: rank one a token, what is known of a write times a direction.

One program a lane, memory and piece: `chunk.inner_errors` and its backward. KNOWN has C E numbers of the first layer
and C K of the second, DIRECTION the hidden activations at unit length (C E); a linear memory has C K and none.
"""

import triton
import triton.language as tl

from nested_lm.ops.memory.triton.tiles import (
    LEAST_SQUARE,
    SHORTEST,
    VARYING,
    add_to,
    anchor_of,
    dot,
    gate_logit,
    load_rows,
    matrix,
    of_memory,
    rate_share,
    room_beside_erase,
    silu_slope,
    span,
    waiting,
)


@triton.jit
def _errors(key, value, inner, outer, generated, LOW: tl.constexpr, ACC: tl.constexpr):
    """Hidden activations at the key, those at the value where that is the target's, error and error carried back."""
    pre = dot(key, tl.trans(inner), LOW, ACC)
    gate = tl.sigmoid(pre)
    difference = pre * gate
    pre_value = tl.zeros_like(pre)
    if generated:
        pre_value = dot(value, tl.trans(inner), LOW, ACC)
        difference -= pre_value * tl.sigmoid(pre_value)
    error = dot(difference, tl.trans(outer), LOW, ACC) + key - value
    return pre, gate, pre_value, difference, error, dot(error, outer, LOW, ACC)


@triton.jit
def _steepness(moved, gradient, squared, error_squared, room):
    """See `state.damping`: how far the write would overshoot, and the squared norm of its gradient."""
    size = tl.sum(gradient * gradient, 1) + squared * error_squared + LEAST_SQUARE
    return tl.sum(moved * moved, 1) / size / room, size


@triton.jit(do_not_specialize=VARYING)
def errors_kernel(
    MADE_KEY, MADE_VALUE, LOGIT_RATE, REACH, LIMITS, START, WEIGHTS, RESETS, KNOWN, DIRECTION,
    lanes, T, H, piece, first_memory, POS, FIRST, STEP, chunk_generators, chunk_memory, ALIGN,
    M: tl.constexpr, GENERATED: tl.constexpr, GENERATED_OTHERS: tl.constexpr, PRODUCT: tl.constexpr,
    DAMP: tl.constexpr, ERASES: tl.constexpr, STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What is known of the writes of a piece. PRODUCT: the objective is the inner product with the target."""
    lane, m = tl.program_id(0), first_memory + tl.program_id(1)
    begin, n = span(piece + tl.program_id(2), T, FIRST, STEP)
    head = lane % H
    first = ((lane // H).to(tl.int64) * T + begin) * H
    t = tl.arange(0, C)
    chunk = tl.where(m == M - 1, chunk_memory, chunk_generators)
    inner, outer, slot = anchor_of(
        START, WEIGHTS, RESETS, lane, m, begin, chunk, lanes, T, H, POS, FIRST, STEP, ALIGN, M, LAYERS, E, K, ACC
    )
    key = load_rows(MADE_KEY, first + head, t, n, H, K, ACC)
    value = load_rows(MADE_VALUE, first + head, t, n, H, K, ACC)
    at = (tl.program_id(2).to(tl.int64) * lanes + lane) * tl.num_programs(1) + tl.program_id(1)
    generated = of_memory(m, M, GENERATED, GENERATED_OTHERS)
    if LAYERS == 1:
        known = -value
        if generated:
            known = -dot(value, tl.trans(inner), LOW, ACC)
        if not PRODUCT:
            known += dot(key, tl.trans(inner), LOW, ACC)
        tl.store(KNOWN + at * C * K + matrix(C, K), known)
    else:
        pre, gate, pre_value, difference, error, back = _errors(key, value, inner, outer, generated, LOW, ACC)
        hidden = pre * gate
        squared = tl.sum(hidden * hidden, 1)
        length = tl.sqrt(squared + SHORTEST * SHORTEST)
        tl.store(DIRECTION + at * C * E + matrix(C, E), hidden / length[:, None])
        slope = silu_slope(pre, gate)
        gradient = slope * back
        if DAMP:
            logit = gate_logit(LOGIT_RATE, first, head, t, n, H, ALL_HEADS, ACC)
            share = rate_share(logit, t, n, STRETCH) * tl.load(REACH + head).to(ACC)
            room, room_slope = room_beside_erase(share * tl.load(LIMITS + m).to(ACC), ERASES)
            moved = dot(slope * gradient, tl.trans(outer), LOW, ACC) + squared[:, None] * error
            steepness, size = _steepness(moved, gradient, squared, tl.sum(error * error, 1), room)
            damped = 1 / tl.maximum(steepness, 1.0)
            gradient = damped[:, None] * gradient
            length = damped * length
        place = KNOWN + at * C * (E + K)
        tl.store(place + matrix(C, E), gradient)
        tl.store(place + C * E + matrix(C, K), length[:, None] * error)


@triton.jit
def _damping_backward(
    key, value, inner, outer, generated, LOGIT_RATE, REACH, LIMITS, KNOWN, G_SLOPE, SENT_SHARE, G_START,
    waits, share, total, at, first, head, m, t, n, H, DAMP: tl.constexpr, ERASES: tl.constexpr,
    STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the gradients of what is known of both layers to those of the inner gradient and the error, in their place.

    Leaves the gradient of the slope in G_SLOPE, and returns that of the squared length of the hidden activations.
    """
    pre, gate, pre_value, difference, error, back = _errors(key, value, inner, outer, generated, LOW, ACC)
    squared = tl.sum(pre * gate * pre * gate, 1)
    length = tl.sqrt(squared + SHORTEST * SHORTEST)
    place = KNOWN + at * C * (E + K)
    g_error = tl.load(place + C * E + matrix(C, K))
    # inner = damped * gradient and outer = damped * length * error
    along = tl.sum(g_error * error, 1)
    if not DAMP:
        tl.store(place + C * E + matrix(C, K), length[:, None] * g_error)
        return 0.5 / length * along
    slope = silu_slope(pre, gate)
    gradient = slope * back
    g_gradient = tl.load(place + matrix(C, E))
    limit = tl.load(LIMITS + m)
    logit = gate_logit(LOGIT_RATE, first, head, t, n, H, ALL_HEADS, ACC)
    room, room_slope = room_beside_erase(rate_share(logit, t, n, STRETCH) * tl.load(REACH + head) * limit, ERASES)
    moved = dot(slope * gradient, tl.trans(outer), LOW, ACC) + squared[:, None] * error
    error_squared = tl.sum(error * error, 1)
    steepness, size = _steepness(moved, gradient, squared, error_squared, room)
    damped = 1 / tl.maximum(steepness, 1.0)
    # damped = 1 / max(1, steepness), steepness = |moved|^2 / (size room)
    g_damped = tl.sum(g_gradient * gradient, 1) + along * length
    g_steepness = tl.where(steepness > 1, -g_damped * damped * damped, 0.0)
    g_log = g_steepness * steepness
    g_size = -g_log / size
    tl.store(SENT_SHARE + (at * 3 + 2) * C + t, tl.where(t < n, -g_log / room * room_slope * limit, 0.0))
    g_moved = (2 * g_steepness / (size * room))[:, None] * moved
    g_squared = g_size * error_squared + tl.sum(g_moved * error, 1) + 0.5 / length * damped * along
    g_error = (damped * length)[:, None] * g_error + squared[:, None] * g_moved
    tl.store(place + C * E + matrix(C, K), g_error + (2 * g_size * squared)[:, None] * error)
    # moved = (slope * gradient) W_out^T + squared * error
    steep = dot(g_moved, outer, LOW, ACC)
    tl.store(G_SLOPE + at * C * E + matrix(C, E), gradient * steep)
    g_gradient = damped[:, None] * g_gradient + slope * steep + (2 * g_size)[:, None] * gradient
    tl.store(place + matrix(C, E), g_gradient)
    g_outer = dot(tl.trans(g_moved), slope * gradient, LOW, ACC)
    add_to(G_START, g_outer, total + E * K + matrix(K, E))
    add_to(waits, share * g_outer, total + E * K + matrix(K, E))
    return g_squared


@triton.jit(do_not_specialize=VARYING)
def errors_backward_kernel(
    MADE_KEY, MADE_VALUE, LOGIT_RATE, REACH, LIMITS, START, WEIGHTS, RESETS, KNOWN, DIRECTION, G_DIRECTION,
    SENT_KEY, SENT_VALUE, SENT_SHARE, G_START, G_BORDER, G_WEIGHTS,
    lanes, T, H, piece, POS, FIRST, STEP, chunk_generators, chunk_memory, ALIGN,
    M: tl.constexpr, GENERATED: tl.constexpr, GENERATED_OTHERS: tl.constexpr, PRODUCT: tl.constexpr,
    DAMP: tl.constexpr, ERASES: tl.constexpr, STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of `errors_kernel`, after `backward._backward_errors`, which names what is what.

    KNOWN has its gradients, DIRECTION is room to work in. Adds to SENT_KEY; writes SENT_VALUE and its third of
    SENT_SHARE.
    """
    lane, m = tl.program_id(0), tl.program_id(1)
    begin, n = span(piece, T, FIRST, STEP)
    head = lane % H
    first = ((lane // H).to(tl.int64) * T + begin) * H
    t = tl.arange(0, C)
    chunk = tl.where(m == M - 1, chunk_memory, chunk_generators)
    inner, outer, slot = anchor_of(
        START, WEIGHTS, RESETS, lane, m, begin, chunk, lanes, T, H, POS, FIRST, STEP, ALIGN, M, LAYERS, E, K, ACC
    )
    key = load_rows(MADE_KEY, first + head, t, n, H, K, ACC)
    value = load_rows(MADE_VALUE, first + head, t, n, H, K, ACC)
    at = lane.to(tl.int64) * M + m
    generated = of_memory(m, M, GENERATED, GENERATED_OTHERS)
    waits, share = waiting(G_BORDER, G_WEIGHTS, slot, piece, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    total = at * LAYERS * E * K
    if LAYERS == 1:
        g_error = tl.load(KNOWN + at * C * K + matrix(C, K))
        g_value = -g_error
        g_inner = tl.zeros((E, K), ACC)
        if generated:
            g_value = -dot(g_error, inner, LOW, ACC)
            g_inner -= dot(tl.trans(g_error), value, LOW, ACC)
        if not PRODUCT:
            g_inner += dot(tl.trans(g_error), key, LOW, ACC)
            add_to(SENT_KEY, dot(g_error, inner, LOW, ACC), at * C * K + matrix(C, K))
    else:
        # Two phases, with a barrier between: tiles that both need are computed twice, for to hold them would spill.
        g_squared = _damping_backward(
            key, value, inner, outer, generated, LOGIT_RATE, REACH, LIMITS, KNOWN, DIRECTION, SENT_SHARE, G_START,
            waits, share, total, at, first, head, m, t, n, H, DAMP, ERASES, STRETCH, ALL_HEADS, C, K, E, LOW, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        inner, outer, slot = anchor_of(
            START, WEIGHTS, RESETS, lane, m, begin, chunk, lanes, T, H, POS, FIRST, STEP, ALIGN, M, LAYERS, E, K, ACC
        )
        key = load_rows(MADE_KEY, first + head, t, n, H, K, ACC)
        value = load_rows(MADE_VALUE, first + head, t, n, H, K, ACC)
        pre, gate, pre_value, difference, error, back = _errors(key, value, inner, outer, generated, LOW, ACC)
        slope = silu_slope(pre, gate)
        # gradient = slope * (error W_out)
        g_gradient = tl.load(KNOWN + at * C * (E + K) + matrix(C, E))
        g_slope = g_gradient * back
        if DAMP:
            g_slope += tl.load(DIRECTION + at * C * E + matrix(C, E))
        g_back = g_gradient * slope
        g_error = tl.load(KNOWN + at * C * (E + K) + C * E + matrix(C, K))
        g_error += dot(g_back, tl.trans(outer), LOW, ACC)
        g_outer = dot(tl.trans(error), g_back, LOW, ACC) + dot(tl.trans(g_error), difference, LOW, ACC)
        add_to(G_START, g_outer, total + E * K + matrix(K, E))
        add_to(waits, share * g_outer, total + E * K + matrix(K, E))
        g_difference = dot(g_error, outer, LOW, ACC)
        hidden = pre * gate
        length = tl.sqrt(tl.sum(hidden * hidden, 1) + SHORTEST * SHORTEST)
        g_direction = tl.load(G_DIRECTION + at * C * E + matrix(C, E))
        g_squared -= 0.5 * tl.sum(g_direction * hidden, 1) / (length * length * length)
        g_hidden = g_difference + g_direction / length[:, None] + (2 * g_squared)[:, None] * hidden
        g_pre = g_hidden * slope + g_slope * (gate * (1 - gate) * (2 + pre * (1 - 2 * gate)))
        g_inner = dot(tl.trans(g_pre), key, LOW, ACC)
        add_to(SENT_KEY, g_error + dot(g_pre, inner, LOW, ACC), at * C * K + matrix(C, K))
        g_value = -g_error
        if generated:
            g_pre = -g_difference * silu_slope(pre_value, tl.sigmoid(pre_value))
            g_inner += dot(tl.trans(g_pre), value, LOW, ACC)
            g_value += dot(g_pre, inner, LOW, ACC)
    add_to(G_START, g_inner, total + matrix(E, K))
    add_to(waits, share * g_inner, total + matrix(E, K))
    tl.store(SENT_VALUE + at * C * K + matrix(C, K), g_value)

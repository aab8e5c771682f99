"""Kernels of the writes of a piece: the gated delta rule solved for all tokens at once, and the weights after it.

One program a lane, memory, layer and piece: `writes.solve_writes` and its backward. X is the size of a layer's output,
Y that of its input; where they are alike one launch serves both layers (LAYER is -1), else each has its own.
"""

import triton
import triton.language as tl

from nested_lm.ops.memory.triton.tiles import (
    VARYING,
    add_to,
    border_slot,
    dot,
    exact_dot,
    kept,
    layer_of,
    load_directions,
    load_rows,
    matrix,
    of_layer,
    of_memory,
    ratios,
    room_beside_erase,
    settle,
    span,
    store_rows,
    tail_sum,
    unit_lower_inverse,
    write_gates,
)


@triton.jit
def known_place(KNOWN, at, layer, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr):
    """Where what is known of the writes of a layer lies."""
    return KNOWN + at * C * (K if LAYERS == 1 else E + K) + layer * C * E


@triton.jit
def weights_place(WEIGHTS, slot, lanes, own, M: tl.constexpr, SIZE: tl.constexpr):
    """Where a layer of a slot lies."""
    return WEIGHTS + slot.to(tl.int64) * lanes * M * SIZE + own


@triton.jit
def _taken_off(log_decay, log_kept, AFTER_DECAY: tl.constexpr, ACC: tl.constexpr):
    """How much of the weights before the token the erase term meets, and of those before the piece."""
    times = tl.exp(log_decay) if AFTER_DECAY else tl.full(log_decay.shape, 1.0, ACC)
    return times, times * tl.exp(log_kept - log_decay)


@triton.jit(do_not_specialize=VARYING)
def solve_kernel(
    MADE_KEY, DIRECTION, KNOWN, LOGIT_RATE, LOGIT_DECAY, REACH, LIMITS, WEIGHTS, RESETS,
    WRITE_INNER, WRITE_OUTER, WRITE_DIRECTION,
    lanes, T, H, piece, first_memory, memories, POS, FIRST, STEP, chunk_generators, chunk_memory, ALIGN,
    M: tl.constexpr, ERASE_INNER: tl.constexpr, ERASE_OUTER: tl.constexpr, AFTER_DECAY: tl.constexpr,
    SINCE_BORDER: tl.constexpr, SINCE_BORDER_OTHERS: tl.constexpr, DAMP: tl.constexpr,
    STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, CARRY: tl.constexpr, LAYER: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, LAYERS: tl.constexpr,
    LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes of a piece, kept of `memory` for its reads (WRITE_*); and the weights after it, if CARRY.

    memories: how many of them the launch has, from first_memory on.
    """
    index, layer = layer_of(LAYER)
    lane, m = tl.program_id(0), first_memory + index
    piece += tl.program_id(2)
    begin, n = span(piece, T, FIRST, STEP)
    head = lane % H
    first = ((lane // H).to(tl.int64) * T + begin) * H
    row = first + head
    t = tl.arange(0, C)
    at = (tl.program_id(2).to(tl.int64) * lanes + lane) * memories + index
    SIZE: tl.constexpr = LAYERS * E * K
    own = (lane.to(tl.int64) * M + m) * SIZE + layer * E * K
    direction = load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C, Y)
    rate, log_decay, log_kept, last_kept = write_gates(
        LOGIT_RATE, LOGIT_DECAY, REACH, LIMITS, first, head, m, t, n, H, STRETCH, ALL_HEADS, ACC
    )
    slot = piece + 1
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    old = keep * tl.load(weights_place(WEIGHTS, slot, lanes, own, M, SIZE) + matrix(X, Y))
    known = tl.load(known_place(KNOWN, at, layer, C, K, E, LAYERS) + matrix(C, X))
    write = -rate[:, None] * known
    if of_layer(layer, ERASE_INNER, ERASE_OUTER):
        times, met = _taken_off(log_decay, log_kept, AFTER_DECAY, ACC)
        known += met[:, None] * dot(direction, tl.trans(old), LOW, ACC)
        if of_memory(m, M, SINCE_BORDER, SINCE_BORDER_OTHERS):
            chunk = tl.where(m == M - 1, chunk_memory, chunk_generators)
            border = border_slot(begin, chunk, POS, FIRST, STEP, RESETS)
            held = tl.load(weights_place(WEIGHTS, border, lanes, own, M, SIZE) + matrix(X, Y))
            held *= kept(border, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
            room, room_slope = room_beside_erase(rate, DAMP)
            known -= room[:, None] * dot(direction, tl.trans(held), LOW, ACC)
        ratio = ratios(log_kept - log_decay, log_kept, t, True)
        factor = (times * rate)[:, None] * ratio * dot(direction, tl.trans(direction), LOW, ACC)
        write = exact_dot(unit_lower_inverse(factor, C, ACC), -rate[:, None] * known, ACC)
    if m == M - 1:
        kept_write = WRITE_INNER
        if layer == 1:
            kept_write = WRITE_OUTER
            store_rows(WRITE_DIRECTION, direction, row, t, n, H, Y)
        store_rows(kept_write, write, row, t, n, H, X)
    if CARRY:
        to_end = tl.exp(last_kept - log_kept)
        after = tl.exp(last_kept) * old + dot(tl.trans(write * to_end[:, None]), direction, LOW, ACC)
        tl.store(weights_place(WEIGHTS, slot + 1, lanes, own, M, SIZE) + matrix(X, Y), after)


@triton.jit
def read_backward(
    READ_X_INNER, READ_X_OUTER, READ_G_INNER, READ_G_OUTER, layer, row, t, n, H,
    X: tl.constexpr, Y: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a layer of `memory` was read with, and the gradient of its result."""
    read_x, read_g = READ_X_INNER, READ_G_INNER
    if layer == 1:
        read_x, read_g = READ_X_OUTER, READ_G_OUTER
    return load_rows(read_x, row, t, n, H, Y, ACC), load_rows(read_g, row, t, n, H, X, ACC)


@triton.jit(do_not_specialize=VARYING)
def solve_backward_kernel(
    MADE_KEY, DIRECTION, KNOWN, LOGIT_RATE, LOGIT_DECAY, REACH, LIMITS, WEIGHTS, RESETS,
    READ_X_INNER, READ_X_OUTER, READ_G_INNER, READ_G_OUTER, READ_WRITE_INNER, READ_WRITE_OUTER, READ_DIRECTION,
    SENT_KEY, G_DIRECTION, SENT_SHARE, SENT_LOG_DECAY, G_START, G_BORDER, G_WEIGHTS,
    lanes, T, H, piece, POS, FIRST, STEP, chunk_generators, chunk_memory, ALIGN,
    M: tl.constexpr, ERASE_INNER: tl.constexpr, ERASE_OUTER: tl.constexpr, AFTER_DECAY: tl.constexpr,
    SINCE_BORDER: tl.constexpr, SINCE_BORDER_OTHERS: tl.constexpr, DAMP: tl.constexpr,
    STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, INCLUSIVE: tl.constexpr, AT_BORDER: tl.constexpr,
    LAYER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of `solve_kernel`, after `backward._backward_layer`, which has the names; KNOWN becomes its gradient.

    READ_X, READ_G: what a layer of `memory` was read with and the gradient of its result, whose product the weights
    get; the other READ_* are what reads send to writes and directions. G_WEIGHTS comes with the gradient of the weights
    after the piece and leaves with that of those before it.
    """
    m, layer = layer_of(LAYER)
    lane = tl.program_id(0)
    begin, n = span(piece, T, FIRST, STEP)
    head = lane % H
    first = ((lane // H).to(tl.int64) * T + begin) * H
    row = first + head
    t = tl.arange(0, C)
    at = lane.to(tl.int64) * M + m
    SIZE: tl.constexpr = LAYERS * E * K
    own = at * SIZE + layer * E * K
    direction = load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C, Y)
    rate, log_decay, log_kept, last_kept = write_gates(
        LOGIT_RATE, LOGIT_DECAY, REACH, LIMITS, first, head, m, t, n, H, STRETCH, ALL_HEADS, ACC
    )
    slot = piece + 1
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    border = border_slot(begin, tl.where(m == M - 1, chunk_memory, chunk_generators), POS, FIRST, STEP, RESETS)
    old = keep * tl.load(weights_place(WEIGHTS, slot, lanes, own, M, SIZE) + matrix(X, Y))
    place = known_place(KNOWN, at, layer, C, K, E, LAYERS) + matrix(C, X)
    known = tl.load(place)
    g_border = tl.zeros((X, Y), ACC)
    g_log_before = tl.zeros((C,), ACC)
    g_log_decay = tl.zeros((C,), ACC)
    g_direction = tl.zeros((C, Y), ACC)
    grad = tl.zeros((C, X), ACC)
    reads = tl.zeros((X, Y), ACC)
    if m == M - 1:
        x, g = read_backward(READ_X_INNER, READ_X_OUTER, READ_G_INNER, READ_G_OUTER, layer, row, t, n, H, X, Y, ACC)
        add_to(G_START, dot(tl.trans(g), x, LOW, ACC), own + matrix(X, Y))
        if AT_BORDER:
            g_border = dot(tl.trans(g), x, LOW, ACC)
        else:
            seen = tl.exp(log_kept) if INCLUSIVE else tl.exp(log_kept - log_decay)
            reads = dot(tl.trans(g * seen[:, None]), x, LOW, ACC)
            sent = READ_WRITE_INNER
            if layer == 1:
                sent = READ_WRITE_OUTER
                g_direction = load_rows(READ_DIRECTION, row, t, n, H, Y, ACC)
            grad = load_rows(sent, row, t, n, H, X, ACC)
    # after = end * old + (write * to_end)^T direction
    g_after = tl.load(G_WEIGHTS + own + matrix(X, Y))
    to_end = tl.exp(last_kept - log_kept)
    carried = dot(direction, tl.trans(g_after), LOW, ACC)
    grad += to_end[:, None] * carried
    g_old = tl.exp(last_kept) * g_after
    g_last = tl.sum(tl.sum(g_old * old, 1), 0)
    if of_layer(layer, ERASE_INNER, ERASE_OUTER):
        times, met = _taken_off(log_decay, log_kept, AFTER_DECAY, ACC)
        faded = dot(direction, tl.trans(old), LOW, ACC)
        known += met[:, None] * faded
        held = tl.zeros((X, Y), ACC)
        since_border = of_memory(m, M, SINCE_BORDER, SINCE_BORDER_OTHERS)
        room, room_slope = room_beside_erase(rate, DAMP)
        if since_border:
            held = tl.load(weights_place(WEIGHTS, border, lanes, own, M, SIZE) + matrix(X, Y))
            held *= kept(border, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
            known -= room[:, None] * dot(direction, tl.trans(held), LOW, ACC)
        ratio = ratios(log_kept - log_decay, log_kept, t, True)
        overlap = ratio * dot(direction, tl.trans(direction), LOW, ACC)
        inverse = unit_lower_inverse((times * rate)[:, None] * overlap, C, ACC)
        write = exact_dot(inverse, -rate[:, None] * known, ACC)
        right = exact_dot(tl.trans(inverse), grad, ACC)
        factor = -exact_dot(right, tl.trans(write), ACC)
        through = tl.sum(factor * overlap, 1)
        g_log_kept = -tl.sum((times * rate)[:, None] * factor * overlap, 0)
        g_overlap = (times * rate)[:, None] * factor * ratio
        g_direction += dot(g_overlap + tl.trans(g_overlap), direction, LOW, ACC)
        g_rate = times * through - tl.sum(right * known, 1)
        g_known = -rate[:, None] * right
        g_met = tl.sum(g_known * faded, 1)
        g_log_before += times * rate * through + met * g_met
        if AFTER_DECAY:
            g_log_decay += times * rate * through + met * g_met
        g_faded = met[:, None] * g_known
        g_old += dot(tl.trans(g_faded), direction, LOW, ACC)
        g_direction += dot(g_faded, old, LOW, ACC)
        if since_border:
            g_border -= dot(tl.trans(room[:, None] * g_known), direction, LOW, ACC)
            along = dot(g_known, held, LOW, ACC)
            g_direction -= room[:, None] * along
            g_rate -= room_slope * tl.sum(along * direction, 1)
    else:
        write = -rate[:, None] * known
        g_known = -rate[:, None] * grad
        g_rate = -tl.sum(grad * known, 1)
        g_log_kept = tl.zeros((C,), ACC)
    tl.store(place, g_known)
    g_to_end = to_end * tl.sum(write * carried, 1)
    g_log_kept -= g_to_end
    g_direction += dot(write * to_end[:, None], g_after, LOW, ACC)
    g_log_decay += tail_sum(g_log_kept + g_log_before) - g_log_before + g_last + tl.sum(g_to_end, 0)
    tl.store(SENT_LOG_DECAY + (at * 2 + layer) * C + t, tl.where(t < n, g_log_decay, 0.0))
    tl.store(SENT_SHARE + (at * 3 + layer) * C + t, tl.where(t < n, tl.load(LIMITS + m) * g_rate, 0.0))
    sent = SENT_KEY
    if layer == 1:
        sent = G_DIRECTION
    tl.store(sent + at * C * Y + matrix(C, Y), g_direction)
    settle(G_BORDER, G_WEIGHTS, g_old + reads, g_border, border == slot, keep, own + matrix(X, Y))

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
    SENT_KEY, G_DIRECTION, SENT_SHARE, SENT_LOG_DECAY, ROOM, G_START, G_BORDER, G_WEIGHTS,
    lanes, T, H, piece, POS, FIRST, STEP, chunk_generators, chunk_memory, ALIGN,
    M: tl.constexpr, ERASE_INNER: tl.constexpr, ERASE_OUTER: tl.constexpr, AFTER_DECAY: tl.constexpr,
    SINCE_BORDER: tl.constexpr, SINCE_BORDER_OTHERS: tl.constexpr, DAMP: tl.constexpr,
    STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, INCLUSIVE: tl.constexpr, AT_BORDER: tl.constexpr,
    LAYER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of `solve_kernel`, after `backward._backward_layer`, which has the names; KNOWN becomes its gradient.

    READ_X, READ_G: what a layer of `memory` was read with and the gradient of its result, whose product the weights
    get; the other READ_* are what reads send to writes and directions. ROOM: to work in. G_WEIGHTS comes with the
    gradient of the weights after the piece and leaves with that of those before it.
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
    rate, log_decay, log_kept, last_kept = write_gates(
        LOGIT_RATE, LOGIT_DECAY, REACH, LIMITS, first, head, m, t, n, H, STRETCH, ALL_HEADS, ACC
    )
    slot = piece + 1
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    border = border_slot(begin, tl.where(m == M - 1, chunk_memory, chunk_generators), POS, FIRST, STEP, RESETS)
    old_place = weights_place(WEIGHTS, slot, lanes, own, M, SIZE) + matrix(X, Y)
    held_place = weights_place(WEIGHTS, border, lanes, own, M, SIZE) + matrix(X, Y)
    held_share = kept(border, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    place = known_place(KNOWN, at, layer, C, K, E, LAYERS) + matrix(C, X)
    WIDE: tl.constexpr = E if E > K else K
    room_to_work = ROOM + (at * 2 + layer) * C * (C + WIDE)
    write_place = room_to_work + C * C + matrix(C, X)
    sent = SENT_KEY
    if layer == 1:
        sent = G_DIRECTION
    sent_place = sent + at * C * Y + matrix(C, Y)
    times, met = _taken_off(log_decay, log_kept, AFTER_DECAY, ACC)
    to_end = tl.exp(last_kept - log_kept)
    erases = of_layer(layer, ERASE_INNER, ERASE_OUTER)
    since_border = of_memory(m, M, SINCE_BORDER, SINCE_BORDER_OTHERS)
    room, room_slope = room_beside_erase(rate, DAMP)
    # Phases with barriers between: what a phase needs is loaded anew, for to hold all tiles at once would spill.
    # 1: the inverse
    direction = load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C, Y)
    if erases:
        ratio = ratios(log_kept - log_decay, log_kept, t, True)
        factor = (times * rate)[:, None] * ratio * dot(direction, tl.trans(direction), LOW, ACC)
        tl.store(room_to_work + matrix(C, C), unit_lower_inverse(factor, C, ACC))
        tl.debug_barrier()
    # 2: the writes, and the gradient of what is known before the rate, `right`, in the place of what is known
    direction = load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C, Y)
    known = tl.load(place)
    if erases:
        known += met[:, None] * dot(direction, tl.trans(keep * tl.load(old_place)), LOW, ACC)
        if since_border:
            known -= room[:, None] * dot(direction, tl.trans(held_share * tl.load(held_place)), LOW, ACC)
    write = -rate[:, None] * known
    # after = end * old + (write * to_end)^T direction
    right = to_end[:, None] * dot(direction, tl.trans(tl.load(G_WEIGHTS + own + matrix(X, Y))), LOW, ACC)
    if (m == M - 1) and not AT_BORDER:
        of_write = READ_WRITE_INNER
        if layer == 1:
            of_write = READ_WRITE_OUTER
        right += load_rows(of_write, row, t, n, H, X, ACC)
    if erases:
        inverse = tl.load(room_to_work + matrix(C, C))
        write = exact_dot(inverse, write, ACC)
        right = exact_dot(tl.trans(inverse), right, ACC)
    g_rate = -tl.sum(right * known, 1)
    tl.store(write_place, write)
    tl.store(place, right)
    tl.debug_barrier()
    # 3: the factor
    g_direction = tl.zeros((C, Y), ACC)
    if (m == M - 1) and (layer == 1) and not AT_BORDER:
        g_direction = load_rows(READ_DIRECTION, row, t, n, H, Y, ACC)
    g_log_kept = tl.zeros((C,), ACC)
    through = tl.zeros((C,), ACC)
    if erases:
        direction = load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C, Y)
        g_factor = -exact_dot(tl.load(place), tl.trans(tl.load(write_place)), ACC)
        ratio = ratios(log_kept - log_decay, log_kept, t, True)
        g_factor *= ratio
        overlap = g_factor * dot(direction, tl.trans(direction), LOW, ACC)
        through = tl.sum(overlap, 1)
        g_log_kept = -tl.sum((times * rate)[:, None] * overlap, 0)
        g_overlap = (times * rate)[:, None] * g_factor
        g_direction += dot(g_overlap + tl.trans(g_overlap), direction, LOW, ACC)
        g_rate += times * through
    tl.store(sent_place, g_direction)
    tl.debug_barrier()
    # 4: the weights before the piece, and those at the border
    direction = load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C, Y)
    old = keep * tl.load(old_place)
    g_known = -rate[:, None] * tl.load(place)
    g_after = tl.load(G_WEIGHTS + own + matrix(X, Y))
    g_old = tl.exp(last_kept) * g_after
    g_last = tl.sum(tl.sum(g_old * old, 1), 0)
    write = to_end[:, None] * tl.load(write_place)
    g_direction = tl.load(sent_place) + dot(write, g_after, LOW, ACC)
    g_to_end = tl.sum(write * dot(direction, tl.trans(g_after), LOW, ACC), 1)
    g_log_before = tl.zeros((C,), ACC)
    g_border = tl.zeros((X, Y), ACC)
    if erases:
        along = dot(g_known, old, LOW, ACC)
        g_direction += met[:, None] * along
        g_log_before = times * rate * through + met * tl.sum(along * direction, 1)
        g_old += dot(tl.trans(met[:, None] * g_known), direction, LOW, ACC)
        if since_border:
            g_border -= dot(tl.trans(room[:, None] * g_known), direction, LOW, ACC)
            along = dot(g_known, held_share * tl.load(held_place), LOW, ACC)
            g_direction -= room[:, None] * along
            g_rate -= room_slope * tl.sum(along * direction, 1)
    tl.store(place, g_known)
    tl.store(sent_place, g_direction)
    g_log_decay = g_log_before if AFTER_DECAY else tl.zeros((C,), ACC)
    g_log_decay += tail_sum(g_log_kept - g_to_end + g_log_before) - g_log_before + g_last + tl.sum(g_to_end, 0)
    tl.store(SENT_LOG_DECAY + (at * 2 + layer) * C + t, tl.where(t < n, g_log_decay, 0.0))
    tl.store(SENT_SHARE + (at * 3 + layer) * C + t, tl.where(t < n, tl.load(LIMITS + m) * g_rate, 0.0))
    if m == M - 1:
        x, g = read_backward(READ_X_INNER, READ_X_OUTER, READ_G_INNER, READ_G_OUTER, layer, row, t, n, H, X, Y, ACC)
        found = dot(tl.trans(g), x, LOW, ACC)
        add_to(G_START, found, own + matrix(X, Y))
        if AT_BORDER:
            g_border += found
        else:
            seen = tl.exp(log_kept) if INCLUSIVE else tl.exp(log_kept - log_decay)
            g_old += dot(tl.trans(g * seen[:, None]), x, LOW, ACC)
    settle(G_BORDER, G_WEIGHTS, g_old, g_border, border == slot, keep, own + matrix(X, Y))

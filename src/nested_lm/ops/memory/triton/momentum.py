"""Kernels of writes that go through a running sum or mean, without the erase term (Titans eq. 10).

One program a lane, memory and layer: `writes.solve_with_momentum` without what is taken off, and its backward. Nothing
is solved: a push is the rate times what is known. X, Y, LAYER: as in `solve`.
"""

import triton
import triton.language as tl

from nested_lm.ops.memory.triton.solve import known_place, read_backward, weights_place
from nested_lm.ops.memory.triton.tiles import (
    VARYING,
    add_to,
    border_slot,
    dot,
    kept,
    layer_of,
    load_directions,
    load_rows,
    matrix,
    momentum_backward,
    momentum_gates,
    ratios,
    settle,
    span,
    store_rows,
    tail_sum,
    write_gates,
)


@triton.jit
def _arrivals(log_kept, last_kept, log_left, new, t, n):
    """How much of a push, and of the momentum before the piece, reaches the weights after it.

    [j, i] of the push of token i through the momentum until token j, and from there through retention to the end.
    """
    to_end = tl.where(t < n, tl.exp(last_kept - log_kept), 0.0)
    return to_end[:, None] * ratios(log_left, log_left, t, False) * new[None, :], to_end * tl.exp(log_left)


@triton.jit(do_not_specialize=VARYING)
def momentum_kernel(
    MADE_KEY, DIRECTION, KNOWN, LOGIT_RATE, LOGIT_DECAY, LOGIT_MOMENTUM, REACH, LIMITS, WEIGHTS, MOMENTA, RESETS,
    WRITE_INNER, WRITE_OUTER, WRITE_DIRECTION,
    lanes, T, H, piece, first_memory, memories, POS, FIRST, STEP, ALIGN,
    M: tl.constexpr, MEAN: tl.constexpr, STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, CARRY: tl.constexpr,
    LAYER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a piece pushes, kept of `memory` for its reads (WRITE_*); and weights and momentum after it, if CARRY."""
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
    push = -rate[:, None] * tl.load(known_place(KNOWN, at, layer, C, K, E, LAYERS) + matrix(C, X))
    if m == M - 1:
        kept_write = WRITE_INNER
        if layer == 1:
            kept_write = WRITE_OUTER
            store_rows(WRITE_DIRECTION, direction, row, t, n, H, Y)
        store_rows(kept_write, push, row, t, n, H, X)
    if CARRY:
        slot = piece + 1
        keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
        old = keep * tl.load(weights_place(WEIGHTS, slot, lanes, own, M, SIZE) + matrix(X, Y))
        running = keep * tl.load(weights_place(MOMENTA, slot, lanes, own, M, SIZE) + matrix(X, Y))
        log_left, last_left, new = momentum_gates(LOGIT_MOMENTUM, row, t, n, H, MEAN, C, ACC)
        arrivals, of_running = _arrivals(log_kept, last_kept, log_left, new, t, n)
        after = tl.exp(last_kept) * old + tl.sum(of_running, 0) * running
        after += dot(tl.trans(push * tl.sum(arrivals, 0)[:, None]), direction, LOW, ACC)
        left = push * (tl.exp(last_left - log_left) * new)[:, None]
        running = tl.exp(last_left) * running + dot(tl.trans(left), direction, LOW, ACC)
        tl.store(weights_place(WEIGHTS, slot + 1, lanes, own, M, SIZE) + matrix(X, Y), after)
        tl.store(weights_place(MOMENTA, slot + 1, lanes, own, M, SIZE) + matrix(X, Y), running)


@triton.jit(do_not_specialize=VARYING)
def momentum_backward_kernel(
    MADE_KEY, DIRECTION, KNOWN, LOGIT_RATE, LOGIT_DECAY, LOGIT_MOMENTUM, REACH, LIMITS, WEIGHTS, MOMENTA, RESETS,
    READ_X_INNER, READ_X_OUTER, READ_G_INNER, READ_G_OUTER, READ_WRITE_INNER, READ_WRITE_OUTER, READ_DIRECTION,
    SENT_KEY, G_DIRECTION, SENT_SHARE, SENT_LOG_DECAY, SENT_MOMENTUM, G_START, G_BORDER, G_WEIGHTS, G_MOMENTA,
    lanes, T, H, piece, POS, FIRST, STEP, chunk_generators, chunk_memory, ALIGN,
    M: tl.constexpr, MEAN: tl.constexpr, STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr,
    LAYER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of `momentum_kernel`; see `solve_backward_kernel` for the arguments. Reads are inclusive."""
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
    log_left, last_left, new = momentum_gates(LOGIT_MOMENTUM, row, t, n, H, MEAN, C, ACC)
    slot = piece + 1
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    border = border_slot(begin, tl.where(m == M - 1, chunk_memory, chunk_generators), POS, FIRST, STEP, RESETS)
    old = keep * tl.load(weights_place(WEIGHTS, slot, lanes, own, M, SIZE) + matrix(X, Y))
    running = keep * tl.load(weights_place(MOMENTA, slot, lanes, own, M, SIZE) + matrix(X, Y))
    place = known_place(KNOWN, at, layer, C, K, E, LAYERS) + matrix(C, X)
    known = tl.load(place)
    push = -rate[:, None] * known
    g_direction = tl.zeros((C, Y), ACC)
    g_push = tl.zeros((C, X), ACC)
    reads = tl.zeros((X, Y), ACC)
    reads_running = tl.zeros((X, Y), ACC)
    if m == M - 1:
        x, g = read_backward(READ_X_INNER, READ_X_OUTER, READ_G_INNER, READ_G_OUTER, layer, row, t, n, H, X, Y, ACC)
        add_to(G_START, dot(tl.trans(g), x, LOW, ACC), own + matrix(X, Y))
        reads = dot(tl.trans(g * tl.exp(log_kept)[:, None]), x, LOW, ACC)
        first_seen = tl.sum(ratios(log_kept, log_kept, t, False) * tl.exp(log_left)[None, :], 1)
        reads_running = dot(tl.trans(g * first_seen[:, None]), x, LOW, ACC)
        sent = READ_WRITE_INNER
        if layer == 1:
            sent = READ_WRITE_OUTER
            g_direction = load_rows(READ_DIRECTION, row, t, n, H, Y, ACC)
        g_push = load_rows(sent, row, t, n, H, X, ACC)
    # after = end * old + of_running * running + (push * arrived)^T direction
    g_after = tl.load(G_WEIGHTS + own + matrix(X, Y))
    arrivals, of_running = _arrivals(log_kept, last_kept, log_left, new, t, n)
    arrived = tl.sum(arrivals, 0)
    carried = dot(direction, tl.trans(g_after), LOW, ACC)
    g_push += arrived[:, None] * carried
    g_direction += dot(push * arrived[:, None], g_after, LOW, ACC)
    flow = arrivals * tl.sum(push * carried, 1)[None, :]
    arriving = tl.sum(of_running, 0)
    of_running *= tl.sum(tl.sum(g_after * running, 1), 0)
    g_log_kept = -tl.sum(flow, 1) - of_running
    g_last = tl.exp(last_kept) * tl.sum(tl.sum(g_after * old, 1), 0) - tl.sum(g_log_kept, 0)
    g_log_left = tl.sum(flow, 1) - tl.sum(flow, 0) + of_running
    g_log_new = tl.sum(flow, 0)
    # running after = exp(last_left) * running + (push * left)^T direction
    g_left = tl.load(G_MOMENTA + own + matrix(X, Y))
    left = tl.exp(last_left - log_left) * new
    carried = dot(direction, tl.trans(g_left), LOW, ACC)
    g_push += left[:, None] * carried
    g_direction += dot(push * left[:, None], g_left, LOW, ACC)
    flow_left = left * tl.sum(push * carried, 1)
    g_log_left -= flow_left
    g_log_new += flow_left
    g_last_left = tl.sum(flow_left, 0) + tl.exp(last_left) * tl.sum(tl.sum(g_left * running, 1), 0)
    g_running = arriving * g_after + tl.exp(last_left) * g_left + reads_running
    tl.store(G_MOMENTA + own + matrix(X, Y), keep * g_running)
    g_log_left += tl.where(t == n - 1, g_last_left, 0.0)
    grad = momentum_backward(g_log_left, g_log_new, LOGIT_MOMENTUM, row, t, n, H, MEAN, ACC)
    part = (m * LAYERS + layer).to(tl.int64) * lanes * T
    tl.store(SENT_MOMENTUM + part + row + t.to(tl.int64) * H, grad, mask=t < n)
    tl.store(place, -rate[:, None] * g_push)
    g_share = -tl.load(LIMITS + m) * tl.sum(g_push * known, 1)
    tl.store(SENT_SHARE + (at * 3 + layer) * C + t, tl.where(t < n, g_share, 0.0))
    tl.store(SENT_LOG_DECAY + (at * 2 + layer) * C + t, tl.where(t < n, tail_sum(g_log_kept) + g_last, 0.0))
    sent = SENT_KEY
    if layer == 1:
        sent = G_DIRECTION
    tl.store(sent + at * C * Y + matrix(C, Y), g_direction)
    grad = tl.exp(last_kept) * g_after + reads
    settle(G_BORDER, G_WEIGHTS, grad, tl.zeros((X, Y), ACC), border == slot, keep, own + matrix(X, Y))

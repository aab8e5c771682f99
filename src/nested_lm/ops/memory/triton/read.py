"""Kernels of the reads of `memory`, all pieces of a call at once, since reads feed nothing back.

One program a lane and piece: `reads.read_chunks` and its backward. AT_BORDER: the weights at the last border are read.
"""

import triton
import triton.language as tl

from nested_lm.ops.memory.triton.tiles import (
    VARYING,
    border_slot,
    dot,
    exact_dot,
    gate_logit,
    kept,
    load_rows,
    log_sigmoid,
    matrix,
    momentum_backward,
    momentum_gates,
    rate_share,
    ratios,
    silu_slope,
    span,
    store_rows,
    tail_sum,
)


@triton.jit
def _log_decay(LOGIT_DECAY, first, head, t, n, H, ALL_HEADS: tl.constexpr, ACC: tl.constexpr):
    logit = gate_logit(LOGIT_DECAY, first, head, t, n, H, ALL_HEADS, ACC)
    return tl.where(t < n, log_sigmoid(logit), 0.0)


@triton.jit
def _layer(
    x, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen, keys, write, at, start_at,
    X: tl.constexpr, Y: tl.constexpr, AT_BORDER: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One layer of a read; see `read_chunks`."""
    start, old = tl.load(START + start_at + matrix(X, Y)), keep * tl.load(WEIGHTS + at + matrix(X, Y))
    if AT_BORDER:
        return dot(x, tl.trans(start + old), LOW, ACC)
    result = dot(x, tl.trans(start), LOW, ACC) + faded[:, None] * dot(x, tl.trans(old), LOW, ACC)
    if MOMENTA is not None:
        running = keep * tl.load(MOMENTA + at + matrix(X, Y))
        result += of_running[:, None] * dot(x, tl.trans(running), LOW, ACC)
    return result + dot(seen * dot(x, tl.trans(keys), LOW, ACC), write, LOW, ACC)


@triton.jit
def _layer_backward(
    g, x, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen, keys, write, at, start_at,
    X: tl.constexpr, Y: tl.constexpr, AT_BORDER: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of x, keys, writes, of what is seen of them, of the weights and of the momentum before the piece."""
    start, old = tl.load(START + start_at + matrix(X, Y)), keep * tl.load(WEIGHTS + at + matrix(X, Y))
    if AT_BORDER:
        g_x = dot(g, start + old, LOW, ACC)
        return g_x, tl.zeros_like(x), tl.zeros_like(g), tl.zeros_like(seen), tl.zeros_like(faded), tl.zeros_like(faded)
    through = dot(g, old, LOW, ACC)
    g_x = dot(g, start, LOW, ACC) + faded[:, None] * through
    g_faded = tl.sum(x * through, 1)
    g_running = tl.zeros_like(faded)
    if MOMENTA is not None:
        through = dot(g, keep * tl.load(MOMENTA + at + matrix(X, Y)), LOW, ACC)
        g_x += of_running[:, None] * through
        g_running = tl.sum(x * through, 1)
    mutual = dot(x, tl.trans(keys), LOW, ACC)
    g_write = dot(tl.trans(seen * mutual), g, LOW, ACC)
    g_weighted = dot(g, tl.trans(write), LOW, ACC)
    g_seen = g_weighted * mutual
    g_mutual = g_weighted * seen
    g_x += dot(g_mutual, keys, LOW, ACC)
    return g_x, dot(tl.trans(g_mutual), x, LOW, ACC), g_write, g_seen, g_faded, g_running


@triton.jit
def _what_is_seen(
    LOGIT_MOMENTUM, log_decay, log_kept, row, t, n, H,
    INCLUSIVE: tl.constexpr, MEAN: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """How much a read sees: of each write, of the weights before the piece, and of the momentum before it."""
    log_seen = log_kept if INCLUSIVE else log_kept - log_decay
    retained = ratios(log_seen, log_kept, t, not INCLUSIVE)
    of_running = tl.zeros_like(log_kept)
    if LOGIT_MOMENTUM is not None:
        log_left, last_left, new = momentum_gates(LOGIT_MOMENTUM, row, t, n, H, MEAN, C, ACC)
        of_running = tl.sum(retained * tl.exp(log_left)[None, :], 1)
        retained = exact_dot(retained, ratios(log_left, log_left, t, False) * new[None, :], ACC)
    return retained, tl.exp(log_seen), of_running


@triton.jit(do_not_specialize=VARYING)
def read_kernel(
    MADE_KEY, MADE_QUERY, LOGIT_RATE, LOGIT_DECAY, LOGIT_MOMENTUM, REACH, LIMITS, START, WEIGHTS, MOMENTA, RESETS,
    WRITE_INNER, WRITE_OUTER, WRITE_DIRECTION, READS, OUT_RATE, OUT_DECAY,
    lanes, T, H, POS, FIRST, STEP, chunk, ALIGN,
    M: tl.constexpr, MEAN: tl.constexpr, STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, INCLUSIVE: tl.constexpr,
    AT_BORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr,
    LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads of a piece, and the gates it was written with."""
    lane, piece = tl.program_id(0), tl.program_id(1)
    begin, n = span(piece, T, FIRST, STEP)
    head = lane % H
    first = ((lane // H).to(tl.int64) * T + begin) * H
    row = first + head
    t = tl.arange(0, C)
    log_decay = _log_decay(LOGIT_DECAY, first, head, t, n, H, ALL_HEADS, ACC)
    log_kept = tl.cumsum(log_decay, 0)
    share = rate_share(gate_logit(LOGIT_RATE, first, head, t, n, H, ALL_HEADS, ACC), t, n, STRETCH)
    rate = share * tl.load(REACH + head) * tl.load(LIMITS + M - 1)
    tl.store(OUT_RATE + row + t.to(tl.int64) * H, rate, mask=t < n)
    tl.store(OUT_DECAY + row + t.to(tl.int64) * H, tl.exp(log_decay), mask=t < n)
    slot = piece + 1
    if AT_BORDER:
        slot = border_slot(begin, chunk, POS, FIRST, STEP, RESETS)
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    SIZE: tl.constexpr = LAYERS * E * K
    start_at = (head * M + M - 1) * SIZE
    at = ((slot.to(tl.int64) * lanes + lane) * M + M - 1) * SIZE
    seen, faded, of_running = _what_is_seen(LOGIT_MOMENTUM, log_decay, log_kept, row, t, n, H, INCLUSIVE, MEAN, C, ACC)
    query = load_rows(MADE_QUERY, row, t, n, H, K, ACC)
    result = _layer(
        query, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen, load_rows(MADE_KEY, row, t, n, H, K, ACC),
        load_rows(WRITE_INNER, row, t, n, H, E, ACC), at, start_at, E, K, AT_BORDER, LOW, ACC,
    )  # fmt: skip
    if LAYERS == 2:
        hidden = result * tl.sigmoid(result)
        result = query + _layer(
            hidden, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen,
            load_rows(WRITE_DIRECTION, row, t, n, H, E, ACC), load_rows(WRITE_OUTER, row, t, n, H, K, ACC),
            at + E * K, start_at + E * K, K, E, AT_BORDER, LOW, ACC,
        )  # fmt: skip
    store_rows(READS, result, row, t, n, H, K)


@triton.jit(do_not_specialize=VARYING)
def read_backward_kernel(
    MADE_KEY, MADE_QUERY, LOGIT_DECAY, LOGIT_MOMENTUM, START, WEIGHTS, MOMENTA, RESETS,
    WRITE_INNER, WRITE_OUTER, WRITE_DIRECTION, G_READS,
    HIDDEN, G_HIDDEN, G_QUERY, G_KEY, G_WRITE_INNER, G_WRITE_OUTER, G_WRITE_DIRECTION, G_LOG_DECAY, G_MOMENTUM,
    lanes, T, H, POS, FIRST, STEP, chunk, ALIGN,
    M: tl.constexpr, MEAN: tl.constexpr, ALL_HEADS: tl.constexpr, INCLUSIVE: tl.constexpr,
    AT_BORDER: tl.constexpr, C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr,
    LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients that reads send to queries, keys, writes, directions and gates.

    What the weights get is left to the writes' backward: HIDDEN is what the second layer was read with, G_HIDDEN the
    gradient of the first layer's result.
    """
    lane, piece = tl.program_id(0), tl.program_id(1)
    begin, n = span(piece, T, FIRST, STEP)
    head = lane % H
    first = ((lane // H).to(tl.int64) * T + begin) * H
    row = first + head
    t = tl.arange(0, C)
    log_decay = _log_decay(LOGIT_DECAY, first, head, t, n, H, ALL_HEADS, ACC)
    log_kept = tl.cumsum(log_decay, 0)
    slot = piece + 1
    if AT_BORDER:
        slot = border_slot(begin, chunk, POS, FIRST, STEP, RESETS)
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    SIZE: tl.constexpr = LAYERS * E * K
    start_at = (head * M + M - 1) * SIZE
    at = ((slot.to(tl.int64) * lanes + lane) * M + M - 1) * SIZE
    seen, faded, of_running = _what_is_seen(LOGIT_MOMENTUM, log_decay, log_kept, row, t, n, H, INCLUSIVE, MEAN, C, ACC)
    query = load_rows(MADE_QUERY, row, t, n, H, K, ACC)
    key = load_rows(MADE_KEY, row, t, n, H, K, ACC)
    write = load_rows(WRITE_INNER, row, t, n, H, E, ACC)
    g = load_rows(G_READS, row, t, n, H, K, ACC)
    g_query = tl.zeros((C, K), ACC)
    g_seen = tl.zeros((C, C), ACC)
    g_faded = tl.zeros((C,), ACC)
    g_running = tl.zeros((C,), ACC)
    if LAYERS == 2:
        pre = _layer(
            query, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen, key, write, at, start_at,
            E, K, AT_BORDER, LOW, ACC,
        )  # fmt: skip
        gate = tl.sigmoid(pre)
        store_rows(HIDDEN, pre * gate, row, t, n, H, E)
        g, g_keys, g_write, g_seen, g_faded, g_running = _layer_backward(
            g, pre * gate, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen,
            load_rows(WRITE_DIRECTION, row, t, n, H, E, ACC), load_rows(WRITE_OUTER, row, t, n, H, K, ACC),
            at + E * K, start_at + E * K, K, E, AT_BORDER, LOW, ACC,
        )  # fmt: skip
        store_rows(G_WRITE_DIRECTION, g_keys, row, t, n, H, E)
        store_rows(G_WRITE_OUTER, g_write, row, t, n, H, K)
        store_rows(G_HIDDEN, g * silu_slope(pre, gate), row, t, n, H, E)
        tl.debug_barrier()  # what follows is loaded anew: to hold it would spill
        g = load_rows(G_HIDDEN, row, t, n, H, E, ACC)
        query = load_rows(MADE_QUERY, row, t, n, H, K, ACC)
        key = load_rows(MADE_KEY, row, t, n, H, K, ACC)
        write = load_rows(WRITE_INNER, row, t, n, H, E, ACC)
        g_query = load_rows(G_READS, row, t, n, H, K, ACC)
    else:
        store_rows(G_HIDDEN, g, row, t, n, H, E)
    g_x, g_keys, g_write, g_seen_inner, g_faded_inner, g_running_inner = _layer_backward(
        g, query, START, WEIGHTS, MOMENTA, keep, faded, of_running, seen, key, write, at, start_at,
        E, K, AT_BORDER, LOW, ACC,
    )  # fmt: skip
    store_rows(G_QUERY, g_query + g_x, row, t, n, H, K)
    store_rows(G_KEY, g_keys, row, t, n, H, K)
    store_rows(G_WRITE_INNER, g_write, row, t, n, H, E)
    g_seen += g_seen_inner
    g_log_seen = faded * (g_faded + g_faded_inner)
    if LOGIT_MOMENTUM is None:
        g_seen *= seen
        g_log_kept = -tl.sum(g_seen, 0)
        g_log_seen += tl.sum(g_seen, 1)
    else:
        g_running += g_running_inner
        log_left, last_left, new = momentum_gates(LOGIT_MOMENTUM, row, t, n, H, MEAN, C, ACC)
        retained = ratios(log_kept, log_kept, t, False)
        left = ratios(log_left, log_left, t, False) * new[None, :]
        # seen = retained @ left and of_running = retained @ exp(log_left)
        g_seen = tl.where(t[:, None] >= t[None, :], g_seen, 0.0)
        flow = retained * (exact_dot(g_seen, tl.trans(left), ACC) + g_running[:, None] * tl.exp(log_left)[None, :])
        g_log_kept = tl.sum(flow, 1) - tl.sum(flow, 0)
        flow = left * exact_dot(tl.trans(retained), g_seen, ACC)
        g_log_left = tl.sum(flow, 1) - tl.sum(flow, 0)
        g_log_left += tl.exp(log_left) * tl.sum(retained * g_running[:, None], 0)
        grad = momentum_backward(g_log_left, tl.sum(flow, 0), LOGIT_MOMENTUM, row, t, n, H, MEAN, ACC)
        tl.store(G_MOMENTUM + row + t.to(tl.int64) * H, grad, mask=t < n)
    g_log_decay = tail_sum(g_log_kept + g_log_seen)
    if not INCLUSIVE:
        g_log_decay -= g_log_seen
    tl.store(G_LOG_DECAY + row + t.to(tl.int64) * H, g_log_decay, mask=t < n)

"""Kernels of what the memories generate from their weights at the last border: keys, values, queries, gate logits.

One program a lane, generating memory and piece: `chunk.generate` and its backward. A linear memory (DEPTH 1) answers
W_in x, a two-layer one x + W_out silu(W_in x). PLACE_*: number of each generator, -1 without it.
"""

import triton
import triton.language as tl

from nested_lm.ops.memory.triton.tiles import (
    VARYING,
    add_to,
    anchor_of,
    dot,
    gate_logit,
    load_rows,
    load_tokens,
    matrix,
    rate_share,
    rate_share_slope,
    silu_slope,
    span,
    store_rows,
    unit,
    unit_backward,
    waiting,
)


@triton.jit
def _given(KEY, VALUE, QUERY, m, PLACE_V: tl.constexpr, PLACE_Q: tl.constexpr):
    """The input that a generator reads."""
    pointer = KEY
    if m == PLACE_V:
        pointer = VALUE
    if m == PLACE_Q:
        pointer = QUERY
    return pointer


@triton.jit(do_not_specialize=VARYING)
def generate_kernel(
    KEY, VALUE, QUERY, SLOW_RATE, SLOW_DECAY, READOUT_RATE, READOUT_DECAY, START, WEIGHTS, RESETS,
    MADE_KEY, MADE_VALUE, MADE_QUERY, LOGIT_RATE, LOGIT_DECAY,
    lanes, T, H, piece, POS, FIRST, STEP, chunk, ALIGN,
    M: tl.constexpr, PLACE_K: tl.constexpr, PLACE_ETA: tl.constexpr, PLACE_ALPHA: tl.constexpr,
    PLACE_V: tl.constexpr, PLACE_Q: tl.constexpr, UNIT_VALUES: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One generator's part of a piece. chunk: tokens between its borders."""
    lane, m = tl.program_id(0), tl.program_id(1)
    begin, n = span(piece + tl.program_id(2), T, FIRST, STEP)
    head = lane % H
    row = ((lane // H).to(tl.int64) * T + begin) * H + head
    t = tl.arange(0, C)
    inner, outer, slot = anchor_of(
        START, WEIGHTS, RESETS, lane, m, begin, chunk, lanes, T, H, POS, FIRST, STEP, ALIGN, M, LAYERS, E, K, ACC
    )
    x = load_rows(_given(KEY, VALUE, QUERY, m, PLACE_V, PLACE_Q), row, t, n, H, K, ACC)
    pre = dot(x, tl.trans(inner), LOW, ACC)
    if LAYERS == 1:
        out = pre
    else:
        out = x + dot(pre * tl.sigmoid(pre), tl.trans(outer), LOW, ACC)
    if m == PLACE_ETA or m == PLACE_ALPHA:
        of_rate = m == PLACE_ETA
        slow, vector, logit = SLOW_DECAY, READOUT_DECAY, LOGIT_DECAY
        if of_rate:
            slow, vector, logit = SLOW_RATE, READOUT_RATE, LOGIT_RATE
        answered = tl.sum(out * tl.load(vector + head * K + tl.arange(0, K)).to(ACC)[None, :], 1)
        at = row + t.to(tl.int64) * H
        tl.store(logit + at, load_tokens(slow, row, t, n, H, ACC) + answered, mask=t < n)
    else:
        made = MADE_KEY
        if m == PLACE_V:
            made = MADE_VALUE
        if m == PLACE_Q:
            made = MADE_QUERY
        scaled, length = unit(out)
        if not UNIT_VALUES:
            scaled = tl.where(m == PLACE_V, out, scaled)
        store_rows(made, scaled, row, t, n, H, K)


@triton.jit
def _sum_rows(pointer, lane, C: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Sum of COUNT tiles (C, W) of a lane that lie behind one another."""
    total = tl.zeros((C, W), ACC)
    for i in range(COUNT):
        total += tl.load(pointer + (lane.to(tl.int64) * COUNT + i) * C * W + matrix(C, W))
    return total


@triton.jit
def _sum_tokens(pointer, lane, C: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Sum of COUNT vectors (C) of a lane that lie behind one another."""
    total = tl.zeros((C,), ACC)
    for i in range(COUNT):
        total += tl.load(pointer + (lane * COUNT + i) * C + tl.arange(0, C))
    return total


@triton.jit
def _gate_backward(
    PARTS, SENT, READ, LOGIT, REACH, lane, row, t, n, H, limit, STRETCH: tl.constexpr,
    OF_RATE: tl.constexpr, ALL_HEADS: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a gate's logit. PARTS: what memories send; SENT: of the gate that was reported; READ: by reads."""
    head = lane % H
    first = row - head
    logit = gate_logit(LOGIT, first, head, t, n, H, ALL_HEADS, ACC)
    total = tl.zeros((C,), ACC)
    count = H if ALL_HEADS else 1
    for i in range(count):
        other = i if ALL_HEADS else head
        sent = load_tokens(SENT, first + other, t, n, H, ACC)
        grad = _sum_tokens(PARTS, lane - head + other, C, COUNT, ACC)
        if OF_RATE:
            slope = rate_share_slope(rate_share(logit, t, n, STRETCH), STRETCH) * tl.load(REACH + other).to(ACC)
            total += (grad + limit * sent) * slope
        else:
            grad += load_tokens(READ, first + other, t, n, H, ACC)
            total += tl.where(t < n, (grad + sent * tl.sigmoid(logit)) * tl.sigmoid(-logit), 0.0)
    return total / count


@triton.jit(do_not_specialize=VARYING)
def generate_backward_kernel(
    KEY, VALUE, QUERY, LOGIT_RATE, LOGIT_DECAY, READOUT_RATE, READOUT_DECAY, START, WEIGHTS, RESETS, REACH, LIMITS,
    SENT_KEY, SENT_VALUE, SENT_SHARE, SENT_LOG_DECAY, READ_KEY, READ_QUERY, READ_LOG_DECAY, OUT_RATE, OUT_DECAY,
    G_KEY, G_VALUE, G_QUERY, G_RATE, G_DECAY, G_READOUT, G_START, G_BORDER, G_WEIGHTS,
    lanes, T, H, piece, POS, FIRST, STEP, chunk, ALIGN, STRETCH: tl.constexpr,
    M: tl.constexpr, PLACE_K: tl.constexpr, PLACE_ETA: tl.constexpr, PLACE_ALPHA: tl.constexpr,
    PLACE_V: tl.constexpr, PLACE_Q: tl.constexpr, UNIT_VALUES: tl.constexpr, ALL_HEADS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, E: tl.constexpr, LAYERS: tl.constexpr, LOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of one generator's part of a piece; the axis is its role, for the inputs are there without it as well.

    SENT_*: what each memory's writes send, READ_*: what reads of `memory` send, OUT_*: of the gates that were reported.
    Adds to G_START, and to G_WEIGHTS where the piece begins on the generators' border, else to G_BORDER.
    """
    lane, role = tl.program_id(0), tl.program_id(1)
    begin, n = span(piece, T, FIRST, STEP)
    head = lane % H
    row = ((lane // H).to(tl.int64) * T + begin) * H + head
    t = tl.arange(0, C)
    p = tl.arange(0, K)
    m = tl.where(role == 0, PLACE_K, tl.where(role == 1, PLACE_ETA, tl.where(role == 2, PLACE_ALPHA, PLACE_V)))
    m = tl.where(role == 4, PLACE_Q, m)
    g_out = tl.zeros((C, K), ACC)
    logit = tl.zeros((C,), ACC)
    if role == 0:
        g_out = _sum_rows(SENT_KEY, lane, C, K, M, ACC) + load_rows(READ_KEY, row, t, n, H, K, ACC)
    if role == 1:
        logit = _gate_backward(
            SENT_SHARE, OUT_RATE, READ_LOG_DECAY, LOGIT_RATE, REACH, lane, row, t, n, H,
            tl.load(LIMITS + M - 1).to(ACC), STRETCH, True, ALL_HEADS, 3 * M, C, ACC,
        )  # fmt: skip
        tl.store(G_RATE + row + t.to(tl.int64) * H, logit, mask=t < n)
    if role == 2:
        logit = _gate_backward(
            SENT_LOG_DECAY, OUT_DECAY, READ_LOG_DECAY, LOGIT_DECAY, REACH, lane, row, t, n, H, 1.0, STRETCH,
            False, ALL_HEADS, 2 * M, C, ACC,
        )  # fmt: skip
        tl.store(G_DECAY + row + t.to(tl.int64) * H, logit, mask=t < n)
    if role == 3:
        g_out = _sum_rows(SENT_VALUE, lane, C, K, M, ACC)
    if role == 4:
        g_out = load_rows(READ_QUERY, row, t, n, H, K, ACC)
    target = G_VALUE
    if role < 3:
        target = G_KEY + role.to(tl.int64) * lanes * T * K  # keys have a part for each of their readers
    if role == 4:
        target = G_QUERY
    if m < 0:
        store_rows(target, g_out, row, t, n, H, K)
    else:
        inner, outer, slot = anchor_of(
            START, WEIGHTS, RESETS, lane, m, begin, chunk, lanes, T, H, POS, FIRST, STEP, ALIGN, M, LAYERS, E, K, ACC
        )
        x = load_rows(_given(KEY, VALUE, QUERY, m, PLACE_V, PLACE_Q), row, t, n, H, K, ACC)
        pre = dot(x, tl.trans(inner), LOW, ACC)
        gate = tl.sigmoid(pre)
        if LAYERS == 1:
            out = pre
        else:
            out = x + dot(pre * gate, tl.trans(outer), LOW, ACC)
        if role == 1 or role == 2:
            vector = READOUT_DECAY
            if role == 1:
                vector = READOUT_RATE
            g_out = logit[:, None] * tl.load(vector + head * K + p).to(ACC)[None, :]
            at = ((role - 1) * lanes + lane) * K + p
            add_to(G_READOUT, tl.sum(logit[:, None] * out, 0), at)
        elif role != 3 or UNIT_VALUES:
            direction, length = unit(out)
            g_out = tl.where((t < n)[:, None], unit_backward(g_out, direction, length), 0.0)
        SIZE: tl.constexpr = LAYERS * E * K
        total = (lane.to(tl.int64) * M + m) * SIZE
        waits, share = waiting(G_BORDER, G_WEIGHTS, slot, piece, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
        if LAYERS == 1:
            g_pre = g_out
            g_x = dot(g_pre, inner, LOW, ACC)
        else:
            g_pre = dot(g_out, outer, LOW, ACC) * silu_slope(pre, gate)
            g_x = g_out + dot(g_pre, inner, LOW, ACC)
            found = dot(tl.trans(g_out), pre * gate, LOW, ACC)
            at = total + E * K + matrix(K, E)
            add_to(G_START, found, at)
            add_to(waits, share * found, at)
        store_rows(target, g_x, row, t, n, H, K)
        found = dot(tl.trans(g_pre), x, LOW, ACC)
        at = total + matrix(E, K)
        add_to(G_START, found, at)
        add_to(waits, share * found, at)

"""What the kernels share: products, activations, gates, running decays, and where a piece and its weights lie.

A *lane* is a row and a head. All per-token tensors are (B, T, H, ...), as the model makes them. A call is cut into
pieces: the first has up to FIRST tokens, the others up to STEP. `Weights` of both layers lie behind one another, E K
numbers each, in one tensor of *slots*: slot 0 has the border that was given, slot p + 1 the weights before piece p.

Names of sizes, known when a kernel is compiled: C tokens of a tile (a power of 2, at least 16; tokens beyond the piece
count 0 times), K head width, E hidden width of a memory, X and Y output and input of a layer. LOW: products round their
operands to bfloat16. Sums, solves and states have the dtype ACC.
"""

import triton
import triton.language as tl

from nested_lm.ops.memory.state import GRADIENT_FLOOR, NORM_FLOOR, ROOM_FLOOR
from nested_lm.ops.triangular import BLOCK

SHORTEST = tl.constexpr(NORM_FLOOR)
LEAST_ROOM = tl.constexpr(ROOM_FLOOR)
LEAST_SQUARE = tl.constexpr(GRADIENT_FLOOR)
SUBSTITUTED = tl.constexpr(BLOCK)


VARYING = (
    *("lanes", "T", "H", "piece", "first_memory", "memories", "POS", "FIRST", "STEP", "ALIGN"),
    *("chunk", "chunk_generators", "chunk_memory"),
)
"""Numbers that change from call to call, for which no kernel is compiled anew."""


@triton.jit
def dot(a, b, LOW: tl.constexpr, ACC: tl.constexpr):
    """A product whose operands may be rounded to bfloat16."""
    if LOW:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), out_dtype=ACC)
    return exact_dot(a.to(ACC), b.to(ACC), ACC)


@triton.jit
def exact_dot(a, b, ACC: tl.constexpr):
    """A product in float32 (three passes of TF32 each, which lose nothing) or float64."""
    if tl.float64 == ACC:
        return tl.dot(a, b, out_dtype=ACC)
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=ACC)


@triton.jit
def silu_slope(x, gate):
    """Derivative of silu; gate: sigmoid(x)."""
    return gate + x * gate * (1 - gate)


@triton.jit
def unit(x):
    """Rows at length 1, and their lengths."""
    length = tl.sqrt(tl.sum(x * x, 1))
    return x / tl.maximum(length, SHORTEST)[:, None], length


@triton.jit
def unit_backward(grad, direction, length):
    """Gradient of x from that of `unit(x)`."""
    along = tl.sum(grad * direction, 1)
    across = tl.where((length > SHORTEST)[:, None], grad - along[:, None] * direction, grad)
    return across / tl.maximum(length, SHORTEST)[:, None]


@triton.jit
def log_sigmoid(x):
    """log(sigmoid(x)); log(1 + u) after Kahan, since retentions are near 1."""
    u = tl.exp(-tl.abs(x))
    v = 1 + u
    return tl.minimum(x, 0.0) - tl.where(v == 1, u, tl.log(v) * (u / tl.where(v == 1, 1.0, v - 1)))


@triton.jit
def tail_sum(x):
    """Sum of an element and all behind it."""
    return tl.sum(x, 0) - tl.cumsum(x, 0) + x


@triton.jit
def span(piece, T, FIRST, STEP):
    """First token of a piece, and how many it has."""
    begin = tl.where(piece == 0, 0, FIRST + (piece - 1) * STEP)
    return begin, tl.minimum(tl.where(piece == 0, FIRST, STEP), T - begin)


@triton.jit
def border_slot(begin, chunk, POS, FIRST, STEP, RESETS: tl.constexpr):
    """Slot of the weights at the last border before token `begin` of memories with borders every `chunk` tokens.

    POS: tokens of the stream before the call, less whole alignments.
    """
    at = (POS + begin) // chunk * chunk - POS
    first = 0
    if RESETS is not None:  # the weights that are set back are those before piece 0
        first = tl.where(POS == 0, 1, 0)
    return tl.where(at > 0, (at - FIRST) // STEP + 2, tl.where(at == 0, first, 0))


@triton.jit
def kept(slot, row, RESETS, T, POS, FIRST, STEP, ALIGN):
    """0 where a document starts with the weights of a slot, else 1."""
    share = 1.0
    if RESETS is not None:
        begin = tl.where(slot < 2, 0, FIRST + (slot - 2) * STEP)
        starts = (tl.load(RESETS + row * T + begin) != 0) & (slot > 0) & ((POS + begin) % ALIGN == 0)
        share = tl.where(starts, 0.0, 1.0)
    return share


@triton.jit
def matrix(X: tl.constexpr, Y: tl.constexpr):
    """Places of a matrix whose rows lie behind one another."""
    return tl.arange(0, X)[:, None] * Y + tl.arange(0, Y)[None, :]


@triton.jit
def anchor_of(
    START, WEIGHTS, RESETS, lane, m, begin, chunk, lanes, T, H, POS, FIRST, STEP, ALIGN,
    M: tl.constexpr, LAYERS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both layers of a memory at its last border, and the slot of that."""
    slot = border_slot(begin, chunk, POS, FIRST, STEP, RESETS)
    keep = kept(slot, lane // H, RESETS, T, POS, FIRST, STEP, ALIGN)
    SIZE: tl.constexpr = LAYERS * E * K
    start = START + ((lane % H) * M + m) * SIZE
    moved = WEIGHTS + ((slot.to(tl.int64) * lanes + lane) * M + m) * SIZE
    inner = tl.load(start + matrix(E, K)).to(ACC) + keep * tl.load(moved + matrix(E, K))
    if LAYERS == 1:
        return inner, inner, slot
    at = E * K + matrix(K, E)
    return inner, tl.load(start + at).to(ACC) + keep * tl.load(moved + at), slot


@triton.jit
def waiting(G_BORDER, G_WEIGHTS, slot, piece, row, RESETS, T, POS, FIRST, STEP, ALIGN):
    """Where gradients of the weights at a memory's last border go, and times what; that may be before the piece."""
    waits = G_BORDER
    if slot == piece + 1:
        waits = G_WEIGHTS
    share = tl.where(slot == piece + 1, kept(slot, row, RESETS, T, POS, FIRST, STEP, ALIGN), 1.0)
    return waits, share


@triton.jit
def add_to(pointer, x, at):
    """Add to what only this program writes."""
    tl.store(pointer + at, tl.load(pointer + at) + x)


@triton.jit
def load_rows(pointer, row, t, n, H, W: tl.constexpr, ACC: tl.constexpr):
    """W numbers of each token of a lane's piece. row: of the piece's first token, times H, plus the head."""
    at = row * W + t[:, None].to(tl.int64) * H * W + tl.arange(0, W)[None, :]
    return tl.load(pointer + at, mask=(t < n)[:, None], other=0.0).to(ACC)


@triton.jit
def store_rows(pointer, x, row, t, n, H, W: tl.constexpr):
    """Store W numbers of each token of a lane's piece."""
    at = row * W + t[:, None].to(tl.int64) * H * W + tl.arange(0, W)[None, :]
    tl.store(pointer + at, x, mask=(t < n)[:, None])


@triton.jit
def load_tokens(pointer, row, t, n, H, ACC: tl.constexpr):
    """A number of each token of a lane's piece."""
    return tl.load(pointer + row + t.to(tl.int64) * H, mask=t < n, other=0.0).to(ACC)


@triton.jit
def gate_logit(pointer, first, head, t, n, H, ALL_HEADS: tl.constexpr, ACC: tl.constexpr):
    """Logit of a gate of each token: of its head, or the mean over heads. first: the piece's first token, times H."""
    if not ALL_HEADS:
        return load_tokens(pointer, first + head, t, n, H, ACC)
    total = tl.zeros_like(load_tokens(pointer, first, t, n, H, ACC))
    for other in range(H):
        total += load_tokens(pointer, first + other, t, n, H, ACC)
    return total / H


@triton.jit
def rate_share(logit, t, n, STRETCH: tl.constexpr):
    """Learning rate as a share of what the head reaches; 0 beyond the piece. See `state.rate_share`."""
    share = (1 + 2 * STRETCH) * tl.sigmoid(logit) - STRETCH
    return tl.where(t < n, tl.minimum(tl.maximum(share, 0.0), 1.0), 0.0)


@triton.jit
def rate_share_slope(share, STRETCH: tl.constexpr):
    """Derivative of `rate_share` by the logit, from its value."""
    slope = (share + STRETCH) * (1 + STRETCH - share) / (1 + 2 * STRETCH)
    return tl.where((share > 0) & (share < 1), slope, 0.0)


@triton.jit
def room_beside_erase(rate, ERASES: tl.constexpr):
    """See `state.room_beside_erase`; and its derivative by the rate."""
    if not ERASES:
        return tl.full(rate.shape, 1.0, rate.dtype), tl.zeros_like(rate)
    room = (2 - rate) / tl.maximum(rate, 1.0)
    room = tl.minimum(tl.maximum(room, LEAST_ROOM), 1.0)
    return room, tl.where((room > LEAST_ROOM) & (room < 1), -0.5 * (room + 1) * (room + 1), 0.0)


@triton.jit
def ratios(above, log_kept, t, STRICT: tl.constexpr):
    """exp(above_t - log_kept_i) for i before t (or at t, unless STRICT), else 0."""
    seen = t[:, None] > t[None, :] if STRICT else t[:, None] >= t[None, :]
    return tl.where(seen, tl.exp(tl.where(seen, above[:, None] - log_kept[None, :], 0.0)), 0.0)


@triton.jit
def _diagonal_blocks(lower, C: tl.constexpr, B: tl.constexpr):
    """Blocks (C/B, B, B) on the diagonal of a matrix."""
    N: tl.constexpr = C // B
    block = tl.arange(0, N)
    own = block[:, None, None, None] == block[None, None, :, None]
    return tl.sum(tl.where(own, tl.reshape(lower, (N, B, N, B)), 0.0), 2)


@triton.jit
def _merged(inverses, blocks, N: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr):
    """Inverses of N blocks of 2 B rows, from those of their halves: [[P, 0], [-R L P, R]]. Nothing larger is held."""
    half = tl.arange(0, 2)
    pairs = tl.reshape(inverses, (N, 2, B, B))
    upper = tl.sum(tl.where(half[None, :, None, None] == 0, pairs, 0.0), 1)
    lower = tl.sum(tl.where(half[None, :, None, None] == 1, pairs, 0.0), 1)
    row = half[None, :, None, None, None]
    column = half[None, None, None, :, None]
    below = tl.sum(tl.where(row == 1, tl.reshape(blocks, (N, 2, B, 2, B)), 0.0), 1)
    below = tl.sum(tl.where(half[None, None, :, None] == 0, below, 0.0), 2)
    if N == 1:
        inside = exact_dot(tl.reshape(below, (B, B)), tl.reshape(upper, (B, B)), ACC)
        between = tl.reshape(-exact_dot(tl.reshape(lower, (B, B)), inside, ACC), (N, B, B))
    else:
        between = -exact_dot(lower, exact_dot(below, upper, ACC), ACC)
    whole = tl.where(row > column, between[:, None, :, None, :], 0.0)
    whole = tl.where(row == column, tl.where(row == 0, upper[:, None, :, None, :], lower[:, None, :, None, :]), whole)
    return tl.reshape(whole, (N, 2 * B, 2 * B))


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, ACC: tl.constexpr):
    """(I + L)^-1 of strictly lower L: substitution inside blocks of 16, exact merging of pairs above. C: up to 64."""
    B: tl.constexpr = SUBSTITUTED
    N: tl.constexpr = C // B
    i = tl.arange(0, B)
    blocks = _diagonal_blocks(lower, C, B)
    solved = tl.where((i[None, :, None] == i[None, None, :]) & (tl.arange(0, N)[:, None, None] >= 0), 1.0, 0.0).to(ACC)
    for step in range(1, B):
        row = tl.sum(tl.where(i[None, :, None] == step, blocks, 0.0), 1)
        known = -tl.sum(row[:, :, None] * solved, 1)
        solved = tl.where((i[None, :, None] == step) & (i[None, None, :] < step), known[:, None, :], solved)
    if N == 4:
        solved = _merged(solved, _diagonal_blocks(lower, C, 2 * B), 2, B, ACC)
    if N > 1:
        solved = _merged(solved, tl.reshape(lower, (1, C, C)), 1, C // 2, ACC)
    return tl.reshape(solved, (C, C))


@triton.jit
def of_memory(m, M: tl.constexpr, ITS: tl.constexpr, OTHERS: tl.constexpr):
    """A switch of `memory`, the last one, or of the others."""
    if ITS == OTHERS:
        return ITS
    return (m == M - 1) == ITS


@triton.jit
def of_layer(layer, INNER: tl.constexpr, OUTER: tl.constexpr):
    """A switch of the first layer, or of the second."""
    if INNER == OUTER:
        return INNER
    return (layer == 0) == INNER


@triton.jit
def layer_of(LAYER: tl.constexpr):
    """Number of a program's memory among those of the launch, and its layer; LAYER is -1 where a launch has both."""
    if LAYER >= 0:
        return tl.program_id(1), tl.full((), LAYER, tl.int32)
    return tl.program_id(1) // 2, tl.program_id(1) % 2


@triton.jit
def load_directions(MADE_KEY, DIRECTION, layer, row, at, t, n, H, C: tl.constexpr, Y: tl.constexpr):
    """What a layer is written along: keys, or hidden activations at unit length."""
    start = MADE_KEY + row * Y
    if layer == 1:
        start = DIRECTION + at * C * Y
    stride = tl.where(layer == 1, 1, H) * Y
    at = t[:, None].to(tl.int64) * stride + tl.arange(0, Y)[None, :]
    return tl.load(start + at, mask=(t < n)[:, None], other=0.0)


@triton.jit
def write_gates(
    LOGIT_RATE, LOGIT_DECAY, REACH, LIMITS, first, head, m, t, n, H,
    STRETCH: tl.constexpr, ALL_HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Learning rate of a memory, log of the retention, its sum so far and in all, for each token of a piece."""
    logit = gate_logit(LOGIT_RATE, first, head, t, n, H, ALL_HEADS, ACC)
    rate = rate_share(logit, t, n, STRETCH) * tl.load(REACH + head) * tl.load(LIMITS + m)
    logit = gate_logit(LOGIT_DECAY, first, head, t, n, H, ALL_HEADS, ACC)
    log_decay = tl.where(t < n, log_sigmoid(logit), 0.0)
    return rate, log_decay, tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)


@triton.jit
def momentum_gates(LOGIT_MOMENTUM, row, t, n, H, MEAN: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Of the momentum: log of what is left of it so far and in all, and the share of a push that enters."""
    logit = load_tokens(LOGIT_MOMENTUM, row, t, n, H, ACC)
    log_share = tl.where(t < n, log_sigmoid(logit), 0.0)
    new = tl.sigmoid(-logit) if MEAN else tl.full((C,), 1.0, ACC)
    return tl.cumsum(log_share, 0), tl.sum(log_share, 0), new


@triton.jit
def momentum_backward(g_log_left, g_log_new, LOGIT_MOMENTUM, row, t, n, H, MEAN: tl.constexpr, ACC: tl.constexpr):
    """Gradient of the momentum's logit; g_log_new: of the log of the share that enters."""
    logit = load_tokens(LOGIT_MOMENTUM, row, t, n, H, ACC)
    grad = tail_sum(g_log_left) * tl.sigmoid(-logit)
    if MEAN:
        grad -= g_log_new * tl.sigmoid(logit)
    return tl.where(t < n, grad, 0.0)


@triton.jit
def settle(G_BORDER, G_WEIGHTS, grad, g_border, is_border, keep, at):
    """Store the gradient of the weights before a piece; where those are the border's, with what waits for them."""
    waiting = tl.load(G_BORDER + at) + g_border
    if is_border:
        grad += waiting
        waiting = tl.zeros_like(waiting)
    tl.store(G_WEIGHTS + at, keep * grad)
    tl.store(G_BORDER + at, waiting)

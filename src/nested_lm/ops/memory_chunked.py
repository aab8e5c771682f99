"""The self-modifying memories, a chunk of tokens at a time: the same numbers as the reference, in matrix products.

Inside a chunk every gradient is taken at the border, so it is known before the chunk starts, and each layer of each
memory becomes a gated delta rule with rank-one writes. With distances D from the start, unit directions p_t, known
errors g_t, rates eta_t and retentions alpha_t (gamma_t their running product):

    D_t = alpha_t D_{t-1} - eta_t (g_t + D_{t-1} p_t) p_t^T = gamma_t D_0 + sum_{i<=t} (gamma_t / gamma_i) w_i p_i^T

and the updates w solve one unit lower-triangular system (I + L) W = -eta (G + gamma_{t-1} P D_0^T) with
L_ti = eta_t (gamma_{t-1} / gamma_i) p_t.p_i for i < t. The first layers of all memories of equal rate share p = k and
so share the factor. Inner gradients are closed forms; the backward of the solve is written by hand.

Shapes: B batch, T tokens, S chunks, C tokens of a chunk, H heads, M memories (5), K head width, E hidden width.

Source: arXiv 2512.24695 eqs. 83-91 in the parallel form derived in docs/equations.md.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nested_lm.ops.memory import (
    MEMORY,
    VALUE,
    GateReadout,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    WriteRule,
    add,
    outer_write_scale,
    reset_rows,
    unit,
)
from nested_lm.ops.triangular import unit_lower_solve


class ChunkInputs(NamedTuple):
    """Inputs of one chunk, heads before tokens."""

    key: Float[Tensor, "B H C K"]
    value: Float[Tensor, "B H C K"]
    rate: Float[Tensor, "B H C"]
    decay: Float[Tensor, "B H C"]


class Generated(NamedTuple):
    """What the memories generate for one chunk from the border."""

    key: Float[Tensor, "B H C K"]
    value: Float[Tensor, "B H C K"]
    rate: Float[Tensor, "B H C"]  # before scaling by the largest rate
    log_decay: Float[Tensor, "B H C"]


class ChunkTrace(NamedTuple):
    """What a read of `memory` inside a chunk needs: its weights before the chunk and every write in it."""

    inner: Float[Tensor, "B H E K"]
    outer: Float[Tensor, "B H K E"]
    inner_key: Float[Tensor, "B H C K"]
    inner_write: Float[Tensor, "B H C E"]
    outer_key: Float[Tensor, "B H C E"]
    outer_write: Float[Tensor, "B H C K"]
    log_kept: Float[Tensor, "B H C"]  # log gamma_t


class ChunkResult(NamedTuple):
    """Weights after a chunk, what reads need, and the gates."""

    current: MemoryWeights
    trace: ChunkTrace
    rate: Float[Tensor, "B H C"]
    decay: Float[Tensor, "B H C"]


def generate(inputs: ChunkInputs, anchor: MemoryWeights, readout: GateReadout) -> Generated:
    """Let the memories generate keys, values, rates and retentions from the border weights (eq. 83)."""
    x = inputs.key[:, :, None]
    hidden = functional.silu(x @ anchor.inner[:, :, :VALUE].mT)  # (B, H, 3, C, E)
    out = x + hidden @ anchor.outer[:, :, :VALUE].mT  # k, eta, alpha
    key, rate, decay = out.unbind(dim=2)
    hidden = functional.silu(inputs.value @ anchor.inner[:, :, VALUE].mT)
    value = inputs.value + hidden @ anchor.outer[:, :, VALUE].mT
    rate_logit = inputs.rate + (rate * readout.rate[:, None]).sum(-1)
    decay_logit = inputs.decay + (decay * readout.decay[:, None]).sum(-1)
    return Generated(unit(key), unit(value), torch.sigmoid(rate_logit), functional.logsigmoid(decay_logit))


class InnerErrors(NamedTuple):
    """Closed-form inner gradients: rank one per token, as (error, direction) of each layer of each memory."""

    inner: Float[Tensor, "B H M C E"]  # times the key
    outer: Float[Tensor, "B H M C K"]  # times `direction`
    direction: Float[Tensor, "B H M C E"]  # unit hidden activations


def inner_errors(made: Generated, anchor: MemoryWeights) -> InnerErrors:
    """Gradient of half |M(k) - v_hat|^2 at the border, with v_hat = M(v), for every memory and token (eqs. 84-85)."""
    tokens = made.key.shape[2]
    both = torch.cat([made.key, made.value], dim=2)[:, :, None]  # (B, H, 1, 2C, K)
    pre = both @ anchor.inner.mT  # (B, H, M, 2C, E)
    gate = torch.sigmoid(pre)
    hidden = pre * gate
    at_key = hidden[..., :tokens, :]
    error = (made.key - made.value)[:, :, None] + (at_key - hidden[..., tokens:, :]) @ anchor.outer.mT
    gate, pre = gate[..., :tokens, :], pre[..., :tokens, :]
    slope = gate * (1 + pre * (1 - gate))
    direction, scale = outer_write_scale(at_key)
    return InnerErrors(slope * (error @ anchor.outer), error * scale, direction)


def delta_writes(
    error: Float[Tensor, "B H M C X"],
    direction: Float[Tensor, "B H N C Y"],
    before: Float[Tensor, "B H M X Y"],
    rate: Float[Tensor, "B H M C 1"],
    log_kept: Float[Tensor, "B H C"],
    log_decay: Float[Tensor, "B H C"],
) -> Float[Tensor, "B H M C X"]:
    """Solve for the writes w of one layer of M memories. N is 1 when they share their directions and rates."""
    log_before = log_kept - log_decay  # log gamma_{t-1}
    ratio = (log_before[..., :, None] - log_kept[..., None, :]).tril(-1).exp()[:, :, None]
    factor = rate[:, :, : direction.shape[2]] * ratio * (direction @ direction.mT)
    faded = log_before.exp()[:, :, None, :, None] * (direction @ before.mT)
    return unit_lower_solve(factor, -rate * (error + faded))


def end_of_chunk(
    before: Float[Tensor, "B H M X Y"],
    writes: Float[Tensor, "B H M C X"],
    direction: Float[Tensor, "B H N C Y"],
    log_kept: Float[Tensor, "B H C"],
) -> Float[Tensor, "B H M X Y"]:
    """Weights after the last token of a chunk."""
    last = log_kept[..., -1:]
    kept = (last - log_kept).exp()[:, :, None, :, None]
    return last.exp()[..., None, None] * before + (writes * kept).mT @ direction


def write_chunk(
    inputs: ChunkInputs,
    start: MemoryWeights,
    readout: GateReadout,
    border: MemoryWeights,
    current: MemoryWeights,
    rule: WriteRule,
) -> ChunkResult:
    """Write up to a chunk of tokens, none of them beyond the next border, into all memories."""
    anchor = add(start, border)
    made = generate(inputs, anchor, readout)
    errors = inner_errors(made, anchor)
    log_kept = made.log_decay.cumsum(dim=-1)
    key = made.key[:, :, None]
    rate = made.rate[:, :, None, :, None]
    generators, memory = rate * rule.rate_generators, rate * rule.rate_memory
    if rule.rate_generators == rule.rate_memory:
        groups = [(slice(None), memory)]
    else:
        groups = [(slice(0, MEMORY), generators), (slice(MEMORY, None), memory)]
    inner_parts, outer_parts = [], []
    for members, step in groups:
        width = errors.inner[:, :, members].shape[2]
        step = step.expand(-1, -1, width, -1, -1)
        error, old = errors.inner[:, :, members], current.inner[:, :, members]
        if rule.erase == "none":
            inner_parts.append(-step * error)
        else:
            inner_parts.append(delta_writes(error, key, old, step, log_kept, made.log_decay))
        error, old = errors.outer[:, :, members], current.outer[:, :, members]
        if rule.erase == "both":
            direction = errors.direction[:, :, members]
            outer_parts.append(delta_writes(error, direction, old, step, log_kept, made.log_decay))
        else:
            outer_parts.append(-step * error)
    inner_write = torch.cat(inner_parts, dim=2) if len(inner_parts) > 1 else inner_parts[0]
    outer_write = torch.cat(outer_parts, dim=2) if len(outer_parts) > 1 else outer_parts[0]
    after = MemoryWeights(
        end_of_chunk(current.inner, inner_write, key, log_kept),
        end_of_chunk(current.outer, outer_write, errors.direction, log_kept),
    )
    trace = ChunkTrace(
        current.inner[:, :, MEMORY],
        current.outer[:, :, MEMORY],
        made.key,
        inner_write[:, :, MEMORY],
        errors.direction[:, :, MEMORY],
        outer_write[:, :, MEMORY],
        log_kept,
    )
    return ChunkResult(after, trace, made.rate * rule.rate_memory, made.log_decay.exp())


def read_chunks(
    query: Float[Tensor, "B H S C K"],
    start_inner: Float[Tensor, "H E K"],
    start_outer: Float[Tensor, "H K E"],
    trace: ChunkTrace,
    rule: WriteRule,
) -> Float[Tensor, "B H S C K"]:
    """Read `memory` at every token of every chunk, each at its own moment. Nothing here is sequential.

    trace: as in `ChunkTrace`, with a chunk dimension S after the heads.
    """
    log_kept = trace.log_kept
    if rule.read == "inclusive":
        log_seen, diagonal = log_kept, 0
    else:
        log_seen, diagonal = functional.pad(log_kept[..., :-1], (1, 0)), -1
    ratio = (log_seen[..., :, None] - log_kept[..., None, :]).tril(diagonal).exp().tril(diagonal)
    faded = log_seen.exp()[..., None]

    def layer(x: Tensor, start: Tensor, before: Tensor, keys: Tensor, writes: Tensor) -> Tensor:
        return x @ start[:, None].mT + faded * (x @ before.mT) + (ratio * (x @ keys.mT)) @ writes

    hidden = functional.silu(layer(query, start_inner, trace.inner, trace.inner_key, trace.inner_write))
    return query + layer(hidden, start_outer, trace.outer, trace.outer_key, trace.outer_write)


def self_modify(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    phase: int,
    resets: Bool[Tensor, "B T"] | None,
    recompute: bool = False,
) -> MemoryOutput:
    """Write every token and read; exactly what `memory_reference.self_modify` computes, chunk by chunk.

    Gradients reach every input, the start and the readout through all writes. See the reference for the arguments.

    resets: only those on a border count; the caller guarantees that there are no others.
    recompute: keep only the border states for backward and compute each chunk again.
    """
    tokens = inputs.key.shape[1]
    key, value, query = (x.transpose(1, 2) for x in inputs[:3])  # (B, H, T, K)
    rate, decay = inputs.rate.transpose(1, 2), inputs.decay.transpose(1, 2)
    border, current = state
    results: list[ChunkResult] = []
    begin = 0
    while begin < tokens:
        end = min(begin + rule.chunk - (phase + begin) % rule.chunk, tokens)
        if resets is not None and (phase + begin) % rule.chunk == 0:
            current = reset_rows(current, (~resets[:, begin]).to(current.inner.dtype))
            border = current
        piece = ChunkInputs(
            key[:, :, begin:end], value[:, :, begin:end], rate[:, :, begin:end], decay[:, :, begin:end]
        )
        if recompute and torch.is_grad_enabled():
            result = checkpoint(
                write_chunk,
                piece,
                start,
                readout,
                border,
                current,
                rule,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            result = write_chunk(piece, start, readout, border, current, rule)
        results.append(result)
        current = result.current
        if (phase + end) % rule.chunk == 0:
            border = current
        begin = end
    reads = _read_all(query, start, [result.trace for result in results], rule)
    return MemoryOutput(
        reads.transpose(1, 2),
        MemoryState(border, current),
        torch.cat([result.rate for result in results], dim=2).transpose(1, 2),
        torch.cat([result.decay for result in results], dim=2).transpose(1, 2),
    )


def _read_all(
    query: Float[Tensor, "B H T K"], start: MemoryWeights, traces: list[ChunkTrace], rule: WriteRule
) -> Float[Tensor, "B H T K"]:
    """Read all chunks, those of equal length in one go."""
    start_inner, start_outer = start.inner[:, MEMORY], start.outer[:, MEMORY]
    reads, begin, index = [], 0, 0
    while index < len(traces):
        length = traces[index].inner_key.shape[2]
        stop = index
        while stop < len(traces) and traces[stop].inner_key.shape[2] == length:
            stop += 1
        stacked = ChunkTrace(*(torch.stack(parts, dim=2) for parts in zip(*traces[index:stop], strict=True)))
        piece = query[:, :, begin : begin + length * (stop - index)].unflatten(2, (stop - index, length))
        reads.append(read_chunks(piece, start_inner, start_outer, stacked, rule).flatten(2, 3))
        begin += length * (stop - index)
        index = stop
    return torch.cat(reads, dim=2)

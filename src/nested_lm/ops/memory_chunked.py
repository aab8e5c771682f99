"""The self-modifying memories, a chunk of tokens at a time: the numbers of the reference, in matrix products.

`memory_chunk` has the mathematics of one chunk; here a sequence is cut at the borders, chunks are run one after the
other (their borders depend on each other) and `memory` is read for all of them at once (reads feed nothing back).

Shapes: B batch, T tokens, S chunks, C tokens of a chunk, H heads, M memories (5), K head width, E hidden width.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nested_lm.ops.memory import (
    MEMORY,
    GateReadout,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    WriteRule,
    add,
    move_border,
    reset_rows,
)
from nested_lm.ops.memory_chunk import (
    Chunk,
    ChunkInputs,
    TraceGradients,
    backward_chunk,
    forward_chunk,
)


class Borders(NamedTuple):
    """Which memories have a border at a moment."""

    generators: bool
    memory: bool


class Piece(NamedTuple):
    """Tokens between two cuts: a chunk, or the part of one that lies in this call."""

    begin: int
    end: int
    after: Borders  # at its end
    aligned: bool  # begins on a border of every memory


class Trace(NamedTuple):
    """What reads of `memory` need: its weights before each piece and every write."""

    inner_key: Float[Tensor, "B H T K"]
    inner_write: Float[Tensor, "B H T E"]
    outer_key: Float[Tensor, "B H T E"]
    outer_write: Float[Tensor, "B H T K"]
    log_kept: Float[Tensor, "B H T"]  # log of the retention since the piece began
    rate: Float[Tensor, "B H T"]
    decay: Float[Tensor, "B H T"]
    inner: Float[Tensor, "B H S E K"]
    outer: Float[Tensor, "B H S K E"]


class Plan(NamedTuple):
    """How a call is computed: no tensors that need a gradient."""

    rule: WriteRule
    pieces: tuple[Piece, ...]
    keep: Float[Tensor, "S B"] | None  # 0 where a row's document starts with the piece
    keep_chunks: bool  # for backward; otherwise it computes them again
    operands: torch.dtype | None


def cut(tokens: int, position: int, rule: WriteRule) -> tuple[Piece, ...]:
    """Cut a call of `tokens` tokens, `position` tokens into the stream, at every border."""
    pieces = []
    shorter = min(rule.chunk, rule.chunk_generators)
    begin = 0
    while begin < tokens:
        end = min(begin + shorter - (position + begin) % shorter, tokens)
        after = Borders((position + end) % rule.chunk_generators == 0, (position + end) % rule.chunk == 0)
        pieces.append(Piece(begin, end, after, (position + begin) % rule.alignment == 0))
        begin = end
    return tuple(pieces)


def _slice(inputs: ChunkInputs, piece: Piece) -> ChunkInputs:
    return ChunkInputs(*(x[:, :, piece.begin : piece.end] for x in inputs))


def _trace_of(chunk: Chunk, rule: WriteRule) -> tuple[Tensor, ...]:
    """Per-token part of a piece's trace, in the order of `Trace`."""
    made = chunk.made
    return (
        made.key,
        chunk.inner[-1].write[:, :, -1],
        chunk.errors.direction[:, :, MEMORY],
        chunk.outer[-1].write[:, :, -1],
        chunk.decays.log_kept,
        made.rate * rule.rate_memory,
        made.log_decay.exp(),
    )


class _WriteSequence(torch.autograd.Function):
    """All writes of a call. Backward goes through the pieces in reverse with hand-written gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, start, readout, state = _unflatten(tensors)
        border, current = state
        weights, kept, chunks, traces = [], [], [], []
        for index, piece in enumerate(plan.pieces):
            if piece.aligned and plan.keep is not None:
                border = current = reset_rows(current, plan.keep[index])
            chunk = forward_chunk(
                _slice(inputs, piece),
                add(start, border),
                current,
                readout,
                rule=plan.rule,
                operands=plan.operands,
            )
            traces.append(_trace_of(chunk, plan.rule))
            weights.append((current.inner[:, :, MEMORY], current.outer[:, :, MEMORY]))
            kept.append(MemoryState(border, current))
            chunks.append(chunk if plan.keep_chunks else None)
            current = chunk.after
            border = move_border(border, current, **piece.after._asdict())
        ctx.plan, ctx.chunks, ctx.kept = plan, chunks, kept
        ctx.save_for_backward(*tensors)
        trace = [torch.cat(parts, dim=2) for parts in zip(*traces, strict=True)]
        trace += [torch.stack(parts, dim=2) for parts in zip(*weights, strict=True)]
        # An output must not be an input, and the two states must not be one tensor.
        return (*trace, *(x.clone() for x in border), *(x.clone() for x in current))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        inputs, start, readout, _ = _unflatten(ctx.saved_tensors)
        trace = Trace(*grads[:9])
        border, current = MemoryWeights(*grads[9:11]), MemoryWeights(*grads[11:13])
        # Gradients that wait for the border each piece was anchored at. `border` starts with what later calls sent.
        total_start = MemoryWeights(torch.zeros_like(border.inner), torch.zeros_like(border.outer))
        total_readout = GateReadout(torch.zeros_like(readout.rate), torch.zeros_like(readout.decay))
        pieces_of_inputs: list[ChunkInputs] = []
        for index in reversed(range(len(plan.pieces))):
            piece, kept = plan.pieces[index], ctx.kept[index]
            border, current = _move_border_backward(border, current, piece.after)
            anchor = add(start, kept.border)
            part = _slice(inputs, piece)
            common = (plan.rule, plan.operands)
            chunk = ctx.chunks[index] or forward_chunk(part, anchor, kept.current, readout, *common)
            ctx.chunks[index] = None  # free it
            found = backward_chunk(
                current, _trace_gradients(trace, piece), part, anchor, kept.current, readout, chunk, *common
            )
            pieces_of_inputs.append(found.inputs)
            for total, part_of_total in zip(total_readout, found.readout, strict=True):
                total += part_of_total
            for total, gradient in zip(total_start, found.anchor, strict=True):
                total += gradient
            current = found.current
            current.inner[:, :, MEMORY] += trace.inner[:, :, index]
            current.outer[:, :, MEMORY] += trace.outer[:, :, index]
            border = add(border, found.anchor)
            if piece.aligned and plan.keep is not None:
                border, current = _move_border_backward(border, current, Borders(generators=True, memory=True))
                current = reset_rows(current, plan.keep[index])
        grad_inputs = [torch.cat(parts[::-1], dim=2) for parts in zip(*pieces_of_inputs, strict=True)]
        grad_start = [total.sum(0) for total in total_start]
        return (None, *grad_inputs, *grad_start, *total_readout, *border, *current)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _write_sequence(plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run the writes as they are under torch.compile, which cannot trace a backward of its own through the pieces."""
    results: tuple[Tensor, ...] = _WriteSequence.apply(plan, *tensors)  # type: ignore[no-untyped-call]
    return results


def _move_border_backward(
    border: MemoryWeights, current: MemoryWeights, moved: Borders
) -> tuple[MemoryWeights, MemoryWeights]:
    """Backward of `move_border`: what waited for a border that moved goes to the weights it moved to."""
    new_border, new_current = [], []
    for waiting, gradient in zip(border, current, strict=True):
        keep = waiting.new_tensor([not moved.generators] * MEMORY + [not moved.memory]).view(1, 1, -1, 1, 1)
        new_border.append(waiting * keep)
        new_current.append(gradient + waiting * (1 - keep))
    return MemoryWeights(*new_border), MemoryWeights(*new_current)


def _unflatten(tensors: tuple[Tensor, ...]) -> tuple[ChunkInputs, MemoryWeights, GateReadout, MemoryState]:
    return (
        ChunkInputs(*tensors[:4]),
        MemoryWeights(*tensors[4:6]),
        GateReadout(*tensors[6:8]),
        MemoryState(MemoryWeights(*tensors[8:10]), MemoryWeights(*tensors[10:12])),
    )


def _trace_gradients(trace: Trace, piece: Piece) -> TraceGradients:
    return TraceGradients(*(x[:, :, piece.begin : piece.end] for x in trace[:7]))


def read_chunks(
    query: Float[Tensor, "B H S C K"],
    start_inner: Float[Tensor, "H E K"],
    start_outer: Float[Tensor, "H K E"],
    trace: Trace,
    rule: WriteRule,
) -> Float[Tensor, "B H S C K"]:
    """Read `memory` at every token of every piece, each at its own moment.

    trace: its per-token members with the tokens split into (S, C).
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


def read_pieces(
    query: Float[Tensor, "B H T K"],
    start: MemoryWeights,
    trace: Trace,
    pieces: tuple[Piece, ...],
    rule: WriteRule,
) -> Float[Tensor, "B H T K"]:
    """Read all pieces, neighbours of equal length in one go."""
    start_inner, start_outer = start.inner[:, MEMORY], start.outer[:, MEMORY]
    reads = []
    first = 0
    while first < len(pieces):
        length = pieces[first].end - pieces[first].begin
        stop = first + 1
        while stop < len(pieces) and pieces[stop].end - pieces[stop].begin == length:
            stop += 1
        begin, end, shape = pieces[first].begin, pieces[stop - 1].end, (stop - first, length)
        per_token = [x[:, :, begin:end].reshape(*x.shape[:2], *shape, *x.shape[3:]) for x in trace[:7]]
        per_piece = [x[:, :, first:stop] for x in trace[7:]]
        part = Trace(*per_token, *per_piece)
        queries = query[:, :, begin:end].reshape(*query.shape[:2], *shape, query.shape[3])
        reads.append(read_chunks(queries, start_inner, start_outer, part, rule).flatten(2, 3))
        first = stop
    return reads[0] if len(reads) == 1 else torch.cat(reads, dim=2)


def _operand_dtype(x: Tensor) -> torch.dtype | None:
    """Under autocast the products round their operands; the state and the solve stay in float32."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def self_modify(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
    recompute: bool = False,
) -> MemoryOutput:
    """Write every token and read; exactly what `memory_reference.self_modify` computes, chunk by chunk.

    Gradients reach every input, the start and the readout through all writes. See the reference for the arguments.

    resets: only those on a border count; the caller guarantees that there are no others.
    recompute: keep only the border states for backward and compute each chunk again.
    """
    pieces = cut(inputs.key.shape[1], position, rule)
    operands = _operand_dtype(inputs.key)
    dtype = torch.promote_types(inputs.key.dtype, start.inner.dtype)
    key, value, query, rate, decay = (x.to(dtype).transpose(1, 2) for x in inputs)  # (B, H, T, ...)
    keep = None
    if resets is not None:
        keep = (~resets[:, [piece.begin for piece in pieces]]).T.to(dtype)
    plan = Plan(rule, pieces, keep, torch.is_grad_enabled() and not recompute, operands)
    with torch.autocast(key.device.type, enabled=False):
        results = _write_sequence(plan, key, value, rate, decay, *start, *readout, *state.border, *state.current)
        trace = Trace(*results[:9])
        reads = read_pieces(query, start, trace, pieces, rule)
    return MemoryOutput(
        reads.transpose(1, 2),
        MemoryState(MemoryWeights(*results[9:11]), MemoryWeights(*results[11:13])),
        trace.rate.transpose(1, 2),
        trace.decay.transpose(1, 2),
    )

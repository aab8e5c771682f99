"""The self-modifying memories, a chunk of tokens at a time: the numbers of the reference, in matrix products.

`memory_chunk` has the mathematics of one chunk; here a sequence is cut at the borders, chunks are run one after the
other (their borders depend on each other) and `memory` is read for all of them at once (reads feed nothing back).

Shapes: B batch, T tokens, S chunks, C tokens of a chunk, H heads, M memories that adapt, K head width, E hidden width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from nested_lm.ops.memory.backward import TraceGradients, backward_chunk, has_closed_backward
from nested_lm.ops.memory.chunk import Chunk, ChunkInputs, ChunkWeights, forward_chunk
from nested_lm.ops.memory.reads import CLOSED, PER_TOKEN, Trace, read_pieces, trace_chunk
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    GateReadout,
    MemoryCall,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    add,
    check_momentum,
    decay_base,
    move_border,
    reset_rows,
    subtract,
    take_rows,
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
    shorter = min(rule.chunk, rule.generator_chunk)
    begin = 0
    while begin < tokens:
        end = min(begin + shorter - (position + begin) % shorter, tokens)
        after = Borders((position + end) % rule.generator_chunk == 0, (position + end) % rule.chunk == 0)
        pieces.append(Piece(begin, end, after, (position + begin) % rule.alignment == 0))
        begin = end
    return tuple(pieces)


def at_starts(resets: Bool[Tensor, "B T"], pieces: tuple[Piece, ...]) -> Bool[Tensor, "B S"]:
    """Where a row's document starts with a piece. All but the first and the last piece are equally long."""
    if len(pieces) == 1:
        return resets[:, :1]
    second = pieces[1]
    return torch.cat([resets[:, :1], resets[:, second.begin :: max(second.end - second.begin, 1)]], dim=1)


def _slice(inputs: ChunkInputs, piece: Piece) -> ChunkInputs:
    return ChunkInputs(*(None if x is None else x[:, :, piece.begin : piece.end] for x in inputs))  # type: ignore[arg-type]


def run_pieces(
    plan: Plan,
    inputs: ChunkInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    run_chunk: Callable[[ChunkInputs, ChunkWeights, GateReadout, WriteRule, torch.dtype | None], Chunk],
    visit: Callable[[Chunk, MemoryState], None] | None = None,
) -> tuple[Trace, MemoryState]:
    """Run all pieces in turn.

    visit: is shown each chunk and the state it began with, as distances from the start.
    """
    rule = plan.rule
    base = decay_base(start, rule)
    whole = rule.decay_towards == "zero"  # retention acts on whole weights, the state stays a distance from the start
    border, current, momentum = state
    traces = []
    for index, piece in enumerate(plan.pieces):
        if piece.aligned and plan.keep is not None:
            border = current = reset_rows(current, plan.keep[index])
            momentum = None if momentum is None else reset_rows(momentum, plan.keep[index])
        distance = add(start, current) if whole else current
        anchor = add(start, border)
        at_border = (anchor if whole else border) if any(rule.since_border) else None
        weights = ChunkWeights(anchor, base, distance, at_border, momentum)
        chunk = run_chunk(_slice(inputs, piece), weights, readout, rule, plan.operands)
        if visit is not None:
            visit(chunk, MemoryState(border, current, momentum))
        seen = distance
        if rule.read == "border":
            seen = anchor if whole else border
        traces.append(trace_chunk(chunk, seen, momentum, rule))
        current = subtract(chunk.after, start) if whole else chunk.after
        momentum = chunk.momentum
        border = move_border(border, current, **piece.after._asdict())
    return Trace.joined(traces), MemoryState(border, current, momentum)


class _WriteSequence(torch.autograd.Function):
    """All writes of a call. Backward goes through the pieces in reverse with hand-written gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs, start, readout, state = _unflatten(tensors)
        kept: list[MemoryState] = []
        chunks: list[Chunk | None] = []

        def visit(chunk: Chunk, before: MemoryState) -> None:
            kept.append(before)
            chunks.append(chunk if plan.keep_chunks else None)

        trace, after = run_pieces(plan, inputs, start, readout, state, forward_chunk, visit)
        # Saved as tensors, not as attributes, so that a checkpoint around this call can drop them and recompute.
        leaves, ctx.layout = tree_flatten((kept, chunks))
        ctx.plan, ctx.num_inputs = plan, len(tensors)
        ctx.plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*tensors, *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        # An output must not be an input, and the two states must not be one tensor.
        return (*trace.closed(), *(x.clone() for x in after.border), *(x.clone() for x in after.current))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors
        inputs, start, readout, _ = _unflatten(saved[: ctx.num_inputs])
        leaves = [b if a is None else a for a, b in zip(saved[ctx.num_inputs :], ctx.plain, strict=True)]
        states, chunks = tree_unflatten(leaves, ctx.layout)
        sent, (border, current, _) = _results(grads)
        # Gradients that wait for the border each piece was anchored at. `border` starts with what later calls sent.
        total_start = MemoryWeights(torch.zeros_like(border.inner), torch.zeros_like(border.outer))
        total_readout = [None if x is None else torch.zeros_like(x) for x in readout[:2]]
        pieces_of_inputs: list[tuple[Tensor, ...]] = []
        for index in reversed(range(len(plan.pieces))):
            piece, kept = plan.pieces[index], states[index]
            border, current = _move_border_backward(border, current, piece.after)
            at_border = kept.border if any(plan.rule.since_border) else None
            weights = ChunkWeights(add(start, kept.border), start, kept.current, at_border, None)
            part = _slice(inputs, piece)
            chunk = chunks[index] or forward_chunk(part, weights, readout, plan.rule, plan.operands)
            of_trace = TraceGradients(*(x[:, :, piece.begin : piece.end] for x in sent.closed()[:PER_TOKEN]))
            found = backward_chunk(current, of_trace, part, weights, readout, chunk, plan.rule, plan.operands)
            pieces_of_inputs.append(found.inputs)
            for total, of_readout in zip(total_readout, found.readout, strict=True):
                if total is not None and of_readout is not None:
                    total += of_readout
            for of_start, gradient in zip(total_start, found.anchor, strict=True):
                of_start += gradient
            current = found.distance
            current.inner[:, :, -1] += sent.inner[:, :, index]
            current.outer[:, :, -1] += sent.outer[:, :, index]
            border = add(border, found.anchor if found.border is None else add(found.anchor, found.border))
            if piece.aligned and plan.keep is not None:
                border, current = _move_border_backward(border, current, Borders(generators=True, memory=True))
                current = reset_rows(current, plan.keep[index])
        grad_inputs = [torch.cat(parts[::-1], dim=2) for parts in zip(*pieces_of_inputs, strict=True)]
        grad_start = [total.sum(0) for total in total_start]
        return (None, *grad_inputs, *grad_start, *total_readout, *border, *current)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _write_sequence(
    plan: Plan,
    inputs: ChunkInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    differentiable_twice: bool,
) -> tuple[Trace, MemoryState]:
    """Write with the hand-written backward where there is one and it serves, else with autograd's.

    Runs as it is under torch.compile, which cannot trace a backward of its own through the pieces.
    """
    if has_closed_backward(plan.rule) and not differentiable_twice:
        tensors = (*inputs[:5], *start, *readout[:2], *state.border, *state.current)
        return _results(_WriteSequence.apply(plan, *tensors))  # type: ignore[no-untyped-call]
    keep = plan.keep_chunks or not torch.is_grad_enabled()
    return run_pieces(plan, inputs, start, readout, state, forward_chunk if keep else _recomputed_chunk)


def _recomputed_chunk(*args: Any) -> Chunk:
    chunk: Chunk = checkpoint(forward_chunk, *args, use_reentrant=False, preserve_rng_state=False)
    return chunk


def _move_border_backward(
    border: MemoryWeights, current: MemoryWeights, moved: Borders
) -> tuple[MemoryWeights, MemoryWeights]:
    """Backward of `move_border`: what waited for a border that moved goes to the weights it moved to."""
    nothing = MemoryWeights(torch.zeros_like(border.inner), torch.zeros_like(border.outer))
    goes = move_border(nothing, border, **moved._asdict())
    return move_border(border, nothing, **moved._asdict()), add(current, goes)


def _results(tensors: tuple[Tensor, ...]) -> tuple[Trace, MemoryState]:
    """Results of `_WriteSequence`, or their gradients, by name."""
    inner_border, outer_border, inner, outer = tensors[CLOSED:]
    return Trace(*tensors[:CLOSED]), MemoryState(MemoryWeights(inner_border, outer_border), MemoryWeights(inner, outer))


def _unflatten(tensors: tuple[Any, ...]) -> tuple[ChunkInputs, MemoryWeights, GateReadout, MemoryState]:
    return (
        ChunkInputs(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], None),
        MemoryWeights(*tensors[5:7]),
        GateReadout(*tensors[7:9]),
        MemoryState(MemoryWeights(*tensors[9:11]), MemoryWeights(*tensors[11:13])),
    )


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
    differentiable_twice: bool = False,
) -> MemoryOutput:
    """Write every token and read; exactly what `memory_reference.self_modify` computes, chunk by chunk.

    Gradients reach every input, the start and the readout through all writes. See the reference for the arguments.

    resets: only those on a border count; the caller guarantees that there are no others.
    recompute: keep only the border states for backward and compute each chunk again.
    differentiable_twice: leave the whole backward to autograd, so that the gradients have gradients themselves. Slower:
        the backward that is written by hand has none.
    """
    check_momentum(rule, inputs, state)
    pieces = cut(inputs.key.shape[1], position, rule)
    operands = _operand_dtype(inputs.key)
    dtype = torch.promote_types(inputs.key.dtype, start.inner.dtype)
    given = ChunkInputs(*(None if x is None else x.to(dtype).transpose(1, 2) for x in inputs))  # type: ignore[arg-type]
    keep = None
    if resets is not None:
        keep = (~at_starts(resets, pieces)).T.to(dtype)
    plan = Plan(rule, pieces, keep, torch.is_grad_enabled() and not recompute, operands)
    with torch.autocast(given.key.device.type, enabled=False):
        trace, after = _write_sequence(plan, given, start, readout, state, differentiable_twice=differentiable_twice)
        spans = tuple((piece.begin, piece.end) for piece in pieces)
        reads = read_pieces(decay_base(start, rule), readout, trace, spans, rule)
    return MemoryOutput(
        reads.transpose(1, 2),
        after,
        trace.rate.transpose(1, 2),
        trace.decay.transpose(1, 2),
    )


READS_BRANCHES = False


def unsupported(rule: WriteRule, key: Tensor, start: MemoryWeights, call: MemoryCall) -> str | None:
    """Nothing: torch computes every rule on every device."""
    del rule, key, start, call
    return None


def run(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    call: MemoryCall,
) -> MemoryOutput:
    """`self_modify` as a `Backend`."""
    assert call.branches is None, "rows do not branch in torch"
    if call.rows is not None:
        state = tree_map_only(Tensor, partial(take_rows, rows=call.rows), state)
    return self_modify(
        inputs,
        start,
        readout,
        state,
        rule=rule,
        position=call.position,
        resets=call.resets,
        recompute=call.recompute,
        differentiable_twice=call.differentiable_twice,
    )

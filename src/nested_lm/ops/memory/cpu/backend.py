"""The self-modifying memories in C, for processors: the numbers of `memory_chunked`, several times as fast.

`cpu/memory.c` runs all pieces of one row and head in a go, so that the weights of its memories stay in the core's
cache; rows and heads are shared out over torch's number of threads. Backward computes every piece again from the
weights before it, which is all that is kept: 2 M K E numbers a row, head and chunk.

Shapes: B batch, T tokens, H heads, M memories that adapt, K head width, E hidden width of a memory.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from nested_lm.errors import ConfigError
from nested_lm.ops.memory.backward import has_closed_backward
from nested_lm.ops.memory.chunked import Piece, at_starts, cut
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    GRADIENT_FLOOR,
    NORM_FLOOR,
    ROOM_FLOOR,
    GateReadout,
    MemoryCall,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    check_branches,
    check_momentum,
    check_rows,
    shares_of_heads,
)

ABREAST = 32
"""Short branches of a row are read together, in pieces of up to so many tokens: a few at a time cost more a token."""

SHORT = 16
"""With pieces shorter than this many tokens, weights are kept for every so many tokens only."""

_COUNTS = ("B", "T", "H", "K", "E", "M", "pieces", "longest", "group", "stem_pieces", "branches", "abreast")
_SWITCHES = (
    *("k", "eta", "alpha", "v", "q", "erase_in", "erase_out", "erase_after_decay"),
    *("since_border", "since_border_generators", "generated", "generated_generators", "inclusive", "momentum", "mean"),
)
_CONSTANTS = ("stretch", "norm_floor", "room_floor", "gradient_floor")
_GIVEN = (
    "begin",
    "end",
    "flags",
    "limits",
    "reached",
    "key",
    "value",
    "query",
    "rate",
    "decay",
    "moment",
    "start_in",
    "start_out",
)
_OPTIONAL = ("readout_rate", "readout_decay")
_STATE = ("border_in", "border_out", "current_in", "current_out", "moving_in", "moving_out")
_FOUND = ("reads", "used_rate", "used_decay", *(f"{name}_after" for name in _STATE), "saved")
_SENT = ("g_reads", "g_used_rate", "g_used_decay", *(f"g_{name}" for name in _STATE))
_GRADIENTS = (
    *(
        f"g_{name}"
        for name in ("key", "value", "query", "rate", "decay", "moment", "start_in", "start_out", *_OPTIONAL)
    ),
    *(f"g_first_{name}" for name in _STATE),
)
_POINTERS = (*_GIVEN, *_OPTIONAL, *_STATE, "keep", "rows", "cuts", *_FOUND, *_SENT, *_GRADIENTS)


READS_BRANCHES = True

ANY_CALL = MemoryCall()


class _Call(ctypes.Structure):
    """`Call` of cpu/memory.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_COUNTS, *_SWITCHES)),
        *((name, ctypes.c_double) for name in _CONSTANTS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def missing(rule: WriteRule) -> str | None:
    """What of a rule the C library does not have; None when it has all."""
    if rule.momentum and (rule.erase != "none" or rule.read != "inclusive"):
        return "it has momentum with erase none and inclusive reads only, as in Titans"
    if not has_closed_backward(rule, momentum=True):
        return "it has the rules without the rarer options only (see has_closed_backward in ops/memory/backward.py)"
    return None


def unsupported(rule: WriteRule, key: Tensor, start: MemoryWeights, call: MemoryCall = ANY_CALL) -> str | None:
    """Why the C library cannot compute a call; None when it can. Compiles the library when that has not been done."""
    reason = missing(rule)
    if reason is not None:
        return reason
    if call.differentiable_twice:
        return "its gradients have no gradients, which second-order writes in context need"
    if key.device.type != "cpu":
        return f"the tensors are on `{key.device.type}`"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, and it computes in float32 and float64 only"
    if torch.promote_types(key.dtype, start.inner.dtype) not in cpu_library.C_TYPES:
        return f"it computes in float32 and float64 only, not in {key.dtype}"
    if isinstance(key, FakeTensor):
        return "the tensors have no values"
    missing_library: str | None = cpu_library.reason_missing_when_traced()
    return missing_library


def run(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    call: MemoryCall,
) -> MemoryOutput:
    """`self_modify`, or `finish` for a final call, as a `Backend`."""
    tensors = (inputs, start, readout, state)
    output: MemoryOutput
    if call.final:
        rows, branches = call.rows, call.branches
        output = finish(*tensors, rule=rule, position=call.position, resets=call.resets, rows=rows, branches=branches)
    else:
        assert call.rows is None, "rows of a state are taken in final calls only"
        output = self_modify(*tensors, rule=rule, position=call.position, resets=call.resets)
    return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    """Write every token and read; exactly what `memory_reference.self_modify` computes. See there for the arguments.

    Backward always computes pieces again; recompute is there for the sake of the other backends' callers.

    Raises:
        ConfigError: the C cannot compute the call, with the reason.
    """
    del recompute
    pieces, keep, tensors = _checked(inputs, start, readout, state, rule, position, resets)
    found = _SelfModify.apply(rule, pieces, torch.is_grad_enabled(), keep, *tensors)  # type: ignore[no-untyped-call]
    left = MemoryWeights(*found[7:9]) if rule.momentum else None
    after = MemoryState(MemoryWeights(*found[3:5]), MemoryWeights(*found[5:7]), left)
    return MemoryOutput(found[0], after, found[1], found[2])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def finish(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
    rows: Int[Tensor, " B"] | None,
    branches: Int[Tensor, "B N"] | None,
) -> MemoryOutput:
    """`self_modify` for streams that end here, without gradients. The state of the output is the one given.

    rows: the stream of the state that each row goes on from, which is read where it is; neighbouring rows of one stream
        read it once. None: its own.
    branches: where the branches of each row begin, and the last one ends (see `check_branches`). What the output has of
        tokens behind that is 0. None: rows do not branch.

    Raises:
        ConfigError: the C cannot compute the call, with the reason.
        IndexError: a row that is not there.
        ValueError: branches that are none.
    """
    pieces, keep, tensors = _checked(inputs, start, readout, state, rule, position, resets, rows)
    assert branches is None or resets is None, "no document starts in rows that branch"
    if rows is not None:
        rows = rows.to("cpu", torch.long).contiguous()
    stem = pieces
    if branches is not None:
        branches = check_branches(branches, *inputs.key.shape[:2])
        first, longest = int(branches[0, 0]), int(branches.diff().max())
        stem = cut(first, position, rule)
        pieces = (*stem, *cut(longest, position + first, rule))
    named = _named(tensors, keep)
    call, kept_alive = _call(rule, pieces, named)
    found = _room_for_reads(named)
    if branches is not None:
        call.stem_pieces, call.branches, call.abreast = len(stem), branches.shape[1] - 1, ABREAST
        call.longest = max(call.longest, ABREAST)
        for tensor in found.values():
            tensor.zero_()
    cpu_library.point(call, {**found, "rows": rows, "cuts": branches})
    cpu_library.run("forward", call, named["key"].dtype, call.B * call.H)
    del kept_alive
    return MemoryOutput(found["reads"], state, found["used_rate"], found["used_decay"])


def _checked(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
    rows: Int[Tensor, " B"] | None = None,
) -> tuple[tuple[Piece, ...], Tensor | None, tuple[Tensor | None, ...]]:
    """Pieces of a call, what each keeps of the rows before it, and the tensors as the library wants them."""
    reason = unsupported(rule, inputs.key, start)
    if reason is not None:
        raise ConfigError(f"the memories cannot be computed in C: {reason}")
    check_momentum(rule, inputs, state)
    batch = inputs.key.shape[0]
    streams = state.current.inner.shape[0]
    shapes = [part.shape for weights in state if weights is not None for part in weights]
    expected = [(streams, *part.shape) for part in start] * (len(shapes) // 2)
    assert shapes == expected, f"a state of shapes {shapes} for memories of shapes {expected}"
    assert batch == (streams if rows is None else len(rows)), "the library reads a stream for each row of tokens"
    if rows is not None:
        check_rows(rows, streams)
    dtype = torch.promote_types(inputs.key.dtype, start.inner.dtype)
    pieces = cut(inputs.key.shape[1], position, rule)
    keep = None
    if resets is not None:
        keep = (~at_starts(resets, pieces)).T.to(dtype).contiguous()
    moving = state.momentum or (None, None)
    given = (*inputs, *start, readout.rate, readout.decay, *state.border, *state.current, *moving)
    return pieces, keep, tuple(None if x is None else x.to(dtype).contiguous() for x in given)


class _SelfModify(torch.autograd.Function):
    """One call of the library."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: WriteRule,
        pieces: tuple[Piece, ...],
        with_backward: bool,
        keep: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.rule, ctx.pieces = rule, pieces
        named = _named(tensors, keep)
        call, kept_alive = _call(rule, pieces, named)
        found = _room_for_reads(named)
        found |= {f"{name}_after": torch.empty_like(named[name]) for name in _STATE if named[name] is not None}
        saved = None
        if with_backward and any(ctx.needs_input_grad):
            lanes = call.B * call.H
            library = cpu_library.load(named["key"].dtype)
            library.saved_numbers.restype = ctypes.c_int64
            saved = torch.empty(lanes * library.saved_numbers(ctypes.byref(call)), dtype=named["key"].dtype)
        cpu_library.point(call, {**found, "saved": saved})
        cpu_library.run("forward", call, named["key"].dtype, call.B * call.H)
        del kept_alive
        ctx.save_for_backward(keep, saved, *tensors)
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        keep, saved, *tensors = ctx.saved_tensors
        named = _named(tuple(tensors), keep)
        call, kept_alive = _call(ctx.rule, ctx.pieces, named)
        sent = dict(zip(_SENT, (grad.contiguous() for grad in grads), strict=False))  # fewer without momentum
        batch = call.B
        found: dict[str, Tensor | None] = {}
        for name in _GRADIENTS:
            of = named[name.removeprefix("g_").removeprefix("first_")]
            if of is None or name not in ("g_start_in", "g_start_out", *(f"g_{x}" for x in _OPTIONAL)):
                found[name] = None if of is None else torch.empty_like(of)
            else:  # a part for each row, so that rows need not wait for one another
                found[name] = torch.zeros(batch, *of.shape, dtype=of.dtype)
        cpu_library.point(call, {**sent, **found, "saved": saved})
        cpu_library.run("backward", call, named["key"].dtype, call.B * call.H)
        del kept_alive
        for name, grad in found.items():
            of = named[name.removeprefix("g_").removeprefix("first_")]
            if grad is not None and of is not None and grad.dim() > of.dim():
                found[name] = grad.sum(0)
        return (None, None, None, None, *found.values())


_TENSORS = ("key", "value", "query", "rate", "decay", "moment", "start_in", "start_out", *_OPTIONAL, *_STATE)


def _named(tensors: tuple[Tensor | None, ...], keep: Tensor | None) -> dict[str, Any]:
    return {**dict(zip(_TENSORS, tensors, strict=True)), "keep": keep}


def _room_for_reads(named: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors for what every call finds, whether another follows or not."""
    return {
        "reads": torch.empty_like(named["key"]),
        "used_rate": torch.empty_like(named["rate"]),
        "used_decay": torch.empty_like(named["rate"]),
    }


def _call(rule: WriteRule, pieces: tuple[Piece, ...], named: dict[str, Any]) -> tuple[_Call, list[Tensor]]:
    """Describe a call for the library; the tensors must outlive it."""
    key = named["key"]
    batch, tokens, heads, width = key.shape
    resets = named["keep"] is not None
    moved = [sum(bit for bit, moves in zip((1, 2), piece.after, strict=True) if moves) for piece in pieces]
    fresh = [(index > 0 and moved[index - 1] == 3) or (piece.aligned and resets) for index, piece in enumerate(pieces)]
    flags = [m + 4 * p.aligned + 8 * f for m, p, f in zip(moved, pieces, fresh, strict=True)]
    longest = max(piece.end - piece.begin for piece in pieces)
    lists = {
        "begin": torch.tensor([piece.begin for piece in pieces]),
        "end": torch.tensor([piece.end for piece in pieces]),
        "flags": torch.tensor(flags),
        "limits": torch.tensor(rule.limits, dtype=key.dtype),
        "reached": shares_of_heads(rule, key[:, 0, :, 0]).contiguous(),
    }
    call = _Call(
        B=batch, T=tokens, H=heads, K=width, E=named["start_in"].shape[-2], M=len(rule.adapt), pieces=len(pieces),
        stem_pieces=len(pieces), longest=longest, group=max(1, SHORT // longest) if longest < SHORT // 2 else 1,
        **_switches(rule),
        stretch=rule.rate_stretch, norm_floor=NORM_FLOOR, room_floor=ROOM_FLOOR, gradient_floor=GRADIENT_FLOOR,
    )  # fmt: skip
    cpu_library.point(call, {**lists, **named})
    return call, list(lists.values())


def _switches(rule: WriteRule) -> dict[str, int]:
    """The rule as the library wants it: the place of each generator, -1 without it, and what is on."""
    places = {name: rule.adapt.index(name) if name in rule.adapt else -1 for name in ("k", "eta", "alpha", "v", "q")}
    erase_in, erase_out = rule.erased_layers
    return {
        **places,
        "erase_in": erase_in,
        "erase_out": erase_out,
        "erase_after_decay": rule.erase_after_decay,
        "since_border": rule.erase_since == "border",
        "since_border_generators": rule.erase_since_generators == "border",
        "generated": rule.targets == "generated",
        "generated_generators": rule.targets_generators == "generated",
        "inclusive": rule.read == "inclusive",
        "momentum": bool(rule.momentum),
        "mean": rule.momentum == "mean",
    }

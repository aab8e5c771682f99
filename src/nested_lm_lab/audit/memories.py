"""The memories themselves: fast form against reference, ranges, padding, life after 8k tokens.

What the operations are given comes from the audited model's own layers. Shapes: B batch, T tokens, H heads, M memories.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nested_lm.nn.mixers.attention_cache import AttentionState
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import map_tensors
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.state import MemoryState, add, unit
from nested_lm_lab.audit.finding import Finding, at_least, at_most, between, broken, does_not_apply
from nested_lm_lab.audit.probe import (
    Call,
    gradients_of,
    leaves,
    output_tensors,
    recorded,
    run_operation,
    worst_difference,
)
from nested_lm_lab.audit.subject import TOKEN_SEED, Subject

VALUES = 1e-11
"""Of outputs and states, relative, float64: the same sums in another order."""

GRADIENTS = 1e-10
"""Of outer gradients: as VALUES, over a chain about three times as long."""

UNIT = 1e-6
"""Of the length of a unit vector: vectors shorter than 1e-6 before scaling are not stretched further."""

LONG_STREAM = 8192
"""Tokens after which a memory must be alive and bounded."""

ALIVE, BOUNDED = 1e-4, 100.0
CLOSED = 0.5
"""Norm of a memory's distance from its start, relative to the norm of the start."""

SEGMENT = 1024
"""Tokens of a long stream read in one call."""

AROUND_BORDER = 6
"""Tokens of a short comparison, half of them before a border."""

NO_MEMORY = "no mixer of this model writes a memory"


def reference(subject: Subject) -> list[Finding]:
    """Fast form against the token-by-token reference: outputs, states, outer gradients.

    The inputs are what each layer hands over in the middle of a chunk, with memories that have been written. Once with
    the model's own chunk sizes and once, for self-modifying memories, with chunks of one token: eq. 88 as it is
    printed. Each figure says which fast form was compared.
    """
    calls = _calls(subject, subject.build())
    if not calls:
        return [_without_calls(subject, "fast form against reference")]
    # The first call holds a whole chunk; of the others, a border with a few tokens around it.
    own = [
        _compare(call, call.arguments if index == 0 else _first_tokens(call, AROUND_BORDER))
        for index, call in enumerate(calls)
    ]
    findings = _worst(own, "own chunk size", calls)
    memory = next((call for call in calls if call.is_memory), None)
    if memory is None:
        reason = "this operation has no chunk in its definition: any cut gives the same numbers"
        return [*findings, does_not_apply("chunks of one token", reason)]
    try:
        rule = memory.arguments["rule"]
        rule = type(rule).model_validate(rule.model_dump() | {"chunk": 1, "chunk_generators": 1})
    except ValueError as error:
        return [*findings, does_not_apply("chunks of one token", f"the rule is refused at chunk 1: {error}")]
    single = _compare(memory, _first_tokens(memory, 3 * AROUND_BORDER) | {"rule": rule})
    return [*findings, *_worst([single], "chunks of one token", [memory])]


def ranges(subject: Subject) -> list[Finding]:
    """Keys and queries of unit length, gates in range, and padding (rate 0, nothing forgotten) that changes nothing."""
    with torch.no_grad():
        calls = _calls(subject, subject.build())
        if not calls:
            return [_without_calls(subject, "unit keys, gates in range, padding")]
        findings: list[Finding] = []
        memories = [call for call in calls if call.is_memory]
        if memories:
            findings += _memory_ranges(memories)
        deltas = [call for call in calls if call.operation.name == "gated_delta_rule"]
        if deltas:
            findings += _delta_ranges(deltas)
        if any(call.operation.name == "linear_attention" for call in calls):
            reason = "linear attention neither scales its keys nor has gates"
            findings.append(does_not_apply("unit keys, gates in range", reason))
        idle = max(_idle_change(call) for call in calls)
        return [*findings, at_most("change of the state by padding", idle, 1e-14)]


@torch.no_grad()
def long_stream(subject: Subject) -> list[Finding]:
    """Memories after 8192 tokens, independent ones and one token repeated: written, not exploded, logits finite.

    After the repeated token come others: memories that it left at their start must move.
    """
    model = subject.build(dtype=torch.float32)
    if not _calls(subject, subject.build()):
        return [_without_calls(subject, "memory after 8192 tokens")]
    findings = []
    for name in ("independent", "repeated"):
        tokens = subject.random_tokens(1, LONG_STREAM)
        if name == "repeated":
            tokens = tokens[:, :1].expand(-1, LONG_STREAM)
        state, logits_peak = None, 0.0
        for begin in range(0, LONG_STREAM, SEGMENT):
            with recorded() as calls:
                output = model(tokens[:, begin : begin + SEGMENT], state=state)
            state = output.state
            peak = output.logits.abs().max().item()
            logits_peak = peak if peak != peak else max(logits_peak, peak)
        sizes = [size for call in calls for size in _sizes(call)]
        closed = [head for call in calls if call.is_memory for head in _is_closed(call).flatten().tolist()]
        if closed:
            findings.append(at_most(f"share of heads closed to {name} tokens", sum(closed) / len(closed), CLOSED))
            turning = [head for call in calls if call.is_memory for head in _only_turns_over(call).flatten().tolist()]
            figure = f"share of heads that only turn {name} tokens over"
            findings.append(at_most(figure, sum(turning) / len(turning), CLOSED))
        findings += [
            at_least(f"smallest memory after {name} tokens", _extreme(min, sizes), ALIVE),
            _bounded(f"largest memory after {name} tokens", calls, _extreme(max, sizes)),
            at_most(f"largest logit over {name} tokens", logits_peak, 1e4),
        ]
    with recorded() as calls:  # what a repeated token held down must come back
        model(subject.random_tokens(1, SEGMENT, seed=TOKEN_SEED + 1), state=state)
    sizes = [size for call in calls for size in _sizes(call)]
    return [*findings, at_least("smallest memory after repeated tokens and then others", _extreme(min, sizes), ALIVE)]


def _extreme(choose: Callable[[list[float]], float], sizes: list[float]) -> float:
    """Smallest or largest; NaN where one is NaN, 0 where there is none: nothing was written."""
    return next((size for size in sizes if math.isnan(size)), choose(sizes) if sizes else 0.0)


def _is_closed(call: Call) -> Tensor:
    """Which heads wrote nothing, because their learning rate was cut off at 0 for every token. (B, H)."""
    return call.output.rate.amax(1) == 0


def _only_turns_over(call: Call) -> Tensor:
    """Which heads of `memory` store next to nothing, because their rate was cut off at 2 for every token. (B, H).

    Erasing alone then reflects what is held, and damping leaves the gradient step a room of ROOM_FLOOR
    (`room_beside_erase`): `memory` settles that far from its start, whatever its tokens.
    """
    rule = call.arguments["rule"]
    return (call.output.rate.amin(1) >= 2.0) & any(rule.erased_layers)


def _bounded(figure: str, calls: list[Call], largest: float) -> Finding:
    if all(call.operation.name == "linear_attention" for call in calls):
        return does_not_apply(
            figure, f"linear attention sums without forgetting, by definition; it is at {largest:.3g}"
        )
    return at_most(figure, largest, BOUNDED)


def _calls(subject: Subject, model: LanguageModel) -> list[Call]:
    """What every layer hands to its memory in a call that begins inside a chunk, after some have been written.

    The call brings the last tokens of one chunk, a whole one, and the first tokens of the next.
    """
    alignment = subject.config.alignment
    before = min(AROUND_BORDER // 2, alignment)
    begin = 2 * alignment - before
    tokens = subject.random_tokens(1, begin + before + alignment + 2)
    with torch.no_grad():
        state = model(tokens[:, :begin]).state
        with recorded() as calls:
            model(tokens[:, begin:], state=state)
    return calls


def _without_calls(subject: Subject, figure: str) -> Finding:
    """Say why no call was seen. A mixer that carries more than an attention cache was not checked at all: a miss."""
    mixer = subject.config.mixer.kind
    layers = subject.build(dtype=torch.float32).initial_state(1).layers
    if all(isinstance(layer, AttentionState) for layer in layers):
        return does_not_apply(figure, f"{NO_MEMORY}: {mixer}")
    return broken(figure, f"mixer {mixer} carries a state but calls no operation that has a reference")


def _first_tokens(call: Call, count: int) -> dict[str, Any]:
    """The same arguments, cut off after some tokens."""
    own = [name for name in call.arguments if name not in ("start", "readout", "state")]
    return call.arguments | {name: map_tensors(call.arguments[name], lambda tensor: tensor[:, :count]) for name in own}


def _compare(call: Call, arguments: Mapping[str, Any]) -> tuple[float, float]:
    """Worst difference of outputs and states, and of outer gradients, between both forms."""
    found = []
    for function in (call.operation.fast, call.operation.reference):
        given, inputs = leaves(arguments)
        output = run_operation(function, _with_unit_vectors(given) if call.is_memory else given)
        found.append((output_tensors(output), gradients_of(output, inputs)))
    (fast, fast_gradients), (slow, slow_gradients) = found
    return worst_difference(fast, slow), worst_difference(fast_gradients, slow_gradients)


def _with_unit_vectors(arguments: dict[str, Any]) -> dict[str, Any]:
    """Scale keys and queries (and values where the rule does) once more, as the layer did.

    Both forms are defined for unit vectors; derivatives along their length are not, and differ.
    """
    inputs, rule = arguments["inputs"], arguments["rule"]
    value = unit(inputs.value) if rule.unit_values else inputs.value
    return arguments | {"inputs": inputs._replace(key=unit(inputs.key), query=unit(inputs.query), value=value)}


def _worst(compared: list[tuple[float, float]], label: str, calls: list[Call]) -> list[Finding]:
    form = "of " + ", ".join(sorted({call.operation.source for call in calls}))
    return [
        at_most(f"outputs and states, {label}", max(values for values, _ in compared), VALUES, form),
        at_most(f"outer gradients, {label}", max(gradients for _, gradients in compared), GRADIENTS, form),
    ]


def _memory_ranges(calls: list[Call]) -> Iterator[Finding]:
    lengths, rates, decays = [], [], []
    for call in calls:
        inputs, rule = call.arguments["inputs"], call.arguments["rule"]
        anchor = add(call.arguments["start"], call.arguments["state"].border)
        vectors = [inputs.key, inputs.query, *([inputs.value] if rule.unit_values else [])]
        token, query = memory_reference.generate(inputs, 0, anchor, call.arguments["readout"], rule)
        vectors += [token.key, query, *([token.value] if rule.unit_values else [])]
        lengths += [(vector.norm(dim=-1) - 1).abs().max() for vector in vectors]
        for shift in (-50.0, 0.0, 50.0):  # gates driven to both ends as well
            driven = inputs._replace(rate=inputs.rate + shift, decay=inputs.decay + shift)
            output = run_operation(call.operation.fast, call.arguments | {"inputs": driven})
            rates.append(output.rate / rule.rate_memory)
            decays.append(output.decay)
    yield at_most("length of keys, queries and unit values, distance from 1", max(lengths), UNIT)
    yield from _gates(rates, "learning rate, share of its largest", 1.0)
    yield from _gates(decays, "retention", 1.0)


def _delta_ranges(calls: list[Call]) -> Iterator[Finding]:
    lengths = [(call.arguments[name].norm(dim=-1) - 1).abs().max() for call in calls for name in ("key",)]
    decays = [call.arguments["log_decay"] for call in calls if call.arguments["log_decay"] is not None]
    yield at_most("length of keys, distance from 1", max(lengths), UNIT)
    yield from _gates([call.arguments["rate"] for call in calls], "rate of the delta rule", 2.0)
    yield from _gates([decay.exp() for decay in decays], "retention", 1.0)


def _gates(values: list[Tensor], name: str, high: float) -> Iterator[Finding]:
    if values:
        yield between(f"{name}, smallest", min(value.min().item() for value in values), 0.0, high)
        yield between(f"{name}, largest", max(value.max().item() for value in values), 0.0, high)


def _idle_change(call: Call) -> float:
    """Change of the state by tokens that are to change nothing, relative to its size."""
    arguments = dict(call.arguments)
    if call.is_memory:
        inputs = arguments["inputs"]
        still = {"rate": -1e4, "decay": 1e4} | ({} if inputs.momentum is None else {"momentum": -1e4})
        gates = {name: torch.full_like(inputs.rate, logit) for name, logit in still.items()}
        arguments["inputs"] = inputs._replace(**gates)
        output = run_operation(call.operation.fast, arguments)
        return worst_difference(list(output.state.current), list(arguments["state"].current))
    if "rate" in arguments:
        arguments["rate"] = torch.zeros_like(arguments["rate"])
        if arguments["log_decay"] is not None:
            arguments["log_decay"] = torch.zeros_like(arguments["log_decay"])
    else:
        arguments["key"] = torch.zeros_like(arguments["key"])
    output = run_operation(call.operation.fast, arguments)
    return worst_difference([output.state], [arguments["state"]])


def _sizes(call: Call) -> Iterator[float]:
    """Size of each memory that is written, head by head, relative to its start.

    Of the distance from the start, which is what writes make; of each layer's whole weights where retention shrinks
    those, because a memory that fades to nothing is then far from its start, and dead. Left out where retention leads
    back to the start: closed heads, and `memory` of heads that only turn it over. They rest there, and live.
    """
    if not call.is_memory:
        yield from call.output.state.flatten(2).norm(dim=-1).flatten().tolist()
        return
    rule, start, state = call.arguments["rule"], call.arguments["start"], call.output.state
    assert isinstance(state, MemoryState)
    written = [index for index, rate in enumerate(rule.limits) if rate > 0]
    whole = rule.decay_towards == "zero"
    heads = (_is_closed(call).logical_not() | whole)[..., None].expand(-1, -1, len(rule.adapt)).clone()
    if not whole:
        heads[..., -1] &= _only_turns_over(call).logical_not()
    layers = [
        (tensor + origin if whole else tensor, origin)
        for tensor, origin in zip(state.current, start, strict=True)
        if tensor.numel()
    ]
    moved = [found.square().sum((-2, -1)) for found, _ in layers]  # (B, H, M) each
    origins = [origin.square().sum((-2, -1)) for _, origin in layers]  # (H, M) each
    if not whole:
        moved, origins = [torch.stack(moved).sum(0)], [torch.stack(origins).sum(0)]
    for squared, at_start in zip(moved, origins, strict=True):
        yield from (squared / at_start).sqrt()[..., written][heads[..., written]].tolist()

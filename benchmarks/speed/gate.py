"""Nothing is timed unless the chunk form of the memories gives what the token-by-token reference gives."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from nested_lm.ops import memory_chunked, memory_reference
from nested_lm.ops.memory import GateReadout, MemoryInputs, MemoryState, MemoryWeights, unit, zero_state
from nested_lm.write_rule import WriteRule

AGREEMENT = 1e-10
"""Relative error in float64 below which two forms count as the same: rounding gives 1e-15, a wrong term far more."""

TOKENS, LONGEST_CHUNK = 19, 8
"""Few tokens, and chunks cut down so that they still cross borders: the loop is slow."""

Problem = tuple[MemoryInputs, MemoryWeights, GateReadout, MemoryState]


def memory_problem(
    rule: WriteRule, batch: int, tokens: int, heads: int, head_width: int, dtype: torch.dtype
) -> Problem:
    """Random inputs of the size a model gives its memories; key, value, query and starts take gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    shape, scale = (batch, tokens, heads, head_width), head_width**-0.5
    inputs = MemoryInputs(
        *(unit(normal(*shape)).requires_grad_() for _ in range(3)),
        normal(*shape[:3]),
        normal(*shape[:3]) + 5,
        normal(*shape[:3]) if rule.momentum else None,
    )
    start = MemoryWeights(
        (normal(heads, len(rule.adapt), head_width, head_width) * scale).requires_grad_(),
        (normal(heads, len(rule.adapt), head_width, head_width) * 0.1 * scale).requires_grad_(),
    )
    readout = GateReadout(
        normal(heads, head_width) if "eta" in rule.adapt else None,
        normal(heads, head_width) if "alpha" in rule.adapt else None,
    )
    return inputs, start, readout, zero_state(start, batch, momentum=rule.momentum)


def worst_error(rules: Iterable[WriteRule]) -> float:
    """Worst relative difference between the two forms over the rules: outputs, states and gradients, in float64."""
    short = (
        replace(rule, chunk=min(rule.chunk, LONGEST_CHUNK), chunk_generators=min(rule.chunk_generators, LONGEST_CHUNK))
        for rule in rules
    )
    return max(_error(rule) for rule in dict.fromkeys(short))


def _error(rule: WriteRule) -> float:
    problem = memory_problem(rule, 2, TOKENS, 2, 16, torch.float64)
    leaves = [*problem[0][:3], *problem[1]]
    found = []
    for backend in (memory_reference, memory_chunked):
        output = backend.self_modify(*problem, rule=rule, position=0, resets=None)
        reads, state = output.reads, [*output.state.current]
        weights = (torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part) for part in (reads, *state))
        total = sum((part * weight).sum() for part, weight in zip((reads, *state), weights, strict=True))
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
        found.append([reads, *state, *gradients])
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a.any() or b.any()]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def check(rules: Iterable[WriteRule]) -> float:
    """Return the error.

    Raises:
        SystemExit: the forms differ.
    """
    error = worst_error(rules)
    if not error <= AGREEMENT:
        raise SystemExit(f"not timed: the chunk form differs from the reference by {error:.1e} (limit {AGREEMENT})")
    return error

"""Nothing is timed unless both fast forms of the memories give what the token-by-token reference gives."""

from collections.abc import Iterable
from types import ModuleType

import torch

from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import GateReadout, MemoryInputs, MemoryState, MemoryWeights, unit, zero_state

AGREEMENT = 1e-10
"""Relative error in float64 below which two forms count as the same: rounding gives 1e-15, a wrong term far more."""

FORMS = {"the chunk form": memory_chunked, "the C": memory_cpu}

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


def worst_errors(rules: Iterable[WriteRule]) -> dict[str, float]:
    """Worst relative difference of each form from the reference: outputs, states and gradients, in float64.

    Over the rules that it has; without the C where it cannot be compiled.
    """
    short = (
        rule.changed(chunk=min(rule.chunk, LONGEST_CHUNK), chunk_generators=min(rule.generator_chunk, LONGEST_CHUNK))
        for rule in rules
    )
    found: dict[str, list[float]] = {}
    for rule in dict.fromkeys(short):
        for name, error in _errors(rule).items():
            found.setdefault(name, []).append(error)
    return {name: _largest(errors) for name, errors in found.items()}


def _largest(values: list[float]) -> float:
    """NaN where one is NaN."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _errors(rule: WriteRule) -> dict[str, float]:
    problem = memory_problem(rule, 2, TOKENS, 2, 16, torch.float64)
    expected = _results(memory_reference, rule, problem)
    found = {}
    for name, form in FORMS.items():
        if form is memory_cpu and memory_cpu.unsupported(rule, problem[0].key, problem[1]) is not None:
            continue
        pairs = [(a, b) for a, b in zip(expected, _results(form, rule, problem), strict=True) if a.any() or b.any()]
        found[name] = _largest([((a - b).abs().max() / a.abs().max()).item() for a, b in pairs])
    return found


def _results(form: ModuleType, rule: WriteRule, problem: Problem) -> list[torch.Tensor]:
    output = form.self_modify(*problem, rule=rule, position=0, resets=None)
    parts = [output.reads, *output.state.current]
    weights = (torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part) for part in parts)
    total = sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))
    leaves = [*problem[0][:3], *problem[1]]
    return [*parts, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def check(rules: Iterable[WriteRule]) -> dict[str, float]:
    """Return the error of each form.

    Raises:
        SystemExit: a form differs.
    """
    errors = worst_errors(rules)
    for name, error in errors.items():
        if not error <= AGREEMENT:
            raise SystemExit(f"not timed: {name} differs from the reference by {error:.1e} (limit {AGREEMENT})")
    return errors

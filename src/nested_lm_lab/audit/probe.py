"""Tools of the checks: comparing, recording what a model hands to its operations, and taking gradients apart."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.state import StreamState, iterate_tensors, map_tensors
from nested_lm.ops.delta_rule import chunked as delta_rule
from nested_lm.ops.delta_rule import reference as delta_rule_reference
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu

TINY = 1e-300
"""Added to denominators that may be zero."""


@dataclass(frozen=True)
class Operation:
    """An operation that writes a memory: the fast form that models call, and the one it must equal."""

    module: ModuleType
    name: str
    reference: Callable[..., Any]

    @property
    def fast(self) -> Callable[..., Any]:
        """The fast form."""
        found: Callable[..., Any] = getattr(self.module, self.name)
        return found

    @property
    def source(self) -> str:
        """File of the fast form: which of several was taken."""
        return self.module.__name__.removeprefix("nested_lm.").replace(".", "/") + ".py"


OPERATIONS = (
    Operation(memory_chunked, "self_modify", memory_reference.self_modify),
    Operation(memory_cpu, "self_modify", memory_reference.self_modify),
    Operation(delta_rule, "gated_delta_rule", delta_rule_reference.gated_delta_rule),
    Operation(delta_rule, "linear_attention", delta_rule_reference.linear_attention),
)
"""A new operation joins by adding a line."""


@dataclass(frozen=True)
class Call:
    """One call of an operation: `arguments` by name."""

    operation: Operation
    arguments: dict[str, Any]
    output: Any

    @property
    def is_memory(self) -> bool:
        """Whether it wrote the self-modifying memories."""
        return self.operation.name == "self_modify"


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected element."""
    if not found.numel():
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(TINY)).item()


def worst_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest `difference` of any pair; infinite where shapes or numbers of tensors differ, or values are NaN."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.numel()]
    values = [difference(a, b) for a, b in pairs if b.any() or a.any()]
    return max((float("inf") if value != value else value for value in values), default=0.0)


def state_tensors(state: StreamState) -> list[Tensor]:
    """Every tensor of a stream's state."""
    return iterate_tensors((state.layers, state.in_context))


@contextmanager
def replaced(function: Callable[..., Any], by: Callable[..., Any]) -> Iterator[None]:
    """Let every module of the package call something else, wherever the function is known under a name."""
    places = [
        (module, name)
        for key, module in list(sys.modules.items())
        if key.startswith("nested_lm.") and not key.startswith("nested_lm_lab.audit")
        for name, value in list(vars(module).items())
        if value is function
    ]
    for module, name in places:
        setattr(module, name, by)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, function)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record what models hand to their operations, in the order of the calls."""
    calls: list[Call] = []

    def recorder(operation: Operation, fast: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(fast)

        def call(*args: Any, **kwargs: Any) -> Any:
            output = fast(*args, **kwargs)
            calls.append(Call(operation, dict(signature.bind(*args, **kwargs).arguments), output))
            return output

        return call

    with ExitStack() as stack:
        for operation in OPERATIONS:
            stack.enter_context(replaced(operation.fast, recorder(operation, operation.fast)))
        yield calls


def run_operation(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call an operation with those of the arguments that it takes."""
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in taken})


def output_tensors(output: Any) -> list[Tensor]:
    """Tensors of an operation's result that are not empty."""
    return [tensor for tensor in iterate_tensors(output) if tensor.numel()]


def leaves(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Copy arguments so that gradients can be taken of their floating-point tensors; return those as well."""
    found: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        if copy.is_floating_point() and copy.numel():
            found.append(copy.requires_grad_())
        return copy

    return {name: map_tensors(value, leaf) for name, value in arguments.items()}, found


def gradients_of(output: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random sum over all results, so that no error can cancel another."""
    generator = torch.Generator().manual_seed(1)
    total: Tensor | float = 0.0
    for tensor in output_tensors(output):
        if tensor.requires_grad:
            weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            total = total + (tensor * weight).sum()
    assert isinstance(total, Tensor), "no result of the operation depends on its arguments"
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def next_token_loss(model: LanguageModel, tokens: Tensor, state: StreamState | None = None) -> Tensor:
    """Mean loss of predicting each token from the ones before it."""
    return token_losses(model(tokens[:, :-1], state=state).logits, tokens[:, 1:]).mean()

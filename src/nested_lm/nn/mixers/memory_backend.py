"""What computes the self-modifying memories: matrix products of torch, or this project's C for processors."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from nested_lm.config.mixers import MemoryBackend
from nested_lm.errors import ConfigError
from nested_lm.nn.layers import CausalConv, StepContext, once_only, tokens_since_reset
from nested_lm.nn.state import map_tensors, take_rows
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import front as front_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import GateReadout, MemoryInputs, MemoryOutput, MemoryState, MemoryWeights, unit


def run_memories(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    context: StepContext,
    *,
    rule: WriteRule,
    recompute: bool,
    backend: MemoryBackend,
) -> MemoryOutput:
    """Write every token and read. See `memory_reference.self_modify` for the arguments.

    Gradients that will be differentiated again `auto` leaves to the autograd of torch. After a final call the
    state of the output is not to be used.

    Raises:
        ConfigError: backend `cpu` where the library cannot run or serve, with the reason and the repair.
    """
    twice = context.differentiable_twice
    if twice and backend == "cpu":
        raise once_only(backend)
    run: partial[MemoryOutput] = partial(memory_cpu.self_modify, recompute=recompute)
    if twice or not uses_library(backend, rule, inputs.key, start):
        run = partial(memory_chunked.self_modify, recompute=recompute, differentiable_twice=twice)
        if context.rows is not None:
            state = map_tensors(state, partial(take_rows, rows=context.rows))
    elif context.final:
        run = partial(memory_cpu.finish, rows=context.rows, branches=context.branches)
    in_c = context.final and run.func is memory_cpu.finish
    assert context.branches is None or in_c, "rows branch in final calls in C only"
    return run(inputs, start, readout, state, rule=rule, position=context.position, resets=context.resets)


def uses_library(backend: MemoryBackend, rule: WriteRule, key: Tensor, start: MemoryWeights) -> bool:
    """Whether the C library is asked for; with `auto`, whether it can run. key: a tensor as keys are.

    Raises:
        ConfigError: asked for where it cannot run.
    """
    if backend == "torch" or isinstance(key, FakeTensor):  # who counts operations computes nothing
        return False
    reason = memory_cpu.unsupported(rule, key, start)
    if backend == "auto":
        return reason is None and _is_library_there()
    if reason is not None:
        raise ConfigError(f"model.mixer.backend is `cpu`, but {reason}; set model.mixer.backend=auto, or torch")
    return True


def branches_in_c(backend: MemoryBackend, rule: WriteRule, projection: Tensor, start: MemoryWeights) -> bool:
    """Whether rows of tokens may branch: with convolution and memories in C. projection: weight of what makes keys."""
    computes = backend != "torch" and projection.dtype in cpu_library.C_TYPES
    return computes and uses_library("auto", rule, projection, start)


def convolved_units(
    conv: CausalConv,
    x: Float[Tensor, "B T 3HK"],
    tail: Float[Tensor, "B W 3HK"],
    resets: Bool[Tensor, "B T"] | None,
    *,
    num_heads: int,
    unit_values: bool,
    backend: MemoryBackend,
    branches: Int[Tensor, "B N"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value of every head, unit(silu(conv(x))), and the tail of the next call.

    branches: see `StepContext`; in C only.
    """
    computes = x.device.type == "cpu" and x.dtype in cpu_library.C_TYPES and not isinstance(x, FakeTensor)
    if backend != "torch" and computes and _is_library_there():
        age = None if resets is None else tokens_since_reset(resets)
        options = {"num_heads": num_heads, "unit_values": unit_values}
        units = front_cpu.convolved_units(x, conv.weight, tail, age, **options, branches=branches)
        return *units, conv.next_tail(x, tail, age)
    assert branches is None, "rows branch in C only"
    mixed, tail = conv(x, tail, resets)
    query, key, value = functional.silu(mixed).unflatten(-1, (3, num_heads, -1)).unbind(dim=2)
    return unit(query), unit(key), unit(value) if unit_values else value, tail


@torch.compiler.assume_constant_result
def _is_library_there() -> bool:
    return cpu_library.reason_missing() is None

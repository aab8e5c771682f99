"""The self-modifying memories as Triton kernels: when they can run, and one call.

`run` has the launches. This module imports without Triton, which is not there on every machine.

Shapes: B batch, T tokens, H heads, M memories that adapt, K head width, E hidden width of a memory.
"""

import os
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    GateReadout,
    MemoryCall,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
    check_momentum,
    take_rows,
)
from nested_lm.ops.memory.triton.launch import counting

OLDEST = (3, 6)
"""Oldest version of Triton the kernels were run with."""

OLDEST_GPU = (8, 0)
"""Oldest compute capability that multiplies bfloat16 and TF32."""

NUMBERS = (torch.float32, torch.float64)
"""Number types of sums and states; float64 in the interpreter only."""

READS_BRANCHES = False

WIDTHS = (16, 32, 64, 128)
"""Head widths and hidden widths that tiles have."""

LONGEST = 64
"""Tokens of a piece at most: its triangular system is solved in registers."""

SECTION = 64
"""Pieces of a call without gradients that are run before they are read: their weights are kept until then."""


def missing(rule: WriteRule) -> str | None:
    """What of a rule no kernel has; None when they have all."""
    if rule.gradient != "border":
        return f"no kernel has gradient `{rule.gradient}`, only that at the last border"
    if rule.normalise:
        return "no kernel has layer normalisation inside a memory"
    if rule.decay_towards != "start":
        return "no kernel has retention towards zero, only towards the start"
    if rule.momentum and (rule.erase != "none" or rule.read != "inclusive"):
        return "kernels have momentum with erase none and inclusive reads only, as in Titans"
    if min(rule.chunk, rule.generator_chunk) > LONGEST:
        shorter = min(rule.chunk, rule.generator_chunk)
        return f"the shorter of its two chunks has {shorter} tokens, and kernels have tiles of up to {LONGEST}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a processor."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why Triton cannot serve; None when it can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed (pip install 'nested-lm[gpu]')"
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < OLDEST:
        return f"Triton is {found}, and the kernels need {'.'.join(map(str, OLDEST))} or later"
    return None


def unsupported(rule: WriteRule, key: Tensor, start: MemoryWeights, call: MemoryCall) -> str | None:
    """Why the kernels cannot compute a call; None when they can."""
    reason = missing(rule) or triton_missing()
    width, hidden = start.inner.shape[-1], start.inner.shape[-2]
    if reason is None and call.differentiable_twice:
        reason = "gradients of kernels have no gradients, which second-order writes in context need"
    if reason is None and call.branches is not None:
        reason = "no kernel reads branches"
    if reason is None and not {width, hidden} <= set(WIDTHS):
        reason = f"no kernel has head width {width} with hidden width {hidden}; both must be among {WIDTHS}"
    if reason is None and torch.promote_types(key.dtype, start.inner.dtype) not in NUMBERS:
        reason = f"states are float32, and the learned start is {start.inner.dtype}"
    return reason or device_lacks(key, start.inner.dtype)


def device_lacks(key: Tensor, dtype: torch.dtype) -> str | None:
    """What the tensors' device lacks."""
    if isinstance(key, FakeTensor):
        return None if counting() else "the tensors have no values"
    if interpreted():
        return None
    if key.device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on `{key.device.type}`, and kernels run on NVIDIA GPUs"
    if torch.promote_types(key.dtype, dtype) == torch.float64:
        return "kernels compute in float32 and bfloat16, and the tensors are float64"
    major, minor = torch.cuda.get_device_capability(key.device)
    if (major, minor) < OLDEST_GPU:
        return f"the GPU is sm_{major}{minor}, and kernels need sm_80 (A100) or later"
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
    if call.rows is not None:
        state = tree_map_only(Tensor, partial(take_rows, rows=call.rows), state)
    tensors = (inputs, start, readout, state)
    output: MemoryOutput = self_modify(*tensors, rule=rule, position=call.position, resets=call.resets)
    return output


@torch.compiler.disable
def self_modify(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
) -> MemoryOutput:
    """Write every token and read; exactly what `memory_reference.self_modify` computes. See there for the arguments.

    Under autocast products round their operands to bfloat16; sums, solves and states stay float32. Backward always
    computes pieces again.
    """
    check_momentum(rule, inputs, state)
    step = min(rule.chunk, rule.generator_chunk)
    tokens = inputs.key.shape[1]
    section = SECTION * step - position % step
    if torch.is_grad_enabled() or tokens <= section:
        return _one_call(inputs, start, readout, state, rule, position, resets)
    parts = []
    for begin, end in _sections(tokens, section, SECTION * step):
        part = MemoryInputs(*(None if x is None else x[:, begin:end] for x in inputs))  # type: ignore[arg-type]
        starts = None if resets is None else resets[:, begin:end]
        parts.append(_one_call(part, start, readout, state, rule, position + begin, starts))
        state = parts[-1].state
    return MemoryOutput(
        torch.cat([part.reads for part in parts], dim=1),
        state,
        torch.cat([part.rate for part in parts], dim=1),
        torch.cat([part.decay for part in parts], dim=1),
    )


def _sections(tokens: int, first: int, later: int) -> list[tuple[int, int]]:
    borders = [0, *range(first, tokens, later), tokens]
    return list(pairwise(borders))


def _one_call(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
) -> MemoryOutput:
    from nested_lm.ops.memory.triton.run import Call, SelfModify

    key = inputs.key
    dtype = torch.promote_types(key.dtype, start.inner.dtype)
    batch, tokens, heads, width = key.shape
    low = torch.is_autocast_enabled(key.device.type)
    call = Call(rule, batch, tokens, heads, width, start.inner.shape[-2], position, low, dtype)
    given = (*inputs, *start, *readout[:2], *state.border, *state.current, *(state.momentum or (None, None)))
    tensors = (None if x is None else x.to(dtype).contiguous() for x in given)
    starts = None if resets is None else resets.to(torch.uint8).contiguous()
    with torch.autocast(key.device.type, enabled=False):
        found = SelfModify.apply(call, starts, *tensors)
    momentum = MemoryWeights(*found[7:9]) if rule.momentum else None
    after = MemoryState(MemoryWeights(*found[3:5]), MemoryWeights(*found[5:7]), momentum)
    return MemoryOutput(found[0], after, found[1], found[2])

"""What computes the self-modifying memories: matrix products of torch, or this project's C for processors."""

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nested_lm.config.mixers import MemoryBackend
from nested_lm.errors import ConfigError
from nested_lm.ops import cpu_library, memory_chunked, memory_cpu
from nested_lm.ops.memory import GateReadout, MemoryInputs, MemoryOutput, MemoryState, MemoryWeights
from nested_lm.write_rule import WriteRule


def run_memories(
    inputs: MemoryInputs,
    start: MemoryWeights,
    readout: GateReadout,
    state: MemoryState,
    *,
    rule: WriteRule,
    position: int,
    resets: Bool[Tensor, "B T"] | None,
    recompute: bool,
    backend: MemoryBackend,
) -> MemoryOutput:
    """Write every token and read. See `memory_reference.self_modify` for the arguments.

    Raises:
        ConfigError: backend `cpu` where the library cannot run, with the reason and the repair.
    """
    module = memory_cpu if uses_library(backend, rule, inputs, start) else memory_chunked
    return module.self_modify(
        inputs, start, readout, state, rule=rule, position=position, resets=resets, recompute=recompute
    )


def uses_library(backend: MemoryBackend, rule: WriteRule, inputs: MemoryInputs, start: MemoryWeights) -> bool:
    """Whether the C library is asked for; with `auto`, whether it can run.

    Raises:
        ConfigError: asked for where it cannot run.
    """
    if backend == "torch" or isinstance(inputs.key, FakeTensor):  # who counts operations computes nothing
        return False
    reason = memory_cpu.unsupported(rule, inputs, start)
    if backend == "auto":
        return reason is None and _is_library_there()
    if reason is not None:
        raise ConfigError(f"model.mixer.backend is `cpu`, but {reason}; set model.mixer.backend=auto, or torch")
    return True


@torch.compiler.assume_constant_result
def _is_library_there() -> bool:
    return cpu_library.reason_missing() is None

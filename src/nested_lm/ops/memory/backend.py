"""What a backend of the self-modifying memories is, and which one computes a call.

A backend is a module with the three members of `Backend`; one line in `registry.BACKENDS` makes it known
(docs/extending.md). `reference.self_modify` says what every backend must compute.

Shapes: B batch, T tokens, H heads, K head width, W convolution width.
"""

from importlib import import_module
from typing import Protocol, cast

from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nested_lm.errors import ConfigError
from nested_lm.ops.memory.registry import BACKENDS, FRONTS
from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.memory.state import (
    GateReadout,
    MemoryCall,
    MemoryInputs,
    MemoryOutput,
    MemoryState,
    MemoryWeights,
)


class Backend(Protocol):
    """A module that computes the memories."""

    READS_BRANCHES: bool
    """Whether rows may branch in final calls (`MemoryCall.branches`)."""

    def unsupported(self, rule: WriteRule, key: Tensor, start: MemoryWeights, call: MemoryCall) -> str | None:
        """Why it cannot compute a call; None when it can.

        key: a tensor of the device and dtype of `MemoryInputs.key`; its values and shape do not matter. The reason is a
        clause with a subject of its own, as in "the backend is `cpu`, but {reason}".
        """

    def run(
        self,
        inputs: MemoryInputs,
        start: MemoryWeights,
        readout: GateReadout,
        state: MemoryState,
        *,
        rule: WriteRule,
        call: MemoryCall,
    ) -> MemoryOutput:
        """Write every token and read, as `reference.self_modify` does. Only called where `unsupported` gave None."""


class Front(Protocol):
    """A module that computes queries, keys and values of all heads from their projections."""

    def unsupported(self, x: Tensor) -> str | None:
        """Why it cannot serve tensors like x; None when it can."""

    def convolved_units(
        self,
        x: Float[Tensor, "B T 3HK"],
        weight: Float[Tensor, "3HK W"],
        tail: Float[Tensor, "B W-1 3HK"],
        age: Int[Tensor, "B T"] | None,
        *,
        num_heads: int,
        unit_values: bool,
        branches: Int[Tensor, "B N"] | None,
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        """unit(silu(conv(x))). Arguments: see `cpu/front.py`."""


_BACKENDS = {name: cast(Backend, import_module(path)) for name, path in BACKENDS.items()}
_FRONTS = {name: cast(Front, import_module(path)) for name, path in FRONTS.items()}


def select(name: str, rule: WriteRule, key: Tensor, start: MemoryWeights, call: MemoryCall) -> Backend:
    """Return the backend of a name that computes a call, or with `auto` the first that can.

    A backend that was asked for by name is never replaced by another. Tensors without values (FakeTensor) are no
    computation: a backend that cannot count on them leaves that to torch.

    Raises:
        ConfigError: the backend that was asked for cannot run, with the reason.
    """
    for other, backend in _BACKENDS.items():
        if name not in ("auto", other):
            continue
        reason = backend.unsupported(rule, key, start, call)
        if reason is None:
            return backend
        if name == other and not isinstance(key, FakeTensor):
            raise ConfigError(f"model.mixer.backend is `{name}`, but {reason}; set model.mixer.backend=auto, or torch")
    return _BACKENDS["torch"]


def reads_branches(name: str, rule: WriteRule, projected: Tensor, start: MemoryWeights) -> bool:
    """Whether rows may branch in a final call. projected: a tensor like the projections of queries, keys and values."""
    call = MemoryCall(final=True)
    for other, backend in _BACKENDS.items():
        if name in ("auto", other) and backend.unsupported(rule, projected, start, call) is None:
            return backend.READS_BRANCHES and front(name, projected) is not None
    return False


def front(name: str, x: Tensor) -> Front | None:
    """Return the kernels that make queries, keys and values of projections like x; None: torch's form serves."""
    for other, kernels in _FRONTS.items():
        if name in ("auto", other) and kernels.unsupported(x) is None:
            return kernels
    return None

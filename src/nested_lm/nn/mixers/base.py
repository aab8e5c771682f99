"""What every mixer is: a part of a block that moves information between tokens, and says what it can do.

Shapes: B batch, T tokens, S cached tokens, D model width.
"""

from abc import abstractmethod
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.config.mixers import MixerSection
from nested_lm.nn.layers import StepContext
from nested_lm.nn.part import Part


class Mixer(Part):
    """Base of all mixers. `nn/mixers/registry.py` says which configuration section builds which."""

    has_constant_state: bool = True
    """Whether the state keeps its size however long the stream."""

    has_fast_weights: bool = True
    """Whether reading writes anything but a cache of keys and values."""

    takes_rows: bool = False
    """Whether `StepContext.rows` may fork its state."""

    @property
    def reads_branches(self) -> bool:
        """Whether `StepContext.branches` may say how rows branch."""
        return False

    @property
    def frozen_reach(self) -> int | None:
        """Tokens before its own that a frozen output depends on; None: it may depend on all."""
        return None

    @property
    def memories(self) -> tuple[str, ...]:
        """Names of the self-modifying memories of a head."""
        return ()

    @classmethod
    def build(cls, width: int, config: MixerSection, *, epsilon: float, recompute: bool) -> Self:
        """Make the mixer of a configuration section.

        epsilon: of its norms. recompute: backward computes chunks again instead of keeping their results.
        """
        return cls(width, config, epsilon=epsilon, recompute=recompute)  # type: ignore[call-arg, arg-type]

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """State of streams that have read nothing: a tree of tensors, each with the batch first."""

    def documents(self, state: Any) -> Int[Tensor, "B S"] | None:  # noqa: ARG002  of mixers that attend
        """Number of the document of each cached token; None when the mixer attends to none."""
        return None

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: Any
    ) -> tuple[Float[Tensor, "B T D"], Any, dict[str, Tensor]]:
        """Mix tokens. Returns the result, the new state and scalar statistics (detached)."""


def zeros_for(weight: Tensor, *shape: int) -> Tensor:
    """Zeros of a weight's type and device, for a state.

    Not `weight.new_zeros`: a weight that is sharded over devices would make a sharded state.
    """
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

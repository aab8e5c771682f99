"""What every channel memory is: the part of a block that works on each token by itself.

Shapes: B batch, T tokens, D model width.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nested_lm.nn.fast_linear import MLPDistance
from nested_lm.nn.part import Part


class ChannelMemory(Part):
    """Base of channel memories, which add their own residuals."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"], distances: Mapping[int, MLPDistance]) -> Float[Tensor, "B T D"]:
        """Apply to every token. distances: of the levels that have fast copies, by level."""

    @abstractmethod
    def level_mlps(self) -> dict[int, Any]:
        """The MLP of each level."""

    @abstractmethod
    def level_of(self, name: str) -> int | None:
        """Level that a parameter belongs to, by its name in this module; None outside the levels."""

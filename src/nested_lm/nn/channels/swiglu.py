"""The channel memory of Transformer++: one gated MLP.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from nested_lm.nn.channels.base import ChannelMemory
from nested_lm.nn.fast_linear import MLPDistance
from nested_lm.nn.layers import RMSNorm, SwiGLU


class ResidualSwiGLU(ChannelMemory):
    """Pre-norm residual SwiGLU. level: that of its MLP; None without levels."""

    def __init__(self, width: int, hidden: int, *, level: int | None, epsilon: float) -> None:
        super().__init__()
        self.level = level
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Float[Tensor, "B T D"], distances: Mapping[int, MLPDistance]) -> Float[Tensor, "B T D"]:
        """Apply to every token. distances: of the levels that have fast copies, by level."""
        distance = None if self.level is None else distances.get(self.level)
        return x + self.mlp(self.norm(x), distance)

    def level_mlps(self) -> dict[int, SwiGLU]:
        """The MLP, if it belongs to a level."""
        return {} if self.level is None else {self.level: self.mlp}

    def level_of(self, name: str) -> int | None:  # noqa: ARG002  one level for all
        """Level that a parameter belongs to, by its name in this module."""
        return self.level

    def output_projections(self) -> list[nn.Linear]:
        """The second layer of the MLP."""
        return [self.mlp.out]

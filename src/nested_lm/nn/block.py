"""A residual block: a mixer over tokens, then a channel memory over each token.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nested_lm.nn.channels.base import ChannelMemory
from nested_lm.nn.fast_linear import MLPDistance
from nested_lm.nn.layers import RMSNorm, StepContext
from nested_lm.nn.mixers.base import Mixer
from nested_lm.nn.part import Normal, initialise


class Block(nn.Module):
    """x + mixer(norm(x)), then the channel memory, which adds its own residuals."""

    def __init__(self, width: int, mixer: Mixer, channel: ChannelMemory, *, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.mixer = mixer
        self.channel = channel

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: Any, distances: Mapping[int, MLPDistance]
    ) -> tuple[Float[Tensor, "B T D"], Any, dict[str, Tensor]]:
        """Return the block's output, the mixer's new state and its statistics.

        distances: of the channel's levels that have fast copies, by level.
        """
        mixed, state, stats = self.mixer(self.norm(x), context, state)
        return self.channel(x + mixed, distances), state, stats

    def initialise(self, normal: Normal, *, residual: float) -> None:
        """Set every parameter, see `nn.part.initialise`."""
        initialise(self, (self.mixer, self.channel), normal, residual=residual)

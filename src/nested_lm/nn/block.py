"""A residual block: a mixer over tokens, then a channel memory over each token.

Shapes: B batch, T tokens, D model width.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nested_lm.config import channels, mixers
from nested_lm.config.layer_levels import LayerLevels
from nested_lm.config.model import ModelConfig
from nested_lm.nn.attention import Attention
from nested_lm.nn.cms import ContinuumMemory
from nested_lm.nn.layers import RMSNorm, StepContext, SwiGLU
from nested_lm.nn.self_modifying import SelfModifyingTitans


class ResidualSwiGLU(nn.Module):
    """Pre-norm residual SwiGLU: the channel memory of Transformer++."""

    def __init__(self, width: int, hidden: int, *, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Apply to every token."""
        return x + self.mlp(self.norm(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then the channel memory, which adds its own residuals."""

    def __init__(self, config: ModelConfig, *, recompute_chunks: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mixer = _build_mixer(config, recompute_chunks=recompute_chunks)
        self.channel = _build_channel(config)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: Any
    ) -> tuple[Float[Tensor, "B T D"], Any, dict[str, Tensor]]:
        """Return the block's output, the mixer's new state and its statistics."""
        mixed, state, stats = self.mixer(self.norm(x), context, state)
        return self.channel(x + mixed), state, stats


def _build_mixer(config: ModelConfig, *, recompute_chunks: bool) -> nn.Module:
    width, epsilon = config.width, config.norm_epsilon
    match config.mixer:
        case mixers.FullAttention() as mixer:
            return Attention(width, mixer)
        case mixers.SelfModifying() as mixer:
            return SelfModifyingTitans(width, mixer, epsilon=epsilon, recompute=recompute_chunks)


def _build_channel(config: ModelConfig) -> nn.Module:
    width, epsilon = config.width, config.norm_epsilon
    match config.channel:
        case channels.ContinuumMemory() as channel:
            return ContinuumMemory(width, channel.levels, epsilon=epsilon)
        case LayerLevels() as channel:
            return ResidualSwiGLU(width, channel.hidden, epsilon=epsilon)
        case channels.SwiGLU() as channel:
            return ResidualSwiGLU(width, round(channel.expansion * width), epsilon=epsilon)

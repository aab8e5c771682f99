"""A residual block: a mixer over tokens, then a channel memory over each token.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nested_lm.config import baselines, channels, mixers
from nested_lm.config.layer_levels import LayerLevels
from nested_lm.config.model import ModelConfig
from nested_lm.nn.channels.cms import ContinuumMemory
from nested_lm.nn.fast_linear import MLPDistance
from nested_lm.nn.layers import RMSNorm, StepContext, SwiGLU
from nested_lm.nn.mixers.attention import Attention
from nested_lm.nn.mixers.delta_net import DeltaNet, GatedDeltaNet
from nested_lm.nn.mixers.linear_attention import LinearAttention
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.nn.mixers.titans import MemoryAsGate, MemoryAsLayer
from nested_lm.nn.mixers.titans_mac import MemoryAsContext


class ResidualSwiGLU(nn.Module):
    """Pre-norm residual SwiGLU: the channel memory of Transformer++. level: that of its MLP; None without levels."""

    def __init__(self, width: int, hidden: int, *, level: int | None, epsilon: float) -> None:
        super().__init__()
        self.level = level
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Float[Tensor, "B T D"], distances: Mapping[int, MLPDistance]) -> Float[Tensor, "B T D"]:
        """Apply to every token. distances: of the levels that have fast copies, by level."""
        return x + self.mlp(self.norm(x), distances.get(self.level))

    def level_mlps(self) -> dict[int, SwiGLU]:
        """The MLP, if it belongs to a level."""
        return {} if self.level is None else {self.level: self.mlp}

    def level_of(self, name: str) -> int | None:  # noqa: ARG002  one level for all
        """Level that a parameter belongs to, by its name in this module."""
        return self.level


class Block(nn.Module):
    """x + mixer(norm(x)), then the channel memory, which adds its own residuals. layer: its place, from the bottom."""

    def __init__(self, config: ModelConfig, layer: int, *, recompute_chunks: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mixer = _build_mixer(config, recompute_chunks=recompute_chunks)
        self.channel = _build_channel(config, layer)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: Any, distances: Mapping[int, MLPDistance]
    ) -> tuple[Float[Tensor, "B T D"], Any, dict[str, Tensor]]:
        """Return the block's output, the mixer's new state and its statistics.

        distances: of the channel's levels that have fast copies, by level.
        """
        mixed, state, stats = self.mixer(self.norm(x), context, state)
        return self.channel(x + mixed, distances), state, stats


def _build_mixer(config: ModelConfig, *, recompute_chunks: bool) -> nn.Module:
    width, epsilon = config.width, config.norm_epsilon
    match config.mixer:
        case mixers.FullAttention() as mixer:
            return Attention(width, mixer)
        case mixers.SelfModifying() as mixer:
            return SelfModifyingTitans(width, mixer, epsilon=epsilon, recompute=recompute_chunks)
        case baselines.LinearAttention() as mixer:
            return LinearAttention(width, mixer, epsilon=epsilon, recompute=recompute_chunks)
        case baselines.DeltaNet() as mixer:
            return DeltaNet(width, mixer, epsilon=epsilon, recompute=recompute_chunks)
        case baselines.GatedDeltaNet() as mixer:
            return GatedDeltaNet(width, mixer, epsilon=epsilon, recompute=recompute_chunks)
        case baselines.TitansMAC() as mixer:
            return MemoryAsContext(width, mixer, epsilon=epsilon, recompute=recompute_chunks)
        case baselines.TitansMAG() as mixer:
            return MemoryAsGate(width, mixer, epsilon=epsilon, recompute=recompute_chunks)
        case baselines.TitansMAL() as mixer:
            return MemoryAsLayer(width, mixer, epsilon=epsilon, recompute=recompute_chunks)


def _build_channel(config: ModelConfig, layer: int) -> nn.Module:
    width, epsilon = config.width, config.norm_epsilon
    match config.channel:
        case channels.ContinuumMemory() as channel:
            return ContinuumMemory(width, channel.levels, wiring=channel.wiring, gated=channel.gated, epsilon=epsilon)
        case LayerLevels() as channel:
            level = channel.levels_of_layers(config.num_layers)[layer]
            return ResidualSwiGLU(width, channel.hidden, level=level, epsilon=epsilon)
        case channels.SwiGLU() as channel:
            return ResidualSwiGLU(width, round(channel.expansion * width), level=None, epsilon=epsilon)

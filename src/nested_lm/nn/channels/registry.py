"""Which channel memory each configuration section builds."""

from nested_lm.config import channels
from nested_lm.config.layer_levels import LayerLevels
from nested_lm.nn.channels.base import ChannelMemory
from nested_lm.nn.channels.cms import ContinuumMemory
from nested_lm.nn.channels.swiglu import ResidualSwiGLU


def build_channel(
    config: channels.ChannelSection, width: int, *, epsilon: float, layer: int, num_layers: int
) -> ChannelMemory:
    """Make the channel memory that a configuration section asks for. layer: place of its block, from the bottom."""
    match config:
        case channels.ContinuumMemory():
            return ContinuumMemory(width, config.levels, wiring=config.wiring, gated=config.gated, epsilon=epsilon)
        case LayerLevels():
            level = config.levels_of_layers(num_layers)[layer]
            return ResidualSwiGLU(width, config.hidden, level=level, epsilon=epsilon)
        case channels.SwiGLU():
            return ResidualSwiGLU(width, round(config.expansion * width), level=None, epsilon=epsilon)
    raise TypeError(f"no channel memory is made of {type(config).__name__}")

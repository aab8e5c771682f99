"""Which mixer each configuration section builds."""

from nested_lm.config import baselines, mixers
from nested_lm.config.mixers import MixerSection
from nested_lm.nn.mixers.attention import Attention
from nested_lm.nn.mixers.base import Mixer
from nested_lm.nn.mixers.delta_net import DeltaNet, GatedDeltaNet
from nested_lm.nn.mixers.linear_attention import LinearAttention
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.nn.mixers.titans import MemoryAsGate, MemoryAsLayer
from nested_lm.nn.mixers.titans_mac import MemoryAsContext

MIXERS: dict[type[MixerSection], type[Mixer]] = {
    mixers.FullAttention: Attention,
    mixers.SelfModifying: SelfModifyingTitans,
    baselines.LinearAttention: LinearAttention,
    baselines.DeltaNet: DeltaNet,
    baselines.GatedDeltaNet: GatedDeltaNet,
    baselines.TitansMAC: MemoryAsContext,
    baselines.TitansMAG: MemoryAsGate,
    baselines.TitansMAL: MemoryAsLayer,
}


def build_mixer(config: MixerSection, width: int, *, epsilon: float, recompute: bool) -> Mixer:
    """Make the mixer that a configuration section asks for. See `Mixer.build`."""
    return MIXERS[type(config)].build(width, config, epsilon=epsilon, recompute=recompute)

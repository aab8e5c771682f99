"""What a model is: width, depth, and for each block a mixer and a channel memory."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from nested_lm.config.baselines import DeltaNet, GatedDeltaNet, LinearAttention, TitansMAC, TitansMAG, TitansMAL
from nested_lm.config.channels import ContinuumMemory, SwiGLU
from nested_lm.config.layer_levels import LayerLevels
from nested_lm.config.mixers import FullAttention, SelfModifying
from nested_lm.config.section import Count, NonNegativeFloat, PositiveFloat, Section

Mixer = Annotated[
    SelfModifying | FullAttention | LinearAttention | DeltaNet | GatedDeltaNet | TitansMAC | TitansMAG | TitansMAL,
    Field(discriminator="kind"),
]

Channel = Annotated[ContinuumMemory | LayerLevels | SwiGLU, Field(discriminator="kind")]


class ModelConfig(Section):
    """A language model: embedding, `num_layers` blocks of mixer and channel memory, norm, head."""

    vocab_size: Count
    width: Count
    num_layers: Count
    mixer: Mixer
    channel: Channel
    tie_embeddings: bool = True
    norm_epsilon: PositiveFloat = 1e-6
    init_std: NonNegativeFloat = 0.02  # of the embedding; matrices start at 1/sqrt(fan-in)

    @model_validator(mode="after")
    def _parts_fit(self) -> "ModelConfig":
        self.mixer.check_width(self.width)
        if isinstance(self.channel, LayerLevels):
            self.channel.check_layers(self.num_layers)
        return self

    @model_validator(mode="after")
    def _writes_can_be_differentiated(self) -> "ModelConfig":
        shared = self.channel.in_context_settings
        is_second = shared is not None and shared.meta_gradient == "second_order"
        if is_second and self.num_layers > 1 and not self.mixer.is_twice_differentiable:
            raise ValueError(
                f"channel.in_context.meta_gradient second_order differentiates the inner gradient, which passes "
                f"through the mixers of the layers above, and mixer {self.mixer.kind} can be differentiated only "
                "once; use meta_gradient=first_order, or the mixer attention"
            )
        return self

    @property
    def writes_in_context(self) -> bool:
        """Whether some level is written while the model reads (clock B)."""
        return any(writes is not None and writes.rate > 0 for writes in self.channel.writes)

    @property
    def alignment(self) -> int:
        """Documents packed into one row start at multiples of this many tokens: borders of memories and levels."""
        return math.lcm(self.mixer.alignment, self.channel.alignment)

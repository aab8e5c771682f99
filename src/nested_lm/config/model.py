"""What a model is: width, depth, and for each block a mixer and a channel memory."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from nested_lm.config.baselines import DeltaNet, GatedDeltaNet, LinearAttention, TitansMAC, TitansMAG, TitansMAL
from nested_lm.config.channels import ContinuumMemory, SwiGLU
from nested_lm.config.layer_levels import LayerLevels
from nested_lm.config.mixers import FullAttention, SelfModifying
from nested_lm.config.section import NonNegativeFloat, PositiveFloat, Section, Size

Mixer = Annotated[
    SelfModifying | FullAttention | LinearAttention | DeltaNet | GatedDeltaNet | TitansMAC | TitansMAG | TitansMAL,
    Field(discriminator="kind"),
]

Channel = Annotated[ContinuumMemory | LayerLevels | SwiGLU, Field(discriminator="kind")]


class ModelConfig(Section):
    """A language model: embedding, `num_layers` blocks of mixer and channel memory, norm, head."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]  # tokens of the tokenizer, or more
    width: Size  # of the residual stream
    num_layers: Annotated[int, Field(ge=1, le=1024)]  # blocks of mixer and channel
    mixer: Mixer  # what moves information between tokens
    channel: Channel  # what works on each token by itself
    tie_embeddings: bool = True  # one matrix for embedding and head
    norm_epsilon: PositiveFloat = 1e-6  # added to the mean square inside RMSNorm
    init_std: NonNegativeFloat = 0.02  # of the embedding; matrices start at 1/sqrt(fan-in)

    @model_validator(mode="after")
    def _parts_fit(self) -> "ModelConfig":
        self.mixer.check_width(self.width)
        if isinstance(self.channel, LayerLevels):
            self.channel.check_layers(self.num_layers)
        return self

    @model_validator(mode="after")
    def _writes_can_be_differentiated(self) -> "ModelConfig":
        if self.layers_differentiated_twice and not self.mixer.is_twice_differentiable:
            raise ValueError(
                "channel.in_context.meta_gradient second_order differentiates the inner gradient, which passes "
                f"through the mixers of the layers above, and mixer {self.mixer.kind} with the backend that was asked "
                "for can be differentiated only once; use backend: auto or torch, or meta_gradient: first_order"
            )
        return self

    @property
    def writes_in_context(self) -> bool:
        """Whether some level is written while the model reads (clock B)."""
        return any(writes is not None and writes.rate > 0 for writes in self.channel.writes)

    @property
    def layers_differentiated_twice(self) -> range:
        """Layers whose mixers have gradients that training differentiates again.

        With second-order writes in context, all above the lowest layer that is written: the inner gradient passes
        through them on its way down.
        """
        shared = self.channel.in_context_settings
        if shared is None or shared.meta_gradient == "first_order" or not self.writes_in_context:
            return range(0)
        lowest = 0
        if isinstance(self.channel, LayerLevels):
            levels = self.channel.levels_of_layers(self.num_layers)
            lowest = min(layer for layer, level in enumerate(levels) if self.channel.writes[level] is not None)
        return range(lowest + 1, self.num_layers)

    @property
    def alignment(self) -> int:
        """Documents packed into one row start at multiples of this many tokens: borders of memories and levels."""
        return math.lcm(self.mixer.alignment, self.channel.alignment)

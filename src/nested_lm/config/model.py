"""What a model is: width, depth, and for each block a mixer and a channel memory."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from nested_lm.config.section import Count, NonNegativeFloat, PositiveFloat, Section


class WriteRates(Section):
    """Largest inner step size of each memory, reached when its gate saturates.

    Rates above 1 give the write negative eigenvalues (needed for state tracking); above 2 it cannot be
    stable with unit keys, so 2 is the limit. Generators are the memories for keys, values, rates and decays.
    """

    memory: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0
    generators: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0


class SelfModifying(Section):
    """Self-modifying Titans: memories for k, v, eta, alpha and memory, written by Delta Gradient Descent.

    Source: arXiv 2512.24695 eqs. 83-93, in the Delta-form: decay and erase act on the distance from the
    learned start.
    """

    kind: Literal["self_modifying"]
    num_heads: Count
    head_width: Count = 32  # key and value width of one head
    expansion: PositiveFloat = 1.0  # hidden width of a memory / head_width
    chunk: Count = 16  # tokens between two borders of `memory`; gradients are taken at the last border
    chunk_generators: Count | None = None  # the same of k, v, eta, alpha; null: as `chunk`
    conv_width: Count = 4  # tokens seen by the causal depthwise convolution
    erase: Literal["both", "input", "none"] = "both"  # which memory layers forget along the written key
    read: Literal["inclusive", "exclusive"] = "inclusive"  # does a token read its own write
    rates: WriteRates = WriteRates()
    rate_init: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # share of the largest rate at the start
    decay_horizon_tokens: PositiveInt = 2048  # at the start a write fades to 1/e after this many tokens

    @property
    def alignment(self) -> int:
        """Tokens between two moments that are a border of every memory."""
        return max(self.chunk, self.chunk_generators or self.chunk)

    @model_validator(mode="after")
    def _chunks_nest(self) -> "SelfModifying":
        other = self.chunk_generators or self.chunk
        if max(self.chunk, other) % min(self.chunk, other):
            near = max(1, round(other / self.chunk)) * self.chunk
            raise ValueError(
                f"chunk {self.chunk} and chunk_generators {other} do not nest: one must be a multiple of the other, so "
                f"that documents can start on a border of every memory; try chunk_generators={near}"
            )
        return self


class FullAttention(Section):
    """Causal softmax attention with rotary positions."""

    kind: Literal["attention"]
    num_heads: Count
    rope_base: PositiveFloat = 10_000.0


Mixer = Annotated[SelfModifying | FullAttention, Field(discriminator="kind")]


class Level(Section):
    """One level of the Continuum Memory System."""

    period_tokens: PositiveInt  # training tokens between two optimizer updates of this level
    expansion: PositiveFloat  # hidden width / model width


class ContinuumMemory(Section):
    """Chain of pre-norm residual MLPs, fastest level first, each updated on its own clock.

    Source: arXiv 2512.24695 eqs. 70-71 (sequential wiring), clock A of the pre-training phase.
    """

    kind: Literal["cms"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _periods_nest(self) -> "ContinuumMemory":
        periods = [level.period_tokens for level in self.levels]
        for fast, slow in pairwise(periods):
            if slow % fast:
                near = max(1, round(slow / fast)) * fast
                raise ValueError(
                    f"level periods {periods} do not nest: {slow} is not a multiple of {fast}, the period of "
                    f"the faster level before it; try {near}"
                )
        return self


class SwiGLU(Section):
    """Gated MLP of Transformer++."""

    kind: Literal["swiglu"]
    expansion: PositiveFloat  # hidden width / model width


Channel = Annotated[ContinuumMemory | SwiGLU, Field(discriminator="kind")]


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
    def _heads_fit(self) -> "ModelConfig":
        if isinstance(self.mixer, FullAttention):
            heads = self.mixer.num_heads
            if self.width % heads:
                near = max(h for h in range(1, heads + 1) if self.width % h == 0)
                raise ValueError(
                    f"width {self.width} is not a multiple of mixer.num_heads {heads}; try num_heads={near}"
                )
            if (self.width // heads) % 2:
                raise ValueError(
                    f"head width {self.width // heads} (width {self.width} / num_heads {heads}) is odd; "
                    "rotary positions need an even head width"
                )
        return self

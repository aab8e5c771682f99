"""Mixers that Hope is compared with: linear attention, DeltaNet, Gated DeltaNet, and Titans with attention."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from nested_lm.config.mixers import MixerSection, SelfModifying, check_heads
from nested_lm.config.section import Count, PositiveFloat

Backend = Literal["auto", "torch", "fla"]
"""What computes a matrix-valued recurrence: this project's chunk form; the Triton kernels of flash-linear-attention
(extra `gpu`), an error where they cannot run; or (`auto`) the kernels wherever they can. The two differ by rounding.
"""


class MatrixMemory(MixerSection):
    """What mixers with one matrix a head share."""

    num_heads: Count
    head_width: Count = 32  # key width of one head
    backend: Backend = "torch"

    @property
    def is_twice_differentiable(self) -> bool:
        """The kernels are not; `auto` leaves them aside where that is needed."""
        return self.backend != "fla"


class LinearAttention(MatrixMemory):
    """Linear attention: a matrix a head that sums v k, read by q. Source: arXiv 2512.24695 eqs. 14-18."""

    kind: Literal["linear_attention"]
    feature_map: Literal["identity", "elu"] = "identity"  # of keys and queries; elu: elu(x) + 1 (arXiv 2006.16236)


class DeltaNet(MatrixMemory):
    """DeltaNet: a matrix a head, written by the delta rule. Source: arXiv 2406.06484; arXiv 2512.24695 eq. 65."""

    kind: Literal["delta_net"]
    conv_width: Count = 4  # tokens seen by the causal depthwise convolution
    rate_max: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0  # of the write; above 1: negative eigenvalues (2411.12537)


class GatedDeltaNet(MatrixMemory):
    """DeltaNet with a decay for each head and token, and a gated output. Source: arXiv 2412.06464."""

    kind: Literal["gated_delta_net"]
    value_expansion: PositiveFloat = 2.0  # value width / key width
    conv_width: Count = 4  # tokens seen by the causal depthwise convolution
    rate_max: Annotated[float, Field(gt=0.0, le=2.0)] = 1.0  # of the write; above 1: negative eigenvalues


class TitansSection(MixerSection):
    """What the three hybrids of Titans share: a neural memory and attention with learned persistent tokens."""

    memory: SelfModifying
    num_heads: Count  # of the attention
    num_persistent: NonNegativeInt = 16  # learned tokens that every token sees
    rope_base: PositiveFloat = 10_000.0

    @property
    def alignment(self) -> int:
        """Documents start on borders of the memory."""
        return self.memory.alignment

    @property
    def is_twice_differentiable(self) -> bool:
        """Whether the memory is."""
        return self.memory.is_twice_differentiable

    def check_width(self, width: int) -> None:
        """Heads must divide the width, and be of even width for the rotary positions."""
        check_heads(width, self.num_heads)


class TitansMAC(TitansSection):
    """Memory as a context: attention over persistent tokens, reads of the memory and one segment.

    Source: arXiv 2501.00663 eqs. 21-25.
    """

    kind: Literal["titans_mac"]
    segment: Count  # tokens that attend to each other

    @property
    def alignment(self) -> int:
        """Documents start where segments do."""
        return self.segment

    @model_validator(mode="after")
    def _chunks_divide_the_segment(self) -> "TitansMAC":
        chunk = self.memory.alignment
        if self.segment % chunk:
            near = max(1, round(self.segment / chunk)) * chunk
            raise ValueError(
                f"segment {self.segment} is not a multiple of {chunk}, the tokens between two borders of the memory, "
                f"which must be up to date when a segment starts; try segment={near}"
            )
        return self


class TitansMAG(TitansSection):
    """Memory as a gate: the product of sliding-window attention and memory. Source: arXiv 2501.00663 eqs. 26-28."""

    kind: Literal["titans_mag"]
    window: Count  # tokens a token sees, itself included


class TitansMAL(TitansSection):
    """Memory as a layer: sliding-window attention over the memory's output. Source: arXiv 2501.00663 eqs. 29-31."""

    kind: Literal["titans_mal"]
    window: Count  # tokens a token sees, itself included

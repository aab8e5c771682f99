"""Mixers over tokens: the self-modifying memories of Hope, and softmax attention."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, model_validator

from nested_lm.config.section import Count, PositiveFloat, Section
from nested_lm.ops.memory.registry import BACKENDS
from nested_lm.ops.memory.rule import WriteRule

OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
"""A share that is neither nothing nor all."""

MemoryBackend = Literal["auto", *BACKENDS]  # type: ignore[valid-type]
"""What computes the self-modifying memories: `torch`, matrix products on any device; `cpu`, C that is compiled for this
machine's processor on first use; or `auto`, the first that can run. A backend that is named and cannot run (another
device, an option of the write rule, no compiler) is an error. They differ by rounding.
"""


STORED = "stored"
"""Validation-context key: set when loading a stored model, so that rules we now refuse still load."""


class MixerSection(Section):
    """What every mixer's configuration answers."""

    @property
    def alignment(self) -> int:
        """Documents packed into one row start at multiples of this many tokens."""
        return 1

    @property
    def is_twice_differentiable(self) -> bool:
        """Whether gradients through the mixer can be differentiated again."""
        return True

    def check_width(self, width: int) -> None:
        """Refuse a model width the mixer cannot serve.

        Raises:
            ValueError: with the repair.
        """


class _Heads(MixerSection):
    """Sizes that the rule's own defaults depend on: they are read first."""

    kind: Literal["self_modifying"]
    num_heads: Count
    head_width: Count = 32  # key and value width of one head


class SelfModifying(WriteRule, _Heads):
    """Self-modifying Titans: memories for k, v, q, eta, alpha and memory, written by the rule that this section is.

    flat_gates: gates whose weights start at 0, so that they open alike for every token until training tells tokens
        apart.
    control: what a working memory is not indifferent to: the coordinates of values are permuted, another way at every
        token, or memories are read with the keys they are written with.

    Source: arXiv 2512.24695 eqs. 83-93. The defaults are what measures best; `rule: hope_paper` has the equations as
    they are printed (see `NAMED` in ops/memory/rule.py).
    """

    expansion: PositiveFloat = 1.0  # hidden width of a memory / head_width
    conv_width: Count = 4  # tokens seen by the causal depthwise convolution; 1 is a scale per channel
    retention: Literal["learned", "full"] = "learned"  # full: held at 1, writes never fade (table 6, no weight decay)
    momentum_init: OpenShare = 0.5  # share of the sum or mean kept at the start
    rate_init: OpenShare | Annotated[tuple[OpenShare, OpenShare], Field(strict=False)] = 0.5
    # share of its largest rate at which a head starts: of all, or of the first and the last and evenly in between
    flat_gates: Annotated[tuple[Literal["output", "rate", "decay"], ...], Field(strict=False)] = ()
    control: Literal["scrambled_values", "queries_are_keys"] | None = None
    decay_horizon_tokens: PositiveInt = 2048  # at the start a write fades to 1/e after this many tokens
    backend: MemoryBackend = "auto"

    @property
    def is_twice_differentiable(self) -> bool:
        """In torch, autograd can take the place of the backward pass that is written by hand."""
        return self.backend in ("auto", "torch")

    @model_validator(mode="after")
    def _rule_fits_the_sizes(self) -> "SelfModifying":
        if self.depth == 1 and self.expansion != 1.0:
            raise ValueError(
                f"expansion {self.expansion:g} is the hidden width of two-layer memories; leave it out with depth: 1"
            )
        if self.retention == "full" and "alpha" in self.adapt:
            rest = ", ".join(name for name in self.adapt if name != "alpha")
            raise ValueError(
                f"retention full leaves nothing for the alpha memory to decide; use adapt: [{rest}], or "
                "retention: learned"
            )
        if self.retention == "full" and "decay" in self.flat_gates:
            raise ValueError("flat_gates names decay, and retention full has no decay gate; leave it out of flat_gates")
        if self.num_heads < len(self.shares):
            raise ValueError(
                f"rate_shares {list(self.shares)} are for {len(self.shares)} groups of heads, and num_heads is "
                f"{self.num_heads}; use at most as many shares as heads, or rate_shares: [1.0]"
            )
        return self

    @model_validator(mode="after")
    def _writes_are_bounded(self, info: ValidationInfo) -> "SelfModifying":
        reason = self.unbounded()
        if reason is not None and not (info.context or {}).get(STORED):
            raise ValueError(reason)
        return self


class Llama3Scaling(Section):
    """Rotary angles of Llama 3.1 and later: slow ones are divided, fast ones kept, those between blended.

    An angle is fast when its wave is shorter than `original_context` / `high_frequency` tokens, slow when it is
    longer than `original_context` / `low_frequency`.
    """

    kind: Literal["llama3"]
    factor: PositiveFloat  # by which slow angles are divided
    low_frequency: PositiveFloat
    high_frequency: PositiveFloat
    original_context: Count  # tokens the model was first trained with

    @model_validator(mode="after")
    def _bands_are_in_order(self) -> "Llama3Scaling":
        if self.high_frequency <= self.low_frequency:
            raise ValueError(
                f"high_frequency {self.high_frequency:g} must be above low_frequency {self.low_frequency:g}; "
                "Llama 3.1 has 4 and 1"
            )
        return self


class FullAttention(MixerSection):
    """Causal softmax attention with rotary positions."""

    kind: Literal["attention"]
    num_heads: Count
    num_kv_heads: Count | None = None  # heads of keys and values, each shared by several queries; null: as num_heads
    window: Count | None = None  # tokens a token sees, itself included; null: all before it
    rope_base: PositiveFloat = 10_000.0
    rope_scaling: Llama3Scaling | None = None

    def check_width(self, width: int) -> None:
        """Heads must divide the width, and be of even width for the rotary positions."""
        check_heads(width, self.num_heads)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @model_validator(mode="after")
    def _key_heads_divide_heads(self) -> "FullAttention":
        if self.num_heads % self.key_heads:
            near = max(h for h in range(1, min(self.key_heads, self.num_heads) + 1) if self.num_heads % h == 0)
            raise ValueError(
                f"num_kv_heads {self.key_heads} does not divide num_heads {self.num_heads}: every head of keys and "
                f"values serves equally many queries; try num_kv_heads={near}"
            )
        return self


def check_heads(width: int, num_heads: int) -> None:
    """Refuse heads that do not divide the width, or that are of odd width, which rotary positions cannot turn.

    Raises:
        ValueError: with the nearest number of heads that fits.
    """
    if width % num_heads:
        near = max(h for h in range(1, num_heads + 1) if width % h == 0)
        raise ValueError(f"width {width} is not a multiple of mixer.num_heads {num_heads}; try num_heads={near}")
    if (width // num_heads) % 2:
        raise ValueError(
            f"head width {width // num_heads} (width {width} / num_heads {num_heads}) is odd; "
            "rotary positions need an even head width"
        )

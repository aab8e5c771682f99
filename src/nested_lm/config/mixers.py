"""Mixers over tokens: the self-modifying memories of Hope, and softmax attention."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, ValidationInfo, model_validator

from nested_lm.config.section import Count, PositiveFloat, Section
from nested_lm.ops.memory.registry import BACKENDS
from nested_lm.ops.memory.rule import MEMORIES, WriteRule

OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
"""A share that is neither nothing nor all."""

Rate = Annotated[float, Field(ge=0.0, le=2.0)]
"""Largest inner step size of a memory; 0 keeps it at its start."""

Momentum = Annotated[Literal[False, "sum", "mean"], BeforeValidator(lambda given: "sum" if given is True else given)]
"""How writes are carried on, see `WriteRule`. Runs of earlier versions say true for the sum."""

MemoryBackend = Literal["auto", *BACKENDS]  # type: ignore[valid-type]
"""What computes the self-modifying memories: `torch`, matrix products on any device; `cpu`, C that is compiled for this
machine's processor on first use; or `auto`, the first that can run. A backend that is named and cannot run (another
device, an option of the write rule, no compiler) is an error. They differ by rounding.
"""


STORED = "stored"
"""Key of the validation's context: the configuration is of a model that is there, whose rule is what it is."""


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


class WriteRates(Section):
    """Largest inner step size of each memory, reached when its gate saturates.

    Rates above 1 give the write negative eigenvalues (needed for state tracking); above 2 it cannot be stable with unit
    keys, so 2 is the limit. Generators that move fast change the meaning of what was written, so theirs are small
    (docs/stability_journal.md has the measurements). `generators` stands for every memory but `memory` that has no rate
    of its own.
    """

    memory: Annotated[float, Field(gt=0.0, le=2.0)] = 2.0
    generators: Rate = 0.1
    k: Rate | None = None
    v: Rate | None = None
    q: Rate | None = None
    eta: Rate | None = None
    alpha: Rate | None = None

    def of(self, name: str) -> float:
        """Largest rate of one memory."""
        own: float | None = getattr(self, name)
        return self.generators if own is None else own


class SelfModifying(MixerSection):
    """Self-modifying Titans: memories for k, v, q, eta, alpha and memory, written by Delta Gradient Descent.

    Source: arXiv 2512.24695 eqs. 83-93. The defaults are what measures best; configs/model/hope_paper_demo.yaml has the
    equations as they are printed.
    """

    kind: Literal["self_modifying"]
    num_heads: Count
    head_width: Count = 32  # key and value width of one head
    expansion: PositiveFloat = 1.0  # hidden width of a memory / head_width
    chunk: Count = 16  # tokens between two borders of `memory`; gradients are taken at the last border
    chunk_generators: Count | None = None  # the same of the other memories; null: as `chunk`
    conv_width: Count = 4  # tokens seen by the causal depthwise convolution; 1 is a scale per channel
    adapt: Annotated[tuple[Literal["k", "eta", "alpha", "v", "q", "memory"], ...], Field(strict=False)] = (
        "k",
        "eta",
        "alpha",
        "v",
        "memory",
    )  # memories that exist and are written; without one, its slow projection serves alone
    depth: Literal[1, 2] = 2  # layers of a memory: a matrix, or a residual two-layer network
    objective: Literal["l2", "dot"] = "l2"  # inner loss; dot: linear memories only
    targets: Literal["generated", "values"] = "values"  # what `memory` is taught: M(v) (eq. 84), or the value (Titans)
    targets_generators: Literal["generated", "values"] = "generated"  # the same of the other memories
    gradient: Literal["border", "fresh", "self_referential"] = "border"  # where it is taken; the last two: depth 1
    erase: Literal["both", "input", "none"] = "both"  # which memory layers forget along the written key
    erase_after_decay: bool = True  # alpha (I - eta k k^T), stable for rates to 2; false: alpha I - eta k k^T (eq. 88)
    erase_since: Literal["start", "border"] | None = None
    # what erasing takes off `memory`: all that was written (eq. 88), or what the gradient at the border does not, so
    # that a write replaces; null: the second, with erase both and the gradient of a squared error at the border
    erase_since_generators: Literal["start", "border"] = "start"  # the same of the other memories
    retention: Literal["learned", "full"] = "learned"  # full: held at 1, writes never fade (table 6, no weight decay)
    decay_towards: Literal["start", "zero"] = "start"  # what retention shrinks: the distance from the start, or all
    momentum: Momentum = False  # writes go through a running sum or mean with a decay of its own for every token
    momentum_init: OpenShare = 0.5  # share of the sum or mean kept at the start
    read: Literal["inclusive", "exclusive", "border"] = "inclusive"  # is a token's own write, or its chunk, seen
    normalise: bool = False  # layer normalisation inside a two-layer memory
    unit_values: bool = True  # scale values to unit length
    gates: Literal["head", "token"] = "head"  # one rate and retention for each head, or one for all heads of a token
    damp: bool = True  # damp writes of two-layer memories that would overshoot; false has no bound: stored runs only
    rates: WriteRates = WriteRates()
    rate_stretch: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1  # how far the sigmoid of the rate is cut off at 0 and 1
    rate_shares: Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], Field(strict=False)] | None = None
    # share of the rates of all memories that each of as many groups of neighbouring heads reaches; null: half of the
    # heads stays at rates of `memory` up to 1, where a write replaces exactly, if others may pass it
    rate_init: OpenShare | Annotated[tuple[OpenShare, OpenShare], Field(strict=False)] = 0.5
    # share of its largest rate at which a head starts: of all, or of the first and the last and evenly in between
    decay_horizon_tokens: PositiveInt = 2048  # at the start a write fades to 1/e after this many tokens
    backend: MemoryBackend = "auto"

    def rule(self) -> WriteRule:
        """Return the rule by which the memories are written.

        Raises:
            ValueError: an impossible combination, with the repair.
        """
        adapt = tuple(name for name in MEMORIES if name in self.adapt)
        assert self.erase_since is not None, "validation writes it down"
        assert self.rate_shares is not None, "validation writes it down"
        return WriteRule(
            chunk=self.chunk,
            chunk_generators=self.chunk_generators or self.chunk,
            adapt=adapt,
            rates=tuple(self.rates.of(name) for name in adapt),
            depth=self.depth,
            objective=self.objective,
            targets=self.targets,
            targets_generators=self.targets_generators,
            gradient=self.gradient,
            erase=self.erase,
            erase_after_decay=self.erase_after_decay,
            erase_since=self.erase_since,
            erase_since_generators=self.erase_since_generators,
            decay_towards=self.decay_towards,
            momentum=self.momentum,
            read=self.read,
            normalise=self.normalise,
            unit_values=self.unit_values,
            gates=self.gates,
            damp=self.damp,
            rate_stretch=self.rate_stretch,
            rate_shares=self.rate_shares,
        )

    @property
    def alignment(self) -> int:
        """Tokens between two moments that are a border of every memory."""
        return max(self.chunk, self.chunk_generators or self.chunk)

    @property
    def is_twice_differentiable(self) -> bool:
        """In torch, autograd can take the place of the backward pass that is written by hand."""
        return self.backend in ("auto", "torch")

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

    @model_validator(mode="after")
    def _choices_are_written_down(self) -> "SelfModifying":
        """Set what was left open, so that the configuration of a run says what it was trained with."""
        if self.erase_since is None:
            replaces = self.erase == "both" and self.objective == "l2" and self.gradient == "border"
            object.__setattr__(self, "erase_since", "border" if replaces else "start")
        if self.rate_shares is None:
            largest = self.rates.of("memory")
            shares = (1.0 / largest, 1.0) if largest > 1.0 and self.num_heads > 1 else (1.0,)
            object.__setattr__(self, "rate_shares", shares)
        return self

    @model_validator(mode="after")
    def _rule_is_possible(self) -> "SelfModifying":
        if len(set(self.adapt)) != len(self.adapt):
            raise ValueError(f"adapt {list(self.adapt)} names a memory twice")
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
        shares = self.rule().rate_shares
        if self.num_heads < len(shares):
            raise ValueError(
                f"rate_shares {list(shares)} are for {len(shares)} groups of heads, and num_heads is {self.num_heads}; "
                f"use at most as many shares as heads, or rate_shares: [1.0]"
            )
        return self

    @model_validator(mode="after")
    def _writes_are_bounded(self, info: ValidationInfo) -> "SelfModifying":
        reason = self.rule().unbounded()
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

"""The rule by which the self-modifying memories are written: every choice the paper leaves open, declared once.

The configuration of the mixer is this rule with sizes; the operations follow it. Imports no torch.

Source: arXiv 2512.24695 eqs. 83-93; arXiv 2501.00663 eq. 10.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nested_lm.ops.memory import stability

MEMORIES = ("k", "eta", "alpha", "v", "q", "memory")
"""Order along the memory dimension: those that read the key input, then v, then q, then the one that is read out."""

Tokens = Annotated[int, Field(ge=1)]

Rate = Annotated[float, Field(ge=0.0, le=2.0)]
"""Largest inner step size of a memory; 0 keeps it at its start."""

Momentum = Annotated[Literal[False, "sum", "mean"], BeforeValidator(lambda given: "sum" if given is True else given)]
"""Runs of earlier versions say true for the sum."""

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class WriteRates(BaseModel):
    """Largest inner step size of each memory, reached when its gate saturates.

    Rates above 1 give the write negative eigenvalues (needed for state tracking); above 2 it cannot be stable with unit
    keys, so 2 is the limit. Generators that move fast change the meaning of what was written, so theirs are small
    (measured in reports/stability_journal.md). `generators` stands for every memory but `memory` that has no rate of
    its own.
    """

    model_config = STRICT

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


NAMED: dict[str, dict[str, Any]] = {
    "hope": {},
    "hope_paper": {
        "rates": {"memory": 1.0, "generators": 1.0},
        "rate_stretch": 0.0,
        "targets": "generated",
        "erase_since": "start",
        "erase_after_decay": False,
        "read": "border",
        "gates": "token",
    },
    "titans": {
        "adapt": ("memory",),
        "rates": {"memory": 0.125},
        "rate_stretch": 0.0,
        "erase": "none",
        "momentum": "mean",
    },
    "linear": {"depth": 1, "rates": {"memory": 1.0, "generators": 0.02}},
    "delta": {
        "adapt": ("memory",),
        "depth": 1,
        "rates": {"memory": 1.0},
        "rate_stretch": 0.0,
        "gradient": "fresh",
        "erase": "none",
    },
}
"""Rules by name; `rule: titans` in a configuration stands for these fields, and every field beside it goes before.

hope: the defaults, what measures best. hope_paper: as printed, eqs. 83-91. titans: Titans eqs. 10-15, for chunks of up
to 16 tokens. linear: matrices as memories. delta: one matrix and the delta rule, as in DeltaNet.
"""


class WriteRule(BaseModel):
    """The choices the paper leaves open, and those its ablations switch.

    chunk, chunk_generators: tokens between two borders of `memory`, and of the generators (section 8.2 has two
        sizes; null: as `chunk`). Keys, values and gates come from the generators' last border, and every memory's
        gradient and target from its own (eq. 90). One of the two divides the other.
    adapt: memories that exist and are written; `memory` is always among them. Without one, its slow projection serves.
    depth: 2 for residual networks (eq. 91), 1 for matrices (eqs. 92-93).
    objective: half the squared error, or (depth 1) the negative inner product with the target (eq. 92).
    targets, targets_generators: what `memory`, and what the generators, are taught: each its own M(v) (eq. 84), or the
        value itself as in Titans.
    gradient: taken at the `border`; or (depth 1) at the `fresh` weights with the border's target; or
        `self_referential`, with the target from the fresh weights as well.
    erase: layers whose fast weights also forget along the written direction (the DGD term of eq. 88).
    erase_after_decay: whether the erase term meets what retention left, alpha (I - eta k k^T) as in Gated DeltaNet, or
        the weights before it, alpha I - eta k k^T as eq. 88 prints. The second has the eigenvalue alpha - eta, below -1
        for rates near 2.
    erase_since, erase_since_generators: what the erase term of `memory`, and of the generators, takes off: all that was
        written since the `start` (eq. 88), or only since the last `border`. The gradient of the squared error takes off
        what the border held as well, so that with `start` a write at rate 1 leaves value - old; with `border` it leaves
        value, the delta rule. At rates above 1 the gradient step has less room (`ops/memory/state.py`), and the erase
        term takes off the rest: at rate 2 both are the same. Taking off everything keeps generators near their start.
        Null: `border` for `memory` where it replaces, with erase both and a squared error's gradient of the border.
    decay_towards: what retention shrinks, the distance from the `start` or the whole weights (`zero`).
    momentum: whether gradients pass through a running `sum` of writes with its own decay m = mu m + b (Titans eq. 10),
        or through a running `mean`, m = mu m + (1 - mu) b, the same with (1 - mu) as a part of its rate; False:
        they do not. A sum multiplies the rate by up to 1 / (1 - mu), so that no rate is safe at every share mu that
        training may find; a mean is stable at each constant mu below 1 where writes without momentum are.
    read: whether a token reads the memory after (`inclusive`) or before (`exclusive`) its own write, or at the last
        `border` (the literal eq. 90).
    normalise: layer normalisation of the second layer's output inside a memory.
    unit_values: whether values are scaled to unit length.
    gates: one learning rate and retention a token for each `head`, or one for all heads of a `token` (eq. 88).
    damp: whether writes are damped where they would overshoot, see `damping`; false has no bound with depth 2.
    rates: largest inner learning rate of each memory.
    rate_stretch: how far the sigmoid of the rate reaches beyond both of its ends before it is cut off there, as a share
        of the largest rate; above 0, writing nothing and the largest rate are reached exactly.
    rate_shares: how much of `rates` the heads reach, in as many groups of neighbouring heads. With (0.5, 1.0) and rates
        up to 2 the first half of the heads writes at rates up to 1, where overwriting is exact, and the second half up
        to 2, which state tracking needs. Null: just that where `memory` may write at rates above 1.
    """

    model_config = STRICT

    chunk: Tokens = 16
    chunk_generators: Tokens | None = None
    adapt: Annotated[tuple[Literal["k", "eta", "alpha", "v", "q", "memory"], ...], Field(strict=False)] = (
        *("k", "eta", "alpha", "v", "memory"),
    )
    depth: Literal[1, 2] = 2
    objective: Literal["l2", "dot"] = "l2"
    targets: Literal["generated", "values"] = "values"
    targets_generators: Literal["generated", "values"] = "generated"
    gradient: Literal["border", "fresh", "self_referential"] = "border"
    erase: Literal["both", "input", "none"] = "both"
    erase_after_decay: bool = True
    erase_since: Literal["start", "border"] | None = None
    erase_since_generators: Literal["start", "border"] = "start"
    decay_towards: Literal["start", "zero"] = "start"
    momentum: Momentum = False
    read: Literal["inclusive", "exclusive", "border"] = "inclusive"
    normalise: bool = False
    unit_values: bool = True
    gates: Literal["head", "token"] = "head"
    damp: bool = True
    rates: WriteRates = WriteRates()
    rate_stretch: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    rate_shares: Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], Field(strict=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Replace `rule: NAME` by the fields it stands for."""
        if not isinstance(given, dict) or "rule" not in given:
            return given
        name = given["rule"]
        if not isinstance(name, str) or name not in NAMED:
            raise ValueError(f"rule {name!r} is none of {', '.join(NAMED)}; name one of them, or leave `rule` out")
        return NAMED[name] | {key: value for key, value in given.items() if key != "rule"}

    @field_validator("adapt")
    @classmethod
    def _in_order(cls, adapt: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(adapt)) != len(adapt):
            raise ValueError(f"adapt {list(adapt)} names a memory twice")
        if "memory" not in adapt:
            raise ValueError(f"adapt {list(adapt)} must be some of {', '.join(MEMORIES)}, with `memory`")
        return tuple(name for name in MEMORIES if name in adapt)

    @field_validator("erase_since", mode="before")
    @classmethod
    def _replaces_where_it_can(cls, given: Any, info: ValidationInfo) -> Any:
        """Write down what was left open, so that the configuration of a run says what it was trained with."""
        if given is not None:
            return given
        written = {"erase": "both", "objective": "l2", "gradient": "border"}
        return "border" if all(info.data.get(name) == value for name, value in written.items()) else "start"

    @field_validator("rate_shares", mode="before")
    @classmethod
    def _half_of_the_heads_replaces(cls, given: Any, info: ValidationInfo) -> Any:
        """Write down what was left open. A mixer has `num_heads`: one head alone reaches all."""
        rates = info.data.get("rates")
        if given is not None or rates is None:
            return given
        split = rates.memory > 1.0 and info.data.get("num_heads", 2) > 1
        return (1.0 / rates.memory, 1.0) if split else (1.0,)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for wrong, reason in (*self._impossible(), *stability.overshooting(self)):
            if wrong:
                raise ValueError(reason)
        return self

    def _impossible(self) -> tuple[tuple[bool, str], ...]:
        linear = self.depth == 1
        one, other = sorted((self.chunk, self.generator_chunk))
        near = max(1, round(self.generator_chunk / self.chunk)) * self.chunk
        return (
            (
                other % one != 0,
                f"chunk {self.chunk} and chunk_generators {self.generator_chunk} do not nest: one must be a multiple "
                f"of the other, so that documents can start on a border of every memory; try chunk_generators={near}",
            ),
            (
                not self.shares or max(self.shares) != 1.0,
                f"rate_shares {self.rate_shares}: every share must be above 0, and the largest of them 1, which is the "
                f"whole of `rates`; use rate_shares: [0.5, 1.0] or [1.0], and lower `rates` to write less",
            ),
            (
                self.objective == "dot" and not linear,
                "objective `dot` with a two-layer memory has no minimum: its writes grow without bound; use "
                "objective: l2, or depth: 1",
            ),
            (
                self.gradient != "border" and not linear,
                f"gradient `{self.gradient}` needs linear memories, where it stays a linear recurrence; use "
                "gradient: border, or depth: 1",
            ),
            (
                self.gradient == "self_referential" and not all(self.generated_targets),
                "gradient `self_referential` means that the target is M(v) at the fresh weights; use "
                "targets: generated, or gradient: fresh",
            ),
            (
                "border" in (self.erase_since, self.erase_since_generators)
                and (self.gradient != "border" or self.objective == "dot"),
                f"erase_since border brings a squared error's gradient of the border up to date; gradient "
                f"`{self.gradient}` with objective `{self.objective}` leaves nothing to do; use erase_since: start",
            ),
            (
                bool(self.momentum) and self.gradient != "border",
                "momentum needs gradients that are known before the chunk; use gradient: border",
            ),
            (self.normalise and linear, "normalise is a layer inside two-layer memories; use depth: 2"),
        )

    def unbounded(self) -> str | None:
        """Say which memory grows without bound when one key is written again and again; None when none does.

        Not part of the validation: such a rule has a meaning, and models that were trained with it are read.
        """
        return stability.unbounded(self)

    def changed(self, **changes: Any) -> Self:
        """Return the rule with some fields set to other values, validated."""
        return type(self).model_validate(self.model_dump() | changes)

    @property
    def generator_chunk(self) -> int:
        """Tokens between two borders of the generators."""
        return self.chunk_generators or self.chunk

    @property
    def alignment(self) -> int:
        """Tokens between two moments that are a border of every memory: where a document may start."""
        return max(self.chunk, self.generator_chunk)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Of each memory, tokens between two of its borders."""
        return (self.generator_chunk,) * (len(self.adapt) - 1) + (self.chunk,)

    @property
    def limits(self) -> tuple[float, ...]:
        """Largest rate of each memory."""
        return tuple(self.rates.of(name) for name in self.adapt)

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the largest rates each group of heads reaches."""
        return self.rate_shares or ()

    @property
    def since_border(self) -> tuple[bool, ...]:
        """Of each memory, whether its erase term leaves to the gradient what the border held."""
        erases = self.erase != "none"
        generators = erases and self.erase_since_generators == "border"
        return (generators,) * (len(self.adapt) - 1) + (erases and self.erase_since == "border",)

    @property
    def generated_targets(self) -> tuple[bool, ...]:
        """Of each memory, whether its target is its own answer to the value."""
        generators = self.targets_generators == "generated"
        return (generators,) * (len(self.adapt) - 1) + (self.targets == "generated",)

    @property
    def erased_layers(self) -> tuple[bool, bool]:
        """Whether the first and the second layer forget along the written direction."""
        return self.erase != "none", self.erase == "both"

    def index(self, name: str) -> int | None:
        """Place of a memory along the memory dimension; None when it does not adapt."""
        return self.adapt.index(name) if name in self.adapt else None

    @property
    def rate_memory(self) -> float:
        """Largest inner learning rate of `memory`."""
        return self.rates.memory

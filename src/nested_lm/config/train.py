"""How a model is trained: budget, optimizer, schedule, precision, checkpoints, sinks."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from nested_lm.config.section import Count, Fraction, Name, NonNegativeFloat, Place, PositiveFloat, Section
from nested_lm.config.update_rules import TrainingRule


class MatrixOptimizer(Section):
    """How the matrices of one level are stepped."""

    rule: TrainingRule  # the update rule
    rate: PositiveFloat  # a rule's own unit: that of the gradient for gd, momentum, delta_momentum, dmgd
    weight_decay: NonNegativeFloat = 0.1  # decoupled, times the rate


LevelOptimizers = Annotated[tuple[MatrixOptimizer | None, ...], Field(strict=False)]
"""One entry a level of the channel memory, fastest first, for its matrices; null: as the matrices outside levels."""


class AdamW(Section):
    """AdamW for every parameter, but for the matrices of levels that have an optimizer of their own."""

    kind: Literal["adamw"]
    rate: PositiveFloat  # peak of the schedule
    weight_decay: NonNegativeFloat = 0.1  # decoupled, times the rate; matrices only
    beta1: Fraction = 0.9  # share of the running mean of gradients that is kept a step
    beta2: Fraction = 0.95  # the same of squared gradients
    epsilon: PositiveFloat = 1e-8  # added to the root of squared gradients
    levels: LevelOptimizers = ()  # one entry a level of the channel, fastest first; null: as the other matrices


class Muon(Section):
    """Muon for the 2-D matrices inside the blocks; AdamW for embeddings, vectors and memory starts."""

    kind: Literal["muon"]
    rate: PositiveFloat  # of the matrices, in AdamW units (update RMS matched to AdamW)
    adamw_rate: PositiveFloat  # of everything else
    weight_decay: NonNegativeFloat = 0.1  # decoupled, times the rate; matrices only
    momentum: Fraction = 0.95  # share of the running sum of gradients that is kept a step
    beta1: Fraction = 0.9  # AdamW's: share of the mean of gradients kept a step
    beta2: Fraction = 0.95  # the same of squared gradients
    epsilon: PositiveFloat = 1e-8  # added to the root of squared gradients
    levels: LevelOptimizers = ()  # one entry a level of the channel, fastest first; null: as the other matrices


class Deep(Section):
    """An update rule for the 2-D matrices inside the blocks; AdamW for embeddings, vectors and memory starts."""

    kind: Literal["deep"]
    rule: TrainingRule  # the update rule
    rate: PositiveFloat  # of the matrices, in the rule's own unit
    adamw_rate: PositiveFloat  # of everything else
    weight_decay: NonNegativeFloat = 0.1  # decoupled, times the rate; matrices only
    beta1: Fraction = 0.9  # AdamW's, as the next two
    beta2: Fraction = 0.95  # the same of squared gradients
    epsilon: PositiveFloat = 1e-8  # added to the root of squared gradients
    levels: LevelOptimizers = ()  # one entry a level of the channel, fastest first; null: as the other matrices


Optimizer = Annotated[AdamW | Muon | Deep, Field(discriminator="kind")]


class Cosine(Section):
    """Linear warm-up, then half a cosine to `final` of the peak."""

    kind: Literal["cosine"]
    warmup_tokens: Annotated[int, Field(ge=0)]  # tokens until the peak
    final: Fraction = 0.1  # rate at the end / peak


class WarmupStableDecay(Section):
    """Linear warm-up, constant, then linear to `final` of the peak over the last `decay_tokens`."""

    kind: Literal["wsd"]
    warmup_tokens: Annotated[int, Field(ge=0)]  # tokens until the peak
    decay_tokens: Annotated[int, Field(ge=0)]  # tokens of the decay at the end
    final: Fraction = 0.0  # rate at the end / peak


Schedule = Annotated[Cosine | WarmupStableDecay, Field(discriminator="kind")]


FactKind = Literal["note", "number", "word"]
"""A fact's wording: `key: number.`, or RULER's sentence about the special magic number, or word, of a key."""


class Facts(Section):
    """Facts and questions about them, written over the text of training rows (`data/facts.py`).

    The distance from a fact to its question is drawn uniformly between the two `distances`, as far as the row goes.
    """

    share: Annotated[float, Field(gt=0.0, le=1.0)]  # of the rows
    every_tokens: PositiveInt  # such a row has from one fact to one for every so many of its tokens, evenly drawn
    kinds: Annotated[tuple[FactKind, ...], Field(min_length=1, strict=False)] = ("note", "number", "word")
    # one that is named twice is drawn twice as often
    distances: Annotated[tuple[Annotated[int, Field(ge=0)], PositiveInt], Field(strict=False)]  # tokens in between
    ramp_tokens: Annotated[int, Field(ge=0)] = 0  # training tokens over which the largest distance grows to its value
    keys: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] | None = None  # null: those of the package

    @model_validator(mode="after")
    def _distances_are_in_order(self) -> "Facts":
        nearest, farthest = self.distances
        if nearest > farthest:
            raise ValueError(f"distances {nearest}, {farthest}: the first is the smaller one; exchange them")
        return self


class Shuffled(Section):
    """All training documents in an order drawn from the seed, epoch after epoch."""

    kind: Literal["shuffled"]
    facts: Facts | None = None  # written over the text; null: the text as it is


class Chronological(Section):
    """Periods one after the other, one pass, equal tokens each; a checkpoint is kept at each border.

    order: `forward` in the order of time; `reverse` the other way round, a control for how hard each period's text
        is; `shuffled` deals all dated documents out at random, a control without a shift: nothing should be forgotten.
    replay: share of the rows that come from earlier periods, among those that were read; 0: none. They take the
        place of new rows, so that runs with and without replay see equally many tokens.
    """

    kind: Literal["chronological"]
    periods: Annotated[int, Field(ge=2)]  # parts of equal tokens
    order: Literal["forward", "reverse", "shuffled"] = "forward"
    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


Stream = Annotated[Shuffled | Chronological, Field(discriminator="kind")]


class ElasticWeights(Section):
    """Elastic weight consolidation: what earlier periods depend on is held in place by a quadratic penalty.

    The penalty is strength / 2 x sum of F (weight - weight at the last border)^2, F the diagonal of the Fisher
    information a token, summed over the periods that are over.

    Source: Kirkpatrick et al., arXiv 1612.00796, in the online form of arXiv 1805.06370 without decay.
    """

    strength: PositiveFloat  # weight of the penalty
    sequences: Count = 64  # rows of a period that its Fisher information is estimated on


class Probe(Section):
    """A fixed batch of held-out text of every period, scored after every step: what each update does to each period."""

    sequences: Count = 1  # rows of each period


class Checkpoints(Section):
    """When training state is written and how much of it is kept."""

    every_tokens: PositiveInt  # training tokens between two checkpoints
    keep: Count = 2  # newest ones kept; border checkpoints of a chronological stream are always kept


class Logging(Section):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    every_steps: Count = 10  # steps between two lines of metrics.jsonl
    tensorboard: bool = False  # also write TensorBoard events
    wandb_project: str | None = None  # null: W&B is off; offline when no key is set


class ContextStage(Section):
    """An early stage of training, at a shorter context; the tokens of a step stay the same."""

    context_length: Count  # tokens; divides train.context_length
    until_tokens: PositiveInt  # training tokens after which the next stage begins; a whole number of steps


class TrainConfig(Section):
    """One training run."""

    budget_tokens: PositiveInt  # training tokens in all
    context_length: Count  # tokens; of the last stage, of validation, and of the batch sizes below
    curriculum: Annotated[tuple[ContextStage, ...], Field(strict=False)] = ()  # stages before context_length is reached
    batch_size: Count  # sequences of a micro-batch: the most a device holds at once
    accumulation: Count = 1  # micro-batches a step, of all devices together
    init_from: Place | None = None  # checkpoint or run folder whose weights the run starts from; null: drawn ones
    stream: Stream = Shuffled(kind="shuffled")  # order of documents
    ewc: ElasticWeights | None = None  # of a chronological stream
    probe: Probe | None = None  # of a chronological stream
    optimizer: Optimizer  # what steps the weights
    schedule: Schedule  # rate over the run
    clip_norm: PositiveFloat = 1.0  # largest norm of the whole gradient
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast; fast state stays float32
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    recompute: Literal["none", "chunk", "block"] = "none"  # what backward computes again to save memory
    compile: bool = False  # torch.compile the blocks
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the run computes
    strategy: Literal["single", "fsdp2"] = "single"  # fsdp2: the processes that torchrun starts share it
    evaluate_every_tokens: PositiveInt  # training tokens between two validations
    evaluate_tokens: PositiveInt  # validation tokens of one such evaluation
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 5  # skipped in a row before the run stops
    checkpoints: Checkpoints  # when the state is written
    logging: Logging = Logging()  # where metrics go

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, of all devices together."""
        return self.context_length * self.batch_size * self.accumulation

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Tokens of a sequence, stage by stage."""
        return (*(stage.context_length for stage in self.curriculum), self.context_length)

    @property
    def facts(self) -> Facts | None:
        """What is written over the text; None: nothing."""
        return self.stream.facts if isinstance(self.stream, Shuffled) else None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.budget_tokens // self.step_tokens)

    @field_validator("strategy", mode="before")
    @classmethod
    def _strategy_exists(cls, found: object) -> object:
        if found == "deepspeed":
            raise ValueError(
                "there is no strategy deepspeed: ZeRO hands flat pieces to the optimizer, and Muon needs whole "
                "matrices; fsdp2 cuts weights, gradients and optimizer state over processes as ZeRO-3 does"
            )
        return found

    @model_validator(mode="after")
    def _strategy_fits(self) -> "TrainConfig":
        if self.strategy == "fsdp2" and self.compile:
            raise ValueError("compile has not been proven with strategy fsdp2; set compile=false, or strategy=single")
        return self

    @model_validator(mode="after")
    def _periods_are_there(self) -> "TrainConfig":
        for name in ("ewc", "probe"):
            if getattr(self, name) is not None and not isinstance(self.stream, Chronological):
                raise ValueError(
                    f"{name} looks back at the periods of a chronological stream, and the stream is shuffled; set "
                    f"stream.kind=chronological, or remove {name}"
                )
            if getattr(self, name) is not None and self.strategy != "single":
                raise ValueError(f"{name} has not been proven with strategy {self.strategy}; set strategy=single")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "TrainConfig":
        begin, step = 0, self.step_tokens
        for index, stage in enumerate(self.curriculum):
            where = f"curriculum[{index}]"
            if self.context_length % stage.context_length:
                near = max(n for n in range(1, stage.context_length + 1) if self.context_length % n == 0)
                raise ValueError(
                    f"{where}.context_length {stage.context_length} does not divide context_length "
                    f"{self.context_length}, so the tokens of a step could not stay the same; try {near}"
                )
            if stage.until_tokens % step:
                near = max(1, round(stage.until_tokens / step)) * step
                raise ValueError(
                    f"{where}.until_tokens {stage.until_tokens:,} is not a whole number of steps of {step:,} tokens; "
                    f"try {near}"
                )
            if not begin < stage.until_tokens < self.num_steps * step:
                raise ValueError(
                    f"{where}.until_tokens {stage.until_tokens:,} must lie after {begin:,}, where it begins, and "
                    f"before the end of the budget, {self.num_steps * step:,}"
                )
            begin = stage.until_tokens
        if self.curriculum and isinstance(self.stream, Chronological):
            raise ValueError("a curriculum needs a shuffled stream; set stream.kind=shuffled, or remove curriculum")
        return self

    @model_validator(mode="after")
    def _facts_fit(self) -> "TrainConfig":
        facts = self.facts
        if facts is None:
            return self
        most = self.context_length // facts.every_tokens
        if facts.keys is not None and len(set(facts.keys)) < most:
            raise ValueError(
                f"stream.facts.keys has {len(set(facts.keys))} different keys, and a row of {self.context_length} "
                f"tokens has up to {most} facts, each with a key of its own; give more keys, or a larger every_tokens"
            )
        if facts.distances[1] >= self.context_length:
            raise ValueError(
                f"stream.facts.distances reach {facts.distances[1]} tokens, and a row of the stream has "
                f"{self.context_length} (context_length); a fact and its question lie in one row, so use distances "
                f"below {self.context_length}, or a longer context"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainConfig":
        schedule = self.schedule
        needed = schedule.warmup_tokens + (schedule.decay_tokens if schedule.kind == "wsd" else 0)
        if needed > self.budget_tokens:
            names = [name for name in ("warmup_tokens", "decay_tokens") if hasattr(schedule, name)]
            found = " and ".join(f"schedule.{name} {getattr(schedule, name):,}" for name in names)
            share = self.budget_tokens / (2 * needed)  # the same proportions, in half of the budget
            fitting = " ".join(f"train.schedule.{name}={int(getattr(schedule, name) * share)}" for name in names)
            raise ValueError(
                f"{found} need {needed:,} tokens, but budget_tokens is {self.budget_tokens:,}; "
                f"set {fitting}, or raise train.budget_tokens"
            )
        if isinstance(self.stream, Chronological) and self.num_steps < self.stream.periods:
            raise ValueError(
                f"{self.num_steps} steps cannot cover {self.stream.periods} periods; raise budget_tokens to "
                f"at least {self.stream.periods * self.step_tokens:,}"
            )
        return self

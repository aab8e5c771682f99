"""What a result file holds: run identity, settings and the metrics of one task, strict and finite.

Lists run in the order of the file: documents in the order of the data set, periods and positions ascending.
Bits per byte count the nats of every scored token of a document, its closing end-of-text token included, over
the UTF-8 bytes of its text.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from nested_lm.config.section import Count, Fraction, NonNegativeFloat, Section
from nested_lm_lab.evaluation.interval import Interval, Natural
from nested_lm_lab.tasks.continual.schema import ContinualTaskMetrics
from nested_lm_lab.tasks.needles.metrics import BabilongMetrics, BooksMetrics, NiahMetrics
from nested_lm_lab.tasks.zeroshot.metrics import ZeroShotMetrics

SCHEMA_VERSION = 1

Row = tuple[float, ...]


class RunIdentity(Section):
    """What a number came from."""

    run_id: str
    name: str
    arm: str
    config_hash: str
    data_hash: str
    tokenizer_hash: str
    commit: str | None  # null: not run from a git checkout
    seed: Natural
    parameters: Count
    tokens: Natural  # training tokens seen
    step: Natural
    context_length: Count


class DocumentSums(Section):
    """Sums of each held-out document, kept so that two runs can be compared pair by pair later."""

    id: tuple[str, ...]
    period: tuple[Natural | None, ...]
    bytes: tuple[Natural, ...]
    tokens: tuple[Natural, ...]  # scored tokens, the end-of-text token included
    window_nats: Row
    streaming_nats: Row | None  # null: the model's state grows with the text, or streaming was not asked for
    unigram_nats: Row
    bigram_nats: Row

    @model_validator(mode="after")
    def _one_entry_a_document(self) -> "DocumentSums":
        for field in type(self).model_fields:
            column = getattr(self, field)
            if column is not None and len(column) != len(self.id):
                raise ValueError(f"{field} has {len(column)} entries but there are {len(self.id)} documents")
        return self


class PeriodScore(Section):
    """One chronological period; null where it has no held-out document."""

    label: str
    first_year: int
    last_year: int
    documents: Natural
    bits_per_byte: Interval | None


class PositionScore(Section):
    """Tokens at positions `first` to `last`, counted from 0 at the last fresh state; null where none."""

    first: Natural
    last: Natural
    tokens: Natural
    nats_per_token: Interval | None


class ProtocolScores(Section):
    """One way of reading the documents. window: fresh state every context; streaming: state carried."""

    bits_per_byte: Interval
    nats_per_token: Interval
    below_bigram: Interval  # bits per byte of the bigram floor minus the model's, paired by document
    by_period: tuple[PeriodScore, ...]
    by_position: tuple[PositionScore, ...]
    tokens_per_s: NonNegativeFloat


class FloorScores(Section):
    """A count model of the training split, scored on the same documents."""

    bits_per_byte: Interval
    nats_per_token: Interval
    by_period: tuple[PeriodScore, ...]


class LanguageModellingMetrics(Section):
    """Held-out text."""

    kind: Literal["language_modelling"]
    split: Literal["validation", "test"]
    window: ProtocolScores
    streaming: ProtocolScores | None
    streaming_gain: Interval | None  # bits per byte of window minus streaming, paired by document
    unigram: FloorScores
    bigram: FloorScores
    documents: DocumentSums


class PasskeySample(Section):
    """One prompt, with its key and with the key's sentence taken out."""

    depth: Fraction  # of the key in the document: 0 start, 1 end
    answer_tokens: Count
    nats_per_token: NonNegativeFloat
    exact: bool
    first_rank: Count  # of the first answer token among the vocabulary; 1 is the model's first choice
    control_nats_per_token: NonNegativeFloat
    control_exact: bool
    control_first_rank: Count


class PasskeyLength(Section):
    """All samples of one length. `worth`: nats per answer token that the key in the text saves, paired."""

    length: Count  # tokens of the prompt
    nats_per_token: Interval
    exact: Interval
    median_first_rank: float
    control_nats_per_token: Interval
    control_exact: Interval
    control_median_first_rank: float
    worth: Interval
    tokens_per_s: NonNegativeFloat
    samples: tuple[PasskeySample, ...]


class PasskeyMetrics(Section):
    """A five-digit key hidden in a document."""

    kind: Literal["passkey"]
    reading: Literal["segments", "whole"]  # state carried over segments, or one forward over the whole prompt
    lengths: tuple[PasskeyLength, ...]


class TextSample(Section):
    """A prompt and how the model goes on."""

    prompt: str
    text: str
    tokens: Natural  # generated before an end-of-text token, if one came
    ended: bool  # an end-of-text token came before max_new_tokens
    seed: Natural


class SamplingMetrics(Section):
    """Generated text."""

    kind: Literal["sampling"]
    samples: tuple[TextSample, ...]
    tokens_per_s: NonNegativeFloat


class Segment(Section):
    """One stretch of the training stream and its held-out documents; bytes and tokens are the scored ones."""

    label: str
    periods: tuple[Natural, ...]
    documents: Count
    bytes: Count
    tokens: Count
    trained_tokens: Natural  # training tokens seen at the end of this segment


class ContinualMetrics(Section):
    """Loss on every segment after every segment: row t, column s. Row 0 is the untrained model.

    Lower is better. forgetting has one row a trained segment: [t-1][s-1] for t >= s, null above the diagonal.
    """

    kind: Literal["continual"]
    segments: tuple[Segment, ...]
    bits_per_byte: tuple[tuple[Interval, ...], ...]
    nats_per_token: tuple[tuple[Interval, ...], ...]
    forgetting: tuple[tuple[Interval | None, ...], ...]  # bits per byte above the best seen since the segment
    backward_transfer: Interval  # positive: later training helped earlier segments
    forward_transfer: Interval  # positive: earlier training helped segments not yet seen
    plasticity: Interval  # mean loss on a segment right after it
    accuracy: Interval  # mean loss over the segments at the end (ACC, lower is better)


Metrics = Annotated[
    LanguageModellingMetrics
    | PasskeyMetrics
    | SamplingMetrics
    | ContinualMetrics
    | NiahMetrics
    | ContinualTaskMetrics
    | BabilongMetrics
    | BooksMetrics
    | ZeroShotMetrics,
    Field(discriminator="kind"),
]


class CheckpointMark(Section):
    """Which checkpoint was scored: folder name and digest of its manifest."""

    name: str
    digest: str


class ResultFile(Section):
    """One task on one checkpoint (or on the border checkpoints of a chronological run)."""

    schema_version: Literal[1]
    task: str  # the kind of the metrics, or `KIND_LABEL` for another result of that kind
    task_version: str
    identity: RunIdentity
    settings: dict[str, JsonValue]  # of the task; equal in every row of one table
    checkpoint: CheckpointMark
    device: str
    scored_commit: str | None = None  # of the program that scored, identity.commit trained; null: not known
    metrics: Metrics
    created: str
    wall_seconds: NonNegativeFloat

    @property
    def label(self) -> str:
        """What sets the result apart from another of its kind; empty for the one that has the kind's own name."""
        return self.task.removeprefix(self.metrics.kind).removeprefix("_")

    @model_validator(mode="after")
    def _metrics_belong_to_the_task(self) -> "ResultFile":
        if self.task != self.metrics.kind and not self.task.startswith(f"{self.metrics.kind}_"):
            raise ValueError(f"task is {self.task!r} but the metrics are those of {self.metrics.kind!r}")
        return self

"""Metrics of held-out text and of samples.

Lists run in the order of the file: documents in the order of the data set, periods and positions ascending.
Bits per byte count the nats of every scored token of a document, its closing end-of-text token included, over
the UTF-8 bytes of its text.
"""

from typing import Literal

from pydantic import model_validator

from nested_lm.config.section import NonNegativeFloat, Section
from nested_lm_lab.evaluation.interval import Interval, Natural
from nested_lm_lab.evaluation.schema import Metrics

Row = tuple[float, ...]


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


class LanguageModellingMetrics(Metrics):
    """Held-out text."""

    kind: Literal["language_modelling"]
    split: Literal["validation", "test"]
    window: ProtocolScores
    streaming: ProtocolScores | None
    streaming_gain: Interval | None  # bits per byte of window minus streaming, paired by document
    unigram: FloorScores
    bigram: FloorScores
    documents: DocumentSums


class TextSample(Section):
    """A prompt and how the model goes on."""

    prompt: str
    text: str
    tokens: Natural  # generated before an end-of-text token, if one came
    ended: bool  # an end-of-text token came before max_new_tokens
    seed: Natural


class SamplingMetrics(Metrics):
    """Generated text."""

    kind: Literal["sampling"]
    samples: tuple[TextSample, ...]
    tokens_per_s: NonNegativeFloat

"""What a result file holds of needle curves: every row, and what is made of the rows.

Rows are columns of one length: one entry for each prompt with a needle, sample after sample, depths ascending.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nested_lm.config.section import Count, Fraction, NonNegativeFloat, Section
from nested_lm_lab.evaluation.interval import Interval, Natural
from nested_lm_lab.evaluation.schema import Metrics


class Score(Section):
    """Answers of one kind. match: share of the references in the output; null where nothing was generated."""

    match: Interval | None
    exact: Interval  # greedy decoding begins with the answer
    nats: Interval  # a token of the answer
    median_rank: float  # of its first token; 1 is the model's first choice


class Controls(Section):
    """The same questions without what they need. What an answer is worth is its distance from these.

    no_needle: the text without the needles that are asked for. needle_only: no text at all but the needles; null
    where the text is the task. reset: a fresh state right before the question. frozen: fast weights are read and not
    written from the question on; unwritten: from the text's first token on, needle at the middle depth; both null for a
    model that has none.
    """

    no_needle: Score
    needle_only: Score | None
    reset: Score
    frozen: Score | None
    unwritten: Score | None = None


class Cell(Section):
    """All samples of one length and depth. distance: median tokens from the needle's start to the question's."""

    depth: Fraction
    distance: Count
    score: Score


class Rows(Section):
    """Single prompts. output: the first characters of what was generated, for a reader to judge."""

    sample: tuple[Natural, ...]
    depth: tuple[Fraction | None, ...]  # null: needles at random depths, or none
    distance: tuple[Natural | None, ...]  # tokens from the first needle's start to the question's
    match: tuple[Fraction, ...]
    exact: tuple[bool, ...]
    nats: tuple[NonNegativeFloat, ...]
    rank: tuple[Count, ...]
    frozen_exact: tuple[bool, ...] | None
    frozen_nats: tuple[NonNegativeFloat, ...] | None
    output: tuple[str, ...]

    @model_validator(mode="after")
    def _one_entry_a_row(self) -> "Rows":
        for field in type(self).model_fields:
            column = getattr(self, field)
            if column is not None and len(column) != len(self.sample):
                raise ValueError(f"{field} has {len(column)} entries but there are {len(self.sample)} rows")
        return self


class ControlRows(Section):
    """Single questions without what they need: one entry a sample."""

    no_needle_match: tuple[Fraction, ...]
    no_needle_exact: tuple[bool, ...]
    no_needle_nats: tuple[NonNegativeFloat, ...]
    needle_only_exact: tuple[bool, ...] | None
    needle_only_nats: tuple[NonNegativeFloat, ...] | None
    reset_exact: tuple[bool, ...]
    reset_nats: tuple[NonNegativeFloat, ...]
    unwritten_exact: tuple[bool, ...] | None = None
    unwritten_nats: tuple[NonNegativeFloat, ...] | None = None


class LengthScores(Section):
    """All samples of one length. Intervals count samples, not rows: depths of a sample share its text.

    worth: nats a token that the needle saves, paired with the text without it. state_bytes: of one row after the text.
    """

    score: Score
    worth: Interval
    controls: Controls
    cells: tuple[Cell, ...]  # none where depths are random
    rows: Rows
    control_rows: ControlRows
    state_bytes: Natural
    tokens: Natural  # of all prompts, those of `unwritten` included; older results leave these out
    tokens_read: Natural  # of texts; what several prompts share, once
    seconds: NonNegativeFloat


class NeedleLength(Section):
    """One length: scores, or why there are none."""

    length: Count  # tokens of a prompt
    scores: LengthScores | None
    stopped: str | None

    @model_validator(mode="after")
    def _one_of_both(self) -> "NeedleLength":
        if (self.scores is None) == (self.stopped is None):
            raise ValueError(f"length {self.length}: exactly one of scores and stopped is null")
        return self


class EffectiveLength(Section):
    """The longest length up to which the lower bound of `match` stays at the threshold or above.

    null: none does, or the samples are too few for any score to reach it (`summary.effective_words` tells which).
    """

    threshold: Fraction
    length: Count | None


class NeedleTask(Section):
    """One task at all its lengths, ascending."""

    task: str
    upstream: str  # its name where it comes from
    haystack: str | None
    lengths: Annotated[tuple[NeedleLength, ...], Field(min_length=1)]
    effective: tuple[EffectiveLength, ...]


class _Curves(Metrics):
    """What all needle curves have in common. max_state_mib: limit within which states were read side by side."""

    constant_state: bool  # false: the state grows with the text, up to that limit or the end of memory
    max_state_mib: Count
    tasks: Annotated[tuple[NeedleTask, ...], Field(min_length=1)]
    tokens_per_s: NonNegativeFloat  # of all prompts; shared tokens count for each
    tokens_read_per_s: NonNegativeFloat


class NiahMetrics(_Curves):
    """Needle curves after RULER."""

    kind: Literal["niah"]


class BabilongMetrics(_Curves):
    """Questions about facts hidden in books, after BABILong."""

    kind: Literal["babilong"]


class BookPosition(Section):
    """Nats a token at positions `first` to `last`, counted from 0 at the book's start.

    carried: with the state carried from the book's start. fresh: with a fresh state every training context. saved: the
    second minus the first, paired by book.
    """

    first: Natural
    last: Natural
    carried: Interval
    fresh: Interval
    saved: Interval


class BooksMetrics(Metrics):
    """Loss by position in long books. Intervals resample books.

    length: tokens of each book that were asked for. reached: that were read before the limit for states, or memory,
    ended it; `stopped` says how. max_state_mib: that limit; null: a result of before it was kept.
    perplexity: exp of the nats a token with carried state.
    """

    kind: Literal["books"]
    books: Count
    length: Count
    reached: Count
    stopped: str | None
    max_state_mib: Count | None = None
    constant_state: bool
    carried: Interval
    fresh: Interval
    saved: Interval
    perplexity: Interval
    positions: Annotated[tuple[BookPosition, ...], Field(min_length=1)]
    tokens_per_s: NonNegativeFloat


LongTextMetrics = NiahMetrics | BabilongMetrics | BooksMetrics
"""What is measured within a limit for states."""


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


class PasskeyMetrics(Metrics):
    """A five-digit key hidden in a document."""

    kind: Literal["passkey"]
    reading: Literal["segments", "whole"]  # state carried over segments, or one forward over the whole prompt
    lengths: tuple[PasskeyLength, ...]

"""What result files hold of continual learning."""

from typing import Annotated, Literal

from pydantic import Field

from nested_lm.config.section import Count, Fraction, NonNegativeFloat, Section
from nested_lm_lab.evaluation.interval import Interval, Natural
from nested_lm_lab.evaluation.schema import Metrics

Matrix = tuple[tuple[Interval, ...], ...]
Shares = tuple[tuple[Fraction, ...], ...]


class OtherRun(Section):
    """Another run that a result leans on. arm: kind of its mixer and channel memory; null in older files."""

    run_id: str
    name: str
    config_hash: str
    seed: Natural
    commit: str | None
    checkpoint: str
    digest: str
    arm: str | None = None


class RegretMetrics(Metrics):
    """Bits per byte above an oracle that read the same text mixed, with the same budget."""

    kind: Literal["regret"]
    segments: tuple[str, ...]
    oracle: OtherRun
    bits_per_byte: tuple[Interval, ...]  # of the oracle, by segment
    regret: Matrix  # [t-1][s-1]: after segment t, on segment s
    on: Interval  # mean over t = s
    below: Interval  # mean over t > s: segments read before
    above: Interval  # mean over t < s: segments not yet read


class CarriedMetrics(Metrics):
    """The matrix with whole documents read in one stream each, the state carried and the memories writing on."""

    kind: Literal["carried"]
    segments: tuple[str, ...]
    bits_per_byte: Matrix  # row 0: untrained
    backward_transfer: Interval
    accuracy: Interval


class CorrelationScore(Section):
    """A rank correlation; null where one side does not vary or there are fewer than three points."""

    value: Annotated[float, Field(ge=-1.000001, le=1.000001)]
    p_value: Fraction
    smallest_p: Fraction  # that so few points could give
    n: Count


class LesionLevel(Section):
    """What setting one level back costs on each segment; positive: knowledge of it was in this level."""

    level: Natural
    period_tokens: Count
    damage: tuple[Interval, ...]  # bits per byte, paired by document
    centre: Interval | None  # mean segment number weighted by damage; null: damages nothing


class LesionMetrics(Metrics):
    """A lesion matrix: which segment's knowledge goes with which level."""

    kind: Literal["lesion"]
    segments: tuple[str, ...]
    set_back_to: str  # border checkpoint
    bits_per_byte: tuple[Interval, ...]  # of the whole model, by segment
    levels: tuple[LesionLevel, ...]
    others: tuple[Interval, ...]  # damage by setting back everything outside the levels, as a measure of size
    correlation: CorrelationScore | None  # of centres with log periods


class EffectScore(Section):
    """Change at ticks minus change elsewhere, with its permutation test."""

    value: float  # nats a token; positive: a tick of this level makes old text worse
    p_value: Fraction
    smallest_p: Fraction  # that the clearest effect could have had
    ticks: Count
    others: Count
    shifts: Count
    tried: Count
    exact: bool


class LevelEvents(Section):
    """One clock; effect is null where there is nothing to compare with, and `why` says so."""

    level: Natural
    period_tokens: Count
    matched_tokens: Count  # places are multiples of it: borders of the next faster clock
    effect: EffectScore | None
    why: str | None


class EventMetrics(Metrics):
    """What happens at ticks, in training (old periods, step by step) or while reading (loss around the tick)."""

    kind: Literal["events"]
    segments: tuple[str, ...]
    training: tuple[LevelEvents, ...] | None  # null: the run has no probe
    reading: tuple[LevelEvents, ...] | None  # null: no level writes in context


class RetentionCurveScore(Section):
    """What was lost of one segment since its end, by age; thinned to at most a few hundred points."""

    segment: str
    age_tokens: tuple[Natural, ...]
    lost: tuple[NonNegativeFloat, ...]  # nats a token above the best since the segment's end


class RetentionScore(Section):
    """One fit. scale: kappa, or the free time constant in tokens."""

    scale: NonNegativeFloat
    weights: tuple[NonNegativeFloat, ...]
    error: NonNegativeFloat  # nats a token, root mean square over the curves
    held_out: tuple[NonNegativeFloat, ...]  # of each curve, by a fit to the others
    held_out_error: NonNegativeFloat


class RetentionMetrics(Metrics):
    """Forgetting curves fitted with time constants tied to the levels' periods, and with one free exponential."""

    kind: Literal["retention"]
    periods: tuple[Count, ...]
    curves: tuple[RetentionCurveScore, ...]
    tied: RetentionScore
    free: RetentionScore
    tied_is_better: bool  # by the held-out error


class IncrementalScores(Section):
    """A stream of classes. matrix[t][s]: accuracy on task s after task t, among the classes seen, for s <= t."""

    matrix: Shares
    accuracy: Interval  # after the last task, mean over tasks
    incremental: Interval  # mean over t of the accuracy on what was seen
    backward_transfer: Interval
    forgetting: Interval
    plasticity: Interval


class ClassStream(Section):
    """One data set, number of examples a class and order of classes."""

    data: str
    content_hash: str
    order: str  # `given`, or `random N`
    shots: Count | None  # examples read of each class; null: all
    tasks: tuple[tuple[str, ...], ...]  # classes
    tests: Count
    model: IncrementalScores
    floor: IncrementalScores  # nearest class mean of bags of words, same examples, same tests
    above_floor: Interval  # accuracy at the end minus the floor's, paired
    joint: Interval  # accuracy after all examples in one mixed order
    unread: Interval  # accuracy without having read any example
    chance: Fraction
    tokens_read: Count
    state_bytes: Natural
    seconds: NonNegativeFloat


class ClassIncrementalMetrics(Metrics):
    """Classes that come task after task, learned by reading."""

    kind: Literal["class_incremental"]
    streams: tuple[ClassStream, ...]


class FactsEpoch(Section):
    """After one epoch of changing facts, shares of questions by what the model prefers among all values.

    updated: facts that this epoch changed, the new value is first. stale: among them, the value before is preferred
    to the new one. unchanged: facts this epoch left. paraphrase: all facts, asked in words never read. Null in the
    first epoch, which changes nothing.
    """

    updated: Interval | None
    stale: Interval | None
    unchanged: Interval | None
    current: Interval
    paraphrase: Interval
    nats: Interval  # a token of the current value


class FactsMetrics(Metrics):
    """Facts of an invented world that change."""

    kind: Literal["changing_facts"]
    epochs: tuple[FactsEpoch, ...]
    unread: Interval  # first epoch's facts, asked before reading anything
    chance: Fraction
    stale_chance: Fraction
    tokens_read: Count
    state_bytes: Natural


class TranslationScore(Section):
    """Held-out sentences translated into English."""

    chrf: Interval  # 0 to 100
    exact: Interval
    nats: Interval  # a token of the reference


class LanguageScores(Section):
    """One invented language, asked at four moments."""

    unread: TranslationScore
    alone: TranslationScore  # after this language only
    first_then_other: TranslationScore  # learned first, the other one after it
    other_then_this: TranslationScore  # learned second
    kept: Interval  # chrF of first_then_other minus alone, paired; negative: the other language took its place


class LanguagesMetrics(Metrics):
    """Two invented languages, learned one after the other by reading."""

    kind: Literal["invented_languages"]
    a: LanguageScores
    b: LanguageScores
    copy_chrf: Interval  # of repeating the sentence unchanged, language A: the floor
    lesson_sentences: Count
    tokens_read: Count
    state_bytes: Natural


class Segment(Section):
    """One stretch of the training stream and its held-out documents; bytes and tokens are the scored ones."""

    label: str
    periods: tuple[Natural, ...]
    documents: Count
    bytes: Count
    tokens: Count
    trained_tokens: Natural  # training tokens seen at the end of this segment


class ContinualMetrics(Metrics):
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

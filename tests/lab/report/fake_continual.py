"""One result of every kind of continual learning, and a campaign whose chronological Hope run has them all."""

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.results import load_result, write_result
from nested_lm_lab.tasks.continual.schema import (
    CarriedMetrics,
    ClassIncrementalMetrics,
    ClassStream,
    CorrelationScore,
    EffectScore,
    EventMetrics,
    FactsEpoch,
    FactsMetrics,
    IncrementalScores,
    LanguageScores,
    LanguagesMetrics,
    LesionLevel,
    LesionMetrics,
    LevelEvents,
    OtherRun,
    RegretMetrics,
    RetentionCurveScore,
    RetentionMetrics,
    RetentionScore,
    TranslationScore,
)
from tests.lab.report.fake_runs import write_campaign


def at(value, width=0.1):
    return Interval(value=value, low=value - width, high=value + width, n=9, method="test")


EFFECT = EffectScore(value=0.02, p_value=0.03, smallest_p=0.001, ticks=9, others=27, shifts=64, tried=64, exact=True)
SCORES = IncrementalScores(
    matrix=((0.9,), (0.5, 0.7)),
    accuracy=at(0.6),
    incremental=at(0.75),
    backward_transfer=at(-0.4),
    forgetting=at(0.4),
    plasticity=at(0.8),
)
FLOOR = SCORES.model_copy(update={"matrix": ((1.0,), (0.9, 0.9)), "forgetting": at(0.3)})
READING = TranslationScore(chrf=at(20.5), exact=at(0.1), nats=at(3.0))
TRANSLATED = LanguageScores(
    unread=READING, alone=READING, first_then_other=READING, other_then_this=READING, kept=at(-1.5)
)
METRICS = (
    CarriedMetrics(
        kind="carried",
        segments=("1790-1850", "1851-2026"),
        bits_per_byte=((at(3.0), at(3.1)), (at(2.0), at(2.6)), (at(2.2), at(2.1))),
        backward_transfer=at(-0.2),
        accuracy=at(2.15),
    ),
    LesionMetrics(
        kind="lesion",
        segments=("1790-1850", "1851-2026"),
        set_back_to="period-0",
        bits_per_byte=(at(2.0), at(2.1)),
        levels=(
            LesionLevel(level=0, period_tokens=2048, damage=(at(0.01), at(0.512)), centre=at(1.9)),
            LesionLevel(level=1, period_tokens=8192, damage=(at(0.25), at(-0.02)), centre=at(1.0)),
        ),
        others=(at(3.0), at(3.0)),
        correlation=CorrelationScore(value=-1.0, p_value=0.33, smallest_p=0.33, n=3),
    ),
    EventMetrics(
        kind="events",
        segments=("1790-1850", "1851-2026"),
        training=(
            LevelEvents(level=0, period_tokens=2048, matched_tokens=2048, effect=None, why="it ticks at every place"),
            LevelEvents(level=1, period_tokens=8192, matched_tokens=2048, effect=EFFECT, why=None),
        ),
        reading=None,
    ),
    RetentionMetrics(
        kind="retention",
        periods=(2048, 8192),
        curves=(
            RetentionCurveScore(segment="1790-1850", age_tokens=(100, 200, 400), lost=(0.0, 0.1, 0.15)),
            RetentionCurveScore(segment="1851-1900", age_tokens=(100, 200), lost=(0.0, 0.12)),
        ),
        tied=RetentionScore(scale=0.1, weights=(0.1, 0.1), error=0.01, held_out=(0.02, 0.02), held_out_error=0.02),
        free=RetentionScore(scale=150.0, weights=(0.2,), error=0.01, held_out=(0.03, 0.03), held_out_error=0.03),
        tied_is_better=True,
    ),
    ClassIncrementalMetrics(
        kind="class_incremental",
        streams=(
            ClassStream(
                data="toy",
                content_hash="0" * 16,
                order="given",
                shots=5,
                tasks=(("a", "b"), ("c", "d")),
                tests=40,
                model=SCORES,
                floor=FLOOR,
                above_floor=at(-0.3),
                joint=at(0.7),
                unread=at(0.25),
                chance=0.25,
                tokens_read=100,
                state_bytes=1000,
                seconds=1.0,
            ),
        ),
    ),
    FactsMetrics(
        kind="changing_facts",
        epochs=(
            FactsEpoch(updated=None, stale=None, unchanged=None, current=at(0.5), paraphrase=at(0.4), nats=at(1.0)),
            FactsEpoch(
                updated=at(0.3), stale=at(0.6), unchanged=at(0.5), current=at(0.5), paraphrase=at(0.4), nats=at(1.0)
            ),
        ),
        unread=at(0.1),
        chance=0.125,
        stale_chance=0.5,
        tokens_read=100,
        state_bytes=1000,
    ),
    RegretMetrics(
        kind="regret",
        segments=("1790-1850", "1851-2026"),
        oracle=OtherRun(
            run_id="mixed-1",
            name="mixed",
            config_hash="0",
            seed=1,
            commit=None,
            checkpoint="step-1",
            digest="0",
            arm="attention+swiglu",
        ),
        bits_per_byte=(at(2.0), at(2.1)),
        regret=((at(0.1), at(0.4)), (at(0.2), at(0.1))),
        on=at(0.123),
        below=at(0.2),
        above=at(0.4),
    ),
    LanguagesMetrics(
        kind="invented_languages",
        a=TRANSLATED,
        b=TRANSLATED,
        copy_chrf=at(14.0),
        lesson_sentences=64,
        tokens_read=100,
        state_bytes=1000,
    ),
)


def write_continual(root):
    """Write a campaign with these results under a folder."""
    write_campaign(root, ("hope-chronological", "transformer-chronological"), tasks=("continual",))
    results = root / "runs" / "hope-chronological" / "results"
    matrix = load_result(results / "continual.json")
    for metrics in METRICS:
        changed = {"task": metrics.kind, "metrics": metrics, "settings": {}}
        write_result(results / f"{metrics.kind}.json", matrix.model_copy(update=changed))

"""Figures of continual learning: drawn from results, the same bytes each time, nothing without numbers."""

import json
import xml.etree.ElementTree as ET

import pytest

from nested_lm.eval.continual.schema import (
    ClassIncrementalMetrics,
    ClassStream,
    CorrelationScore,
    EffectScore,
    EventMetrics,
    FactsEpoch,
    FactsMetrics,
    IncrementalScores,
    LesionLevel,
    LesionMetrics,
    LevelEvents,
    RetentionCurveScore,
    RetentionMetrics,
    RetentionScore,
)
from nested_lm.eval.interval import Interval
from nested_lm.eval.results import load_result, write_result
from nested_lm.report import plots_continual
from nested_lm.report.collect import collect
from tests.report.fake_runs import write_campaign

pytest.importorskip("matplotlib")


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
FLOOR = SCORES.model_copy(update={"matrix": ((1.0,), (0.9, 0.9))})
METRICS = (
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
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A campaign whose chronological Hope run has every result of continual learning."""
    root = tmp_path_factory.mktemp("campaign")
    write_campaign(root, ("hope-chronological", "transformer-chronological"), tasks=("continual",))
    results = root / "runs" / "hope-chronological" / "results"
    matrix = load_result(results / "continual.json")
    for metrics in METRICS:
        changed = {"task": metrics.kind, "metrics": metrics, "settings": {}}
        write_result(results / f"{metrics.kind}.json", matrix.model_copy(update=changed))
    return collect(root)


def test_every_figure_is_drawn_the_same_way_twice(campaign):
    for plot in plots_continual.ALL:
        drawing = plot(campaign)
        assert drawing is not None, plot.__name__
        ET.fromstring(drawing.svg)
        assert plot(campaign) == drawing


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        (plots_continual.lesions, [">0.512<", ">-0.020<", "every 8.19 k", "p = 0.33"]),
        (plots_continual.events, ["p = 0.03, 9 ticks", "nothing to compare with"]),
        (plots_continual.retention, ["the clocks fits better", ">1790-1850<"]),
        (plots_continual.classes, ["nearest class mean", "toy, 5 examples a class"]),
        (plots_continual.facts, [">stale<", ">updated<"]),
    ],
)
def test_figures_say_their_numbers(campaign, plot, words):
    svg = plot(campaign).svg
    assert [word for word in words if word not in svg] == []


def test_without_results_there_is_nothing_to_draw(tmp_path):
    write_campaign(tmp_path, ("hope",), tasks=("sampling",))
    campaign = collect(tmp_path)
    assert [plot(campaign) for plot in plots_continual.ALL] == [None] * len(plots_continual.ALL)


def test_results_survive_the_file(campaign):
    for metrics in METRICS:
        assert type(metrics).model_validate_json(json.dumps(metrics.model_dump(mode="json"))) == metrics

"""Figures of continual learning: drawn from results, the same bytes each time, nothing without numbers."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from nested_lm_lab.report import plots_continual
from nested_lm_lab.report.collect import collect
from tests.lab.report.fake_continual import METRICS, at, write_continual
from tests.lab.report.fake_runs import write_campaign

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A campaign whose chronological Hope run has every result of continual learning."""
    root = tmp_path_factory.mktemp("campaign")
    write_continual(root)
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
        (plots_continual.retention, ["the clocks fit better", ">1790-1850<"]),
        (plots_continual.classes, ["nearest class mean", "toy, 5 examples a class"]),
        (plots_continual.facts, [">stale<", ">updated<"]),
    ],
)
def test_figures_say_their_numbers(campaign, plot, words):
    svg = plot(campaign).svg
    assert [word for word in words if word not in svg] == []


def test_runs_that_forgot_nothing_are_named_and_not_drawn(campaign):
    first, second = campaign.runs
    result = first.results["continual"]
    nothing = at(0.0, width=0.0)
    cells = tuple(tuple(cell and nothing for cell in row) for row in result.metrics.forgetting)
    metrics = result.metrics.model_copy(update={"forgetting": cells})
    calm = replace(first, results={"continual": result.model_copy(update={"metrics": metrics})})
    drawing = plots_continual.forgetting(replace(campaign, runs=(calm, second)))
    assert f"nothing was forgotten at any border: {calm.arm}." in drawing.caption
    assert f">{calm.arm}<" not in drawing.svg
    assert f">{second.arm}<" in drawing.svg
    both = plots_continual.forgetting(campaign)
    assert "Not drawn" not in both.caption
    assert f">{first.arm}<" in both.svg


def test_a_long_label_takes_two_lines_and_each_arm_rows_of_its_own(campaign):
    first, second = campaign.runs
    longer = replace(second, config=first.config.model_copy(update={"name": "second-of-its-arm"}))
    twins = replace(campaign, runs=(first, replace(longer, entry=first.entry), second))
    svg = plots_continual.forgetting(twins).svg
    assert ">second-of-its-arm<" in svg
    assert ", second-of-its-arm<" not in svg


def test_without_results_there_is_nothing_to_draw(tmp_path):
    write_campaign(tmp_path, ("hope",), tasks=("sampling",))
    campaign = collect(tmp_path)
    assert [plot(campaign) for plot in plots_continual.ALL] == [None] * len(plots_continual.ALL)


def test_results_survive_the_file(campaign):
    for metrics in METRICS:
        assert type(metrics).model_validate_json(json.dumps(metrics.model_dump(mode="json"))) == metrics

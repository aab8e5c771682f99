"""Figures of needle curves."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from nested_lm.config.load import load_run
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.report import plots_needles
from nested_lm_lab.tasks.needles.measure import ControlRow, Measured, Row
from nested_lm_lab.tasks.needles.metrics import BookPosition, BooksMetrics, NeedleLength, NeedleTask, NiahMetrics
from nested_lm_lab.tasks.needles.summary import effective_lengths, summarise

DEPTHS = (0.0, 0.5, 1.0)
NEEDLES = (plots_needles.needle_matches, plots_needles.needle_worth, plots_needles.needle_distance)
PLOTS = (*NEEDLES, plots_needles.book_positions)


def scores(length, reach, *, samples=4):
    """Scores of a model that finds needles up to `reach` tokens back."""
    rows, controls = [], []
    for sample in range(samples):
        for depth in DEPTHS:
            distance = max(round((1 - depth) * (length - 100)), 30)
            found = distance <= reach
            rows.append(
                Row(sample, depth, distance, True, float(found), 0.1 if found else 5.0, found, 1, None, "12 is it")
            )
        rows.append(Row(sample, None, None, False, 0.0, 5.0 + 0.01 * sample, False, 90, None, "no"))
        controls.append(ControlRow(sample, (0.1, True, 1), (5.0, False, 90), None))
    return summarise(Measured(rows, controls, 1024, 12 * length, 9 * length, 2.0), Bootstrap(samples=100))


def metrics(reach, *, stops_at=None):
    lengths = []
    for length in (2048, 4096, 8192):
        if stops_at is not None and length >= stops_at:
            lengths.append(NeedleLength(length=length, scores=None, stopped="memory ended"))
        else:
            lengths.append(NeedleLength(length=length, scores=scores(length, reach), stopped=None))
    task = NeedleTask(
        task="s1",
        upstream="niah_single_1",
        haystack="noise",
        lengths=tuple(lengths),
        effective=effective_lengths(lengths),
    )
    return NiahMetrics(
        kind="niah",
        constant_state=stops_at is None,
        max_state_mib=2048,
        tasks=(task,),
        tokens_per_s=1000.0,
        tokens_read_per_s=600.0,
    )


def of_books():
    at = Bootstrap(samples=100).mean(np.array([4.0, 4.5, 5.0]))
    edges = [0, 4, 8, 16, 4096]
    return BooksMetrics(
        kind="books",
        books=3,
        length=4096,
        reached=4096,
        stopped=None,
        constant_state=True,
        carried=at,
        fresh=at,
        saved=at,
        perplexity=at,
        positions=tuple(BookPosition(first=a, last=b - 1, carried=at, fresh=at, saved=at) for a, b in pairwise(edges)),
        tokens_per_s=1.0,
    )


@pytest.fixture(scope="module")
def measured(complete):
    """Two runs: one finds needles 3,000 tokens back and runs to the end, the other 200 and stops at 8,192."""

    def with_needles(run, found):
        result = run.results["passkey"].model_copy(update={"task": "niah", "metrics": found})
        books = run.results["passkey"].model_copy(update={"task": "books", "metrics": of_books()})
        return replace(run, results={"niah": result, "books": books})

    hope, transformer = complete.runs[:2]
    runs = (with_needles(hope, metrics(3000)), with_needles(transformer, metrics(200, stops_at=8192)))
    return replace(complete, runs=runs)


def test_figures_are_whole_and_the_same_bytes_again(measured):
    for plot in PLOTS:
        drawing = plot(measured)
        ET.fromstring(drawing.svg)
        assert plot(measured).svg == drawing.svg
        assert not re.search(r"\b20\d\d-\d\d-\d\dT", drawing.svg)


def test_cells_show_their_values(measured):
    svg = plots_needles.needle_matches(measured).svg
    assert svg.count(">1.00<") >= 3 + 2 + 1  # hope at depths 0 to 1, as far as it reaches
    assert "s1: Hope" in svg
    assert "s1: Transformer++" in svg
    saved = plots_needles.needle_worth(measured).svg
    assert ">4.92<" in saved  # 5.015 without the needle, 0.1 with it


def test_distances_gather_lengths_and_count_texts(measured):
    task = measured.runs[0].results["niah"].metrics.tasks[0]
    bins = list(plots_needles._by_distance(task))
    assert [entry.found.value for entry in bins] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert bins[0].found.n == 12  # four samples of three lengths
    assert bins[2].found.n == 8  # 1,948 tokens back in the shortest, 1,998 in the next
    assert bins[0].distance == pytest.approx(30)
    assert bins[-1].saved.value == pytest.approx(0.015, abs=1e-6)


def test_lines_stand_at_windows_levels_and_the_training_context():
    found = plots_needles.spans(load_run("hope/demo_in_context"))
    assert found == {
        32: "level 0 in context",
        64: "level 1 in context",
        256: "trained on",
        2048: "level 0",
        4096: "level 1",
    }
    assert plots_needles.spans(load_run("baselines/sliding_window_demo"))[64] == "window"
    assert plots_needles.spans(load_run("baselines/titans_mac_demo"))[64] == "segment"


def test_no_figure_without_needles(complete):
    assert [plot(complete) for plot in PLOTS] == [None] * len(PLOTS)


def test_lines_are_drawn_where_the_axis_shows_them(measured):
    svg = plots_needles.needle_distance(measured).svg
    assert "level 0 2k" in svg
    assert "level 1 4k" in svg
    assert "trained on 256" in svg


@pytest.mark.parametrize(
    ("tokens", "words"), [(2048, "2k"), (524288, "512k"), (1 << 20, "1,024k"), (256, "256"), (5000, "5 k")]
)
def test_lengths_are_written_as_the_command_line_takes_them(tokens, words):
    assert plots_needles.short_length(tokens) == words


def with_metrics(campaign, run, found):
    result = run.results["niah"].model_copy(update={"metrics": found})
    return replace(campaign, runs=(replace(run, results={"niah": result}),))


def test_a_cross_is_explained_by_what_ended_the_run(measured):
    hope, transformer = measured.runs[:2]
    assert "a length that was not read: there or before, memory ended." in plots_needles.needle_worth(measured).caption
    assert "cross" not in plots_needles.needle_matches(replace(measured, runs=(hope,))).caption
    found = transformer.results["niah"].metrics
    (task,) = found.tasks
    stop = NeedleLength(length=8192, scores=None, stopped="a state: 3,000 MiB, and the limit is 2,048 MiB")
    task = task.model_copy(update={"lengths": (*task.lengths[:-1], stop)})
    limited = with_metrics(measured, transformer, found.model_copy(update={"tasks": (task,)}))
    caption = plots_needles.needle_matches(limited).caption
    assert "before, the limit of 2,048 MiB (--max-state-mib) was reached." in caption
    assert "memory ended" not in caption


def test_needles_at_random_depths_have_a_figure_over_the_distance(measured):
    run = measured.runs[0]
    found = run.results["niah"].metrics
    (task,) = found.tasks
    lengths = tuple(
        entry.model_copy(update={"scores": entry.scores.model_copy(update={"cells": ()})}) for entry in task.lengths
    )
    several = task.model_copy(update={"task": "mv", "lengths": lengths})
    svg = plots_needles.needle_distance(with_metrics(measured, run, found.model_copy(update={"tasks": (several,)}))).svg
    assert "mv: found" in svg
    both = with_metrics(measured, run, found.model_copy(update={"tasks": (task, several)}))
    assert "only in the figure over the distance or in tables: mv." in plots_needles.needle_matches(both).caption


def test_points_of_one_text_are_hollow_and_not_joined(measured):
    at = Bootstrap(samples=100).mean(np.array([4.0, 4.5, 5.0]))
    one = at.model_copy(update={"low": None, "high": None, "n": 1})
    with plots_needles.canvas(1, 1, height=3) as (_, axes):
        plots_needles._draw_bins(axes[0][0], [(64, at), (128, at), (256, one), (512, one)], "#000000")
        joined, alone = axes[0][0].lines
    assert list(joined.get_xdata()) == [64, 128]
    assert joined.get_linestyle() == "-"
    assert list(alone.get_xdata()) == [256, 512]
    assert alone.get_linestyle() == "None"
    assert alone.get_markerfacecolor() == "white"


def test_results_of_one_run_become_one_curve(measured):
    run = measured.runs[0]
    (task,) = run.results["niah"].metrics.tasks
    far = task.model_copy(update={"lengths": (NeedleLength(length=65536, scores=scores(65536, 3000), stopped=None),)})
    long = run.results["niah"].metrics.model_copy(update={"tasks": (far,)})
    result = run.results["niah"].model_copy(update={"task": "niah_long", "metrics": long})
    both = replace(measured, runs=(replace(run, results=run.results | {"niah_long": result}),))
    ((_, ((_, whole),)),) = plots_needles._tasks(both)
    assert [entry.length for entry in whole.lengths] == [2048, 4096, 8192, 65536]
    assert plots_needles.needle_matches(both).svg != plots_needles.needle_matches(replace(both, runs=(run,))).svg

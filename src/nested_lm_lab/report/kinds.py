"""Results that the page of a campaign has no section for: by their tasks' tables, or by their intervals."""

from collections.abc import Sequence

from nested_lm_lab.evaluation.interval import intervals_of
from nested_lm_lab.evaluation.registry import find_task
from nested_lm_lab.report.arms import clock_sweep, seeds
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.tables import ABSENT, Cell, Shown, Table, interval_cell

_MOST_ROWS = 60


def other_results(campaign: Campaign) -> list[Shown]:
    """Arms over seeds, every result the page has no section for, and clocks."""
    found = []
    for name in dict.fromkeys(name for run in campaign.runs for name in run.results):
        runs = [run for run in campaign.runs if name in run.results]
        task = find_task(runs[0].results[name].metrics.kind)
        if not task.on_the_page:
            found += task.tables(campaign, runs, name)
    return [*seeds(campaign), *found, *clock_sweep(campaign)]


def intervals(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Every interval of a result, one row each, for kinds without a table of their own."""
    columns = [dict(intervals_of(run.results[task].metrics)) for run in runs]
    paths = list(dict.fromkeys(path for column in columns for path in column))
    rows = [
        (Cell(path), *(interval_cell(column[path]) if path in column else Cell(ABSENT) for column in columns))
        for path in paths[:_MOST_ROWS]
    ]
    left = f" {len(paths) - _MOST_ROWS} more numbers are in the result files." if len(paths) > _MOST_ROWS else ""
    kind = runs[0].results[task].metrics.kind
    text = f"Result kind `{kind}` has no table of its own; these are its numbers with intervals.{left}"
    return [Shown(task.replace("_", " "), text, Table(("number", *_labels(campaign, runs)), tuple(rows)))]


def _labels(campaign: Campaign, runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(campaign.label(run) for run in runs)

"""Tables of result kinds: one registry. A kind without a table of its own is shown by its intervals, and named."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report import continual_tables, needle_tables, zeroshot_tables
from nested_lm_lab.report.arms import clock_sweep, seeds
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.tables import ABSENT, Cell, Shown, Table, interval_cell

_MOST_ROWS = 60
_NAMES = ("task", "data", "label", "segment", "length", "level", "order", "depth", "name")
"""Fields by which an entry of a list is called in a path."""


Renderer = Callable[[Campaign, Sequence[Run], str], list[Shown]]

ON_THE_PAGE = ("language_modelling", "passkey", "sampling", "continual")
"""Kinds that the campaign's page shows in sections of their own."""


def other_results(campaign: Campaign) -> list[Shown]:
    """Arms over seeds, every result the page has no section for, by the registry or by its intervals, and clocks."""
    tasks = dict.fromkeys(task for run in campaign.runs for task in run.results if task not in ON_THE_PAGE)
    found = []
    for task in tasks:
        runs = [run for run in campaign.runs if task in run.results]
        kind = runs[0].results[task].metrics.kind
        found += RENDERERS.get(kind, intervals)(campaign, runs, task)
    return [*seeds(campaign), *found, *clock_sweep(campaign)]


def intervals(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Every interval of a result, one row each, for kinds without a table of their own."""
    columns = [dict(_walk(run.results[task].metrics)) for run in runs]
    paths = list(dict.fromkeys(path for column in columns for path in column))
    rows = [
        (Cell(path), *(interval_cell(column[path]) if path in column else Cell(ABSENT) for column in columns))
        for path in paths[:_MOST_ROWS]
    ]
    left = f" {len(paths) - _MOST_ROWS} more numbers are in the result files." if len(paths) > _MOST_ROWS else ""
    kind = runs[0].results[task].metrics.kind
    text = f"Result kind `{kind}` has no table of its own; these are its numbers with intervals.{left}"
    return [Shown(task.replace("_", " "), text, Table(("number", *_labels(campaign, runs)), tuple(rows)))]


RENDERERS: dict[str, Renderer] = {
    "niah": needle_tables.needles,
    "babilong": needle_tables.babilong,
    "books": needle_tables.books,
    "zeroshot": zeroshot_tables.zero_shot,
    "regret": continual_tables.regret,
    "carried": continual_tables.carried,
    "lesion": continual_tables.lesions,
    "events": continual_tables.events,
    "retention": continual_tables.retention,
    "class_incremental": continual_tables.classes,
    "changing_facts": continual_tables.facts,
    "invented_languages": continual_tables.languages,
}


def _labels(campaign: Campaign, runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(campaign.label(run) for run in runs)


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Interval]]:
    """Intervals below a node with their places; lists of lists (matrices) and single samples are left to the files."""
    if isinstance(node, Interval):
        yield path, node
    elif isinstance(node, BaseModel):
        for name in type(node).model_fields:
            yield from _walk(
                getattr(node, name), f"{path}, {name.replace('_', ' ')}" if path else name.replace("_", " ")
            )
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _walk(child, f"{path}, {name}")
    elif isinstance(node, tuple) and not any(isinstance(child, tuple) for child in node):
        for index, child in enumerate(node):
            name = next((getattr(child, field) for field in _NAMES if hasattr(child, field)), index + 1)
            yield from _walk(child, f"{path} {name}")

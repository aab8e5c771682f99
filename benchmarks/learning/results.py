"""The result file of the suite, and its tables."""

import fcntl
import hashlib
import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from benchmarks.learning.protocol import Task
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit

Row = dict[str, Any]

VERSION = 1
NOT_RUN = "not run"
T_QUANTILE = {
    2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262
}  # fmt: skip
"""Two-sided 95 % quantiles of Student's t for so many seeds."""


def identity(task: Task, arm: str, steps: int, rows: int) -> str:
    """Hash of everything a cell depends on besides the seed and the code."""
    return _digest(task.recipe(steps, rows), task.configuration(arm).model_dump(mode="json"))


def is_current(row: Row, task: Task, steps: int, rows: int) -> bool:
    """Whether a row was made with today's recipe and configuration; settings that came later have their defaults."""
    config = task.configuration(row["arm"])
    if row["identity"] != _digest(task.recipe(steps, rows), row["config"]):
        return False
    try:
        return type(config).model_validate(row["config"]) == config
    except ValidationError:
        return False


def _digest(recipe: list[Any], config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([recipe, config], sort_keys=True).encode()).hexdigest()[:16]


def stamp() -> dict[str, Any]:
    """What the numbers are made with."""
    hardware = {
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
    }
    return {"commit": current_commit(), "hardware": hardware}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load(path: Path) -> list[Row]:
    """Rows of a result file; none when there is no such file."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    found = content.get("version")
    if found != VERSION:
        raise SystemExit(f"{path} has version {found}, this suite writes {VERSION}; move it away and run again")
    return list(content["cells"])


def add(path: Path, rows: list[Row]) -> None:
    """Put rows into a result file, in the place of those of the same cell. Several processes may do so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cells = {_cell(row): row for row in load(path)} | {_cell(row): row for row in rows}
        content = {"version": VERSION, "cells": [cells[key] for key in sorted(cells)]}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _cell(row: Row) -> tuple[str, str, int]:
    return row["task"], row["arm"], row["seed"]


def interval(values: list[float], *, bounds: tuple[float, float] = (-math.inf, math.inf)) -> str:
    """Mean, 95 % interval over seeds (Student's t), cut at the least and largest value that is possible, and seeds."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f} (1 seed)"
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    low, high = max(bounds[0], mean - half), min(bounds[1], mean + half)
    return f"{mean:.2f} ({low:.2f} to {high:.2f}; {len(values)})"


def tables(groups: Mapping[str, Sequence[Task]], arms: list[str], rows: list[Row], *, tested: int) -> str:
    """Markdown: for each group of tasks a table with a row an arm. tested: sequences a length."""
    lines = [_origin(rows), ""]
    for title, tasks in groups.items():
        lines += [f"### {title}", "", *(f"- `{task.name}`: {task.about}" for task in tasks), ""]
        lines += [*_table(tasks, arms, rows, tested), ""]
    return "\n".join(lines)


def _origin(rows: list[Row]) -> str:
    commits = ", ".join(sorted({str(row["commit"])[:12] for row in rows}))
    processors = ", ".join(sorted({row["hardware"]["processor"] for row in rows}))
    hours = sum(row["cpu_s"] for row in rows) / 3600
    return f"{len(rows)} cells, {hours:.1f} processor hours on {processors}; commits {commits}."


def _bounds(task: Task, measure: str) -> tuple[float, float]:
    if task.unit != "share":
        return -math.inf, math.inf
    return (-1.0 if measure in task.differences else 0.0), 1.0


def _table(tasks: Sequence[Task], arms: list[str], rows: list[Row], tested: int) -> list[str]:
    columns = [(task, measure) for task in tasks for measure in task.shown]
    lines = ["| Arm | " + " | ".join(f"{task.name} {measure}" for task, measure in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    missing = []
    for arm in dict.fromkeys(arm for task in tasks for arm in task.arms or arms):
        cells = [_cell_text(*column, arm, arms, rows) for column in columns]
        if set(cells) <= {"", NOT_RUN}:
            missing.append(arm)
        else:
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    references = {task.name: task.references(tested) for task in tasks}
    for name in dict.fromkeys(name for found in references.values() for name in found):
        cells = [references[task.name].get(name, {}).get(measure) for task, measure in columns]
        lines.append(f"| *{name}* | " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    return [*lines, "", f"{NOT_RUN.capitalize()}: {', '.join(missing)}."] if missing else lines


def _cell_text(task: Task, measure: str, arm: str, arms: list[str], rows: list[Row]) -> str:
    """What the page has for one arm and measure."""
    if arm not in (task.arms or arms):
        return ""
    mine = [row for row in rows if (row["task"], row["arm"]) == (task.name, arm)]
    values = [row["measures"][measure] for row in mine if measure in row["measures"]]
    diverged = sum(row["diverged_at"] is not None for row in mine)
    if not mine or not (values or diverged):
        return "-" if mine else NOT_RUN
    parts = [interval(values, bounds=_bounds(task, measure))] if values else []
    return ", ".join(parts + ([f"{diverged} diverged"] if diverged else []))

"""The result file of the suite, and its tables."""

import fcntl
import hashlib
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.protocol import Task
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit

Row = dict[str, Any]

VERSION = 1
T_QUANTILE = {
    2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262
}  # fmt: skip
"""Two-sided 95 % quantiles of Student's t for so many seeds."""


def identity(task: Task, arm: str, steps: int, rows: int) -> str:
    """Hash of everything a cell depends on besides the seed and the code."""
    config = task.configuration(arm).model_dump(mode="json")
    return hashlib.sha256(json.dumps([task.recipe(steps, rows), config], sort_keys=True).encode()).hexdigest()[:16]


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
    """Mean and 95 % interval over seeds (Student's t), cut at the least and largest value that is possible."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    low, high = max(bounds[0], mean - half), min(bounds[1], mean + half)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def tables(tasks: dict[str, Task], arms: list[str], rows: list[Row], *, tested: int) -> str:
    """Markdown: for each task a row an arm, mean over seeds and interval. tested: sequences a length."""
    lines = [_origin(rows), ""]
    for task in tasks.values():
        mine = [row for row in rows if row["task"] == task.name]
        if mine:
            lines += [f"### {task.name}", "", task.about, "", *_table(task, arms, mine, task.references(tested)), ""]
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


def _table(task: Task, arms: list[str], rows: list[Row], references: dict[str, dict[str, float]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row["measures"]))
    lines = ["| Arm | " + " | ".join(keys) + " | Seeds |", "|---" * (len(keys) + 2) + "|"]
    for arm in task.arms or arms:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        trained = [row for row in mine if row["diverged_at"] is None]
        cells = []
        for key in keys:
            values = [row["measures"][key] for row in trained if key in row["measures"]]
            cells.append(interval(values, bounds=_bounds(task, key)) if values else "-")
        diverged = f", {len(mine) - len(trained)} diverged" if len(mine) > len(trained) else ""
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {len(mine)}{diverged} |")
    for name, measures in references.items():
        cells = [f"{measures[key]:.2f}" if key in measures else "-" for key in keys]
        lines.append(f"| *{name}* | " + " | ".join(cells) + " | |")
    return lines

"""Peak resident memory of training, each side in a process of its own."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import MemoryGoal, MemorySide, Sizes, memory_cases, models
from benchmarks.speed.driver import Worker

STEPS = 3
"""The optimizer's state is there from the second step on."""


def measure(size: Sizes) -> dict[str, Any]:
    """Train each side for a few steps. Returns rows and judged goals.

    `added` is the peak over what the process held before the model was built: parameters, gradients, optimizer and
    activations, without Python and torch. Goals that compare two sides compare it.
    """
    sides, goals = memory_cases(size)
    rows: dict[str, dict[str, Any]] = {}
    for side in sides:
        like = None if side.same_size_as is None else rows[side.same_size_as]["parameters"]
        rows[side.name] = _one(side, size, like)
    return {"rows": list(rows.values()), "goals": [_judged(goal, rows) for goal in goals]}


def _one(side: MemorySide, size: Sizes, parameters: int | None) -> dict[str, Any]:
    arguments = {
        "model": models(size)[side.model],
        "batch": side.batch,
        "tokens": size.tokens,
        "recompute": side.recompute,
        "parameters": parameters,
    }
    with Worker("nested_lm", Path(sys.executable)) as worker:
        before = worker.ask("memory")["resident"]
        ready = worker.ask("prepare", key="", job="language_model", precision="highest", arguments=arguments)
        for _ in range(STEPS):
            worker.ask("run", key="")
        peak = worker.ask("memory")["peak"]
    shape = {"batch": side.batch, "tokens": size.tokens, "recompute": side.recompute}
    sizes = {"peak_bytes": peak, "added_bytes": None if before is None else peak - before}
    return {"side": side.name, "parameters": ready["parameters"]} | shape | sizes


def _judged(goal: MemoryGoal, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if goal.against is None:
        measured = rows[goal.side]["peak_bytes"]
    else:
        added = rows[goal.side]["added_bytes"], rows[goal.against]["added_bytes"]
        measured = None if None in added else added[0] / added[1]
    return vars(goal) | {"measured": measured, "met": None if measured is None else measured <= goal.limit}

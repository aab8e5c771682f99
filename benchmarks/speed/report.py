"""The result file of the suite: rates and ratios from the times, goals judged, and the tables of the page."""

import statistics
from typing import Any

from benchmarks.speed.cases import Case, Goal

Row = dict[str, Any]

VERSION = 2


def judged(case: Case, rows: list[Row]) -> Row:
    """Add rates to the rows, and the measured ratio to each goal."""
    for row in rows:
        if "missing" not in row:
            row["tokens_per_cpu_s"] = _spread([row["tokens"] / seconds for seconds in row["cpu_s"]])
            row["tokens_per_s"] = _spread([row["tokens"] / seconds for seconds in row["wall_s"]])
    timed = {row["side"]: row for row in rows if "missing" not in row}
    return {
        "name": case.name,
        "about": case.about,
        "rows": rows,
        "goals": [vars(goal) | _ratio(goal, timed) for goal in case.goals],
    }


def _spread(values: list[float]) -> Row:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _ratio(goal: Goal, timed: dict[str, Row]) -> Row:
    """Ratio of the medians over the turns both took, and the lowest and highest ratio within one turn."""
    if goal.side not in timed or goal.against not in timed:
        return {"measured": None, "low": None, "high": None, "met": None, "stretch_met": None}
    side, against = timed[goal.side], timed[goal.against]
    turns = min(len(side["cpu_s"]), len(against["cpu_s"]))  # slow sides sit out the later ones
    ours, theirs = (row["cpu_s"][:turns] for row in (side, against))
    scale = side["tokens"] / against["tokens"]
    measured = scale * statistics.median(theirs) / statistics.median(ours)
    pairs = [scale * other / own for own, other in zip(ours, theirs, strict=True)]
    met, stretch = (None if aim is None else measured >= aim for aim in (goal.first, goal.stretch))
    return {"measured": measured, "low": min(pairs), "high": max(pairs), "met": met, "stretch_met": stretch}


def tables(result: Row) -> str:
    """Markdown: origin, goals, and every case's rows."""
    lines = [_origin(result), "", "### Goals", "", *_goals(result), ""]
    for case in result["cases"]:
        lines += [f"### {case['name'][0].upper()}{case['name'][1:]}", "", case["about"], "", *_rows(case), ""]
    lines += ["### Memory of training", "", *_memory(result["memory"]["rows"])]
    return "\n".join(lines)


def _origin(result: Row) -> str:
    hardware, load = result["hardware"], result["load_average"]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in result["gate"]["errors"].items())
    lines = [
        f"Commit `{str(result['commit'])[:12]}`, {result['date']}: {hardware['processor']}, {hardware['cores']} cores, "
        f"one thread a side, {result['turns']} turns; torch {hardware['torch']}, Python {hardware['python']}; "
        f"memories {result['memories']}; load average {load['before'][0]:.1f} before and {load['after'][0]:.1f} after. "
        f"Against the reference in float64: {errors} (limit {result['gate']['limit']:.0e}).",
    ]
    missing = [f"{name}: {found['missing']}" for name, found in result["packages"].items() if "missing" in found]
    return "\n\n".join(lines + [f"Not timed: {line}" for line in missing])


def _goals(result: Row) -> list[str]:
    lines = ["| Goal | Speed of | over | Measured | in single turns | Aim | Stretch |", "|---|---|---|---|---|---|---|"]
    for case in result["cases"]:
        for goal in case["goals"]:
            spread = "" if goal["measured"] is None else f"{goal['low']:.3g} to {goal['high']:.3g}"
            cells = goal["name"], goal["side"], goal["against"], _figure(goal["measured"], "x"), spread
            lines.append(
                f"| {' | '.join(cells)} | {_aim(goal, 'first', 'met')} | {_aim(goal, 'stretch', 'stretch_met')} |"
            )
    lines += ["", "| Memory | of | over | Measured | At most |", "|---|---|---|---|---|"]
    for goal in result["memory"]["goals"]:
        if goal["against"] is None:
            figures = f"{goal['measured'] / 1e9:.2f} GB", f"{goal['limit'] / 1e9:g} GB"
        else:
            figures = _figure(goal["measured"], "x"), f"{goal['limit']:g}x"
        verdict = {True: ", met", False: ", **missed**", None: ""}[goal["met"]]
        lines.append(
            f"| {goal['name']} | {goal['side']} | {goal['against'] or ''} | {figures[0]} | {figures[1]}{verdict} |"
        )
    return lines


def _figure(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:.3g}{unit}"


def _aim(goal: Row, aim: str, verdict: str) -> str:
    if goal[aim] is None:
        return ""
    return f"{goal[aim]:g}x" + {True: ", met", False: ", **missed**", None: ""}[goal[verdict]]


def _rows(case: Row) -> list[str]:
    lines = [
        "| Side | Parameters | Products | Tokens per processor second | low to high | Turns | Tokens per second |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in case["rows"]:
        if "missing" in row:
            lines.append(f"| {row['side']} | | | not timed: {row['missing']} | | | |")
            continue
        rate, wall = row["tokens_per_cpu_s"], row["tokens_per_s"]["median"]
        lines.append(
            f"| {row['side']} | {row['parameters']:,} | {row['precision']} | {_rate(rate['median'])} | "
            f"{_rate(rate['low'])} to {_rate(rate['high'])} | {len(row['cpu_s'])} | {_rate(wall)} |"
        )
    return lines


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(rows: list[Row]) -> list[str]:
    lines = ["| Side | Parameters | Batch x tokens | Peak | Added by training |", "|---|---|---|---|---|"]
    for row in rows:
        added = "not measured" if row["added_bytes"] is None else f"{row['added_bytes'] / 1e6:,.0f} MB"
        shape = f"{row['batch']} x {row['tokens']}"
        lines.append(
            f"| {row['side']} | {row['parameters']:,} | {shape} | {row['peak_bytes'] / 1e6:,.0f} MB | {added} |"
        )
    return lines

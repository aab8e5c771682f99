"""What the trainings and evaluations of a campaign took, by model and suite."""

from collections.abc import Sequence

from nested_lm_lab.report.collect import Campaign
from nested_lm_lab.report.tables import Cell, Shown, Table, duration


def cost(campaign: Campaign) -> list[Shown]:
    """Seconds of trainings and of result files, summed over the runs of each model; none without either."""
    arms = campaign.arms()
    spent: dict[str, dict[str, list[float]]] = {}
    for run in campaign.runs:
        if (seconds := run.steps.last("seconds")) is not None:
            spent.setdefault("training", {}).setdefault(run.arm, []).append(seconds)
    for run in campaign.runs:
        for task, result in run.results.items():
            spent.setdefault(task, {}).setdefault(run.arm, []).append(result.wall_seconds)
    if not spent:
        return []
    rows = [
        (Cell(name.replace("_", " ")), *(_cell(found.get(arm, ())) for arm in arms)) for name, found in spent.items()
    ]
    sums = [sum(sum(found.get(arm, ())) for found in spent.values()) for arm in arms]
    rows.append((Cell("all"), *(Cell(duration(seconds)) for seconds in sums)))
    devices = sorted({str(run.record.get("device")) for run in campaign.runs})
    text = (
        f"Wall time on {'; '.join(devices)}, of the trainings and of the result file of each suite, summed over the "
        "runs of a model; other load on the machine counts. Loading and the start of programs are not in it."
    )
    return [Shown("Cost", text, Table(("time", *arms), tuple(rows)))]


def _cell(seconds: Sequence[float]) -> Cell:
    if not seconds:
        return Cell("-")
    if len(seconds) == 1:
        return Cell(duration(seconds[0]))
    return Cell(
        duration(sum(seconds)), f"{len(seconds)} runs, {duration(min(seconds))} to {duration(max(seconds))} each"
    )

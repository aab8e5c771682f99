"""Figures of what goes on inside the models while they train: gates, updates, fast weights."""

from typing import Any

from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.plot_style import (
    PART_COLOURS,
    Drawing,
    canvas,
    finish,
    label_line_ends,
    thousands,
)

_LAYER_MAP = "viridis"
_FIXED = ("k", "v", "eta", "alpha", "memory"), ("embedding", "matrix", "vector", "level 0", "level 1", "level 2")
"""Memories and parameter groups that have the same colour in every panel."""


def _with_stats(campaign: Campaign) -> list[Run]:
    """The runs on the shuffled stream (else all) with statistics of memories, one an arm."""
    pool = [run for run in campaign.runs if not run.chronological] or list(campaign.runs)
    first: dict[str, Run] = {}
    for run in pool:
        if run.steps.keys("layer0/"):
            first.setdefault(run.arm, run)
    return list(first.values())


def _layers(run: Run) -> list[str]:
    """Names of the layers that report statistics: layer0, layer1, ..."""
    found = {key.split("/")[0] for key in run.steps.keys("layer")}
    return sorted(found, key=lambda name: int(name.removeprefix("layer")))


def _layer_colours(count: int) -> list[Any]:
    """Shallow layers light, deep ones dark."""
    from matplotlib import colormaps

    return [colormaps[_LAYER_MAP](0.82 * (1 - (i + 0.5) / count)) for i in range(count)]


def _part_colour(name: str, index: int) -> str:
    """Colour of a memory or parameter group; one without a fixed colour takes that of its place."""
    for names in _FIXED:
        if name in names:
            return PART_COLOURS[names.index(name)]
    return PART_COLOURS[-1 - index % len(PART_COLOURS)]


def gates(campaign: Campaign) -> Drawing | None:
    """Mean write rate and decay of every layer."""
    runs = _with_stats(campaign)
    if not runs:
        return None
    with canvas(len(runs), 2, height=3.3 * len(runs)) as (figure, axes):
        labels = []
        for row, run in zip(axes, runs, strict=True):
            layers = _layers(run)
            colours = _layer_colours(len(layers))
            for axis, gate in zip(row, ("rate", "decay"), strict=True):
                ends = []
                for layer, colour in zip(layers, colours, strict=True):
                    xs, ys = run.steps.columns("tokens", f"{layer}/{gate}")
                    if xs:
                        axis.plot(xs, ys, color=colour)
                        ends.append((xs[-1], ys[-1], layer.replace("layer", "layer "), colour))
                axis.set_xlim(left=0)
                axis.set(xlabel="training tokens", title=f"{campaign.label(run)}: {gate}")
                thousands(axis.xaxis)
                labels.append((axis, ends))
            row[0].set_ylabel("mean step size of a write")
            row[1].set_ylabel("mean share kept from token to token")
        label_line_ends(labels)
        return finish(
            figure,
            name="gates",
            title="Gates",
            caption="How strongly the memories write (left) and how much of what they hold they keep (right), mean "
            "over tokens and heads: a flat line means training left that gate where it started.",
        )


def updates(campaign: Campaign) -> Drawing | None:
    """Size of the optimizer's updates by parameter group, and apart from them the memories' starts."""
    runs = [run for run in _first_of_each_arm(campaign) if run.steps.keys("update_norm/")]
    if not runs:
        return None
    panels: list[tuple[Run, str, list[str]]] = []
    for run in runs:
        keys = run.steps.keys("update_norm/")
        memories = [key for key in keys if key.startswith("update_norm/memory")]
        groups = [key for key in keys if key not in memories]
        panels.append((run, "parameter groups", groups))
        if memories:
            panels.append((run, "starts of the memories", memories))
    rows = -(-len(panels) // 2)
    with canvas(rows, 2, height=3.3 * rows) as (figure, axes):
        flat, labels = list(axes.flat), []
        for axis, (run, title, keys) in zip(flat, panels, strict=False):
            ends = []
            for index, key in enumerate(keys):
                xs, ys = run.steps.columns("tokens", key)
                pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
                if not pairs:
                    continue
                colour = _part_colour(_group_name(key), index)
                axis.plot(*zip(*pairs, strict=True), color=colour, linewidth=1.5)
                ends.append((*pairs[-1], _group_name(key), colour))
            axis.set_yscale("log")
            axis.set_xlim(left=0)
            axis.set(title=f"{campaign.label(run)}: {title}", xlabel="training tokens", ylabel="update / weights")
            thousands(axis.xaxis)
            _few_log_ticks(axis)
            labels.append((axis, ends))
        for axis in flat[len(panels) :]:
            axis.set_visible(False)
        label_line_ends(labels, size=8.5)
        return finish(
            figure,
            name="updates",
            title="Update sizes",
            caption="Norm of one optimizer update over the norm of the weights it changes, by group. "
            "A line that falls away from the others has "
            "stopped learning.",
        )


def _first_of_each_arm(campaign: Campaign) -> list[Run]:
    pool = [run for run in campaign.runs if not run.chronological] or list(campaign.runs)
    first: dict[str, Run] = {}
    for run in pool:
        first.setdefault(run.arm, run)
    return list(first.values())


def _group_name(key: str) -> str:
    """update_norm/level0/matrix -> level 0; update_norm/memory/k -> k."""
    name = key.removeprefix("update_norm/").removeprefix("memory/")
    if name.startswith("level"):
        level, _, rest = name.partition("/")
        return f"level {level.removeprefix('level')}" + (f" {rest}" if rest not in ("", "matrix") else "")
    return name


def _few_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:.2g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def fast_weights(campaign: Campaign) -> Drawing | None:
    """Norm of the fast weights of every memory at the end of the batch, one panel a layer."""
    runs = [run for run in _with_stats(campaign) if run.steps.keys("layer0/fast_norm/")]
    if not runs:
        return None
    columns = max(len(_layers(run)) for run in runs)
    per_row = min(columns, 4)
    rows_each = -(-columns // per_row)
    with canvas(rows_each * len(runs), per_row, height=2.9 * rows_each * len(runs), sharey=True) as (
        figure,
        axes,
    ):
        labels = []
        for index, run in enumerate(runs):
            layers = _layers(run)
            cells = list(axes[index * rows_each : (index + 1) * rows_each].flat)
            for axis in cells[len(layers) :]:
                axis.set_visible(False)
            for place, (axis, layer) in enumerate(zip(cells, layers, strict=False)):
                ends = []
                for number, key in enumerate(run.steps.keys(f"{layer}/fast_norm/")):
                    colour = _part_colour(key.rsplit("/", 1)[1], number)
                    xs, ys = run.steps.columns("tokens", key)
                    axis.plot(xs, ys, color=colour, linewidth=1.6)
                    ends.append((xs[-1], ys[-1], key.rsplit("/", 1)[1], colour))
                axis.set_xlim(left=0)
                axis.set_title(f"{campaign.label(run)}: {layer.replace('layer', 'layer ')}", fontsize=9.5)
                axis.xaxis.set_major_locator(_few())
                thousands(axis.xaxis)
                axis.set_xlabel("training tokens")
                if place % per_row == 0:
                    axis.set_ylabel("mean Frobenius norm")
                labels.append((axis, ends))
        label_line_ends(labels, size=8.2)  # the panels share their scale, which is final only now
        return finish(
            figure,
            name="fast_weights",
            title="Fast weights",
            caption="Size of each memory's fast weights at the end of a training batch: a line that shoots "
            "up would be a memory losing its balance between writing and forgetting.",
        )


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)

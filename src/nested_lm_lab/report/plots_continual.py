"""Figures of continual learning: forgetting by tokens, lesions, ticks, retention, classes and facts."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.plot_style import (
    INK,
    MUTED,
    PART_COLOURS,
    Drawing,
    canvas,
    finish,
    label_line_ends,
    label_rows,
    panels,
    short_count,
    thousands,
)
from nested_lm_lab.report.plots import arm_colour
from nested_lm_lab.tasks.continual.clocks import predict_lost
from nested_lm_lab.tasks.continual.schema import (
    ClassIncrementalMetrics,
    ContinualMetrics,
    EventMetrics,
    FactsMetrics,
    LesionMetrics,
    LevelEvents,
    RetentionMetrics,
)

M = TypeVar("M")

ORDERS = {
    "forward": "Reading history in order",
    "reverse": "Control: the same periods in reverse order",
    "shuffled": "Control: shares of the mixed text, one after the other",
}
"""What runs of each reading order show."""

_SEEN = 0.0005
"""Bits per byte; less forgetting than that is 0.000 in every table."""

_MAX_TICK_LINES = 40
"""Ticks of a level that are drawn as lines; a faster clock would paint the panel grey."""


def _measured(campaign: Campaign, task: str, kind: type[M]) -> list[tuple[Run, M]]:
    """Runs that have a result, with its metrics."""
    return [
        (run, metrics)
        for run in campaign.runs
        if task in run.results and isinstance(metrics := run.results[task].metrics, kind)
    ]


def matrices(campaign: Campaign, order: str) -> Drawing | None:
    """Loss and forgetting on every segment after every segment; two heat maps an arm of one reading order."""
    every = [one for one in _measured(campaign, "continual", ContinualMetrics) if one[0].order == order]
    firsts = campaign.firsts(run for run, _ in every)
    found = [one for one in every if one[0] in firsts]
    if not found:
        return None
    count = max(len(metrics.segments) for _, metrics in found)
    nan = float("nan")
    losses = [[[cell.value for cell in row] for row in metrics.bits_per_byte] for _, metrics in found]
    forgets = [[[nan if cell is None else cell.value for cell in row] for row in m.forgetting] for _, m in found]
    trained = [value for matrix in losses for row in matrix[1:] for value in row]
    worst = max((v for matrix in forgets for row in matrix for v in row if v == v), default=0.0) or 1.0
    with panels(2 * len(found), height=0.36 * count + 1.65) as (figure, axes):
        for index, (run, metrics) in enumerate(found):
            labels = [re.sub(r"[- ]", r"\g<0>\n", segment.label, count=1) for segment in metrics.segments]
            flat = [segment.label for segment in metrics.segments]
            left, right = axes[2 * index], axes[2 * index + 1]
            limits = (min(trained), max(trained))
            _heat(left, losses[index], labels, ["untrained", *flat], "YlGnBu", limits, "{:.2f}")
            _heat(right, forgets[index], labels, flat, "OrRd", (0.0, worst), "{:.3f}")
            left.set_title(f"{run.arm}\nbits per byte", color=arm_colour(campaign, run), fontsize=9)
            right.set_title(f"{run.arm}\nforgetting", color=arm_colour(campaign, run), fontsize=9)
        label_rows(axes, "after reading up to")
        return finish(
            figure,
            name="continual" if order == "forward" else f"continual-{order}",
            title=ORDERS[order],
            caption="Each row is a model that has read one more part, each column held-out text of one part. Bits per "
            "byte: dark is worse, framed cells are the part just read. Forgetting: bits per byte lost since the model "
            "was at its best on that part; zero is no forgetting. The first run of every arm.",
        )


def forgetting(campaign: Campaign, *, every: bool = True) -> Drawing | None:
    """What was forgotten of each segment after each later one, with lines where slow levels tick; a panel a run.

    Every arm begins a row of its own. Runs that forgot nothing that could be seen are named, not drawn.
    every: all runs; else the first of each arm that read the periods in the order of time, side by side.
    """
    found = _measured(campaign, "continual", ContinualMetrics)
    if not every:
        firsts = campaign.firsts(run for run, _ in found if run.order == "forward")
        found = [one for one in found if one[0] in firsts]
    if not found:
        return None
    drawn = [(run, metrics) for run, metrics in found if _most_forgotten(metrics) >= _SEEN]
    names = [campaign.label(run) for run, metrics in found if drawn and _most_forgotten(metrics) < _SEEN]
    drawn = drawn or found
    rows = _rows_by_arm(campaign, drawn, per_row=3) if every else [drawn[at : at + 3] for at in range(0, len(drawn), 3)]
    with canvas(len(rows), max(map(len, rows)), height=3.1 * len(rows), sharey=True) as (figure, grid):
        labelled = []
        axes = [axis for line, row in zip(grid, rows, strict=True) for axis in line[: len(row)]]
        for line, row in zip(grid, rows, strict=True):
            for axis in line[len(row) :]:
                axis.set_visible(False)
        for axis, (run, metrics) in zip(axes, (one for row in rows for one in row), strict=True):
            ends = []
            trained = [segment.trained_tokens for segment in metrics.segments]
            for s, segment in enumerate(metrics.segments[:-1]):
                cells = [(trained[t], row[s]) for t, row in enumerate(metrics.forgetting) if t >= s]
                known = [(x, cell) for x, cell in cells if cell is not None]
                colour = PART_COLOURS[s % len(PART_COLOURS)]
                _band(axis, [x for x, _ in known], [cell for _, cell in known], colour)
                ends.append((known[-1][0], known[-1][1].value, segment.label, colour))
            axis.set_xlim(trained[0], trained[-1])
            _tick_lines(axis, run, trained[0], trained[-1])
            axis.set_title(_panel_title(campaign, run), color=arm_colour(campaign, run))
            axis.set_xlabel("training tokens")
            thousands(axis.xaxis)
            labelled.append((axis, ends))
        label_rows(axes, "forgetting (bits per byte)")
        label_line_ends(labelled)
        return finish(
            figure,
            name="forgetting" if every else "forgetting-arms",
            title="Forgetting of every run" if every else "Forgetting, period by period",
            caption="Each line is one period's text: bits per byte lost since the model was at its best on it, "
            "from the moment it was read; zero is no forgetting. Bands are 95 % intervals over "
            "documents. Grey lines are ticks of the slowest level that ticks often enough to be seen and "
            "seldom enough to be drawn."
            + (f" Not drawn, for nothing was forgotten at any border: {'; '.join(names)}." if names else ""),
        )


def _most_forgotten(metrics: ContinualMetrics) -> float:
    """The highest value or limit of an interval of the whole matrix."""
    cells = [cell for row in metrics.forgetting for cell in row if cell is not None]
    return max(cell.value if cell.high is None else max(cell.value, cell.high) for cell in cells)


def _rows_by_arm(campaign: Campaign, found: Sequence[tuple[Run, M]], *, per_row: int) -> list[list[tuple[Run, M]]]:
    """Runs with their metrics in rows of at most `per_row`, each of one arm, in the order of the arms."""
    rows = []
    for arm in campaign.arms():
        own = [(run, metrics) for run, metrics in found if run.arm == arm]
        rows += [own[start : start + per_row] for start in range(0, len(own), per_row)]
    return rows


def _panel_title(campaign: Campaign, run: Run) -> str:
    """The label of a run on two lines, for panels that are narrower than it is."""
    return campaign.label(run).replace(f"{run.arm}, ", f"{run.arm}\n", 1)


def _heat(
    axis: Any,
    values: list[list[float]],
    columns: list[str],
    rows: list[str],
    colours: str,
    limits: tuple[float, float],
    text: str,
) -> None:
    """A heat map with its values written in; NaN cells stay empty. Values beyond the limits are clipped."""
    from matplotlib.patches import Rectangle

    axis.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1] + 0.25 * (limits[1] - limits[0]), aspect="auto")
    span = limits[1] - limits[0] or 1.0
    extra = len(rows) - len(columns)  # rows before training
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                dark = (value - limits[0]) / span > 0.75
                axis.text(
                    x,
                    y,
                    text.format(value),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if dark else INK,
                )
        if y >= extra:
            axis.add_patch(Rectangle((y - extra - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.2))
    axis.set_xticks(range(len(columns)), columns, fontsize=7.5)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _band(axis: Any, xs: list[int], intervals: list[Interval], colour: str) -> None:
    values = [interval.value for interval in intervals]
    axis.plot(xs, values, "o-", color=colour, markersize=4)
    low = [interval.value if interval.low is None else interval.low for interval in intervals]
    high = [interval.value if interval.high is None else interval.high for interval in intervals]
    axis.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)


def _tick_lines(axis: Any, run: Run, first: int, last: int) -> None:
    """Ticks of the slowest level that ticks in the range, if they are few enough to be drawn."""
    for period in reversed(run.config.model.channel.periods):
        ticks = range(-(-first // period) * period, last + 1, period)
        if 2 <= len(ticks) <= _MAX_TICK_LINES:
            for tick in ticks:
                axis.axvline(tick, color=MUTED, linewidth=0.5, alpha=0.6)
            return


def lesions(campaign: Campaign) -> Drawing | None:
    """Damage to each segment by setting back each level; a panel a run."""
    found = _measured(campaign, "lesion", LesionMetrics)
    if not found:
        return None
    rows = max(len(metrics.levels) for _, metrics in found)
    with panels(len(found), height=1.7 + 0.5 * rows, per_row=3) as (figure, axes):
        for axis, (run, metrics) in zip(axes, found, strict=True):
            values = [[cell.value for cell in level.damage] for level in metrics.levels]
            most = max(max(abs(value) for row in values for value in row), 1e-9)
            axis.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            for y, level in enumerate(metrics.levels):
                for x, cell in enumerate(level.damage):
                    is_clear = cell.low is not None and cell.high is not None and not cell.low <= 0 <= cell.high
                    axis.text(
                        x,
                        y,
                        f"{cell.value:.3f}",
                        ha="center",
                        va="center",
                        fontsize=9,
                        fontweight="bold" if is_clear else "normal",
                        color="white" if abs(cell.value) > 0.7 * most else INK,
                    )
            axis.set_xticks(range(len(metrics.segments)), [label.replace("-", "-\n") for label in metrics.segments])
            axis.set_yticks(
                range(len(metrics.levels)), [f"every {short_count(level.period_tokens)}" for level in metrics.levels]
            )
            axis.tick_params(length=0)
            axis.grid(visible=False)
            title = campaign.label(run)
            if metrics.correlation is not None:
                title += f"\nrank corr. {metrics.correlation.value:.2f}, p = {metrics.correlation.p_value:.2g}"
            axis.set_title(title, color=arm_colour(campaign, run))
        label_rows(axes, "level that is set back")
        return finish(
            figure,
            name="lesions",
            title="Which period's knowledge goes with which level",
            caption="Bits per byte that each period's text gets worse by when one level goes back to earlier "
            "weights and everything else stays; red is damage, bold is a 95 % interval without zero. If "
            "slow levels held old knowledge, damage would move to the left from top to bottom; the rank "
            "correlation is that of the centre of the damage with the level's period.",
        )


def events(campaign: Campaign) -> Drawing | None:
    """Effect of ticks of each level with its permutation test; a panel a run and clock."""
    found: list[tuple[Run, str, tuple[LevelEvents, ...]]] = []
    for run, metrics in _measured(campaign, "events", EventMetrics):
        for clock, levels in (("training", metrics.training), ("reading", metrics.reading)):
            if levels is not None and any(level.effect is not None for level in levels):
                found.append((run, clock, levels))
    if not found:
        return None
    height = 1.9 + 0.5 * max(len(levels) for *_, levels in found)
    with panels(len(found), height=height, per_row=2) as (figure, axes):
        for axis, (run, clock, levels) in zip(axes, found, strict=True):
            axis.axvline(0.0, color=MUTED, linewidth=1)
            for y, level in enumerate(levels):
                if level.effect is None:
                    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
                    why = "  nothing to compare with"
                    axis.text(0.0, y, why, va="center", fontsize=8.8, color=MUTED, bbox=behind)
                    continue
                effect = level.effect
                is_clear = effect.p_value <= 0.05
                colour = arm_colour(campaign, run)
                axis.plot([0, effect.value], [y, y], color=colour, linewidth=2)
                axis.plot([effect.value], [y], "o", color=colour, markerfacecolor=colour if is_clear else "white")
                axis.annotate(
                    f"p = {effect.p_value:.2g}, {effect.ticks} ticks",
                    xy=(effect.value, y),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.8,
                    color=INK,
                )
            axis.margins(x=0.3)
            axis.locator_params(axis="x", nbins=5)
            axis.set_yticks(range(len(levels)), [f"every {short_count(level.period_tokens)}" for level in levels])
            axis.set_ylim(len(levels) - 0.4, -0.7)
            axis.set_title(f"{_panel_title(campaign, run)}, clock of {clock}", color=arm_colour(campaign, run))
            axis.set_xlabel("loss change at a tick minus elsewhere (nats / token)")
        return finish(
            figure,
            name="events",
            title="What happens at ticks",
            caption="Mean change of the loss over an update of a level, minus that over like updates without it: "
            "in training on held-out text of periods that are over, in reading on the text around the "
            "tick. Right of zero, ticks make it worse. Filled: p at most 0.05 by shifting the ticks in "
            "circles.",
        )


def retention(campaign: Campaign) -> Drawing | None:
    """Forgetting curves with both fits; a panel a run."""
    found = _measured(campaign, "retention", RetentionMetrics)
    if not found:
        return None
    with panels(len(found), height=3.3, per_row=3, sharey=True) as (figure, axes):
        labelled = []
        for axis, (run, metrics) in zip(axes, found, strict=True):
            ends = []
            for index, curve in enumerate(metrics.curves):
                colour = PART_COLOURS[index % len(PART_COLOURS)]
                axis.plot(curve.age_tokens, curve.lost, color=colour, linewidth=1.1)
                ends.append((curve.age_tokens[-1], curve.lost[-1], curve.segment, colour))
            age = np.linspace(0, max(max(curve.age_tokens) for curve in metrics.curves), 200)
            for score, periods, style in ((metrics.tied, metrics.periods, "-"), (metrics.free, (1,), "--")):
                lost = predict_lost(age, periods, score.scale, score.weights)
                axis.plot(age, lost, style, color=INK, linewidth=1.6)
            better = "the clocks fit" if metrics.tied_is_better else "one free time fits"
            axis.set_title(f"{campaign.label(run)}\n{better} better", color=arm_colour(campaign, run))
            axis.set_xlabel("tokens since the period ended")
            axis.set_xlim(left=0)
            thousands(axis.xaxis)
            labelled.append((axis, ends))
        label_rows(axes, "lost since its best (nats / token)")
        label_line_ends(labelled)
        return finish(
            figure,
            name="retention",
            title="How forgetting ages",
            caption="Coloured: held-out loss on each period above its best since the period ended. Black: one "
            "curve for all, solid with times tied to the levels' periods by one factor, dashed with one "
            "free time; which is better is judged on periods that the fit has not seen.",
        )


def classes(campaign: Campaign) -> Drawing | None:
    """Accuracy on the classes seen so far, beside floor and chance; a panel a data set."""
    found = _measured(campaign, "class_incremental", ClassIncrementalMetrics)
    if not found:
        return None
    keys = list(dict.fromkeys((stream.data, stream.shots) for _, metrics in found for stream in metrics.streams))
    with canvas(1, len(keys), height=3.7, sharey=True) as (figure, axes):
        labelled = []
        for axis, (data, shots) in zip(axes[0], keys, strict=True):
            ends: dict[str, tuple[float, float, str, str]] = {}
            for run, metrics in found:
                for stream in metrics.streams:
                    if (stream.data, stream.shots) != (data, shots):
                        continue
                    seen = np.cumsum([len(task) for task in stream.tasks])
                    lines = (
                        (stream.model, arm_colour(campaign, run), campaign.label(run), "-"),
                        (stream.floor, MUTED, "nearest class mean", "--"),
                    )
                    for scores, colour, name, style in lines:
                        ys = [float(np.mean(row)) for row in scores.matrix]
                        axis.plot(seen, ys, style, color=colour, marker="o", markersize=3.5, linewidth=1.4)
                        ends[name] = (float(seen[-1]), ys[-1], name, colour)
                    axis.plot(seen, 1 / seen, ":", color=MUTED, linewidth=1)
            axis.set_title(f"{data}, {'all' if shots is None else shots} examples a class")
            axis.set(xlabel="classes seen", ylim=(0, 1))
            labelled.append((axis, list(ends.values())))
        axes[0][0].set_ylabel("accuracy on the classes seen")
        label_line_ends(labelled)
        return finish(
            figure,
            name="classes",
            title="Classes that come task after task",
            caption="Accuracy among all classes seen so far, learned by reading examples. Dashed: bags of words "
            "without any training, the floor; dotted: chance.",
        )


def facts(campaign: Campaign) -> Drawing | None:
    """Changing facts: new values, what did not change, and what is stale; a panel a run."""
    found = _measured(campaign, "changing_facts", FactsMetrics)
    if not found:
        return None
    with panels(len(found), height=3.3, per_row=3, sharey=True) as (figure, axes):
        labelled = []
        for axis, (run, metrics) in zip(axes, found, strict=True):
            ends = []
            for index, (name, label) in enumerate(
                (
                    ("updated", "updated"),
                    ("unchanged", "unchanged"),
                    ("paraphrase", "asked otherwise"),
                    ("stale", "stale"),
                )
            ):
                scores = [(epoch, getattr(row, name)) for epoch, row in enumerate(metrics.epochs, start=1)]
                known = [(epoch, interval) for epoch, interval in scores if interval is not None]
                colour = PART_COLOURS[index]
                _band(axis, [epoch for epoch, _ in known], [interval for _, interval in known], colour)
                ends.append((known[-1][0], known[-1][1].value, label, colour))
            axis.axhline(metrics.chance, color=MUTED, linewidth=1, linestyle=":")
            axis.set_title(campaign.label(run), color=arm_colour(campaign, run))
            axis.set(xlabel="epoch", ylim=(-0.02, 1.02))
            axis.set_xticks(range(1, len(metrics.epochs) + 1))
            labelled.append((axis, ends))
        label_rows(axes, "share of questions")
        label_line_ends(labelled)
        return finish(
            figure,
            name="facts",
            title="Facts that change",
            caption="After each epoch: facts that it changed and the model answers anew, facts that it left, all "
            "facts asked in words never read, and changed facts whose old value is still preferred "
            "(stale, lower is better; one half is chance). Dotted: chance of the others. Bands are 95 % "
            "intervals.",
        )


ALL = (forgetting, lesions, events, retention, classes, facts)
"""Every figure of this module, in the order of a report."""

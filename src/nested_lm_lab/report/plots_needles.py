"""Figures of needle curves: length against depth, and what is left over the distance to the needle."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nested_lm.config.run import RunConfig
from nested_lm_lab.evaluation.bootstrap import Bootstrap, wilson
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.plot_style import INK, MUTED, Drawing, canvas, finish, label_line_ends, short_count
from nested_lm_lab.report.plots import arm_colour
from nested_lm_lab.tasks.needles.metrics import BooksMetrics, Cell, LengthScores, NeedleTask, NiahMetrics
from nested_lm_lab.tasks.needles.stops import describe_stop, first_stop

_RESAMPLES = Bootstrap(samples=2000)

_MANY_LENGTHS = 6  # of a heat map beside others; more need smaller labels

_FIRST_POSITION = 8  # tokens; the loss before it would flatten the figure


def needle_matches(campaign: Campaign) -> Drawing | None:
    """Heat maps of length against depth: how much of the answer the model prints."""
    return _heat_maps(
        campaign,
        name="needle_matches",
        title="Needles found",
        caption="Share of the answer in the model's output, for each length of text (right: longer) and depth of the "
        "needle (bottom: right before the question). Dark is found.",
        limits=(0.0, 1.0),
    )


def needle_worth(campaign: Campaign) -> Drawing | None:
    """Heat maps of length against depth: nats a token that the needle saves."""
    return _heat_maps(
        campaign,
        name="needle_worth",
        title="What a needle saves",
        caption="Nats for each token of the answer that the needle in the text saves, against the same text without "
        "it; small models that print no needle still show here whether one left a trace. Zero is none.",
        limits=None,
    )


def needle_distance(campaign: Campaign) -> Drawing | None:
    """Needles found, and nats saved, against the distance from the question, with lines at the model's own spans."""
    panels = [(task, runs) for task, runs in _tasks(campaign) if any(_has_distances(found) for _, found in runs)]
    if not panels:
        return None
    with canvas(len(panels), 2, height=0.8 + 3.1 * len(panels)) as (figure, axes):
        for (task, runs), (left, right) in zip(panels, axes, strict=True):
            ends: tuple[list[Any], list[Any]] = ([], [])
            for run, found in runs:
                colour, label = arm_colour(campaign, run), campaign.label(run)
                bins = list(_by_distance(found))
                if not bins:
                    continue
                for axis, part, kept in ((left, "found", ends[0]), (right, "saved", ends[1])):
                    _draw_bins(axis, [(entry.distance, getattr(entry, part)) for entry in bins], colour)
                    kept.append((bins[-1].distance, getattr(bins[-1], part).value, label, colour))
            left.set(
                title=f"{task}: found", ylabel="share of the answer", ylim=(-0.03, 1.22), yticks=[0, 0.25, 0.5, 0.75, 1]
            )
            right.set(title=f"{task}: saved", ylabel="nats a token of the answer")
            right.axhline(0, color=INK, linewidth=0.9)
            for axis in (left, right):
                axis.set_xscale("log", base=2)
                axis.set_xlabel("tokens from the needle to the question")
                axis.xaxis.set_major_formatter(_short_tokens)
                axis.minorticks_off()
                _mark_spans(axis, [run.config for run, _ in runs])
            label_line_ends([(left, ends[0]), (right, ends[1])])
        return finish(
            figure,
            name="needle_distance",
            title="How far back a needle is found",
            caption="Each point gathers the prompts whose needle (of several, the first) lies that far back, over all "
            "lengths, with its 95 % interval; a hollow point is a single text and has none. 2k is 2,048 tokens. "
            "Vertical lines are spans of the models: what is found left of a window may be attention's "
            "doing, what is found right of it is memory's.",
        )


def book_positions(campaign: Campaign) -> Drawing | None:
    """Nats a token by position in long books, with carried state and with a fresh one every training context."""
    runs = [run for run in campaign.runs if "books" in run.results]
    if not runs:
        return None
    with canvas(1, 1, height=3.6) as (figure, axes):
        axis, ends = axes[0][0], []
        for run in runs:
            metrics = run.results["books"].metrics
            assert isinstance(metrics, BooksMetrics)
            shown = [position for position in metrics.positions if position.first >= _FIRST_POSITION]
            xs = [((position.first + 1) * (position.last + 1)) ** 0.5 for position in shown]
            colour = arm_colour(campaign, run)
            for style, words, intervals in (
                ("-", "", [position.carried for position in shown]),
                ("--", ", fresh", [position.fresh for position in shown]),
            ):
                axis.plot(xs, [i.value for i in intervals], style, color=colour, marker="o", markersize=3.5)
                low = [i.value if i.low is None else i.low for i in intervals]
                high = [i.value if i.high is None else i.high for i in intervals]
                axis.fill_between(xs, low, high, color=colour, alpha=0.10, linewidth=0)
                if xs:
                    ends.append((xs[-1], intervals[-1].value, campaign.label(run) + words, colour))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(_short_tokens)
        axis.minorticks_off()
        axis.set(xlabel="position in the book (tokens)", ylabel="loss (nats / token)")
        _mark_spans(axis, [run.config for run in runs])
        label_line_ends([(axis, ends)])
        return finish(
            figure,
            name="book_positions",
            title="Loss by position in long books",
            caption="Lower is better. Solid: the state is carried from the book's start; dashed: it is fresh every "
            "training context. A solid line below its dashed one shows what the longer past saves. Bands are 95 % "
            "intervals over books; the first few tokens are cut off.",
        )


def _short_tokens(value: float, _position: int) -> str:
    return short_length(value)


def short_length(tokens: float) -> str:
    """Tokens as the command line takes them, 2k for 2,048, and otherwise in three digits."""
    return f"{tokens / 1024:,.0f}k" if tokens >= 1024 and tokens % 1024 == 0 else short_count(tokens)


class _Bin(NamedTuple):
    """Prompts of like distance. distance: geometric mean."""

    distance: float
    found: Interval
    saved: Interval


def _tasks(campaign: Campaign) -> list[tuple[str, list[tuple[Run, NeedleTask]]]]:
    """Runs by task, in the order of the results; the lengths of several results of a run are one curve."""
    found: dict[str, list[tuple[Run, NeedleTask]]] = defaultdict(list)
    for run in campaign.runs:
        whole: dict[str, NeedleTask] = {}
        for result in run.results.values():
            if isinstance(result.metrics, NiahMetrics):
                for task in result.metrics.tasks:
                    whole[task.task] = _join(whole[task.task], task) if task.task in whole else task
        for name, task in whole.items():
            found[name].append((run, task))
    return list(found.items())


def _join(one: NeedleTask, other: NeedleTask) -> NeedleTask:
    """The lengths of both, ascending; of a length that both have, that of the first."""
    known = {entry.length for entry in one.lengths}
    lengths = (*one.lengths, *(entry for entry in other.lengths if entry.length not in known))
    return one.model_copy(update={"lengths": tuple(sorted(lengths, key=lambda entry: entry.length))})


def _cells(task: NeedleTask) -> list[tuple[int, LengthScores, Cell]]:
    return [
        (entry.length, entry.scores, cell)
        for entry in task.lengths
        if entry.scores is not None
        for cell in entry.scores.cells
    ]


def _has_distances(task: NeedleTask) -> bool:
    return any(any(entry.scores.rows.distance) for entry in task.lengths if entry.scores is not None)


def _by_distance(task: NeedleTask) -> Iterator[_Bin]:
    """Gather rows whose distance lies between two powers of two."""
    rows: dict[int, list[tuple[tuple[int, int], float, float, float]]] = defaultdict(list)
    for entry in task.lengths:
        if entry.scores is None:
            continue
        columns, without = entry.scores.rows, entry.scores.control_rows.no_needle_nats
        samples = {number: place for place, number in enumerate(dict.fromkeys(columns.sample))}
        for sample, distance, match, nats in zip(
            columns.sample, columns.distance, columns.match, columns.nats, strict=True
        ):
            if distance:
                saved = without[samples[sample]] - nats
                rows[distance.bit_length()].append(((entry.length, sample), distance, match, saved))
    for _, members in sorted(rows.items()):
        # The depths of one sample share its text: they count as one.
        texts: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        for text, _, match, saved in members:
            texts[text].append((match, saved))
        means = np.array([np.mean(entries, axis=0) for entries in texts.values()])
        yield _Bin(
            float(np.exp(np.mean([np.log(distance) for _, distance, _, _ in members]))),
            wilson(float(means[:, 0].sum()), len(means)),
            _RESAMPLES.mean(means[:, 1]),
        )


def _draw_bins(axis: Any, bins: Sequence[tuple[float, Interval]], colour: str) -> None:
    """A line with its band through points of several texts; points of one text stand alone, hollow."""
    several = [(x, interval) for x, interval in bins if interval.n > 1]
    single = [(x, interval) for x, interval in bins if interval.n == 1]
    axis.plot([x for x, _ in several], [i.value for _, i in several], "o-", color=colour, markersize=4)
    axis.fill_between(
        [x for x, _ in several],
        [i.value if i.low is None else i.low for _, i in several],
        [i.value if i.high is None else i.high for _, i in several],
        color=colour,
        alpha=0.12,
        linewidth=0,
    )
    axis.plot([x for x, _ in single], [i.value for _, i in single], "o", color=colour, mfc="white", markersize=4.5)


def spans(config: RunConfig) -> dict[int, str]:
    """Spans in tokens at which a model's memory may change its nature, and what they are."""
    mixer, channel = config.model.mixer, config.model.channel
    found: dict[int, list[str]] = defaultdict(list)
    for field, words in (("window", "window"), ("segment", "segment")):
        size = getattr(mixer, field, None)
        if size is not None:
            found[size].append(words)
    for level, period in enumerate(channel.periods):
        found[period].append(f"level {level}")
    for level, writes in enumerate(channel.writes):
        if writes is not None:
            found[writes.period_tokens].append(f"level {level} in context")
    found[config.train.context_length].append("trained on")
    return {size: ", ".join(words) for size, words in sorted(found.items())}


def _mark_spans(axis: Any, configs: Sequence[RunConfig]) -> None:
    marked = {size: words for config in configs for size, words in spans(config).items()}
    low, high = axis.get_xlim()
    shown = {size: words for size, words in sorted(marked.items()) if low <= size <= high}
    for place, (size, words) in enumerate(shown.items()):
        axis.axvline(size, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
        axis.annotate(
            f"{words} {short_length(size)}",
            xy=(size, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2 - 10 * (place % 3)),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
            va="top",
        )


def _heat_maps(
    campaign: Campaign, *, name: str, title: str, caption: str, limits: tuple[float, float] | None
) -> Drawing | None:
    """One heat map for each task and run. limits: of a share; None: of the nats that are saved."""
    panels = [(task, runs) for task, runs in _tasks(campaign) if any(_cells(found) for _, found in runs)]
    if not panels:
        return None
    columns = max(len(runs) for _, runs in panels)
    with canvas(len(panels), columns, height=0.6 + 2.9 * len(panels)) as (figure, axes):
        for (task, runs), line in zip(panels, axes, strict=True):
            grids = [_grid(found, saved=limits is None) for _, found in runs]
            for axis in line[len(runs) :]:
                axis.set_visible(False)
            top = max((abs(v) for grid in grids for row in grid.values for v in row if v == v), default=0.0) or 1.0
            low, high = limits or (-top, top)
            for axis, grid, (run, found) in zip(line, grids, runs, strict=False):
                _draw_grid(axis, grid, found, (low, high), "YlGnBu" if limits else "BrBG")
                axis.set_title(f"{task}: {campaign.label(run)}", color=arm_colour(campaign, run))
                axis.set_xlabel("length of the text (tokens)")
            line[0].set_ylabel("depth of the needle")
        return finish(figure, name=name, title=title, caption=" ".join([caption, *_notes(campaign)]))


def _notes(campaign: Campaign) -> list[str]:
    """What a reader of the heat maps has to know about lengths, crosses and tasks without a map."""
    notes = ["2k is 2,048 tokens."]
    reasons = dict.fromkeys(reason for run in campaign.runs for reason in _reasons(run))
    if reasons:
        notes.append(f"A cross is a length that was not read: there or before, {' or '.join(reasons)}.")
    flat = [task for task, runs in _tasks(campaign) if not any(_cells(found) for _, found in runs)]
    if flat:
        notes.append(f"Without a depth, so only in the figure over the distance or in tables: {', '.join(flat)}.")
    return notes


def _reasons(run: Run) -> Iterator[str]:
    """What kept lengths of a run from being read, at the shortest of them or before."""
    for result in run.results.values():
        if isinstance(result.metrics, NiahMetrics):
            for task in result.metrics.tasks:
                stop = first_stop(task.lengths)
                if stop is not None:
                    yield describe_stop(stop, result.metrics.max_state_mib)


class _Grid(NamedTuple):
    """Depths down, lengths across; NaN where nothing was measured."""

    depths: list[float]
    values: list[list[float]]


def _grid(task: NeedleTask, *, saved: bool) -> _Grid:
    depths = sorted({cell.depth for _, _, cell in _cells(task)})
    values = [[float("nan")] * len(task.lengths) for _ in depths]
    at = {entry.length: place for place, entry in enumerate(task.lengths)}
    for length, scores, cell in _cells(task):
        match = cell.score.match
        assert match is not None
        value = scores.controls.no_needle.nats.value - cell.score.nats.value if saved else match.value
        values[depths.index(cell.depth)][at[length]] = value
    return _Grid(depths, values)


def _draw_grid(axis: Any, grid: _Grid, task: NeedleTask, limits: tuple[float, float], colours: str) -> None:
    axis.imshow(grid.values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for y, row in enumerate(grid.values):
        for x, value in enumerate(row):
            if value == value:
                dark = abs(value) > 0.6 * limits[1]
                text = f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero
                axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    for x, entry in enumerate(task.lengths):
        if entry.stopped is not None:
            axis.plot([x], [(len(grid.depths) - 1) / 2], "x", color=MUTED, markersize=14, markeredgewidth=1.5)
    axis.set_xticks(range(len(task.lengths)), [short_length(entry.length) for entry in task.lengths])
    axis.set_yticks(range(len(grid.depths)), [f"{depth:.1f}" for depth in grid.depths])
    axis.tick_params(length=0)
    if len(task.lengths) > _MANY_LENGTHS:
        axis.tick_params(axis="x", labelsize=7.0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)

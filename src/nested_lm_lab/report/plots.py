"""Figures of how well the arms do: one function each, None where no run has the numbers."""

from statistics import fmean
from typing import Any

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.plot_style import (
    ARM_COLOURS,
    FLOOR_COLOURS,
    INK,
    MUTED,
    Drawing,
    canvas,
    finish,
    label_line_ends,
    running_mean,
    thousands,
)
from nested_lm_lab.report.seeds import over_seeds
from nested_lm_lab.tasks.needles.metrics import PasskeyMetrics
from nested_lm_lab.tasks.schema import LanguageModellingMetrics, PeriodScore, PositionScore, ProtocolScores

_FIRST_POSITION = 8  # tokens; the loss before it would flatten the rest of the figure
_SMOOTH_ABOVE = 120  # logged steps; fewer are drawn as they are


def arm_colour(campaign: Campaign, run: Run) -> str:
    """The colour of a run's arm, the same in every figure."""
    return ARM_COLOURS[campaign.arms().index(run.arm) % len(ARM_COLOURS)]


def _shuffled(campaign: Campaign) -> tuple[Run, ...]:
    """Runs whose curves are compared: on the shuffled stream where there are any."""
    return tuple(run for run in campaign.runs if not run.chronological) or campaign.runs


def overview(campaign: Campaign) -> Drawing | None:
    """Held-out bits per byte of every arm over its seeds, the best first, beside the bigram floor."""
    runs = campaign.with_result("language_modelling") or campaign.with_result("language_modelling", chronological=True)
    if not runs:
        return None
    arms = sorted(dict.fromkeys(run.arm for run in runs), key=lambda arm: fmean(_scores(runs, arm)))
    rows: list[tuple[str, str, Interval, list[float]]] = []
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        seeds = _scores(runs, arm)
        interval = over_seeds(seeds) if len(seeds) > 1 else _language(own[0]).window.bits_per_byte
        rows.append((arm, arm_colour(campaign, own[0]), interval, seeds))
    first = _language(runs[0])
    with canvas(1, 1, height=1.15 + 0.42 * len(rows)) as (figure, axes):
        axis = axes[0][0]
        floor = first.bigram.bits_per_byte.value
        axis.axvline(floor, color=FLOOR_COLOURS["bigram"], linewidth=2)
        axis.annotate(
            f"bigram counts {floor:.3f}",
            xy=(floor, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=8.8,
        )
        for y, (_, colour, interval, seeds) in enumerate(rows):
            if len(seeds) > 1:
                axis.plot(seeds, [y + 0.22] * len(seeds), "o", color=colour, alpha=0.45, markersize=4)
            errors = [[side[0]] for side in _errors([interval])]
            axis.errorbar(
                [interval.value],
                [y],
                xerr=errors,
                fmt="o",
                color=colour,
                markersize=7,
                elinewidth=2,
            )
            edge = interval.value if interval.high is None else interval.high
            axis.annotate(
                f"{interval.value:.3f}",
                xy=(edge, y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9.5,
                fontweight="bold",
            )
        axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
        for text, (_, colour, *_rest) in zip(axis.get_yticklabels(), rows, strict=True):
            text.set(color=colour, fontsize=9.8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(f"bits per byte on the {first.split} split (lower is better)")
        return finish(
            figure,
            name="overview",
            title="Held-out bits per byte",
            caption="Further left is better. Small dots are seeds, bars 95 % intervals: over seeds where an arm has "
            "several, else over documents. The grey line is a count model of the training text.",
        )


def _scores(runs: tuple[Run, ...], arm: str) -> list[float]:
    return [_language(run).window.bits_per_byte.value for run in runs if run.arm == arm]


def loss(campaign: Campaign) -> Drawing | None:
    """Training loss against tokens, of the first run of every arm."""
    runs = [run for run in campaign.firsts(_shuffled(campaign)) if len(run.steps.columns("tokens", "loss")[0]) > 1]
    if not runs:
        return None
    with canvas(1, 1, height=3.7) as (figure, axes):
        axis, ends = axes[0][0], []
        lowest, late = float("inf"), 0.0
        for run in runs:
            xs, ys = run.steps.columns("tokens", "loss")
            window = max(1, len(ys) // 40) if len(ys) > _SMOOTH_ABOVE else 1
            mean, colour = running_mean(ys, window), arm_colour(campaign, run)
            if window > 1:
                axis.plot(xs, ys, color=colour, alpha=0.18, linewidth=0.7)
            axis.plot(xs, mean, color=colour)
            ends.append((xs[-1], mean[-1], run.arm, colour))
            lowest, late = min(lowest, *ys), max(late, mean[len(mean) // 12])
        axis.set_xlim(left=0)
        axis.set_ylim(lowest - 0.3, late + 0.35)
        axis.set(xlabel="training tokens", ylabel="loss (nats / token)")
        thousands(axis.xaxis)
        label_line_ends([(axis, ends)])
        return finish(
            figure,
            name="loss",
            title="Training loss",
            caption="Lower is better. Pale lines are single steps, strong ones running means; the first steps are cut "
            "off. The first seed of every arm.",
        )


def validation(campaign: Campaign) -> Drawing | None:
    """Validation bits per byte against tokens."""
    runs = [run for run in _shuffled(campaign) if run.evaluations.columns("tokens", "validation_bpb")[0]]
    if not runs:
        return None
    firsts = campaign.firsts(runs)
    with canvas(1, 1, height=3.5) as (figure, axes):
        axis, ends = axes[0][0], []
        for run in runs:
            xs, ys = run.evaluations.columns("tokens", "validation_bpb")
            colour = arm_colour(campaign, run)
            axis.plot(xs, ys, "o-", color=colour, markersize=3.5, linewidth=1.2)
            if run in firsts:
                ends.append((xs[-1], ys[-1], run.arm, colour))
        axis.set(xlabel="training tokens", ylabel="validation bits per byte")
        axis.set_xlim(left=0)
        thousands(axis.xaxis)
        label_line_ends([(axis, ends)])
        return finish(
            figure,
            name="validation",
            title="Held-out loss while training",
            caption="Lower is better: bits per byte on validation text at every evaluation, one line a seed.",
        )


def _errors(intervals: list[Interval]) -> list[list[float]]:
    """Lengths below and above for `errorbar`; zero where there is no interval."""
    below = [i.value - i.low if i.low is not None else 0.0 for i in intervals]
    above = [i.high - i.value if i.high is not None else 0.0 for i in intervals]
    return [[max(0.0, v) for v in below], [max(0.0, v) for v in above]]


def periods(campaign: Campaign) -> Drawing | None:
    """Bits per byte of each chronological period, with intervals and floors."""
    runs = campaign.with_result("language_modelling") or campaign.with_result("language_modelling", chronological=True)
    scores = [(run, _language(run)) for run in campaign.firsts(runs)]
    if not scores or not any(score.bits_per_byte for score in scores[0][1].window.by_period):
        return None
    first = scores[0][1]
    shown = [index for index, score in enumerate(first.window.by_period) if score.bits_per_byte is not None]
    with canvas(1, 1, height=4.2) as (figure, axes):
        axis, ends = axes[0][0], []
        for name, floor in (("unigram", first.unigram), ("bigram", first.bigram)):
            ys = [_value(floor.by_period[index]) for index in shown]
            axis.plot(range(len(shown)), ys, "_", color=FLOOR_COLOURS[name], markersize=26, mew=2.2)
            ends.append((len(shown) - 1, ys[-1], f"{name} floor", MUTED))
        width = 0.22
        for place, (run, score) in enumerate(scores):
            found = [score.window.by_period[index].bits_per_byte for index in shown]
            intervals = [interval for interval in found if interval is not None]
            xs = [x + (place - (len(scores) - 1) / 2) * width for x in range(len(shown))]
            colour = arm_colour(campaign, run)
            axis.errorbar(
                xs,
                [i.value for i in intervals],
                yerr=_errors(intervals),
                fmt="o",
                color=colour,
                markersize=5.5,
                elinewidth=1.4,
                capsize=0,
            )
            ends.append((len(shown) - 1, intervals[-1].value, run.arm, colour))
        by_period = [first.window.by_period[index] for index in shown]
        axis.set_xticks(range(len(shown)), [f"{p.first_year}-\n{p.last_year}\nn = {p.documents}" for p in by_period])
        axis.set_xlim(-0.5, len(shown) - 0.5)
        axis.grid(axis="x", visible=False)
        axis.set(ylabel=f"bits per byte, {first.split} split")
        label_line_ends([(axis, ends)])
        return finish(
            figure,
            name="periods",
            title="Bits per byte by period",
            caption="Lower is better: dots are the models, bars their 95 % intervals over documents "
            "(none where n = 1), dashes the count models of the training text. Fresh state every context.",
        )


def _language(run: Run) -> LanguageModellingMetrics:
    metrics = run.results["language_modelling"].metrics
    assert isinstance(metrics, LanguageModellingMetrics)
    return metrics


def _value(score: PeriodScore) -> float:
    return float("nan") if score.bits_per_byte is None else score.bits_per_byte.value


def positions(campaign: Campaign) -> Drawing | None:
    """Nats per token by position in the context, with a fresh window and with carried state."""
    runs = campaign.with_result("language_modelling") or campaign.with_result("language_modelling", chronological=True)
    if not runs:
        return None
    with canvas(1, 1, height=3.9) as (figure, axes):
        axis, ends, top = axes[0][0], [], 0.0
        for run in campaign.firsts(runs):
            metrics, colour = _language(run), arm_colour(campaign, run)
            for protocol, style, word in (
                (metrics.window, "-", ""),
                (metrics.streaming, "--", ", state carried"),
            ):
                if protocol is None:
                    continue
                xs, ys, intervals = _by_position(protocol)
                axis.plot(xs, ys, style, color=colour, marker="o", markersize=3.5)
                low = [i.value if i.low is None else i.low for i in intervals]
                high = [i.value if i.high is None else i.high for i in intervals]
                axis.fill_between(xs, low, high, color=colour, alpha=0.10, linewidth=0)
                ends.append((xs[-1], ys[-1], run.arm + word, colour))
                top = max([top, *(y for x, y in zip(xs, ys, strict=True) if x >= _FIRST_POSITION)])
        axis.set_xscale("log", base=2)
        if top:
            bottom = axis.get_ylim()[0]
            axis.set_ylim(bottom, top + 0.08 * (top - bottom))
            axis.set_xlim(left=_FIRST_POSITION)
        _mark_context(axis, runs[0])
        axis.set(xlabel="position in the text since the last fresh state (tokens)", ylabel="loss (nats / token)")
        _plain_powers(axis)
        label_line_ends([(axis, ends)])
        return finish(
            figure,
            name="positions",
            title="Loss by position",
            caption="A line that keeps falling to the right shows a model that makes use of a longer past; "
            "solid: fresh state every context, dashed: state carried through the whole document. "
            "Bands are 95 % intervals over documents, of the first seed; the first few tokens are cut off.",
        )


def _by_position(protocol: ProtocolScores) -> tuple[list[float], list[float], list[Interval]]:
    filled: list[PositionScore] = [p for p in protocol.by_position if p.nats_per_token is not None]
    intervals = [p.nats_per_token for p in filled if p.nats_per_token is not None]
    middles = [((p.first + 1) * (p.last + 1)) ** 0.5 for p in filled]
    return middles, [interval.value for interval in intervals], intervals


def _mark_context(axis: Any, run: Run) -> None:
    """A line at the training length."""
    length = run.config.train.context_length
    axis.axvline(length, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
    axis.annotate(
        f"training length {length:,}",
        xy=(length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        color=MUTED,
        fontsize=8.5,
        va="top",
    )


def _plain_powers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,.0f}"))
    axis.minorticks_off()


def passkey(campaign: Campaign) -> Drawing | None:
    """Loss of the hidden key against the length of the text, with the key's sentence taken out as control."""
    runs = campaign.with_result("passkey") or campaign.with_result("passkey", chronological=True)
    if not runs:
        return None
    with canvas(1, 2, height=3.9) as (figure, axes):
        left, right = axes[0]
        ends = []
        for place, run in enumerate(runs):
            metrics = run.results["passkey"].metrics
            assert isinstance(metrics, PasskeyMetrics)
            colour, label = arm_colour(campaign, run), campaign.label(run)
            xs = [float(score.length) for score in metrics.lengths]
            keyed = [score.nats_per_token for score in metrics.lengths]
            control = [score.control_nats_per_token for score in metrics.lengths]
            worth = [score.worth for score in metrics.lengths]
            left.errorbar(xs, [i.value for i in keyed], yerr=_errors(keyed), color=colour, marker="o", markersize=4.5)
            left.plot(
                xs,
                [i.value for i in control],
                "--",
                color=colour,
                linewidth=1.2,
                marker="o",
                markerfacecolor="white",
                markersize=4.5,
            )
            moved = [x * 2 ** (0.09 * (place - (len(runs) - 1) / 2)) for x in xs]
            right.errorbar(moved, [i.value for i in worth], yerr=_errors(worth), color=colour, fmt="o", markersize=5.5)
            ends.append((xs[-1], keyed[-1].value, label, colour))
        right.axhline(0, color=INK, linewidth=0.9)
        left.set(title="loss of the key", xlabel="length of the text (tokens)", ylabel="nats per answer token")
        right.set(
            title="what the key in the text saves",
            xlabel="length of the text (tokens)",
            ylabel="nats per answer token saved",
        )
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs)
            _plain_powers(axis)
        label_line_ends([(left, ends)])
        return finish(
            figure,
            name="passkey",
            title="Passkey",
            caption="Left: loss of a five-digit key hidden in the text (filled) and with its sentence "
            "taken out (open, dashed). Right: the difference with its 95 % interval; a model that remembers "
            "it lies above zero.",
        )

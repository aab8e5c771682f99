"""The first table of a report: every arm over its seeds, the best first."""

from collections.abc import Callable, Sequence
from statistics import fmean

from nested_lm_lab.evaluation.bootstrap import wilson
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.arms import seed_scores
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.findings import compared_runs, language
from nested_lm_lab.report.plot_style import short_count
from nested_lm_lab.report.seeds import over_seeds
from nested_lm_lab.report.tables import Cell, Table
from nested_lm_lab.tasks.continual.schema import ContinualMetrics
from nested_lm_lab.tasks.needles.metrics import NiahMetrics, PasskeyMetrics
from nested_lm_lab.tasks.zeroshot.metrics import ZeroShotMetrics

READING = (
    "One row an arm, the fewest bits per byte first; bits per byte are of held-out text, in order of time those of all "
    "periods after the last one was read. Below a number: its 95 % interval, and what it is over. Over several seeds "
    "it says what another seed would give; with one seed it is over documents or prompts, and another seed may turn a "
    "small difference round."
)
_NONE = Cell("-")


def summary_table(campaign: Campaign) -> Table:
    """Quality, size and speed of every arm, and the bigram floor; columns that nobody was measured on are left out."""
    arms = sorted(campaign.arms(), key=lambda arm: _mean_bits(campaign, arm))
    columns: tuple[tuple[str, Callable[[Campaign, str], Cell]], ...] = (
        ("bits / byte", _bits),
        ("needles found", _needles),
        ("in order of time, bits / byte", _continual),
        ("zero-shot accuracy", _zero_shot),
        ("parameters", _parameters),
        ("tokens", _tokens),
        ("tokens / s", _speed),
    )
    cells = [(name, [cell(campaign, arm) for arm in arms]) for name, cell in columns]
    shown = [(name, column) for name, column in cells if any(cell != _NONE for cell in column)]
    rows = [(Cell(arm), *(column[place] for _, column in shown)) for place, arm in enumerate(arms)]
    muted = [False] * len(rows)
    measured = [metrics for run in compared_runs(campaign) if (metrics := language(run)) is not None]
    if measured:
        floor = Cell(f"{measured[0].bigram.bits_per_byte.value:.3f}")
        rows.append((Cell("bigram counts"), *(floor if name == "bits / byte" else Cell("") for name, _ in shown)))
        muted.append(True)
    return Table(("arm", *(name for name, _ in shown)), tuple(rows), tuple(muted))


def _mean_bits(campaign: Campaign, arm: str) -> float:
    values = _scores(campaign, arm)
    return fmean(values.values()) if values else float("inf")


def _scores(campaign: Campaign, arm: str) -> dict[int, float]:
    return seed_scores(
        campaign, arm, False, lambda run: None if (found := language(run)) is None else found.window.bits_per_byte.value
    )


def _cell(single: Sequence[Interval], values: Sequence[float], what: str) -> Cell:
    """A number over its seeds, or the interval of the only run."""
    if not values:
        return _NONE
    if len(values) > 1:
        found = over_seeds(values)
        return Cell(f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}, {len(values)} seeds")
    interval = single[0]
    span = "no interval" if interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
    return Cell(f"{interval.value:.3f}", f"{span}, 1 seed, {interval.n} {what}")


def _bits(campaign: Campaign, arm: str) -> Cell:
    found = [metrics for run in compared_runs(campaign) if run.arm == arm and (metrics := language(run)) is not None]
    values = _scores(campaign, arm)
    return _cell([metrics.window.bits_per_byte for metrics in found], [*values.values()], "documents")


def _continual(campaign: Campaign, arm: str) -> Cell:
    def score(run: Run) -> float | None:
        result = run.results.get("continual")
        return result.metrics.accuracy.value if result and isinstance(result.metrics, ContinualMetrics) else None

    values = seed_scores(campaign, arm, True, score)
    single = [
        run.results["continual"].metrics.accuracy
        for run in campaign.with_result("continual", chronological=True)
        if run.arm == arm and run.order == "forward"
    ]
    return _cell(single, [*values.values()], "documents")


def _needles(campaign: Campaign, arm: str) -> Cell:
    """Exact answers to all prompts of the needle tasks; where there are none, of the passkey."""
    found = [result for run in campaign.runs if run.arm == arm for result in run.results.values()]
    curves = [one.metrics for one in found if isinstance(one.metrics, NiahMetrics)]
    scores = [
        (one.scores.score.exact.value, one.scores.score.exact.n)
        for metrics in curves
        for task in metrics.tasks
        for one in task.lengths
        if one.scores is not None
    ] or [
        (sum(sample.exact for sample in length.samples) / len(length.samples), len(length.samples))
        for one in found
        if isinstance(one.metrics, PasskeyMetrics)
        for length in one.metrics.lengths
    ]
    if not scores:
        return _NONE
    count = sum(n for _, n in scores)
    share = wilson(sum(value * n for value, n in scores), count)
    return Cell(f"{share.value:.2f}", f"{share.low:.2f} to {share.high:.2f}, {count} prompts")


def _zero_shot(campaign: Campaign, arm: str) -> Cell:
    for run in campaign.runs:
        metrics = run.results["zeroshot"].metrics if "zeroshot" in run.results else None
        if run.arm == arm and isinstance(metrics, ZeroShotMetrics) and metrics.arms[0].average is not None:
            mean = metrics.arms[0].average
            if mean.low is None or mean.high is None:
                return Cell(f"{100 * mean.value:.1f} %")
            return Cell(f"{100 * mean.value:.1f} %", f"{100 * mean.low:.1f} to {100 * mean.high:.1f}, 1 seed")
    return _NONE


def _runs(campaign: Campaign, arm: str) -> list[Run]:
    return [run for run in compared_runs(campaign) if run.arm == arm]


def _parameters(campaign: Campaign, arm: str) -> Cell:
    counts = {run.parameters for run in _runs(campaign, arm) if run.parameters}
    return Cell(" / ".join(f"{count:,}" for count in sorted(counts))) if counts else _NONE


def _tokens(campaign: Campaign, arm: str) -> Cell:
    runs = _runs(campaign, arm)
    counts = {value for run in runs if (value := run.steps.last("tokens"))}
    unfinished = "" if all(run.finished for run in runs) else "unfinished"
    return Cell(" / ".join(map(short_count, sorted(counts))), unfinished) if counts else _NONE


def _speed(campaign: Campaign, arm: str) -> Cell:
    found = [speed for run in _runs(campaign, arm) if (speed := run.tokens_per_s)]
    if not found:
        return _NONE
    low, high = f"{min(found):,.0f}", f"{max(found):,.0f}"
    return Cell(f"{fmean(found):,.0f}", "" if low == high else f"{low} to {high}")

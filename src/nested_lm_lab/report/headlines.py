"""One sentence for each suite beside language modelling: needles, zero-shot tasks, forgetting, ticks and lesions.

A sentence holds for any campaign, because its words follow from the numbers; without results of a suite there is none.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TypeVar

from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.zeroshot_tables import is_above_floors
from nested_lm_lab.tasks.continual.chronological import mean_forgetting
from nested_lm_lab.tasks.continual.schema import ContinualMetrics, EventMetrics, LesionMetrics
from nested_lm_lab.tasks.needles.metrics import NiahMetrics
from nested_lm_lab.tasks.needles.stops import first_stop, why_stopped
from nested_lm_lab.tasks.zeroshot.metrics import ZeroShotMetrics

M = TypeVar("M")
SIGNIFICANT = 0.05


def headlines(campaign: Campaign) -> list[str]:
    """Sentences on the runs outside grids, in the order of the suites."""
    plain = campaign.plain()
    return [*needles(plain), *zero_shot(plain), *forgetting(plain), *ticks(plain), *lesions(plain)]


def needles(campaign: Campaign) -> list[str]:
    """Share of the needles found, and nats saved by the needle, of every result of needle curves."""
    found = []
    for task in _tasks(campaign, "niah"):
        arms, lengths = [], []
        for run, metrics in _metrics(campaign, task, NiahMetrics):
            lengths += [one.length for curve in metrics.tasks for one in curve.lengths]
            scores = [(one.length, one.scores) for curve in metrics.tasks for one in curve.lengths if one.scores]
            label, longest = campaign.label(run), max((length for length, _ in scores), default=0)
            if not scores:
                arms.append(f"{label} none, {_stop(metrics)}")
                continue
            share = fmean(one.score.exact.value for _, one in scores)
            worth = [one.worth for _, one in scores]
            above = sum(one.low is not None and one.low > 0 for one in worth)
            ended = "" if longest == max(lengths) else f", to {longest:,} tokens: {_stop(metrics)}"
            arms.append(
                f"{label} {share:.2f} ({_range([one.value for one in worth], '+.3f')} nats a token saved, the whole "
                f"interval above 0 in {above} of {len(worth)}{ended})"
            )
        found.append(
            f"Needles in {_range(sorted(set(lengths)), ',')} tokens, mean share found over tasks and lengths: "
            f"{'; '.join(arms)}."
        )
    return found


def _stop(metrics: NiahMetrics) -> str:
    """What ended the first task that did not go on to the longest length, and where."""
    first = next(stop for curve in metrics.tasks if (stop := first_stop(curve.lengths)) is not None)
    return why_stopped(first, metrics.max_state_mib)


def zero_shot(campaign: Campaign) -> list[str]:
    """How many accuracies lie above every floor, and WikiText beside the bigram; labelled results are parts."""
    arms = []
    for run, metrics in _metrics(campaign, "zeroshot", ZeroShotMetrics):
        judged = [above for entry in metrics.arms[0].tasks if (above := is_above_floors(metrics, entry)) is not None]
        parts = [f"{sum(judged)} of {len(judged)}"] if judged else []
        own = next(
            (entry.metrics.get("bits_per_byte") for entry in metrics.arms[0].tasks if entry.task == "wikitext"), None
        )
        bigram = (metrics.floors["wikitext"].bigram or {}).get("bits_per_byte") if own is not None else None
        if own is not None and bigram is not None:
            parts.append(f"WikiText {own.value:.3f} bits per byte beside the bigram's {bigram:.3f}")
        if parts:
            arms.append(f"{campaign.label(run)} {', '.join(parts)}")
    if not arms:
        return []
    return [f"Zero-shot accuracies above every floor with the whole interval: {'; '.join(arms)}."]


def forgetting(campaign: Campaign) -> list[str]:
    """Forgetting and backward transfer in the order of time, beside the same training without a shift."""
    arms, larger, compared = [], 0, 0
    runs = list(_metrics(campaign, "continual", ContinualMetrics))
    for arm in campaign.arms():
        pairs = [
            (metrics, _control(run, runs)) for run, metrics in runs if run.arm == arm and _is_plain(run, "forward")
        ]
        controls = [control for _, control in pairs if control is not None]
        if controls:  # only those that can be compared
            pairs = [(metrics, control) for metrics, control in pairs if control is not None]
        if not pairs:
            continue
        compared += len(controls)
        larger += sum(
            control is not None and control.backward_transfer.value >= metrics.backward_transfer.value
            for metrics, control in pairs
        )
        own = _transfer([metrics for metrics, _ in pairs])
        arms.append(f"{arm} {own}" + (f" (without a shift {_transfer(controls)})" if controls else ""))
    if not arms:
        return []
    text = f"Periods in the order of time, bits per byte forgotten and backward transfer: {'; '.join(arms)}."
    if not compared:
        return [text + " No run read the same text without a shift, so this may be learning that was not finished."]
    if larger == compared:
        return [
            text
            + " Without a shift the transfer is no smaller: it shows learning that was not finished, not what later "
            "periods teach about earlier ones."
        ]
    return [text + f" The transfer is larger than without a shift in {compared - larger} of {compared} runs."]


def _transfer(found: Sequence[ContinualMetrics]) -> str:
    lost = _range([mean_forgetting(metrics).value for metrics in found], ".3f")
    return f"{lost} and {_range([metrics.backward_transfer.value for metrics in found], '+.3f')}"


def _is_plain(run: Run, order: str) -> bool:
    """Whether a run read its periods in an order, without anything against forgetting."""
    stream = run.config.train.stream
    return stream.kind == "chronological" and (run.order, stream.replay, run.config.train.ewc) == (order, 0.0, None)


def _control(run: Run, runs: Sequence[tuple[Run, ContinualMetrics]]) -> ContinualMetrics | None:
    """The same model, seed and training with the text dealt out at random over the periods."""
    for other, metrics in runs:
        if _is_plain(other, "shuffled") and _training(other) == _training(run):
            return metrics
    return None


def _training(run: Run) -> tuple[object, ...]:
    train = run.config.train
    return (
        run.config.model,
        run.config.seed,
        train.budget_tokens,
        train.step_tokens,
        train.optimizer,
        train.schedule,
    )


def ticks(campaign: Campaign) -> list[str]:
    """In how many comparisons the update of a level leaves a mark."""
    effects = [
        level.effect
        for task in _tasks(campaign, "events")
        for _, metrics in _metrics(campaign, task, EventMetrics)
        for level in (*(metrics.training or ()), *(metrics.reading or ()))
        if level.effect is not None
    ]
    if not effects:
        return []
    marks = sum(effect.p_value <= SIGNIFICANT for effect in effects)
    able = sum(effect.smallest_p <= SIGNIFICANT for effect in effects)
    values = _range([effect.p_value for effect in effects], ".3g")
    return [
        f"Updates of levels leave a mark on the loss (p at most {SIGNIFICANT}) in {marks} of {len(effects)} "
        f"comparisons, of which {able} had ticks enough to show one; p {values}."
    ]


def lesions(campaign: Campaign) -> list[str]:
    """Which level holds old knowledge, by rank correlation."""
    found = [
        (run, metrics)
        for task in _tasks(campaign, "lesion")
        for run, metrics in _metrics(campaign, task, LesionMetrics)
    ]
    shown = [
        f"{campaign.label(run)} {one.value:+.2f} (p = {one.p_value:.3g}, at least {one.smallest_p:.3g})"
        for run, metrics in found
        if (one := metrics.correlation) is not None
    ]
    if not found:
        return []
    if not shown:
        return ["Lesions of levels: too few levels that hold anything for a rank correlation."]
    return [
        "Levels set back, rank correlation of a level's period with how new the text is that suffers, below 0 if slow "
        f"levels hold old knowledge: {'; '.join(shown)}."
    ]


def _tasks(campaign: Campaign, kind: str) -> list[str]:
    """Names of the results of one kind, in the order of the runs."""
    names = (task for run in campaign.runs for task, result in run.results.items() if result.metrics.kind == kind)
    return list(dict.fromkeys(names))


def _metrics(campaign: Campaign, task: str, kind: type[M]) -> Iterator[tuple[Run, M]]:
    for run in campaign.runs:
        if task in run.results:
            metrics = run.results[task].metrics
            assert isinstance(metrics, kind)
            yield run, metrics


def _range(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"

"""Tables over several runs of a campaign: the clock sweep, and every arm over its seeds."""

from collections.abc import Callable, Sequence

from nested_lm.config.run import RunConfig
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.seeds import over_seeds
from nested_lm_lab.report.tables import Cell, Shown, Table, interval_cell
from nested_lm_lab.tasks.continual.chronological import mean_forgetting
from nested_lm_lab.tasks.continual.comparison import SweepRow, sweep_row, trends
from nested_lm_lab.tasks.continual.schema import ContinualMetrics
from nested_lm_lab.tasks.continual.settings import ContinualSettings
from nested_lm_lab.tasks.schema import LanguageModellingMetrics

Score = Callable[[Run], float | None]


def clock_sweep(campaign: Campaign) -> list[Shown]:
    """What forgetting has to do with the clocks, over runs that differ in their levels alone; none below two."""
    runs = _sweep_runs(campaign)
    if len(runs) < 2:
        return []
    rows = [(run, _row(run)) for run in runs]
    shown = tuple(
        (
            Cell(campaign.label(run), ", ".join(f"{period:,}" for period in row.periods)),
            interval_cell(_forgetting(run)),
            interval_cell(row.accuracy),
            interval_cell(row.plasticity),
            interval_cell(row.backward_transfer, signed=True),
            Cell("-") if row.regret_below is None else interval_cell(row.regret_below, signed=True),
            Cell("-" if row.retention_scale is None else f"{row.retention_scale:.3g}"),
        )
        for run, row in rows
    )
    header = ("periods", "forgetting", "ACC", "plasticity", "BWT", "regret, read before", "retention factor")
    text = "Runs that differ in their levels alone, with the periods of these in tokens. " + _trends(
        [row for _, row in rows]
    )
    return [Shown("Clock sweep", text, Table(header, shown))]


def _sweep_runs(campaign: Campaign) -> list[Run]:
    """Forward runs with levels, of the recipe and seed that most of them share."""
    found: dict[str, list[Run]] = {}
    for run in campaign.with_result("continual", chronological=True):
        if run.order == "forward" and run.config.model.channel.periods:
            found.setdefault(_recipe(run.config), []).append(run)
    return max(found.values(), key=len, default=[])


def _recipe(config: RunConfig) -> str:
    """All settings but the levels and what has no part in the training."""
    model = config.model.model_dump(mode="json")
    model["channel"].pop("levels", None)
    return repr((model, config.train.model_dump(mode="json"), config.seed, config.data.model_dump(mode="json")))


def _row(run: Run) -> SweepRow:
    others = [run.results[task].metrics if task in run.results else None for task in ("regret", "retention")]
    return sweep_row(run.results["continual"], run.config.model.channel.periods, *others)


def _forgetting(run: Run) -> Interval:
    metrics = run.results["continual"].metrics
    assert isinstance(metrics, ContinualMetrics)
    return mean_forgetting(metrics)


def _trends(rows: Sequence[SweepRow]) -> str:
    settings = ContinualSettings()
    sentences = []
    for trend in trends(rows, permutations=settings.permutations, seed=settings.seed):
        found = trend.correlation
        if found is not None:
            sentences.append(
                f"{trend.score} with {trend.clock}: {found.value:+.2f} (p = {found.p_value:.3g}, at least "
                f"{found.smallest_p:.3g}, n = {found.n})"
            )
    several = f" {len(sentences)} tests, not corrected for their number." if len(sentences) > 1 else ""
    return f"Rank correlations of {'; '.join(sentences)}.{several}" if sentences else "Too few for a rank correlation."


def seeds(campaign: Campaign) -> list[Shown]:
    """Mean of every arm over its seeds, and what it is above or below the first arm's; none without seeds."""
    parts = (
        ("bits / byte, test", False, _bits),
        ("in order of time: ACC", True, _continual(lambda m: m.accuracy.value)),
        ("in order of time: plasticity", True, _continual(lambda m: m.plasticity.value)),
        ("in order of time: BWT", True, _continual(lambda m: m.backward_transfer.value)),
        ("in order of time: FWT", True, _continual(lambda m: m.forward_transfer.value)),
        ("in order of time: forgetting", True, _continual(lambda m: mean_forgetting(m).value)),
    )
    arms = campaign.arms()
    rows = []
    for name, chronological, score in parts:
        values = {arm: seed_scores(campaign, arm, chronological, score) for arm in arms}
        several = {arm: found for arm, found in values.items() if len(found) > 1}
        if not several:
            continue
        first = next(iter(several))
        cells = []
        for arm in arms:
            found = several.get(arm)
            if found is None:
                cells.append(Cell("-"))
                continue
            mean = over_seeds(list(found.values()))
            detail = f"{interval_cell(mean).detail}; seeds {', '.join(map(str, found))}"
            shared = [seed for seed in found if seed in several[first]]
            if arm != first and len(shared) > 1:
                gap = over_seeds([found[seed] - several[first][seed] for seed in shared])
                detail += f"; minus {first}: {gap.value:+.3f}, {gap.low:+.3f} to {gap.high:+.3f}"
            cells.append(Cell(f"{mean.value:.3f}", detail))
        rows.append((Cell(name), *cells))
    if not rows:
        return []
    text = (
        "Means over seeds with Student's 95 % interval: what another seed would give. Differences are paired by seed. "
        "In order of time are runs of one recipe and one architecture for each arm, the one with the most seeds."
    )
    return [Shown("Over seeds", text, Table(("measure", *arms), tuple(rows)))]


def _bits(run: Run) -> float | None:
    result = run.results.get("language_modelling")
    if result is None:
        return None
    assert isinstance(result.metrics, LanguageModellingMetrics)
    return result.metrics.window.bits_per_byte.value


def _continual(value: Callable[[ContinualMetrics], float]) -> Score:
    def score(run: Run) -> float | None:
        result = run.results.get("continual")
        if result is None:
            return None
        assert isinstance(result.metrics, ContinualMetrics)
        return value(result.metrics)

    return score


def seed_scores(campaign: Campaign, arm: str, chronological: bool, score: Score) -> dict[int, float]:
    """Scores by seed of the architecture and recipe that has the most of them."""
    groups: dict[str, dict[int, float]] = {}
    for run in campaign.runs:
        if run.arm != arm or run.chronological != chronological or run.order not in ("mixed", "forward"):
            continue
        if (found := score(run)) is not None:
            train = run.config.train.model_dump(mode="json", exclude={"probe"})
            key = repr((run.config.model.model_dump(mode="json"), train))
            groups.setdefault(key, {})[run.config.seed] = found
    best = max(groups.values(), key=len, default={})
    return dict(sorted(best.items()))

"""Ablation grids: each variant beside the arm it is compared with, over seeds, and the paper's change beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.results import require_comparable
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.manifest import GridEntry, VariantEntry
from nested_lm_lab.report.papers import papers
from nested_lm_lab.report.plot_style import short_count
from nested_lm_lab.report.seeds import over_seeds
from nested_lm_lab.report.tables import ABSENT, Cell, Table, interval_cell
from nested_lm_lab.tasks.language_modelling import paired_difference
from nested_lm_lab.tasks.schema import LanguageModellingMetrics

BASE = "base"


@dataclass(frozen=True)
class Effect:
    """A variant minus the arm it is compared with, in bits per byte; above 0 is worse.

    by_seed: paired by document, one entry a seed that both have.
    """

    variant: VariantEntry
    by_seed: Mapping[int, Interval]
    difference: Interval | None

    @property
    def verdict(self) -> str:
        """In words, by the interval over seeds."""
        found = self.difference
        if found is None:
            return "not measured"
        if found.low is None or found.high is None:
            return "one seed: nothing follows"
        return "worse" if found.low > 0 else "better" if found.high < 0 else "cannot be told apart"


@dataclass(frozen=True)
class GridReport:
    """What a page shows of one grid."""

    title: str
    summary: list[str]
    tables: list[tuple[str, Table]]  # by factor
    effects: list[Effect]
    limits: list[str]


def grid_reports(campaign: Campaign) -> list[GridReport]:
    """All grids of a campaign. Raises ReportError when arms of a grid may not share a table."""
    return [_report(campaign, grid) for grid in campaign.manifest.grids]


def effects(campaign: Campaign, grid: GridEntry) -> list[Effect]:
    """Every variant against the arm it is compared with, in the order of the preset."""
    runs = _by_arm(campaign, grid)
    found = []
    for variant in grid.variants:
        own, other = runs.get(variant.name, {}), runs.get(variant.against, {})
        by_seed = {
            seed: paired_difference(
                own[seed].results["language_modelling"],
                other[seed].results["language_modelling"],
                bootstrap=Bootstrap(samples=1000),
            )
            for seed in grid.seeds
            if _is_measured(own.get(seed)) and _is_measured(other.get(seed))
        }
        values = [interval.value for interval in by_seed.values()]
        found.append(Effect(variant, by_seed, over_seeds(values) if values else None))
    return found


def _report(campaign: Campaign, grid: GridEntry) -> GridReport:
    runs = _by_arm(campaign, grid)
    results = [run.results["language_modelling"] for arm in runs.values() for run in arm.values() if _is_measured(run)]
    require_comparable(results)
    found = effects(campaign, grid)
    factors = dict.fromkeys(effect.variant.factor for effect in found)
    tables = [(factor, _table(grid, runs, [e for e in found if e.variant.factor == factor])) for factor in factors]
    return GridReport(grid.title, _summary(grid, runs, found), tables, found, _limits(grid, runs))


def _by_arm(campaign: Campaign, grid: GridEntry) -> dict[str, dict[int, Run]]:
    runs: dict[str, dict[int, Run]] = {}
    for run in campaign.runs:
        if run.entry.grid == grid.id and run.entry.arm is not None:
            runs.setdefault(run.entry.arm, {})[run.config.seed] = run
    return runs


def _is_measured(run: Run | None) -> bool:
    return run is not None and "language_modelling" in run.results


def _bits(run: Run) -> float:
    metrics = run.results["language_modelling"].metrics
    assert isinstance(metrics, LanguageModellingMetrics)
    return metrics.window.bits_per_byte.value


def _table(grid: GridEntry, runs: Mapping[str, Mapping[int, Run]], found: Sequence[Effect]) -> Table:
    header = (
        "arm",
        "parameters",
        "bits / byte",
        "minus its reference",
        "seeds worse",
        "over seeds",
        "paper: perplexity, accuracy",
    )
    references = dict.fromkeys([BASE, *(effect.variant.against for effect in found)])
    shown = {effect.variant.name for effect in found}
    rows = [
        (*_arm_cells(name, f"{grid.base}" if name == BASE else "", runs.get(name, {}), grid), *(Cell(""),) * 4)
        for name in references
        if name not in shown
    ]
    muted = [True] * len(rows)
    for effect in found:
        variant, size = effect.variant, len(effect.by_seed)
        worse = sum(interval.value > 0 for interval in effect.by_seed.values())
        against = "" if variant.against == BASE else f" (against {variant.against})"
        difference = Cell(ABSENT) if effect.difference is None else interval_cell(effect.difference, signed=True)
        rows.append(
            (
                *_arm_cells(variant.name, variant.change + against, runs.get(variant.name, {}), grid),
                difference,
                Cell(f"{worse} of {size}" if size else ABSENT),
                Cell(effect.verdict),
                _paper_cell(variant),
            )
        )
        muted.append(False)
    return Table(header, tuple(rows), tuple(muted))


def _arm_cells(name: str, detail: str, runs: Mapping[int, Run], grid: GridEntry) -> tuple[Cell, Cell, Cell]:
    measured = [_bits(run) for run in runs.values() if _is_measured(run)]
    sizes = sorted({run.parameters for run in runs.values() if run.parameters is not None})
    missing = len(grid.seeds) - len(measured)
    state = f"{missing} of {len(grid.seeds)} seeds missing" if missing else ""
    bits = interval_cell(over_seeds(measured)) if measured else Cell(ABSENT)
    return (
        Cell(name, "; ".join(part for part in (detail, state) if part)),
        Cell(", ".join(f"{size:,}" for size in sizes) or ABSENT),
        bits,
    )


def _paper_cell(variant: VariantEntry) -> Cell:
    if variant.row is None:
        return Cell("-")
    change = papers().table_6.change(variant.row)
    note = variant.row + (": what we put in, the row leaves out" if variant.reversed else "")
    return Cell(f"{change.perplexity:+.2f}, {change.accuracy:+.1f}", note)


def _summary(grid: GridEntry, runs: Mapping[str, Mapping[int, Run]], found: Sequence[Effect]) -> list[str]:
    by_verdict: dict[str, list[str]] = {}
    for effect in found:
        by_verdict.setdefault(effect.verdict, []).append(effect.variant.name)
    over = f"over {len(grid.seeds)} seeds"
    words = {
        "worse": f"Worse than what they are compared with, {over}",
        "better": f"Better, {over}",
        "cannot be told apart": f"Cannot be told apart, {over}",
        "one seed: nothing follows": "Measured with one seed, from which nothing follows",
        "not measured": "Not measured",
    }
    lines = [f"{text}: {', '.join(by_verdict[verdict])}." for verdict, text in words.items() if verdict in by_verdict]
    agree = [
        _agrees(effect) for effect in found if effect.variant.row is not None and effect.verdict in ("worse", "better")
    ]
    if agree:
        lines.append(
            f"Of the rows of Table 6 that could be told apart here, {sum(agree)} of {len(agree)} go in the direction "
            "that the paper prints for perplexity."
        )
    base = [_bits(run) for run in runs.get(BASE, {}).values() if _is_measured(run)]
    if base:
        cell = interval_cell(over_seeds(base))
        lines.append(f"The base, {grid.base}, has {cell.text} bits per byte over {len(base)} seeds ({cell.detail}).")
    return lines


def _agrees(effect: Effect) -> bool:
    """Whether leaving the part out has the sign that the paper prints."""
    assert effect.variant.row is not None
    assert effect.difference is not None
    ours = -effect.difference.value if effect.variant.reversed else effect.difference.value
    return (ours > 0) == (papers().table_6.change(effect.variant.row).perplexity > 0)


def _limits(grid: GridEntry, runs: Mapping[str, Mapping[int, Run]]) -> list[str]:
    members = [run for arm in runs.values() for run in arm.values()]
    sizes = [run.parameters for run in members if run.parameters]
    tokens = [value for run in members if (value := run.steps.last("tokens"))]
    limits = [
        f"{len(grid.seeds)} seeds ({', '.join(map(str, grid.seeds))}): Student's intervals over so few are wide, and "
        "they do not cover the choice of held-out documents, which all arms share.",
        f"{len(grid.variants)} variants are looked at together without a correction: of so many, one in twenty would "
        "look different by chance.",
        "All arms share the base's recipe, which was tuned for the base; no variant was given a search of its own.",
    ]
    if sizes and tokens:
        limits.append(
            f"{short_count(max(sizes))} parameters and {short_count(max(tokens))} tokens: Table 6 was measured on "
            f"models {papers().table_6.parameters / max(sizes):,.0f} times as large, so agreement says little about "
            "it, and so does disagreement."
        )
    diverged = sorted({run.entry.name for run in members if run.nonfinite})
    if diverged:
        limits.append(f"Steps that were not finite occurred in {', '.join(diverged)}.")
    return limits

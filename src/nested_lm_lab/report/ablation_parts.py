"""The pages of ablation grids."""

from collections.abc import Sequence
from typing import Any

from nested_lm.errors import ReportError
from nested_lm_lab.report.ablations import Effect, GridReport
from nested_lm_lab.report.collect import Campaign
from nested_lm_lab.report.document import Document, Part
from nested_lm_lab.report.findings import shortened
from nested_lm_lab.report.papers import papers
from nested_lm_lab.report.plot_style import ARM_COLOURS, INK, MUTED, Drawing, canvas, finish, require_matplotlib

READING = (
    "Differences are bits per byte of the variant minus those of the arm it is compared with, on the same held-out "
    "documents: above 0 the change made it worse. Small figures are 95 % intervals over seeds."
)


def ablation_document(campaign: Campaign, grids: Sequence[GridReport], *, command: str) -> Document:
    """Everything about the grids of one campaign."""
    parts = [part for grid in grids for part in ablation_parts(grid, name=campaign.manifest.name)]
    if campaign.notes:
        parts.append(Part("Missing", points=list(campaign.notes)))
    parts.append(Part("Where the numbers come from", points=origin(campaign)))
    return Document(campaign.manifest.title, command, [READING], parts)


def ablation_parts(grid: GridReport, *, name: str, level: int = 2) -> list[Part]:
    """Sections of one grid: what follows, a figure, a table for each factor, limits."""
    parts = [Part(grid.title, level, points=grid.summary, drawing=_draw(grid, name))]
    parts += [Part(factor[0].upper() + factor[1:], level + 1, table=table) for factor, table in grid.tables]
    source = papers().table_6.source
    paper = f"The paper's changes are those of {source}: perplexity and accuracy in percent, without that part."
    parts.append(Part("What this does not show", level + 1, text=[paper], points=grid.limits))
    return parts


def origin(campaign: Campaign) -> list[str]:
    """Commits, data and machine of the runs, in a few lines."""
    runs = campaign.runs

    def values(key: str) -> str:
        return ", ".join(sorted({shortened(str(run.record.get(key))) for run in runs}))

    scored = {result.scored_commit for run in runs for result in run.results.values()}
    shown = ", ".join(sorted("not recorded" if commit is None else shortened(commit) for commit in scored))
    return [
        f"{len(runs)} runs, trained at commit {values('commit')}, scored at commit {shown or 'none'}.",
        f"Data {values('data_hash')}, tokenizer {values('tokenizer_hash')}, on {values('device')}.",
    ]


def _draw(grid: GridReport, name: str) -> Drawing | None:
    """Differences with their intervals and single seeds; None without matplotlib or without numbers."""
    found = [effect for effect in grid.effects if effect.difference is not None]
    try:
        require_matplotlib()
    except ReportError:
        return None
    if not found:
        return None
    factors = list(dict.fromkeys(effect.variant.factor for effect in found))
    with canvas(1, 1, height=0.9 + 0.27 * len(found)) as (figure, panels):
        axes = panels[0][0]
        for place, effect in enumerate(reversed(found)):
            _draw_effect(axes, place, effect, ARM_COLOURS[factors.index(effect.variant.factor) % len(ARM_COLOURS)])
        axes.axvline(0.0, color=INK, linewidth=1.0)
        axes.set_yticks(range(len(found)), [effect.variant.name for effect in reversed(found)])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel("bits per byte against the reference arm (right: worse)", color=MUTED)
        axes.grid(visible=False, axis="y")
        return finish(
            figure,
            name=f"{name}-differences",
            title="What each change costs",
            caption="Mean over seeds with its 95 % interval (line) and every seed (dots), coloured by factor.",
        )


def _draw_effect(axes: Any, place: int, effect: Effect, colour: str) -> None:
    difference = effect.difference
    assert difference is not None
    if difference.low is not None and difference.high is not None:
        axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=2.2)
    seeds = [interval.value for interval in effect.by_seed.values()]
    axes.plot(seeds, [place] * len(seeds), linestyle="none", marker="o", markersize=3.2, color=colour, alpha=0.65)
    axes.plot([difference.value], [place], linestyle="none", marker="|", markersize=11, color=INK)

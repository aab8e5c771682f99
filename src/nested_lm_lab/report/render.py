"""Writes `report.md` and a self-contained `report.html`: same inputs, same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nested_lm.errors import ReportError
from nested_lm_lab.evaluation.registry import find_task
from nested_lm_lab.report import plots, plots_continual, plots_inside
from nested_lm_lab.report.ablation_parts import ablation_document
from nested_lm_lab.report.ablations import grid_reports
from nested_lm_lab.report.collect import Campaign, collect
from nested_lm_lab.report.cost import cost
from nested_lm_lab.report.document import environment, write_html, write_markdown, write_text
from nested_lm_lab.report.findings import Check, checks, limits, supports, verdicts
from nested_lm_lab.report.kinds import other_results
from nested_lm_lab.report.plot_style import Drawing, require_matplotlib
from nested_lm_lab.report.tables import (
    Sample,
    Shown,
    Table,
    continual_table,
    identity_table,
    main_table,
    passkey_table,
    samples,
)

Plot = Callable[[Campaign], Drawing | None]
Draw = Callable[[Plot], Drawing | None]

_OUTCOME: tuple[Plot, ...] = (plots.loss, plots.validation, plots.periods, plots.positions)
_INSIDE: tuple[Plot, ...] = (plots_inside.gates, plots_inside.updates, plots_inside.fast_weights)


@dataclass(frozen=True)
class ReadingOrder:
    """What runs that read periods in one order lost and kept."""

    title: str
    table: Table
    figure: Drawing | None


@dataclass(frozen=True)
class Page:
    """Everything the templates write."""

    title: str
    name: str
    verdicts: list[str]
    supports: list[str]
    main: Table
    checks: list[Check]
    overview: Drawing | None
    outcome: list[Drawing]
    passkey: Table | None
    passkey_figure: Drawing | None
    continual: list[ReadingOrder]
    continual_more: list[Drawing]
    inside: list[Drawing]
    samples: list[Sample]
    identity: Table
    limits: list[str]
    notes: list[str]
    others: list[Shown]
    others_figures: list[Drawing]

    @property
    def drawings(self) -> list[Drawing]:
        """All figures in the order of the page."""
        single = [
            self.overview,
            *self.outcome,
            self.passkey_figure,
            *(part.figure for part in self.continual),
            *self.continual_more,
            *self.others_figures,
            *self.inside,
        ]
        return [drawing for drawing in single if drawing is not None]


def render_campaign(campaign_dir: Path) -> Path:
    """Render the report of a campaign folder and return the path of `report.html`.

    An ablation grid has pages of its own: `ablations.*` beside the report of the other runs, or, where there are none,
    the report itself.

    Figures go into the page, and as files into `figures/` for `report.md`. Without matplotlib both reports
    are written without figures and say so.

    Raises:
        ReportError: not a campaign folder, damaged files, or results that may not share a table.
    """
    campaign = collect(campaign_dir)
    plain = campaign.plain()
    if campaign.manifest.grids:
        document = ablation_document(campaign, grid_reports(campaign), command=f"nested-lm report {campaign_dir.name}")
        stem = "ablations" if plain.runs else "report"
        write_markdown(document, campaign_dir / f"{stem}.md")
        write_html(document, campaign_dir / f"{stem}.html")
    if plain.runs:
        page = make_page(plain)
        for drawing in page.drawings:
            write_text(campaign_dir / "figures" / f"{drawing.name}.svg", drawing.svg)
        for name in ("report.md", "report.html"):
            write_text(campaign_dir / name, environment().get_template(f"{name}.j2").render(page=page))
    return campaign_dir / "report.html"


def make_page(campaign: Campaign) -> Page:
    """Everything a report says of the runs outside grids."""
    notes = list(campaign.notes)
    draw = _drawer(campaign, notes)
    return Page(
        title=campaign.manifest.title,
        name=campaign.manifest.name,
        verdicts=verdicts(campaign),
        supports=supports(campaign),
        main=main_table(campaign),
        checks=checks(campaign),
        overview=draw(plots.overview),
        outcome=[drawing for plot in _OUTCOME if (drawing := draw(plot)) is not None],
        passkey=passkey_table(campaign),
        passkey_figure=draw(plots.passkey),
        continual=_reading_orders(campaign, draw),
        continual_more=[drawing for plot in plots_continual.ALL if (drawing := draw(plot)) is not None],
        inside=[drawing for plot in _INSIDE if (drawing := draw(plot)) is not None],
        samples=samples(campaign),
        identity=identity_table(campaign),
        limits=limits(campaign),
        notes=notes,
        others=[*other_results(campaign), *cost(campaign)],
        others_figures=[drawing for plot in _task_plots(campaign) if (drawing := draw(plot)) is not None],
    )


def _reading_orders(campaign: Campaign, draw: Draw) -> list[ReadingOrder]:
    found = []
    for order, title in plots_continual.ORDERS.items():
        table = continual_table(campaign, order)
        if table is not None:
            found.append(ReadingOrder(title, table, draw(partial(plots_continual.matrices, order=order))))
    return found


def _task_plots(campaign: Campaign) -> tuple[Plot, ...]:
    """Figures of tasks that some run was measured on: most campaigns lack some, and need not be told."""
    kinds = dict.fromkeys(result.metrics.kind for run in campaign.runs for result in run.results.values())
    return tuple(plot for kind in kinds for plot in find_task(kind).figures())


def _drawer(campaign: Campaign, notes: list[str]) -> Draw:
    """Draw a figure, or note why it is missing."""
    try:
        require_matplotlib()
    except ReportError as error:
        notes.append(f"There are no figures: {' '.join(str(error).split())}")
        return lambda _plot: None

    def draw(plot: Plot) -> Drawing | None:
        drawing = plot(campaign)
        if drawing is None:
            words = getattr(plot, "__name__", "").replace("_", " ")
            notes.append(f"There is no figure of {words}: no run has the numbers it needs.")
        return drawing

    return draw

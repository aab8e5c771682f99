"""The report of a campaign as parts, and its two files, `report.md` and a self-contained `report.html`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from nested_lm.errors import ReportError
from nested_lm_lab.evaluation.registry import find_task
from nested_lm_lab.report import plots, plots_continual, plots_inside
from nested_lm_lab.report.ablation_parts import ablation_document
from nested_lm_lab.report.ablations import grid_reports
from nested_lm_lab.report.collect import Campaign, collect
from nested_lm_lab.report.cost import cost
from nested_lm_lab.report.document import Document, Part, write_html, write_markdown
from nested_lm_lab.report.findings import checks, limits, verdicts
from nested_lm_lab.report.headlines import headlines
from nested_lm_lab.report.kinds import other_results
from nested_lm_lab.report.plot_style import Drawing, require_matplotlib
from nested_lm_lab.report.summary import READING, summary_table
from nested_lm_lab.report.tables import continual_table, identity_table, main_table, passkey_table, samples

Plot = Callable[[Campaign], Drawing | None]

QUESTIONS: dict[str, Plot] = {
    "Who predicts held-out text best?": plots.overview,
    "Who learns faster?": plots.validation,
    "Does a longer past help?": plots.positions,
    "What is forgotten, and when?": partial(plots_continual.forgetting, every=False),
}
_FOLDED: tuple[Plot, ...] = (
    plots.loss,
    plots.periods,
    *plots_continual.ALL,
    plots_inside.gates,
    plots_inside.updates,
    plots_inside.fast_weights,
)


def render_campaign(campaign_dir: Path) -> Path:
    """Render the report of a campaign folder and return the path of `report.html`: same inputs, same bytes.

    An ablation grid has pages of its own: `ablations.*` beside the report of the other runs, or, where there are none,
    the report itself.

    Figures go into the page, and as files into `figures/` for `report.md`. Without matplotlib both reports
    are written without figures and say so.

    Raises:
        ReportError: not a campaign folder, damaged files, or results that may not share a table.
    """
    campaign = collect(campaign_dir)
    plain = campaign.plain()
    command = f"nested-lm campaign {campaign.manifest.name}"
    documents = {}
    if campaign.manifest.grids:
        stem = "ablations" if plain.runs else "report"
        documents[stem] = ablation_document(campaign, grid_reports(campaign), command=command)
    if plain.runs:
        first, *parts = campaign_parts(plain, links=True)
        documents["report"] = Document(first.title, command, [], [replace(first, title=""), *parts])
    for stem, document in documents.items():
        write_markdown(document, campaign_dir / f"{stem}.md")
        write_html(document, campaign_dir / f"{stem}.html")
    return campaign_dir / "report.html"


def campaign_parts(campaign: Campaign, *, prefix: str = "", links: bool = False) -> list[Part]:
    """Sections on the runs outside grids: one table, one figure a question, what follows; then folded details.

    prefix: of the names of figures. links: whether to list the run folders, which lie beside the report.
    """
    notes = list(campaign.notes)
    try:
        require_matplotlib()
        has_figures = True
    except ReportError as error:
        has_figures = False
        notes.append(f"There are no figures: {' '.join(str(error).split())}")

    def draw(plot: Plot) -> Drawing | None:
        drawing = plot(campaign) if has_figures else None
        return drawing and replace(drawing, name=f"{prefix}{drawing.name}")

    fair = checks(campaign)
    reading = [READING, *(check.text for check in fair if not check.passed and check.text.startswith("Speed"))]
    parts = [Part(campaign.manifest.title, table=summary_table(campaign), text=reading, text_below=True)]
    for title, plot in [*QUESTIONS.items(), *((None, plot) for plot in _task_plots(campaign))]:
        if (drawing := draw(plot)) is not None:
            parts.append(Part(title or drawing.title, 3, drawing=drawing))
    parts.append(Part("What follows", 3, points=[*verdicts(campaign), *headlines(campaign)]))
    if notes:
        parts.append(Part("Missing", 3, points=notes))
    points = [("" if check.passed else "No: ") + check.text for check in fair]
    parts.append(Part("Is the comparison fair?", 3, points=points, folded=all(check.passed for check in fair)))
    parts += _details(campaign, draw)
    if links:
        parts.append(Part("Where the numbers come from", 3, table=identity_table(campaign), folded=True))
    return parts


def _details(campaign: Campaign, draw: Callable[[Plot], Drawing | None]) -> Iterator[Part]:
    yield Part("Every run", 3, table=main_table(campaign), folded=True)
    if (table := passkey_table(campaign)) is not None:
        yield Part("Passkey", 3, drawing=draw(plots.passkey), table=table, folded=True)
    for order, title in plots_continual.ORDERS.items():
        if (table := continual_table(campaign, order)) is not None:
            drawing = draw(partial(plots_continual.matrices, order=order))
            yield Part(title, 3, drawing=drawing, table=table, folded=True)
    for shown in [*other_results(campaign), *cost(campaign)]:
        yield Part(shown.title, 3, text=[shown.text], table=shown.table, folded=True)
    for plot in _FOLDED:
        if (drawing := draw(plot)) is not None:
            yield Part(drawing.title, 3, drawing=drawing, folded=True)
    if found := samples(campaign):
        yield Part("Samples", 3, samples=found, folded=True)
    yield Part("What this does not show", 3, points=limits(campaign), folded=True)


def _task_plots(campaign: Campaign) -> tuple[Plot, ...]:
    kinds = dict.fromkeys(result.metrics.kind for run in campaign.runs for result in run.results.values())
    return tuple(plot for kind in kinds for plot in find_task(kind).figures())

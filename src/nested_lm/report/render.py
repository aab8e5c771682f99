"""Writes `report.md` and a self-contained `report.html`: same inputs, same bytes."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from nested_lm.errors import ReportError
from nested_lm.report import plots, plots_continual, plots_inside
from nested_lm.report.collect import Campaign, collect
from nested_lm.report.findings import Check, checks, limits, supports, verdicts
from nested_lm.report.plot_style import Drawing, require_matplotlib
from nested_lm.report.tables import (
    Sample,
    Table,
    continual_table,
    identity_table,
    main_table,
    passkey_table,
    samples,
)

Plot = Callable[[Campaign], Drawing | None]

_OUTCOME: tuple[Plot, ...] = (plots.loss, plots.validation, plots.periods, plots.positions)
_INSIDE: tuple[Plot, ...] = (plots_inside.gates, plots_inside.updates, plots_inside.fast_weights)


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
    continual: Table | None
    continual_figure: Drawing | None
    continual_more: list[Drawing]
    inside: list[Drawing]
    samples: list[Sample]
    identity: Table
    limits: list[str]
    notes: list[str]

    @property
    def drawings(self) -> list[Drawing]:
        """All figures in the order of the page."""
        single = [
            self.overview,
            *self.outcome,
            self.passkey_figure,
            self.continual_figure,
            *self.continual_more,
            *self.inside,
        ]
        return [drawing for drawing in single if drawing is not None]


def render_campaign(campaign_dir: Path) -> Path:
    """Render the report of a campaign folder and return the path of `report.html`.

    Figures go into the page, and as files into `figures/` for `report.md`. Without matplotlib both reports
    are written without figures and say so.

    Raises:
        ReportError: not a campaign folder, damaged files, or results that may not share a table.
    """
    campaign = collect(campaign_dir)
    page = _page(campaign)
    environment = _environment()
    figures = campaign_dir / "figures"
    for drawing in page.drawings:
        figures.mkdir(exist_ok=True)
        _write(figures / f"{drawing.name}.svg", drawing.svg)
    for name in ("report.md", "report.html"):
        _write(campaign_dir / name, environment.get_template(f"{name}.j2").render(page=page))
    return campaign_dir / "report.html"


def _page(campaign: Campaign) -> Page:
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
        continual=continual_table(campaign),
        continual_figure=draw(plots.continual),
        continual_more=[drawing for plot in plots_continual.ALL if (drawing := draw(plot)) is not None],
        inside=[drawing for plot in _INSIDE if (drawing := draw(plot)) is not None],
        samples=samples(campaign),
        identity=identity_table(campaign),
        limits=limits(campaign),
        notes=notes,
    )


def _drawer(campaign: Campaign, notes: list[str]) -> Plot:
    """Draw a figure, or note why it is missing."""
    try:
        require_matplotlib()
    except ReportError as error:
        notes.append(f"There are no figures: {' '.join(str(error).split())}")
        return lambda _campaign: None

    def draw(plot: Plot) -> Drawing | None:
        drawing = plot(campaign)
        if drawing is None:
            words = getattr(plot, "__name__", "").replace("_", " ")
            notes.append(f"There is no figure of {words}: no run has the numbers it needs.")
        return drawing

    return lambda plot: draw(plot)  # type: ignore[arg-type, return-value]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nested_lm.report", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown_text
    environment.filters["fenced"] = markdown_block
    environment.filters["address"] = lambda path: quote(str(path))
    return environment


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table cell."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", one_line)


def markdown_block(text: str) -> str:
    """Text as a code block whose fence the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _write(path: Path, text: str) -> None:
    """Write a file atomically, with the same bytes on every system."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        aside.write_bytes(text.encode("utf-8", errors="replace"))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)

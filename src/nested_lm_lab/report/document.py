"""A report as data, written as Markdown or as a self-contained HTML page: same input, same bytes."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from nested_lm_lab.report.plot_style import Drawing
from nested_lm_lab.report.tables import Sample, Table


@dataclass(frozen=True)
class Part:
    """One section: paragraphs, points, a figure, a table and generated texts, in this order, where there are any.

    text_below: the paragraphs explain the table and stand below it. folded: a page shows the title until it is opened.
    """

    title: str
    level: int = 2
    text: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    drawing: Drawing | None = None
    table: Table | None = None
    samples: list[Sample] = field(default_factory=list)
    text_below: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """A whole report. command: what writes it. figures: folder of its figures, as Markdown links to it."""

    title: str
    command: str
    lead: list[str]
    parts: list[Part]
    figures: str = "figures"

    @property
    def drawings(self) -> list[Drawing]:
        """All figures in their order."""
        return [part.drawing for part in self.parts if part.drawing is not None]


def write_markdown(document: Document, path: Path) -> Path:
    """Write a document and its figures; files already there with these bytes are left untouched."""
    text = environment().get_template("document.md.j2").render(document=document)
    _write_figures(document, path.parent / document.figures)
    return write_text(path, re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")


def write_html(document: Document, path: Path) -> Path:
    """Write a document as one page that needs nothing else."""
    return write_text(path, environment().get_template("document.html.j2").render(document=document))


def _write_figures(document: Document, folder: Path) -> None:
    for drawing in document.drawings:
        write_text(folder / f"{drawing.name}.svg", drawing.svg)


def environment() -> Environment:
    """The templates of the reports."""
    found = Environment(
        loader=PackageLoader("nested_lm_lab.report", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["markdown"] = markdown_text
    found.filters["fenced"] = markdown_block
    found.filters["address"] = _address
    return found


def _address(target: str) -> str:
    """A link: web addresses as they are, paths with their odd characters quoted."""
    return target if target.startswith("https://") else quote(target)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table cell."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", one_line)


def markdown_block(text: str) -> str:
    """Text as a code block whose fence the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically, with the same bytes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        aside.write_bytes(text.encode("utf-8", errors="replace"))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path

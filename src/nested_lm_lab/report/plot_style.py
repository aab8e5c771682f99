"""One look for all figures: type, colours, axes, direct labels; and SVG with reproducible bytes."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nested_lm.errors import ReportError, pip_install

WIDTH = 10.0  # inches; the page is as wide
_FRAME = 0.9  # inches of a panel's height that its title and labels take
INK = "#1f2328"
MUTED = "#6b7280"
GRID = "#e5e7eb"
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8a6d00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, darkened where thin lines need it."""
PART_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#1f2328", "#7a5195")
FLOOR_COLOURS = {"unigram": "#b6bcc6", "bigram": "#808791"}

_STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.8,
    "ytick.labelsize": 8.8,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "nested-lm",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    name: file name without ending. caption: says how to read it. svg: the element, its ids unique to `name`.
    """

    name: str
    title: str
    caption: str
    svg: str


def require_matplotlib() -> ModuleType:
    """Import matplotlib. Raises ReportError naming the extra when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            "figures need matplotlib, which is not installed\n"
            f"  Install the extra `plot`: {pip_install('plot')}; then render the report again."
        ) from error
    return matplotlib


@contextmanager
def canvas(rows: int, columns: int, *, height: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure with rows x columns axes (always a 2-D array) in the shared style.

    height: inches. options: of `matplotlib.figure.Figure.subplots`.
    """
    matplotlib = require_matplotlib()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(_STYLE)):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.05)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


@contextmanager
def panels(count: int, *, height: float, per_row: int = 4, **options: Any) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with `count` axes in rows of at most `per_row`, as one flat list. height: inches of a row."""
    columns = min(count, per_row)
    rows = -(-count // columns)
    with canvas(rows, columns, height=height * rows, **options) as (figure, axes):
        flat = list(axes.flat)
        for axis in flat[count:]:
            axis.set_visible(False)
        yield figure, flat[:count]


def label_rows(axes: Sequence[Any], text: str) -> None:
    """Name the vertical axis, once a row."""
    for axis in axes:
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(text)


def finish(figure: Any, *, name: str, title: str, caption: str) -> Drawing:
    """Write a figure as an SVG element: no date, no XML header, ids that no other figure on the page has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return Drawing(name, title, caption.replace("95 %", "95\u00a0%"), text.strip() + "\n")


LineEnd = tuple[float, float, str, str]
"""x and y of a line's last point in data units, its name and its colour."""


def label_line_ends(panels: Sequence[tuple[Any, Sequence[LineEnd]]], *, size: float = 9.0) -> None:
    """Write names beside the ends of lines, pushed apart where they would overlap.

    panels: axes of one figure, limits final, each with the ends of its lines.
    """
    for axes, ends in panels:
        to_fraction = axes.transScale + axes.transLimits  # of the panel's height; needs no layout
        axes.get_ylim()
        figure, rows = axes.figure, axes.get_gridspec().nrows
        panel = figure.get_figheight() / rows - _FRAME  # inches
        gap = 1.25 * size / 72 / panel
        placed = sorted((to_fraction.transform((x, y))[1], name, colour) for x, y, name, colour in ends)
        heights = spread([height for height, _, _ in placed], gap)
        for height, (_, name, colour) in zip(heights, placed, strict=True):
            axes.annotate(
                name,
                xy=(1.0, height),
                xycoords="axes fraction",
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                ha="left",
                color=colour,
                fontsize=size,
                annotation_clip=False,
            )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, as near to the wanted ones as can be (least squares)."""
    pools: list[tuple[float, int]] = []  # mean and size of neighbours that push each other
    for index, value in enumerate(wanted):
        mean, size = value - index * gap, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return [mean + index * gap for index, mean in enumerate(flat)]


def thousands(axis: Any) -> None:
    """Tick labels such as 200 k and 1.2 M."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _position: short_count(value)))


def short_count(value: float) -> str:
    """A count in three digits: 950, 4.1 k, 1.2 M, 3 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the start."""
    sums, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        sums.append(total / min(index + 1, window))
    return sums

"""Tables between the markers of a page of the documentation."""

from collections.abc import Iterable
from pathlib import Path

from nested_lm.storage.atomic import write_atomically

RESULTS = "<!-- results: begin -->", "<!-- results: end -->"
"""Markers of a page that has one place for tables."""


def line(cells: Iterable[str]) -> str:
    """Make a line of a table."""
    return f"| {' | '.join(cells)} |"


def insert(page: Path, text: str, markers: tuple[str, str] = RESULTS) -> None:
    """Replace what stands between two markers of a page.

    Raises:
        SystemExit: the page has no markers.
    """
    first, last = markers
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the tables; put the lines {first} and {last} where they belong")
    write_atomically(page, f"{before}{first}\n{text}\n{last}{after}".encode())

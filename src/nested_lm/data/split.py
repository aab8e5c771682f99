"""Which split a document belongs to, and which chronological period: functions of the document alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nested_lm.config.data import Split

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Period:
    """One chronological segment, both years included."""

    label: str
    first_year: int
    last_year: int


def assign_split(content: str, shares: Split) -> SplitName:
    """Split of a document from its `content_hash`.

    Depends on nothing else, so a document keeps its split when others are added, removed or reordered.
    """
    point = int(content[:13], 16) / 2**52  # exact in a float, always below 1
    if point < shares.train:
        return "train"
    return "validation" if point < shares.train + shares.validation or shares.test == 0.0 else "test"


def cut_periods(years: Iterable[int], period_years: int) -> list[Period]:
    """Periods of `period_years` years from the first year to the last; the last one ends with the corpus.

    A period without documents keeps its place, so that an index always means the same years.
    """
    years = set(years)
    if not years:
        return []
    first, last = min(years), max(years)
    periods = []
    for start in range(first, last + 1, period_years):
        end = min(start + period_years - 1, last)
        periods.append(Period(f"{start}-{end}" if end > start else f"{start}", start, end))
    return periods


def period_of(year: int, periods: list[Period]) -> int:
    """Index of the period a year falls into."""
    length = periods[0].last_year - periods[0].first_year + 1
    return (year - periods[0].first_year) // length

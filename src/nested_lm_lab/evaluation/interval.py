"""A measured number with its interval, as every result file writes it."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from nested_lm.config.section import Count, Section

Natural = Annotated[int, Field(ge=0)]


class Interval(Section):
    """A number and its 95 % interval.

    `low` and `high` are null where no interval can be had: a bootstrap over one document has no spread, and
    to print a width of zero there would claim certainty.
    """

    value: float
    low: float | None
    high: float | None
    n: Count  # documents or samples behind the number
    method: str

    @model_validator(mode="after")
    def _ordered(self) -> "Interval":
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low {self.low} and high {self.high} must both be numbers or both be null")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    def text(self, digits: int = 3) -> str:
        """The number and its interval, as in `0.512 [0.474, 0.550]`."""
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


_NAMES = ("task", "data", "label", "segment", "length", "level", "order", "depth", "name")
"""Fields by which an entry of a list is called in a path."""


def intervals_of(metrics: Any, path: str = "") -> Iterator[tuple[str, Interval]]:
    """Every interval in the metrics of a result, with its place in words.

    Lists of lists (matrices) and single samples are left to the file.
    """
    if isinstance(metrics, Interval):
        yield path, metrics
    elif isinstance(metrics, BaseModel):
        for name in type(metrics).model_fields:
            words = name.replace("_", " ")
            yield from intervals_of(getattr(metrics, name), f"{path}, {words}" if path else words)
    elif isinstance(metrics, dict):
        for name, child in metrics.items():
            yield from intervals_of(child, f"{path}, {name}")
    elif isinstance(metrics, tuple) and not any(isinstance(child, tuple) for child in metrics):
        for index, child in enumerate(metrics):
            name = next((getattr(child, field) for field in _NAMES if hasattr(child, field)), index + 1)
            yield from intervals_of(child, f"{path} {name}")

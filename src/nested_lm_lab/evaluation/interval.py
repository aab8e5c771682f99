"""A measured number with its interval, as every result file writes it."""

from typing import Annotated

from pydantic import Field, model_validator

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

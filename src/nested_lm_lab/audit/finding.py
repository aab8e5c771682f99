"""What a check finds: a figure against its limits, or the reason why it does not apply."""

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["passed", "missed", "does not apply"]


@dataclass(frozen=True)
class Finding:
    """One row of an audit.

    figure: what was measured, with its unit where it has one.
    value: None where nothing could be measured: the check does not apply, or it broke.
    low, high: smallest and largest value that pass; None: no limit on that side.
    reason: why the check does not apply, how it broke, or what else a reader must know.
    broke: the check ended with an error; it counts as missed.
    """

    figure: str
    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    broke: bool = False

    def __post_init__(self) -> None:
        if self.value is None:
            assert self.reason, "a finding without a value says why"
        else:
            assert self.low is not None or self.high is not None, "a figure without a limit cannot be missed"

    @property
    def state(self) -> State:
        """Whether the figure is within its limits; NaN never is."""
        if self.value is None:
            return "missed" if self.broke else "does not apply"
        inside = (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)
        return "passed" if inside and math.isfinite(self.value) else "missed"

    @property
    def limit(self) -> str:
        """The limits in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}" if self.low != self.high else f"{self.low:g}"
        if self.low is not None:
            return f">= {self.low:g}"
        return "" if self.high is None else f"<= {self.high:g}"


def at_most(figure: str, value: float, limit: float, reason: str = "") -> Finding:
    """Judge a figure that must not be larger."""
    return Finding(figure, float(value), high=limit, reason=reason)


def at_least(figure: str, value: float, limit: float, reason: str = "") -> Finding:
    """Judge a figure that must not be smaller."""
    return Finding(figure, float(value), low=limit, reason=reason)


def between(figure: str, value: float, low: float, high: float, reason: str = "") -> Finding:
    """Judge a figure that must lie in a range, ends included."""
    return Finding(figure, float(value), low=low, high=high, reason=reason)


def does_not_apply(figure: str, reason: str) -> Finding:
    """Say why there is nothing to measure in this model. Never for something that is not implemented."""
    return Finding(figure, None, reason=reason)


def broken(figure: str, reason: str) -> Finding:
    """Say how a check ended without a figure: a miss."""
    return Finding(figure, None, reason=reason, broke=True)

"""Intervals: document bootstrap of ratios, means and paired differences; Wilson for shares.

All intervals are 95 %. The same seed draws the same documents, so intervals do not move when a file is
written again, and two models are resampled on the same documents.
"""

import math
from dataclasses import dataclass

import numpy as np

from nested_lm.errors import NumericsError
from nested_lm_lab.evaluation.interval import Interval

_LEVEL = 0.95
_Z = 1.959963984540054  # normal quantile of 0.975
_MAX_WEIGHTS = 8_000_000  # resampling weights held at once


@dataclass(frozen=True)
class Bootstrap:
    """How often and with which seed documents are drawn."""

    samples: int
    seed: int = 0

    @property
    def method(self) -> str:
        """Name of the method as written into result files."""
        return f"document bootstrap, percentile 95 %, {self.samples} resamples, seed {self.seed}"

    def resample(self, *columns: np.ndarray) -> list[np.ndarray]:
        """Sums of each column (n, ...) over documents drawn with replacement, each (samples, ...)."""
        n = len(columns[0])
        rng = np.random.default_rng(self.seed)
        rows = max(1, _MAX_WEIGHTS // n)
        sums: list[list[np.ndarray]] = [[] for _ in columns]
        for start in range(0, self.samples, rows):
            draws = min(rows, self.samples - start)
            weights = rng.multinomial(n, np.full(n, 1.0 / n), size=draws).astype(np.float64)
            for out, column in zip(sums, columns, strict=True):
                out.append(np.tensordot(weights, column, axes=(1, 0)))
        return [np.concatenate(out) for out in sums]

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray, *, scale: float = 1.0) -> Interval:
        """Interval of scale * sum(numerator) / sum(denominator), resampling documents.

        Args:
            numerator, denominator: one entry a document; denominators are positive.
            scale: 1 / ln 2 turns nats over bytes into bits per byte.
        """
        numerator = _finite(numerator, "numerator")
        denominator = _finite(denominator, "denominator")
        assert numerator.shape == denominator.shape, "one numerator for each denominator"
        assert (denominator > 0).all(), "a document without bytes or tokens cannot be scored"
        value = scale * float(numerator.sum() / denominator.sum())
        top, bottom = self.resample(numerator, denominator)
        return self.percentile(value, scale * top / bottom, len(numerator))

    def mean(self, values: np.ndarray) -> Interval:
        """Interval of the mean of one value a document or sample."""
        return self.ratio(values, np.ones(len(values)))

    def paired(self, a: np.ndarray, b: np.ndarray, denominator: np.ndarray, *, scale: float = 1.0) -> Interval:
        """Interval of ratio(a) - ratio(b) where both were measured on the same documents, in this order."""
        return self.ratio(_finite(a, "a") - _finite(b, "b"), denominator, scale=scale)

    def percentile(self, value: float, resampled: np.ndarray, n: int) -> Interval:
        """Percentile interval of resampled statistics (samples,) around `value`; one document has none."""
        if n == 1:
            return Interval(value=value, low=None, high=None, n=1, method="none: one document")
        low, high = np.percentile(resampled, [50 * (1 - _LEVEL), 50 * (1 + _LEVEL)])
        return Interval(value=value, low=float(low), high=float(high), n=n, method=self.method)


def wilson(successes: float, n: int) -> Interval:
    """Wilson score interval of a share: honest at 0 of n and n of n, where the bootstrap has no spread.

    successes: a sum of n scores from 0 to 1. Scores between vary less than 0 and 1 do, so theirs is on the safe side.
    """
    assert 0 <= successes <= n, f"{successes} of {n}"
    assert n > 0, "a share of nothing"
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n, method="Wilson 95 %")


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        raise NumericsError(
            f"{len(bad)} of {len(values)} scores are not finite ({name}, first at document {bad[0]}: "
            f"{values[bad[0]]}); the checkpoint has diverged. Evaluate an earlier one."
        )
    return values

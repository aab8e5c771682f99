"""Intervals over seeds: what a repetition with another seed would give."""

import math
import statistics
from collections.abc import Sequence

from nested_lm_lab.evaluation.interval import Interval

_Z = 1.959963984540054  # normal quantile of 0.975


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of one value a seed with Student's 95 % interval; one seed has none.

    It covers initialisation and data order, not the choice of held-out documents, which all seeds share.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(value=mean, low=None, high=None, n=1, method="none: one seed")
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - half, high=mean + half, n=len(values), method="Student t over seeds, 95 %")


def student(freedom: int) -> float:
    """Quantile 0.975 of Student's distribution; exact for 1 and 2 degrees of freedom, else within 0.01.

    Source: the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )

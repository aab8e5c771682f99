"""Statistics that tie forgetting to the clocks of the levels. Pure functions of arrays; no model, no file.

A clock ticks when a multiple of its period of tokens has passed.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_EXACT_ORDERS = 5040
"""Orders up to which a rank correlation is tested against all of them."""

SPACINGS_SHIFTED_TOGETHER = 4
"""Spacings of a stretch whose ticks are shifted together in an event study, at least; a block may hold several."""


def ticks(tokens: Int[np.ndarray, "n"], period: int) -> Bool[np.ndarray, "n"]:
    """Which of the places, given in tokens passed, lie on a tick."""
    return tokens % period == 0


def age_in_ticks(tokens: int, end: int, period: int) -> int:
    """Ticks of a clock since a segment ended: floor(tokens / period) - floor(end / period)."""
    return tokens // period - end // period


@dataclass(frozen=True)
class Effect:
    """Mean change at ticks minus mean change elsewhere, and how rare that is under shifts of the ticks.

    shifts: distinct combinations of shifts there are. is_exact: all were tried; else `tried` were drawn.
    smallest_p: the p-value that the clearest effect could have had.
    """

    value: float
    p_value: float
    smallest_p: float
    ticks: int
    others: int
    shifts: int
    tried: int
    is_exact: bool


def event_study(
    changes: Float[np.ndarray, "n"],
    is_tick: Bool[np.ndarray, "n"],
    blocks: Int[np.ndarray, "n"],
    *,
    spacing: int,
    permutations: int,
    seed: int,
) -> Effect | None:
    """Compare the changes at ticks with those at the other places; None where no block is long enough.

    From each change the centred mean of one spacing around it is taken off first, which holds exactly one tick: a
    trend would otherwise look like an effect of the ticks, which lie at the end of their periods. Then the ticks are
    shifted in a circle, each stretch of neighbouring places by itself, which keeps their spacing and the correlation
    of near changes. A strictly periodic clock has no more distinct shifts than `spacing`, so that one stretch alone
    could never show a small p-value: stretches multiply them. Two-sided; the ticks as they are count among the
    shifts.

    Args:
        changes: at places in order; finite.
        is_tick: every `spacing`-th place of a block, from anywhere on.
        blocks: number of the block of each place; equal numbers are neighbours.
        spacing: places from tick to tick, at least 2.
    """
    assert len(changes) == len(is_tick) == len(blocks), "one tick and one block a place"
    assert np.isfinite(changes).all(), "changes are finite"
    assert spacing >= 2, "places without a tick to compare with"
    options, places = [], 0
    for block in np.unique(blocks):
        inside = blocks == block
        values, train = _without_trend(changes[inside], is_tick[inside], spacing)
        assert train.sum() * spacing == len(train), "ticks are regular"
        stretch = SPACINGS_SHIFTED_TOGETHER * spacing
        cuts = range(stretch, len(values) - stretch + 1, stretch)
        for part, shifted in zip(np.split(values, cuts), np.split(train, cuts), strict=True):
            if len(part):
                options.append(np.array([part[np.roll(shifted, shift)].sum() for shift in range(spacing)]))
        places += len(values)
    if not options:
        return None
    count = places // spacing
    total = sum(option.sum() for option in options)  # every place is a tick under one shift

    def contrast(at_ticks: np.ndarray) -> np.ndarray:
        return at_ticks / count - (total - at_ticks) / (places - count)

    observed = float(contrast(sum(option[0] for option in options)))
    shifts = spacing ** len(options)
    is_exact = shifts <= permutations
    if is_exact:
        null = contrast(np.array([sum(chosen) for chosen in itertools.product(*options)]))
        own, tried = 0, shifts  # the ticks as they are, among all shifts
    else:
        rng = np.random.default_rng(seed)
        null = contrast(sum(rng.choice(option, size=permutations) for option in options))
        own, tried = 1, permutations
    extreme = int((np.abs(null) >= abs(observed) * (1 - 1e-9)).sum())
    p_value = (extreme + own) / (tried + own)
    # With every second place a tick, the others are a shift of the ticks: as extreme, with the opposite sign.
    smallest = 2 if is_exact and spacing == 2 else 1
    return Effect(observed, p_value, smallest / (tried + own), count, places - count, shifts, tried, is_exact)


def _without_trend(
    values: Float[np.ndarray, "n"], train: Bool[np.ndarray, "n"], spacing: int
) -> tuple[Float[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
    """Values minus their centred mean over one spacing, and their ticks: a whole number of spacings, perhaps none.

    The mean of an even spacing has half the weight at its two ends, as that of a seasonal adjustment has.
    """
    half = spacing // 2
    weights = np.ones(2 * half + 1)
    if spacing % 2 == 0:
        weights[[0, -1]] = 0.5
    if len(values) < len(weights) + spacing - 1:
        return values[:0], train[:0]
    left = values[half : len(values) - half] - np.convolve(values, weights / spacing, mode="valid")
    whole = len(left) // spacing * spacing
    return left[:whole], train[half : half + whole]


def centre_of_mass(damage: Float[np.ndarray, "levels segments"]) -> Float[np.ndarray, "levels"]:
    """Mean number of the segment (1, 2, ...) that each level's lesion damages, weighted by the damage.

    What gets better by a lesion has no weight. NaN for a level whose lesion damages nothing.
    """
    weight = np.maximum(damage, 0.0)
    total = weight.sum(axis=1)
    number = np.arange(1, damage.shape[1] + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, (weight * number).sum(axis=1) / total, np.nan)


@dataclass(frozen=True)
class Correlation:
    """Rank correlation, two-sided p-value over orders, and the smallest p-value so few points could give."""

    value: float
    p_value: float
    smallest_p: float
    n: int


def spearman(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], *, permutations: int, seed: int
) -> Correlation | None:
    """Spearman's rank correlation with a permutation test; None when one of the two does not vary, or n < 3."""
    if len(x) < 3 or len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return None
    ranked_x, ranked_y = _ranks(x), _ranks(y)
    observed = float(np.corrcoef(ranked_x, ranked_y)[0, 1])
    if math.factorial(len(x)) <= MAX_EXACT_ORDERS:
        orders = [np.array(order) for order in itertools.permutations(range(len(x)))]
        extra = 0
    else:
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(x)) for _ in range(permutations)]
        extra = 1  # the order as it is
    null = np.array([np.corrcoef(ranked_x, ranked_y[order])[0, 1] for order in orders])
    extreme = int((np.abs(null) >= abs(observed) - 1e-9).sum())
    best = 2 if extra == 0 else 1  # a perfect order and its reverse
    return Correlation(observed, (extreme + extra) / (len(orders) + extra), best / (len(orders) + extra), len(x))


def _ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 0; ties share their mean rank."""
    return np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values])


@dataclass(frozen=True)
class RetentionCurve:
    """How much of one segment was forgotten, by tokens read since it ended."""

    age: Float[np.ndarray, "n"]
    lost: Float[np.ndarray, "n"]


@dataclass(frozen=True)
class RetentionFit:
    """lost(age) = sum of weight_l (1 - exp(-age / time_l)), weights at least 0.

    scale: the one free number of the times: kappa of time_l = kappa x period_l, or the time itself.
    held_out: root mean square error on each curve, of a fit to the other curves.
    """

    scale: float
    weights: tuple[float, ...]
    error: float
    held_out: tuple[float, ...]

    @property
    def held_out_error(self) -> float:
        """Root mean square over the curves that were held out in turn."""
        return float(np.sqrt(np.mean(np.square(self.held_out))))


def fit_retention(
    curves: Sequence[RetentionCurve], periods: Sequence[int], *, scales: Float[np.ndarray, "n"]
) -> RetentionFit:
    """Fit what was lost by age, with one time constant a level, all tied to the levels' periods by one factor.

    `periods=(1,)` is the single free exponential. The scale is the best of `scales`; the weights are then the exact
    least squares under their bounds. Every curve counts alike, however many points it has.

    Args:
        curves: two or more, so that each can be held out.
    """
    assert len(curves) >= 2, "a curve to fit and a curve to hold out"
    scale, weights, error = _best_scale(curves, periods, scales)
    held_out = []
    for index, curve in enumerate(curves):
        rest = [*curves[:index], *curves[index + 1 :]]
        other_scale, other_weights, _ = _best_scale(rest, periods, scales)
        held_out.append(_error([curve], periods, other_scale, other_weights))
    return RetentionFit(scale, tuple(float(w) for w in weights), error, tuple(held_out))


def predict_lost(
    age: Float[np.ndarray, "n"], periods: Sequence[int], scale: float, weights: Sequence[float]
) -> Float[np.ndarray, "n"]:
    """What a fit says was lost at these ages."""
    return _design(age, periods, scale) @ np.asarray(weights)


def _design(age: np.ndarray, periods: Sequence[int], scale: float) -> Float[np.ndarray, "n levels"]:
    return -np.expm1(-age[:, None] / (scale * np.asarray(periods, dtype=np.float64)[None, :]))


def _best_scale(
    curves: Sequence[RetentionCurve], periods: Sequence[int], scales: np.ndarray
) -> tuple[float, np.ndarray, float]:
    best: tuple[float, np.ndarray, float] | None = None
    root = [1 / math.sqrt(len(curve.age)) for curve in curves]  # each curve counts alike
    wanted = np.concatenate([r * curve.lost for r, curve in zip(root, curves, strict=True)])
    for scale in scales:
        design = np.concatenate([r * _design(c.age, periods, scale) for r, c in zip(root, curves, strict=True)])
        weights = non_negative_least_squares(design, wanted)
        error = _error(curves, periods, float(scale), weights)
        if best is None or error < best[2]:
            best = float(scale), weights, error
    assert best is not None, "at least one scale to try"
    return best


def _error(curves: Sequence[RetentionCurve], periods: Sequence[int], scale: float, weights: np.ndarray) -> float:
    squares = [np.mean((curve.lost - predict_lost(curve.age, periods, scale, weights)) ** 2) for curve in curves]
    return float(np.sqrt(np.mean(squares)))


def non_negative_least_squares(
    design: Float[np.ndarray, "n k"], wanted: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "k"]:
    """Least squares with coefficients of at least 0: the best of all subsets of columns. For few columns."""
    columns = design.shape[1]
    best, best_error = np.zeros(columns), float(wanted @ wanted)
    for size in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), size):
            found = np.linalg.lstsq(design[:, chosen], wanted, rcond=None)[0]
            if (found < 0).any():
                continue
            weights = np.zeros(columns)
            weights[list(chosen)] = found
            error = float(np.sum((wanted - design @ weights) ** 2))
            if error < best_error:
                best, best_error = weights, error
    return best

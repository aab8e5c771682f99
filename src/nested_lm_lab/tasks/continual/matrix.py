"""What a matrix of scores says about forgetting and transfer. Pure functions, on one matrix or a stack of resamples.

Two kinds of matrices. L[t][s]: a loss, lower is better, of segment s = 1..S after segment t = 0..S (row 0 is the
model before any), column s - 1 of the arrays here. R[t][s]: a score, higher is better, of task s after task t, both
1..S, defined for s <= t; what lies above the diagonal is not read.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Losses = Float[np.ndarray, "*resamples rows segments"]
Scores = Float[np.ndarray, "*resamples tasks tasks"]


def forgetting(losses: Losses) -> Float[np.ndarray, "*resamples segments segments"]:
    """F[t][s] = L[t][s] - min over s <= u <= t of L[u][s], for t >= s; NaN above the diagonal.

    What the model knew of a segment before it read it (u < s) does not count. Never negative. Row t - 1 is
    checkpoint t.
    """
    trained = losses[..., 1:, :]
    read = np.tril(np.ones(trained.shape[-2:], dtype=bool))
    best = np.minimum.accumulate(np.where(read, trained, np.inf), axis=-2)
    return np.where(read, trained - best, np.nan)


def backward_transfer(losses: Losses) -> np.ndarray:
    """BWT = -mean over s < S of (L[S][s] - L[s][s]). Positive: later segments helped earlier ones."""
    return -(losses[..., -1, :] - _diagonal(losses))[..., :-1].mean(axis=-1)


def forward_transfer(losses: Losses) -> np.ndarray:
    """FWT = -mean over s > 1 of (L[s-1][s] - L[0][s]). Positive: earlier segments helped later ones."""
    before = np.diagonal(losses[..., :-1, :], axis1=-2, axis2=-1)  # L[s-1][s]
    return -(before - losses[..., 0, :])[..., 1:].mean(axis=-1)


def plasticity(losses: Losses) -> np.ndarray:
    """Mean over s of L[s][s]: how well a segment is learnt when it is read."""
    return _diagonal(losses).mean(axis=-1)


def accuracy(losses: Losses) -> np.ndarray:
    """ACC = mean over s of L[S][s]: loss over all segments at the end."""
    return losses[..., -1, :].mean(axis=-1)


class Regret(NamedTuple):
    """Mean of L[t][s] - L_oracle[s]: on the diagonal, below it (segments read before) and above it (not yet read)."""

    on: np.ndarray
    below: np.ndarray
    above: np.ndarray


def regret(losses: Losses, oracle: Float[np.ndarray, "*resamples segments"]) -> Regret:
    """Loss above that of an oracle that read all segments mixed, with the same budget.

    The untrained row does not count. Source: TiC-LM's in-distribution, backward and forward averages.
    """
    excess = losses[..., 1:, :] - oracle[..., None, :]
    size = excess.shape[-1]
    row, column = np.indices((size, size))
    return Regret(*(excess[..., where].mean(axis=-1) for where in (row == column, row > column, row < column)))


def _diagonal(losses: Losses) -> np.ndarray:
    return np.diagonal(losses[..., 1:, :], axis1=-2, axis2=-1)


def final_score(scores: Scores) -> np.ndarray:
    """ACC = mean over s of R[S][s]."""
    return scores[..., -1, :].mean(axis=-1)


def incremental_score(scores: Scores) -> np.ndarray:
    """Mean over t of the mean over s <= t of R[t][s]: accuracy on what has been seen, all along the stream."""
    size = scores.shape[-1]
    return np.mean([scores[..., t, : t + 1].mean(axis=-1) for t in range(size)], axis=0)


def score_backward_transfer(scores: Scores) -> np.ndarray:
    """BWT = mean over s < S of (R[S][s] - R[s][s]). Negative: earlier tasks were forgotten."""
    diagonal = np.diagonal(scores, axis1=-2, axis2=-1)
    return (scores[..., -1, :] - diagonal)[..., :-1].mean(axis=-1)


def score_forgetting(scores: Scores) -> np.ndarray:
    """Mean over s < S of (max over s <= l < S of R[l][s] - R[S][s]).

    The final row is no candidate for the peak, so that a task that went on getting better counts as negative, and
    the last task, which nothing followed, does not dilute the mean.

    Source: Chaudhry et al., arXiv 1801.10112 eq. 3, with l >= s: a peak before the task was learned does not count.
    """
    size = scores.shape[-1]
    lost = [scores[..., s : size - 1, s].max(axis=-1) - scores[..., -1, s] for s in range(size - 1)]
    return np.mean(lost, axis=0)


def score_plasticity(scores: Scores) -> np.ndarray:
    """Learning accuracy: mean over s of R[s][s]."""
    return np.diagonal(scores, axis1=-2, axis2=-1).mean(axis=-1)

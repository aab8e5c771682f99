"""The gated delta rule with rank-one writes: solving for all writes of a chunk at once.

With distances D, unit directions p_t, known errors g_t, rates eta_t and retentions alpha_t (gamma_t their running
product):

    D_t = alpha_t D_{t-1} - eta_t (g_t + D_{t-1} p_t) p_t^T = gamma_t D_0 + sum_{i<=t} (gamma_t / gamma_i) w_i p_i^T

and the updates w solve one unit lower-triangular system (I + L) W = -eta (G + gamma_{t-1} P D_0^T) with
L_ti = eta_t (gamma_{t-1} / gamma_i) p_t.p_i for i < t.

Shapes: B batch, H heads, C tokens of a chunk, N memories, G directions (1 when shared, else N), X and Y the sizes of a
layer's output and input.

Source: arXiv 2512.24695 eq. 88 in the parallel form derived in docs/equations.md.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory.rule import WriteRule
from nested_lm.ops.triangular import full_product, unit_lower_inverse


class Writes(NamedTuple):
    """Rank-one writes of one layer of some memories, with what the backward of the solve needs."""

    write: Float[Tensor, "B H N C X"]
    known: Float[Tensor, "B H N C X"] | None = None  # right-hand side before the rate and the sign
    faded: Float[Tensor, "B H N C X"] | None = None  # old content read along the direction
    inverse: Float[Tensor, "B H G C C"] | None = None
    overlap: Float[Tensor, "B H G C C"] | None = None  # factor without the rate
    pushed: Float[Tensor, "B H N C X"] | None = None  # what enters the momentum; None without


class Decays(NamedTuple):
    """Running products of the retention, in the forms the recurrences need. gamma_0 = 1."""

    log_kept: Float[Tensor, "B H C"]  # log gamma_t
    before: Float[Tensor, "B H 1 C 1"]  # gamma_{t-1}
    ratio: Float[Tensor, "B H 1 C C"]  # gamma_{t-1} / gamma_i below the diagonal, 0 elsewhere
    to_end: Float[Tensor, "B H 1 C 1"]  # gamma_C / gamma_t
    end: Float[Tensor, "B H 1 1 1"]  # gamma_C
    erased: Float[Tensor, "B H 1 C 1"]  # share of gamma_{t-1} that the erase term meets: alpha_t, or 1


class Spread(NamedTuple):
    """How much of a push has arrived in the weights some tokens later, through momentum and retention.

    matrix[t, i]: weight of the push of token i in the weights after token t. first[t]: that of the momentum before
    the chunk. own_end, own_first: what is left in the momentum itself at the end, of each push and of the old one.
    """

    matrix: Float[Tensor, "B H 1 C C"]
    first: Float[Tensor, "B H 1 C 1"]
    own_end: Float[Tensor, "B H 1 C 1"]
    own_first: Float[Tensor, "B H 1 1 1"]


def product(a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
    """Matrix product with operands rounded to `operands` (None: as they are); the result keeps a's dtype."""
    if operands is None:
        return a @ b
    return (a.to(operands) @ b.to(operands)).to(a.dtype)


def running_decays(log_decay: Float[Tensor, "B H C"], rule: WriteRule) -> Decays:
    """Accumulate the retention over the chunk, in logarithms so that nothing overflows."""
    log_kept = log_decay.cumsum(dim=-1)
    log_before = log_kept - log_decay
    ratio = (log_before[..., :, None] - log_kept[..., None, :]).tril(-1).exp().tril(-1)
    last = log_kept[..., -1:]
    return Decays(
        log_kept,
        log_before.exp()[:, :, None, :, None],
        ratio[:, :, None],
        (last - log_kept).exp()[:, :, None, :, None],
        last.exp()[..., None, None],
        (log_decay.exp() if rule.erase_after_decay else torch.ones_like(log_decay))[:, :, None, :, None],
    )


def spread_of_momentum(
    log_kept: Float[Tensor, "... C"], log_momentum: Float[Tensor, "... C"], rule: WriteRule
) -> Spread:
    """Combine the decay of the momentum with the retention of the weights (spec of the chunk form, docs/equations.md).

    log_momentum: log of the share of the momentum kept at each token; of a mean, the rest is new. Leading dimensions
        are free; one is added before the last two of the results.
    """
    log_left = log_momentum.cumsum(-1)
    retained = (log_kept[..., :, None] - log_kept[..., None, :]).tril().exp().tril()
    left = (log_left[..., :, None] - log_left[..., None, :]).tril().exp().tril()
    if rule.momentum == "mean":
        left = -torch.expm1(log_momentum)[..., None, :] * left
    return Spread(
        (retained @ left)[..., None, :, :],
        (retained @ log_left.exp()[..., None])[..., None, :, :],
        left[..., None, -1, :, None],
        log_left[..., -1:].exp()[..., None, None],
    )


def shifted(x: Float[Tensor, "... C X"]) -> Float[Tensor, "... C X"]:
    """Move rows down by one token; the first row becomes 0."""
    return functional.pad(x[..., :-1, :], (0, 0, 1, 0))


def solve_writes(
    error: Float[Tensor, "B H N C X"],
    direction: Float[Tensor, "B H G C Y"],
    old: Float[Tensor, "B H N X Y"],
    rate: Float[Tensor, "B H 1 C 1"],
    decays: Decays,
    times: Float[Tensor, "B H 1 C 1"] | None,
    operands: torch.dtype | None,
    held: Float[Tensor, "B H N C X"] | None = None,
) -> Writes:
    """Writes of one layer of N memories of equal rate: w_t = -eta_t (g_t + times_t D_{t-1} p_t - held_t).

    G is 1 when the memories share their directions, else N. times: how much of the old content is taken off: by the
    erase term, by a gradient at the fresh weights, or by both; None: nothing. held: what the border held, if the erase
    term leaves that to the gradient, else None.
    """
    if times is None:
        return Writes(-rate * error, error)
    overlap = decays.ratio * product(direction, direction.mT, operands)
    inverse = unit_lower_inverse((times * rate) * overlap)
    faded = product(direction, old.mT, operands)
    known = torch.addcmul(error, times * decays.before, faded)
    if held is not None:
        known = known - held
    return Writes(full_product(inverse, -rate * known), known, faded, inverse, overlap)


def solve_with_momentum(
    error: Float[Tensor, "B H N C X"],
    direction: Float[Tensor, "B H G C Y"],
    old: Float[Tensor, "B H N X Y"],
    momentum: Float[Tensor, "B H N X Y"],
    rate: Float[Tensor, "B H 1 C 1"],
    decays: Decays,
    spread: Spread,
    times: Float[Tensor, "B H 1 C 1"] | None,
    operands: torch.dtype | None,
    held: Float[Tensor, "B H N C X"] | None = None,
) -> Writes:
    """The same when errors go through a running sum first: what is pushed, and what the erase term takes off."""
    pushed = -rate * error
    if times is None:
        return Writes(torch.zeros_like(pushed), pushed=pushed)
    mutual = product(direction, direction.mT, operands)
    inverse = unit_lower_inverse((times * rate) * (decays.ratio * mutual))
    met = decays.before * product(direction, old.mT, operands)
    met = met + shifted(spread.first) * product(direction, momentum.mT, operands)
    met = times * (met + (shifted(spread.matrix) * mutual) @ pushed)
    if held is not None:
        met = met - held
    return Writes(full_product(inverse, -rate * met), pushed=pushed)


def joined(groups: tuple[Writes, ...]) -> Float[Tensor, "B H M C X"]:
    """Writes of all memories of one layer."""
    return groups[0].write if len(groups) == 1 else torch.cat([group.write for group in groups], dim=2)


def joined_pushes(groups: tuple[Writes, ...]) -> Float[Tensor, "B H M C X"]:
    """What enters the momentum of all memories of one layer."""
    pushes = [group.pushed for group in groups if group.pushed is not None]
    return pushes[0] if len(pushes) == 1 else torch.cat(pushes, dim=2)

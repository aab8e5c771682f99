"""Inner optimizers whose step is an orthogonal matrix: Newton-Schulz, Muon and M3 (multi-scale momentum Muon).

Shapes: *B leading dimensions, O outputs, I inputs.

Source: arXiv 2512.24695 eqs. 42-44 and Algorithm 1 (section 7.2). The paper gives no coefficients; these are those of
Muon (Jordan et al., 2024).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.ops.update_rules.base import (
    UPDATE_RMS,
    MomentumState,
    UpdateRule,
    check_range,
    frobenius_unit,
    no_steps,
    root_mean_square,
    zeros,
)

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration: steepest at zero, at the price of singular values that end in about [0.7, 1.2]."""

NORM_FLOOR = 1e-7
"""Smallest Frobenius norm a matrix is divided by before the iteration, as in torch."""


def newton_schulz(matrix: Float[Tensor, "*B O I"], *, iterations: int) -> Float[Tensor, "*B O I"]:
    """Bring all singular values near 1 and keep the singular vectors: X <- a X + (b A + c A^2) X, A = X X^T.

    Runs in the precision of the matrix; differentiable; a zero matrix stays zero.

    Args:
        matrix: one or many.
        iterations: 5 bring singular values above 0.2% of the Frobenius norm into [0.68, 1.21].
    """
    a, b, c = QUINTIC
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = frobenius_unit(matrix.mT if is_tall else matrix, floor=NORM_FLOOR)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


@dataclass(frozen=True)
class Muon(UpdateRule[MomentumState]):
    """m' = inertia m + (1 - inertia) g; W' = W - rate 0.2 sqrt(max(O, I)) NewtonSchulz(m').

    The scale makes the root mean square of an update that of AdamW. For ordinary training use `torch.optim.Muon`,
    which this equals up to its bfloat16; this one has leading dimensions and derivatives, which torch's has not.

    inertia: share of the old mean gradient that is kept; in [0, 1).
    look_ahead: step along (1 - inertia) g + inertia m' instead of m' (Nesterov).
    iterations: of Newton-Schulz.

    Source: arXiv 2512.24695 eqs. 42-44. The momentum is a mean, without the rate: Newton-Schulz forgets its scale.
    """

    inertia: float = 0.95
    look_ahead: bool = True
    iterations: int = 5
    shape: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        check_range(self, "inertia", low=0, high=1, exclude="high")
        check_range(self, "iterations", low=1)

    def initial_state(self, weights: Tensor) -> MomentumState:
        """No gradient yet. `momentum` is the mean of gradients here, without the rate."""
        return MomentumState(zeros(weights))

    def step(
        self, weights: Tensor, gradient: Tensor, state: MomentumState, rate: float | Tensor
    ) -> tuple[Tensor, MomentumState]:
        """Update the mean, then step along its orthogonal part."""
        momentum = self.inertia * state.momentum + (1 - self.inertia) * gradient
        ahead = (1 - self.inertia) * gradient + self.inertia * momentum if self.look_ahead else momentum
        scale = UPDATE_RMS * math.sqrt(max(weights.shape[-2:]))
        direction = newton_schulz(ahead, iterations=self.iterations)
        return weights - rate * scale * direction, MomentumState(momentum)


class M3State(NamedTuple):
    """Two momenta of different frequency, and the second moment.

    fast: of every gradient. square: of every squared gradient. slow: updated once in `slow_every` steps.
    collected: sum of the gradients since then. slow_direction: what Newton-Schulz made of `slow`. step: updates so far.
    """

    fast: Float[Tensor, "*B O I"]
    square: Float[Tensor, "*B O I"]
    slow: Float[Tensor, "*B O I"]
    collected: Float[Tensor, "*B O I"]
    slow_direction: Float[Tensor, "*B O I"]
    step: Float[Tensor, "*B 1 1"]


@dataclass(frozen=True)
class M3(UpdateRule[M3State]):
    """Multi-scale momentum Muon: W' = W - rate (NS(fast) + slow_weight NS(slow)) / root of the second moment.

    `fast` takes in every gradient; `slow` takes in `slow_every` gradients at once and is used during the next
    `slow_every` steps.

    mode: `ema`, the one to train with: all three are means with decay, the denominator is divided by its own root
        mean square, and the update is scaled to a root mean square of 0.2. `literal`: Algorithm 1 as printed, sums
        without decay and a raw denominator; its steps shrink as 1/sqrt(t) and grow as gradients get smaller.
    beta1, beta2, beta3: of fast, second moment and slow; in [0, 1). `ema`: shares that are kept; `literal`: weights of
        what is added.
    slow_weight: alpha of the paper; at least 0.
    slow_every: f of the paper, steps between two updates of `slow`.
    iterations: of Newton-Schulz, T of the paper.
    epsilon: added under the root; above 0. `ema`: a share of the mean square, so free of units; `literal`: in squared
        units of the gradient.

    Source: arXiv 2512.24695 Algorithm 1; eq. 75 differs from it in sign and factor, and is not followed. Deviations:
        the window of `slow` is half-open, f gradients instead of f + 1; of the two readings of the denominator,
        sqrt(V + epsilon) is used, which has a derivative at zero.
    """

    mode: Literal["ema", "literal"] = "ema"
    beta1: float = 0.95
    beta2: float = 0.95
    beta3: float = 0.9
    slow_weight: float = 0.3
    slow_every: int = 50
    iterations: int = 5
    epsilon: float = 1e-2
    shape: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        if self.mode not in ("ema", "literal"):
            raise ValueError(f"M3.mode is {self.mode!r}; it must be 'ema' or 'literal'")
        for name in ("beta1", "beta2", "beta3"):
            check_range(self, name, low=0, high=1, exclude="high")
        check_range(self, "slow_weight", low=0)
        check_range(self, "slow_every", low=1)
        check_range(self, "iterations", low=1)
        check_range(self, "epsilon", low=0, exclude="low")

    def initial_state(self, weights: Tensor) -> M3State:
        """All memories zero."""
        fast, square, slow, collected, direction = (zeros(weights) for _ in range(5))
        return M3State(fast, square, slow, collected, direction, no_steps(weights))

    def step(self, weights: Tensor, gradient: Tensor, state: M3State, rate: float | Tensor) -> tuple[Tensor, M3State]:
        """Update the slow memory where its turn has come, then the fast one, then the weights."""
        state = self._refresh(state)
        step = state.step + 1
        gains = [1.0, 1.0] if self.mode == "literal" else [self.beta1, self.beta2]
        adds = [self.beta1, self.beta2] if self.mode == "literal" else [1 - self.beta1, 1 - self.beta2]
        fast = gains[0] * state.fast + adds[0] * gradient
        square = gains[1] * state.square + adds[1] * gradient.square()
        direction = newton_schulz(fast, iterations=self.iterations) + self.slow_weight * state.slow_direction
        if self.mode == "literal":
            update = direction * torch.rsqrt(square + self.epsilon)
        else:
            # Bias correction cancels: of the means in Newton-Schulz, of the square in the ratio.
            mean = square.mean(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(square.dtype).tiny)
            shaped = direction * torch.rsqrt(square / mean + self.epsilon)
            update = shaped * (UPDATE_RMS / root_mean_square(shaped).clamp(min=NORM_FLOOR))
        new = M3State(fast, square, state.slow, state.collected + gradient, state.slow_direction, step)
        return weights - rate * update, new

    def _refresh(self, state: M3State) -> M3State:
        """Take the collected gradients into `slow` where a window of `slow_every` is complete.

        Asks whether any sequence is due, which waits for a GPU unless the count is on the CPU; without asking, the
        second Newton-Schulz would run at every step.
        """
        due = (state.step > 0) & (state.step % self.slow_every == 0)
        if not bool(due.any()):
            return state
        if self.mode == "literal":
            slow = state.slow + self.beta3 * state.collected
        else:
            slow = self.beta3 * state.slow + (1 - self.beta3) / self.slow_every * state.collected
        due = due.to(slow.device)
        return state._replace(
            slow=torch.where(due, slow, state.slow),
            collected=torch.where(due, torch.zeros_like(slow), state.collected),
            slow_direction=torch.where(due, newton_schulz(slow, iterations=self.iterations), state.slow_direction),
        )

"""Inner optimizers that are linear memories of gradients: descent, momentum and its kin.

Shapes: *B leading dimensions, O outputs, I inputs.

Sign: the momentum holds the step, so that W' = W + m', and the rate is inside it, as the paper prints it. With a
constant rate this equals the momentum of `torch.optim.SGD`; when the rate changes, what was collected keeps the rate
it came with.

Source: arXiv 2512.24695, section 4 (eqs. 33-34, 46-49) and appendix B.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.ops.update_rules.base import (
    MomentumState,
    NoState,
    SecondMomentState,
    UpdateRule,
    check_range,
    frobenius_unit,
    no_steps,
    zeros,
)

GRADIENT_NORM_FLOOR = 1e-12
"""Smallest Frobenius norm that a gradient is divided by when it is made unit; below it nothing is erased."""

ROOT_FLOOR = 1e-8
"""Smallest root mean square of gradients that a preconditioner divides by, where it is not a setting."""


@dataclass(frozen=True)
class GradientDescent(UpdateRule[NoState]):
    """W' = W - rate g.

    Source: arXiv 2512.24695 eq. 1.
    """

    shape: ClassVar[Literal["any", "matrix"]] = "any"

    def initial_state(self, weights: Tensor) -> NoState:
        """Nothing to remember."""
        del weights
        return NoState()

    def step(self, weights: Tensor, gradient: Tensor, state: NoState, rate: float | Tensor) -> tuple[Tensor, NoState]:
        """Descend along the gradient."""
        return weights - rate * gradient, state


@dataclass(frozen=True)
class Momentum(UpdateRule[MomentumState]):
    """m' = inertia m - rate g; W' = W + m'.

    inertia: share of the old step that is kept, alpha in the paper; in [0, 1].

    Source: arXiv 2512.24695 eqs. 33-34.
    """

    inertia: float = 0.9
    shape: ClassVar[Literal["any", "matrix"]] = "any"

    def __post_init__(self) -> None:
        check_range(self, "inertia", low=0, high=1)

    def initial_state(self, weights: Tensor) -> MomentumState:
        """No step yet."""
        return MomentumState(zeros(weights))

    def step(
        self, weights: Tensor, gradient: Tensor, state: MomentumState, rate: float | Tensor
    ) -> tuple[Tensor, MomentumState]:
        """Add to the running step, then take it."""
        momentum = self.inertia * state.momentum - rate * gradient
        return weights + momentum, MomentumState(momentum)


@dataclass(frozen=True)
class PreconditionedMomentum(UpdateRule[SecondMomentState]):
    """m' = inertia m - rate P g; W' = W + m', where P divides by the root mean square of past gradients.

    v' = keep v + (1 - keep) g^2; P = 1 / sqrt(v' / (1 - keep^t) + epsilon^2), entry by entry.

    inertia: share of the old step that is kept, alpha in the paper; in [0, 1].
    square_keep: share of the old mean square that is kept, in [0, 1).
    epsilon: smallest root mean square, in units of the gradient; above 0.

    Source: arXiv 2512.24695 eqs. 46-47, which leave P open: any positive map of past gradients. Adam without its
        (1 - inertia) factor; epsilon is under the root because there the update has a derivative at g = 0.
    """

    inertia: float = 0.9
    square_keep: float = 0.99
    epsilon: float = 1e-8
    shape: ClassVar[Literal["any", "matrix"]] = "any"

    def __post_init__(self) -> None:
        check_range(self, "inertia", low=0, high=1)
        check_range(self, "square_keep", low=0, high=1, exclude="high")
        check_range(self, "epsilon", low=0, exclude="low")

    def initial_state(self, weights: Tensor) -> SecondMomentState:
        """No step yet."""
        return SecondMomentState(zeros(weights), zeros(weights), no_steps(weights))

    def step(
        self, weights: Tensor, gradient: Tensor, state: SecondMomentState, rate: float | Tensor
    ) -> tuple[Tensor, SecondMomentState]:
        """Add the preconditioned gradient to the running step, then take it."""
        step = state.step + 1
        square = self.square_keep * state.square + (1 - self.square_keep) * gradient.square()
        value = gradient * inverse_root(square, keep=self.square_keep, step=step, epsilon=self.epsilon)
        momentum = self.inertia * state.momentum - rate * value
        return weights + momentum, SecondMomentState(momentum, square, step)


@dataclass(frozen=True)
class Adam(UpdateRule[SecondMomentState]):
    """Adam: a bias-corrected mean of gradients over the root of that of their squares.

    mean_keep, square_keep: share of the old means that is kept (beta 1 and 2); in [0, 1).
    epsilon: smallest root mean square, in units of the gradient; above 0.

    Source: arXiv 2512.24695 appendix B, eqs. 101-105, as means instead of sums, with bias correction. Deviation from
        `torch.optim.Adam`: epsilon is under the root, because there the update has a derivative at g = 0.
    """

    mean_keep: float = 0.9
    square_keep: float = 0.99
    epsilon: float = 1e-8
    shape: ClassVar[Literal["any", "matrix"]] = "any"

    def __post_init__(self) -> None:
        check_range(self, "mean_keep", low=0, high=1, exclude="high")
        check_range(self, "square_keep", low=0, high=1, exclude="high")
        check_range(self, "epsilon", low=0, exclude="low")

    def initial_state(self, weights: Tensor) -> SecondMomentState:
        """No mean yet. `momentum` is the mean of gradients here, without the rate."""
        return SecondMomentState(zeros(weights), zeros(weights), no_steps(weights))

    def step(
        self, weights: Tensor, gradient: Tensor, state: SecondMomentState, rate: float | Tensor
    ) -> tuple[Tensor, SecondMomentState]:
        """Update both means, then step along their ratio."""
        step = state.step + 1
        mean = self.mean_keep * state.momentum + (1 - self.mean_keep) * gradient
        square = self.square_keep * state.square + (1 - self.square_keep) * gradient.square()
        corrected = mean / (1 - self.mean_keep**step).to(mean.dtype)
        scale = inverse_root(square, keep=self.square_keep, step=step, epsilon=self.epsilon)
        return weights - rate * corrected * scale, SecondMomentState(mean, square, step)


@dataclass(frozen=True)
class DeltaMomentum(UpdateRule[MomentumState | SecondMomentState]):
    """m' = m (inertia I - erase u^T u) - rate P g, u = g / |g|; W' = W + m'.

    Momentum that first erases what it holds along the directions of the new gradient: the delta rule with the
    gradient as its own key.

    inertia: share of the old step that is kept, alpha in the paper; in [0, 1].
    erase: how much of the old step is erased along the gradient, in [0, inertia]. With a gradient of rank one, `erase`
        equal to `inertia` replaces the old content there altogether.
    square_keep: with a number in [0, 1), P is that of `PreconditionedMomentum` (epsilon 1e-8); None: P = 1.

    Source: arXiv 2512.24695 eqs. 48-49. The objective is 1/2 |m g^T - P|^2, whose gradient is m g^T g - P g.
        Deviations: the paper prints the erase term without a rate and with g itself, which diverges once
        |g|^2 > 1 + inertia; here it has a rate of its own and a unit gradient (Frobenius norm), so that the
        eigenvalues of the decay lie in [inertia - erase, inertia].
    """

    inertia: float = 0.9
    erase: float = 0.9
    square_keep: float | None = None
    shape: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        check_range(self, "inertia", low=0, high=1)
        check_range(self, "erase", low=0, high=self.inertia)
        if self.square_keep is not None:
            check_range(self, "square_keep", low=0, high=1, exclude="high")

    def initial_state(self, weights: Tensor) -> MomentumState | SecondMomentState:
        """No step yet."""
        if self.square_keep is None:
            return MomentumState(zeros(weights))
        return SecondMomentState(zeros(weights), zeros(weights), no_steps(weights))

    def step(
        self, weights: Tensor, gradient: Tensor, state: MomentumState | SecondMomentState, rate: float | Tensor
    ) -> tuple[Tensor, MomentumState | SecondMomentState]:
        """Fade and erase the running step, add to it, then take it."""
        unit = frobenius_unit(gradient, floor=GRADIENT_NORM_FLOOR)
        kept = self.inertia * state.momentum - self.erase * along_gradient(state.momentum, unit)
        if self.square_keep is None:
            momentum = kept - rate * gradient
            return weights + momentum, MomentumState(momentum)
        assert isinstance(state, SecondMomentState)
        step = state.step + 1
        square = self.square_keep * state.square + (1 - self.square_keep) * gradient.square()
        momentum = kept - rate * gradient * inverse_root(square, keep=self.square_keep, step=step, epsilon=ROOT_FLOOR)
        return weights + momentum, SecondMomentState(momentum, square, step)


def along_gradient(momentum: Float[Tensor, "*B O I"], gradient: Float[Tensor, "*B O I"]) -> Float[Tensor, "*B O I"]:
    """Compute m g^T g by the cheaper of its two orders."""
    if gradient.shape[-2] <= gradient.shape[-1]:
        return (momentum @ gradient.mT) @ gradient
    return momentum @ (gradient.mT @ gradient)


def inverse_root(square: Tensor, *, keep: float, step: Tensor, epsilon: float) -> Tensor:
    """One over the root of the bias-corrected mean square and of epsilon^2; differentiable where it is zero.

    Args:
        square: running mean of squares that started at zero.
        keep: share that was kept at each update.
        step: updates so far, at least 1.
        epsilon: smallest root.
    """
    corrected = square / (1 - keep**step).to(square.dtype)
    return torch.rsqrt(corrected + epsilon**2)

"""Deep momentum: a small network as the memory of gradients, whose output is the step.

Shapes: *B leading dimensions, O outputs (rows), I inputs, E hidden width of the memory.

Source: arXiv 2512.24695 eq. 50 (deep momentum gradient descent, DMGD) and 52.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.ops.update_rules.base import UPDATE_RMS, UpdateRule, check_range, root_mean_square, working_dtype

START_SEED = 24695
"""Seed of the first layer every memory starts with: a constant, so that a state depends on shapes alone."""

GRADIENT_RMS_FLOOR = 1e-12
"""Smallest root mean square that a gradient is divided by."""

MIN_HIDDEN = 4
"""Smallest hidden width: with one unit, gradients of rank one and very different rows blow the memory up."""


class DeepMomentumState(NamedTuple):
    """The memory.

    inner: first layer, as its distance from the start. outer: second layer. start: where the first layer began.
    """

    inner: Float[Tensor, "*B E I"]
    outer: Float[Tensor, "*B I E"]
    start: Float[Tensor, "*B E I"]


@dataclass(frozen=True)
class DeepMomentum(UpdateRule[DeepMomentumState]):
    """The step is the output of an MLP that is trained on the gradients: W' = W + rate s m'(u).

    u is the gradient scaled so that its rows have a mean squared norm of 1, and m acts on every row of it:
    m(u) = outer silu(inner u) / sqrt(E). Before the step the memory itself makes one step of descent with decay,
    theta' = inertia theta - memory_rate grad L2, where L2 is the mean over rows of

        l2:  1/2 |m(u) + u|^2       m learns to answer a gradient with its negative
        dot: <m(u), u>              m turns against the gradient, without bound but for the decay

    Directions that keep coming are answered in full, those that came once hardly: what momentum does, with a memory
    that is not linear in the past. The second layer starts at zero, so the first steps are small.

    inertia: share of the memory that is kept at each update, alpha in the paper; in [0, 1].
    memory_rate: step size of the memory, eta in the paper; above 0, at most 1 for l2 and 1 - inertia for dot. Within
        these limits the answer to one constant gradient stays below 1.4 times the gradient; beyond them it grew
        without bound in trials.
    hidden: E, at least 4.
    objective: L2.
    scale: s. `gradient`: the scale that was divided out, so that m(u) = -u is a step of gradient descent;
        `adamw`: a constant with which m(u) = -u moves the weights by a root mean square of 0.2 times the rate.

    Source: arXiv 2512.24695 eq. 50, which leaves m and L2 open. Deviations: u is scaled; the decay of the first layer
        is towards its start (towards zero nothing would restore it); the weight step has a rate of its own.
    """

    inertia: float = 0.9
    memory_rate: float = 1.0
    hidden: int = 16
    objective: Literal["l2", "dot"] = "l2"
    scale: Literal["gradient", "adamw"] = "gradient"
    shape: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        check_range(self, "inertia", low=0, high=1)
        check_range(self, "memory_rate", low=0, exclude="low")
        check_range(self, "hidden", low=MIN_HIDDEN)
        for name, allowed in (("objective", ("l2", "dot")), ("scale", ("gradient", "adamw"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DeepMomentum.{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        limit = largest_memory_rate(self.objective, self.inertia)
        if self.memory_rate > limit:
            raise ValueError(
                f"DeepMomentum.memory_rate is {self.memory_rate:g}; with objective {self.objective} and inertia "
                f"{self.inertia:g} the memory is stable up to {limit:g}"
            )

    def initial_state(self, weights: Tensor) -> DeepMomentumState:
        """Second layer zero, first layer normal, the same one for every matrix of as many columns."""
        width, dtype = weights.shape[-1], working_dtype(weights)
        generator = torch.Generator().manual_seed(START_SEED)
        start = torch.randn(self.hidden, width, generator=generator, dtype=torch.float64)
        start = start.to(weights.device, dtype).expand(*weights.shape[:-2], -1, -1).clone()
        return DeepMomentumState(torch.zeros_like(start), torch.zeros_like(start).mT.contiguous(), start)

    def step(
        self, weights: Tensor, gradient: Tensor, state: DeepMomentumState, rate: float | Tensor
    ) -> tuple[Tensor, DeepMomentumState]:
        """Train the memory on the gradient, then take the step it answers with."""
        scale = root_mean_square(gradient).clamp(min=GRADIENT_RMS_FLOOR) * math.sqrt(gradient.shape[-1])
        unit = gradient / scale
        inner, outer = self.memory_gradient(state, unit)
        new = DeepMomentumState(
            self.inertia * state.inner - self.memory_rate * inner,
            self.inertia * state.outer - self.memory_rate * outer,
            state.start,
        )
        answer, _, _ = read(new, unit)
        size = scale if self.scale == "gradient" else UPDATE_RMS * math.sqrt(gradient.shape[-1])
        return weights + rate * size * answer, new

    def memory_gradient(
        self, state: DeepMomentumState, unit: Float[Tensor, "*B O I"]
    ) -> tuple[Float[Tensor, "*B E I"], Float[Tensor, "*B I E"]]:
        """Gradient of L2 for both layers of the memory, written out so that it is itself differentiable."""
        answer, hidden, before = read(state, unit)
        error = (answer + unit if self.objective == "l2" else unit) / (unit.shape[-2] * math.sqrt(self.hidden))
        gate = torch.sigmoid(before)
        slope = gate * (1 + before * (1 - gate))  # derivative of silu
        return (slope * (error @ state.outer)).mT @ unit, error.mT @ hidden


def largest_memory_rate(objective: Literal["l2", "dot"], inertia: float) -> float:
    """Largest step size at which the memory stays bounded, found by trials (see `DeepMomentum`)."""
    return 1.0 if objective == "l2" else round(1 - inertia, 12)


def read(
    state: DeepMomentumState, unit: Float[Tensor, "*B O I"]
) -> tuple[Float[Tensor, "*B O I"], Float[Tensor, "*B O E"], Float[Tensor, "*B O E"]]:
    """Answer every row: the memory's output, its hidden activations, and what they are the silu of."""
    before = unit @ (state.start + state.inner).mT
    hidden = torch.nn.functional.silu(before)
    return hidden @ state.outer.mT / math.sqrt(hidden.shape[-1]), hidden, before

"""Inner optimizers of the in-context clock: how a fast copy moves, given its gradient."""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from nested_lm.config.channels import GradientDescent, InnerRule
from nested_lm.nn.fast_linear import MLPDistance


class Rule(Protocol):
    """An inner optimizer of one weight matrix, for a batch of fast copies of it."""

    def initial_state(self, distance: Float[Tensor, "B O I"]) -> Any:
        """State before the first step: a tree of tensors whose first dimension is the batch."""
        ...

    def step(
        self, distance: Float[Tensor, "B O I"], gradient: Float[Tensor, "B O I"], state: Any, rate: float
    ) -> tuple[Float[Tensor, "B O I"], Any]:
        """Return the distance after the step, and the new state."""
        ...


class Descent:
    """Plain gradient descent: the distance moves by the rate times the gradient."""

    def initial_state(self, distance: Float[Tensor, "B O I"]) -> tuple[()]:  # noqa: ARG002  no state
        """Nothing."""
        return ()

    def step(
        self, distance: Float[Tensor, "B O I"], gradient: Float[Tensor, "B O I"], state: tuple[()], rate: float
    ) -> tuple[Float[Tensor, "B O I"], tuple[()]]:
        """Take the step."""
        return distance - rate * gradient, state


def build_rule(config: InnerRule) -> Rule:
    """Build the inner optimizer that a level's configuration names."""
    match config:
        case GradientDescent():
            return Descent()


def initial_trees(rule: Rule, distances: tuple[MLPDistance, ...]) -> tuple[Any, ...]:
    """State before the first step, for every weight of a level: (inner, outer) a layer."""
    return tuple((rule.initial_state(layer.inner), rule.initial_state(layer.outer)) for layer in distances)


def step_trees(
    rule: Rule,
    rate: float,
    distances: tuple[MLPDistance, ...],
    gradients: tuple[MLPDistance, ...],
    states: tuple[Any, ...],
) -> tuple[tuple[MLPDistance, ...], tuple[Any, ...]]:
    """Step every weight of a level."""
    moved, kept = [], []
    for distance, gradient, (inner, outer) in zip(distances, gradients, states, strict=True):
        new_inner, inner = rule.step(distance.inner, gradient.inner, inner, rate)
        new_outer, outer = rule.step(distance.outer, gradient.outer, outer, rate)
        moved.append(MLPDistance(new_inner, new_outer))
        kept.append((inner, outer))
    return tuple(moved), tuple(kept)

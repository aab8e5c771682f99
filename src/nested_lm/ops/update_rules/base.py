"""What an inner optimizer is: a pure function from weights, gradient and state to new weights and new state.

Shapes: *B any leading dimensions, one entry a sequence (none for ordinary weights), O outputs, I inputs.

A rule is a frozen dataclass whose fields are its settings. It holds no tensors and changes none in place, so that
autograd differentiates through any number of updates (second-order meta-gradients), and weights with leading
dimensions are so many independent problems: nothing is shared between them, step counts included.

    rule = make_rule("delta_momentum", {"inertia": 0.9, "erase": 0.5})      # ops/update_rules/registry.py
    state = rule.initial_state(weights)                                     # (*B, O, I)
    weights, state = rule.update(weights, gradient, state, rate=0.01)

The last two dimensions are the matrix. A vector a sequence is passed as a matrix of one row, (*B, 1, I); rules whose
`shape` is "any" also take a lone vector of any length.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

State = TypeVar("State", bound=tuple[Any, ...])
"""A NamedTuple of tensors. Every leaf starts with the leading dimensions of the weights."""

UPDATE_RMS = 0.2
"""Root mean square of an update of rate 1 where a rule normalises it: what AdamW's usually has."""


@dataclass(frozen=True)
class UpdateRule(ABC, Generic[State]):
    """One inner optimizer.

    Numbers: everything is computed and kept in float32 (float64 for float64 weights), autocast or not; the new
    weights have the type of the old ones.

    shape: what the rule can step. "any": entry by entry; "matrix": only the matrix as a whole has a meaning.
    reads_inputs: whether it needs to know, beside the gradient, what the layer read.
    """

    shape: ClassVar[Literal["any", "matrix"]]
    reads_inputs: ClassVar[bool] = False

    @abstractmethod
    def initial_state(self, weights: Float[Tensor, "..."]) -> State:
        """State before the first update of weights of this shape, type and device. Its values are not read."""

    @abstractmethod
    def step(
        self, weights: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, rate: float | Tensor
    ) -> tuple[Tensor, State]:
        """Make one update in the working precision. Called by `update`."""

    def update(
        self,
        weights: Float[Tensor, "..."],
        gradient: Float[Tensor, "..."],
        state: State,
        *,
        rate: float | Tensor,
        layer: "Layer | None" = None,
    ) -> tuple[Tensor, State]:
        """Make one update.

        Args:
            weights: (*B, O, I).
            gradient: of the loss, in the shape of the weights.
            state: what the last update returned, or `initial_state(weights)`.
            rate: step size, at least 0; a tensor must broadcast against the weights, such as (*B, 1, 1), and
                carries gradients.
            layer: what a rule with `reads_inputs` must be given; None for the others.

        Returns:
            The new weights, and the state for the next update.

        Raises:
            ValueError: shapes that do not fit, or a layer where the rule reads none.
        """
        if layer is not None:
            raise ValueError(f"{type(self).__name__} does not read the inputs of a layer; leave `layer` out")
        if gradient.shape != weights.shape:
            raise ValueError(
                f"the gradient has shape {tuple(gradient.shape)}, the weights {tuple(weights.shape)}; "
                "they must be equal"
            )
        self.check_shape(weights)
        dtype = working_dtype(weights)
        # Autocast would round the operands of every product below, and the errors would pile up in the state.
        with torch.autocast(weights.device.type, enabled=False):
            new, after = self.step(weights.to(dtype), gradient.to(dtype), state, rate)
        return new.to(weights.dtype), after

    def check_shape(self, weights: Tensor) -> None:
        """Refuse weights that the rule cannot step.

        Raises:
            ValueError: a vector where the rule needs a matrix.
        """
        if self.shape == "matrix" and weights.ndim < 2:
            raise ValueError(
                f"{type(self).__name__} steps matrices, and these weights have shape {tuple(weights.shape)}; pass a "
                "vector as a matrix of one row, or use a rule for any shape (gd, momentum, preconditioned_momentum)"
            )


class Layer(NamedTuple):
    """What some rules need to know of a linear layer y = (learned + weights) x.

    second_moment: X^T X, the sum over the rows x that the gradient comes from.
    learned: the part of the layer's weights that is not stepped; None: `weights` are all of them.
    """

    second_moment: Float[Tensor, "*B I I"]
    learned: Float[Tensor, "O I"] | None = None


class NoState(NamedTuple):
    """Nothing is remembered between updates."""


class MomentumState(NamedTuple):
    """momentum: the running step, the rate included."""

    momentum: Float[Tensor, "*B O I"]


class SecondMomentState(NamedTuple):
    """momentum: the running step. square: mean of squared gradients, not corrected. step: updates so far."""

    momentum: Float[Tensor, "*B O I"]
    square: Float[Tensor, "*B O I"]
    step: Float[Tensor, "*B 1 1"]


def working_dtype(weights: Tensor) -> torch.dtype:
    """float64 for float64 weights, float32 for every other type."""
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


def zeros(weights: Tensor) -> Tensor:
    """Zeros in the shape of the weights and the working precision."""
    return torch.zeros_like(weights, dtype=working_dtype(weights))


def no_steps(weights: Tensor) -> Tensor:
    """A step count of 0 for each sequence: (*B, 1, 1); (1,) for a vector."""
    shape = weights.shape[:-2] + (1,) * min(weights.ndim, 2)
    return torch.zeros(shape, dtype=torch.float32, device=weights.device)


def frobenius_unit(matrix: Float[Tensor, "*B O I"], *, floor: float) -> Float[Tensor, "*B O I"]:
    """Divide each matrix by its Frobenius norm, or by `floor` where that is larger; differentiable at zero."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return matrix / norm.clamp(min=floor)


def root_mean_square(matrix: Float[Tensor, "*B O I"]) -> Float[Tensor, "*B 1 1"]:
    """Root of the mean squared entry of each matrix; differentiable at zero."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return norm / math.sqrt(matrix.shape[-2] * matrix.shape[-1])


def check_range(
    rule: object, name: str, *, low: float, high: float = math.inf, exclude: Literal["none", "low", "high"] = "none"
) -> None:
    """Refuse a setting out of range.

    Args:
        rule: the rule that has the setting as attribute `name`.
        name: of the setting.
        low: smallest value.
        high: largest value; infinity itself is never allowed.
        exclude: which of the two is not allowed itself.

    Raises:
        ValueError: with the rule, the setting, what was found and what is allowed.
    """
    value = getattr(rule, name)
    above = value > low if exclude == "low" else value >= low
    below = value < high if exclude == "high" or high == math.inf else value <= high
    if not (above and below):
        lowest = f"above {low:g}" if exclude == "low" else f"at least {low:g}"
        highest = f"below {high:g}" if exclude == "high" else f"at most {high:g}"
        allowed = f"{lowest} and finite" if high == math.inf else f"{lowest} and {highest}"
        raise ValueError(f"{type(rule).__name__}.{name} is {value!r}; it must be {allowed}")

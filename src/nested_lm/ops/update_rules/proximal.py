"""Delta Gradient Descent (DGD): the proximal step of a linear layer that knows its inputs.

Shapes: *B leading dimensions, T tokens (rows), O outputs, I inputs.

With u_t = -dL/dy_t the target of row t, DGD is W' = argmin_W sum_t 1/2 |W x_t - u_t|^2 + 1/(2 rate) |W - W_0|^2.

Source: arXiv 2512.24695 eqs. 56-57 and appendix C. For one row of norm lambda the solution is the rank-one formula
with rate' = rate / (1 + rate lambda^2); the main text prints rate / (1 + rate), which holds for lambda = 1 only, and
appendix C loses a sign and a square. Several rows are solved together, which the paper does not write down.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.ops.update_rules.base import Layer, NoState, UpdateRule, working_dtype


def proximal_step(
    weights: Float[Tensor, "*B O I"],
    inputs: Float[Tensor, "*B T I"],
    output_gradients: Float[Tensor, "*B T O"],
    *,
    rate: float | Tensor,
) -> Float[Tensor, "*B O I"]:
    """Solve the proximal problem of all rows exactly: W' = W - rate (X W^T + G)^T (I + rate X X^T)^-1 X.

    Differentiable. The system that is solved has the smaller of T and I unknowns.

    Args:
        weights: W_0.
        inputs: X, what the layer read.
        output_gradients: G, gradient of the loss for what the layer answered.
        rate: step size, at least 0; a tensor must broadcast against (*B, 1, 1).
    """
    dtype = working_dtype(weights)
    with torch.autocast(weights.device.type, enabled=False):
        old, x, slopes = weights.to(dtype), inputs.to(dtype), output_gradients.to(dtype)
        if x.shape[-2] >= x.shape[-1]:
            new = proximal_step_from_moments(old, x.mT @ x, slopes.mT @ x, rate=rate)
        else:
            identity = torch.eye(x.shape[-2], dtype=dtype, device=x.device)
            solved: Tensor = torch.linalg.solve(identity + rate * (x @ x.mT), x @ old.mT + slopes)
            new = old - rate * solved.mT @ x
    return new.to(weights.dtype)


def proximal_step_from_moments(
    weights: Float[Tensor, "*B O I"],
    second_moment: Float[Tensor, "*B I I"],
    gradient: Float[Tensor, "*B O I"],
    *,
    rate: float | Tensor,
) -> Float[Tensor, "*B O I"]:
    """Solve the same problem from what training has at hand: W' = (W - rate gradient) (I + rate second_moment)^-1.

    Args:
        weights: W_0.
        second_moment: X^T X, the sum over rows.
        gradient: G^T X, the ordinary gradient of the loss for the weights.
        rate: step size, at least 0; a tensor must broadcast against (*B, 1, 1).
    """
    dtype = working_dtype(weights)
    with torch.autocast(weights.device.type, enabled=False):
        identity = torch.eye(weights.shape[-1], dtype=dtype, device=weights.device)
        system = identity + rate * second_moment.to(dtype)
        plain = weights.to(dtype) - rate * gradient.to(dtype)
        solved: Tensor = torch.linalg.solve(system, plain, left=False)
        return solved.to(weights.dtype)


def proximal_step_one_row(
    weights: Float[Tensor, "*B O I"],
    inputs: Float[Tensor, "*B I"],
    output_gradients: Float[Tensor, "*B O"],
    *,
    rate: float | Tensor,
) -> Float[Tensor, "*B O I"]:
    """Take the step of one row by eq. 57: W' = W (I - rate' x x^T) - rate' g x^T, rate' = rate / (1 + rate |x|^2).

    Args:
        weights: W_0.
        inputs: x, of any norm.
        output_gradients: g, gradient of the loss for the layer's answer.
        rate: step size, at least 0; a tensor must broadcast against (*B, 1, 1).
    """
    dtype = working_dtype(weights)
    with torch.autocast(weights.device.type, enabled=False):
        old, x = weights.to(dtype), inputs.to(dtype).unsqueeze(-1)
        proximal = rate / (1 + rate * x.square().sum(dim=(-2, -1), keepdim=True))
        error = old @ x + output_gradients.to(dtype).unsqueeze(-1)
        return (old - proximal * error @ x.mT).to(weights.dtype)


@dataclass(frozen=True)
class DeltaGradientDescent(UpdateRule[NoState]):
    """DGD of a layer whose inputs are known: W' = (W - rate gradient) (I + rate X^T X)^-1.

    A step never goes beyond its targets, minus the gradients for the layer's answers, at whatever rate.

    erase: what the step takes for W, and so what it forgets along the inputs. `written`: the weights that it steps,
        whose own answers turn to the targets; a learned part beside them stays. `whole`: that part counts as well, so
        that the answers of the layer as a whole turn to the targets. The same where there is no learned part.

    Source: arXiv 2512.24695 eqs. 56-57, with rows solved together. Deviation: `written`; as printed, `whole`, what the
        layer has learned is lost along everything that it reads.
    """

    erase: Literal["written", "whole"] = "written"
    shape: ClassVar[Literal["any", "matrix"]] = "matrix"
    reads_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.erase not in ("written", "whole"):
            raise ValueError(f"DeltaGradientDescent.erase is {self.erase!r}; it must be 'written' or 'whole'")

    def initial_state(self, weights: Float[Tensor, "..."]) -> NoState:  # noqa: ARG002  the interface has it
        """Nothing is remembered."""
        return NoState()

    def step(
        self, weights: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: NoState, rate: float | Tensor
    ) -> tuple[Tensor, NoState]:
        """Refuse: a gradient alone does not say what the layer read."""
        del weights, gradient, state, rate
        raise ValueError(
            "DeltaGradientDescent needs the second moment of what the layer read; pass layer=Layer(second_moment)"
        )

    def update(
        self,
        weights: Float[Tensor, "..."],
        gradient: Float[Tensor, "..."],
        state: NoState,
        *,
        rate: float | Tensor,
        layer: Layer | None = None,
    ) -> tuple[Tensor, NoState]:
        """Make one update. See `UpdateRule.update`.

        Raises:
            ValueError: shapes that do not fit, or no layer.
        """
        if layer is None:
            return super().update(weights, gradient, state, rate=rate)
        expected = (*weights.shape[:-2], weights.shape[-1], weights.shape[-1])
        if gradient.shape != weights.shape or layer.second_moment.shape != expected:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} need a gradient of the same shape and a second moment of "
                f"shape {expected}; got {tuple(gradient.shape)} and {tuple(layer.second_moment.shape)}"
            )
        dtype = working_dtype(weights)
        slope, moment = gradient.to(dtype), layer.second_moment.to(dtype)
        if self.erase == "whole" and layer.learned is not None:
            # The same problem with targets lower by the learned part's answers. So small weights lose no digits, as
            # they would in a sum with the learned ones.
            with torch.autocast(weights.device.type, enabled=False):
                slope = slope + layer.learned.to(dtype) @ moment
        return proximal_step_from_moments(weights, moment, slope, rate=rate), state

"""Delta Gradient Descent (DGD): the proximal step of a linear layer that knows its inputs.

Shapes: *B leading dimensions, T tokens (rows), O outputs, I inputs.

With u_t = -dL/dy_t the target of row t, DGD is W' = argmin_W sum_t 1/2 |W x_t - u_t|^2 + 1/(2 rate) |W - W_0|^2.

Source: arXiv 2512.24695 eqs. 56-57 and appendix C. For one row of norm lambda the solution is the rank-one formula
with rate' = rate / (1 + rate lambda^2); the main text prints rate / (1 + rate), which holds for lambda = 1 only, and
appendix C loses a sign and a square. Several rows are solved together, which the paper does not write down.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.ops.update_rule import working_dtype


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

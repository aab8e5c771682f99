"""Solving many small unit lower-triangular systems, with a backward written by hand.

Shapes: C tokens of a chunk, X columns of the right-hand side.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 16
"""Diagonal blocks of this size are inverted by forward substitution, then merged in pairs by products."""


def unit_lower_inverse(lower: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    """Invert I + L for strictly lower L; entries on and above the diagonal are ignored.

    Forward substitution inside blocks of 16, exact pairwise merging above. (The product form
    (I - L)(I + L^2)(I + L^4)... needs fewer steps but loses every digit for correlated keys.)
    """
    size = lower.shape[-1]
    if size <= BLOCK:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        return torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    half = BLOCK
    while half * 2 < size:
        half *= 2
    top = unit_lower_inverse(lower[..., :half, :half])
    bottom = unit_lower_inverse(lower[..., half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[..., :half, :half] = top
    inverse[..., half:, half:] = bottom
    inverse[..., half:, :half] = -(bottom @ lower[..., half:, :half] @ top)
    return inverse


class _UnitLowerSolve(torch.autograd.Function):
    """X = (I + L)^-1 R. Backward: dR = (I + L)^-T dX and dL = -dR X^T below the diagonal."""

    @staticmethod
    def forward(ctx, lower: Tensor, right: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        inverse = unit_lower_inverse(lower)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        inverse, solution = ctx.saved_tensors
        grad_right = inverse.mT @ grad
        grad_lower = -(grad_right @ solution.mT).tril(-1)
        return grad_lower.sum_to_size(inverse.shape), grad_right


def unit_lower_solve(
    lower: Float[Tensor, "*batch C C"], right: Float[Tensor, "*wider C X"]
) -> Float[Tensor, "*wider C X"]:
    """Solve (I + L) X = R in at least float32, whatever autocast says.

    lower: strictly lower part is used; batch dimensions broadcast against those of `right`, so that one factor can
        serve several right-hand sides. right: right-hand sides.
    """
    with torch.autocast(right.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(lower.dtype, right.dtype), torch.float32)
        solved: Tensor = _UnitLowerSolve.apply(lower.to(dtype), right.to(dtype))
    return solved

"""Inverting many small unit lower-triangular matrices.

Shapes: C tokens of a chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 16
"""Diagonal blocks of this size are inverted by forward substitution, then merged in pairs by products."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever `torch.set_float32_matmul_precision` says for the rest."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def unit_lower_inverse(lower: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    """Invert I + L for strictly lower L; entries on and above the diagonal are ignored.

    Forward substitution inside blocks of 16, exact pairwise merging above. (The product form
    (I - L)(I + L^2)(I + L^4)... needs fewer steps but loses every digit for correlated keys.) Never in reduced
    precision: one wrong write is carried through the rest of the chunk.
    """
    with full_precision():
        return _inverse(lower)


def _inverse(lower: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    size = lower.shape[-1]
    if size <= BLOCK:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        return solved
    half = BLOCK
    while half * 2 < size:
        half *= 2
    top = _inverse(lower[..., :half, :half])
    bottom = _inverse(lower[..., half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[..., :half, :half] = top
    inverse[..., half:, half:] = bottom
    inverse[..., half:, :half] = -(bottom @ lower[..., half:, :half] @ top)
    return inverse

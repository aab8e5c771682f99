"""Inverting many small unit lower-triangular matrices.

Shapes: C tokens of a chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def inside_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, ...) is running: it looks at no values."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # torch has no public name for it


def full_product(a: Float[Tensor, "*_ X Y"], b: Float[Tensor, "*_ Y Z"]) -> Float[Tensor, "*_ X Z"]:
    """Matrix product in full precision, and so are its gradients: for what solves, whose errors a chunk carries on."""
    if not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == "highest":
        return a @ b
    if inside_transform():  # gradients have the precision that torch is set to
        with full_precision():
            return a @ b
    product: Tensor = _full_product(a, b)
    return product


@torch.library.custom_op("nested_lm::full_product", mutates_args=())
def _full_product(a: Tensor, b: Tensor) -> Tensor:
    with full_precision():
        return a @ b


@_full_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward_product(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return full_product(grad, b.mT).sum_to_size(a.shape), full_product(a.mT, grad).sum_to_size(b.shape)


_full_product.register_autograd(_backward_product, setup_context=_keep_factors)


def unit_lower_inverse(lower: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    """Invert I + L for strictly lower L; entries on and above the diagonal are ignored.

    Forward substitution inside blocks of 16, exact pairwise merging above. (The product form
    (I - L)(I + L^2)(I + L^4)... needs fewer steps but loses every digit for correlated keys.) Never in reduced
    precision: one wrong write is carried through the rest of the chunk. An operator of its own, so that compilers take
    it as it is and its gradient is one product instead of a walk back through the blocks.
    """
    if inside_transform():  # which cannot transform operators of one's own
        with full_precision():
            return _inverse(lower)
    inverse: Tensor = _unit_lower_inverse(lower)
    return inverse


@torch.library.custom_op("nested_lm::unit_lower_inverse", mutates_args=())
def _unit_lower_inverse(lower: Tensor) -> Tensor:
    if lower.is_cuda and _has_kernel(lower):
        from nested_lm.ops import triangular_triton

        return triangular_triton.inverse(lower)
    with full_precision():
        inverse: Tensor = _inverse(lower)
        return inverse


def _has_kernel(lower: Tensor) -> bool:
    """Whether the Triton kernel serves: one launch instead of a dozen or more."""
    from nested_lm.ops.memory.triton.backend import LONGEST, device_lacks, triton_missing

    fits = lower.shape[-1] <= LONGEST and lower.dtype == torch.float32
    return fits and (triton_missing() or device_lacks(lower, lower.dtype)) is None


@_unit_lower_inverse.register_fake
def _(lower: Tensor) -> Tensor:
    return lower.new_empty(lower.shape)


def _keep_inverse(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    del inputs
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    """Gradient of the inverse: d(X) = -X dL X, below the diagonal."""
    (inverse,) = ctx.saved_tensors
    gradient: Tensor = -full_product(full_product(inverse.mT, grad), inverse.mT).tril(-1)
    return gradient


_unit_lower_inverse.register_autograd(_backward, setup_context=_keep_inverse)


def _inverse(lower: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    size = lower.shape[-1]
    if size <= BLOCK:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        return solved.contiguous()
    half = BLOCK
    while half * 2 < size:
        half *= 2
    top = _inverse(lower[..., :half, :half])
    bottom = _inverse(lower[..., half:, half:])
    inverse = torch.zeros(lower.shape, dtype=lower.dtype, device=lower.device)
    inverse[..., :half, :half] = top
    inverse[..., half:, half:] = bottom
    inverse[..., half:, :half] = -(bottom @ lower[..., half:, :half] @ top)
    return inverse

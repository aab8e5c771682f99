"""Inverting many small unit lower-triangular matrices in one launch, for NVIDIA GPUs.

One program a matrix, in the form of `triangular._inverse`; what is beyond the matrix counts as the identity.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nested_lm.ops.memory.triton.launch import launch
from nested_lm.ops.memory.triton.tiles import unit_lower_inverse


@triton.jit(do_not_specialize=("size",))
def inverse_kernel(LOWER, INVERSE, size, C: tl.constexpr, ACC: tl.constexpr):
    """Invert one matrix."""
    i = tl.arange(0, C)
    at = tl.program_id(0).to(tl.int64) * size * size + i[:, None] * size + i[None, :]
    inside = (i < size)[:, None] & (i < size)[None, :]
    lower = tl.load(LOWER + at, mask=inside & (i[:, None] > i[None, :]), other=0.0)
    tl.store(INVERSE + at, unit_lower_inverse(lower.to(ACC), C, ACC), mask=inside)


def inverse(lower: Float[Tensor, "*batch C C"]) -> Float[Tensor, "*batch C C"]:
    """(I + L)^-1 for strictly lower L of up to 64 rows; entries on and above the diagonal are ignored."""
    lower = lower.contiguous()
    size = lower.shape[-1]
    found = torch.empty_like(lower)
    number = {torch.float32: tl.float32, torch.float64: tl.float64}[lower.dtype]
    constants = {"C": max(16, triton.next_power_of_2(size)), "ACC": number}
    launch(inverse_kernel, (lower.numel() // (size * size),), (lower, found, size), constants, 4)
    return found

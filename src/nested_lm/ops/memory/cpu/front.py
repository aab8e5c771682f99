"""Causal convolution, silu and unit length of queries, keys and values in C: one pass over what torch does in a dozen.

Shapes: B batch, T tokens, H heads, K head width, W convolution width.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.memory.state import NORM_FLOOR, check_branches

_COUNTS = ("B", "T", "H", "K", "W", "unit_values", "branches")
_POINTERS = ("x", "weight", "tail", "age", "cuts", *("query", "key", "value"), *("g_query", "g_key", "g_value"))
_GRADIENTS = ("g_x", "g_weight", "g_tail")


class _Front(ctypes.Structure):
    """`Front` of cpu/front.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("floor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_GRADIENTS)),
    )


def unsupported(x: Tensor) -> str | None:
    """Why the C cannot serve tensors like x; None when it can."""
    if x.device.type != "cpu":
        return f"the tensors are on `{x.device.type}`"
    if x.dtype not in cpu_library.C_TYPES:
        return f"it computes in float32 and float64 only, not in {x.dtype}"
    if isinstance(x, FakeTensor):
        return "the tensors have no values"
    reason: str | None = cpu_library.reason_missing_when_traced()
    return reason


@torch.compiler.disable  # type: ignore[untyped-decorator]
def convolved_units(
    x: Float[Tensor, "B T 3HK"],
    weight: Float[Tensor, "3HK W"],
    tail: Float[Tensor, "B W-1 3HK"],
    age: Int[Tensor, "B T"] | None,
    *,
    num_heads: int,
    unit_values: bool,
    branches: Int[Tensor, "B N"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
    """Query, key and value: unit(silu(conv(x))), each channel convolved with the tokens before it.

    Args:
        x: queries, keys and values of all heads, behind each other.
        weight: of the convolution; its last column is the token's own.
        tail: the tokens before the first one.
        age: tokens since the document began: older ones are not seen. None: all are.
        num_heads: H.
        unit_values: whether values are scaled to unit length as queries and keys are.
        branches: where the branches of each row begin, and the last one ends (see `check_branches` in
            ops/memory/state.py); before each comes what comes before the first one. Without gradients only.
            None: rows do not branch.

    Raises:
        ValueError: `branches` is malformed.
    """
    assert unsupported(x) is None
    expected = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    assert tail.shape == expected, f"a tail of shape {tuple(tail.shape)} for tokens that need {expected}"
    tensors = (part.to(x.dtype).contiguous() for part in (x, weight, tail))
    if branches is not None:
        assert not torch.is_grad_enabled(), "branches have no backward"
        branches = check_branches(branches, *x.shape[:2])
    query, key, value = _ConvolvedUnits.apply(  # type: ignore[no-untyped-call]
        num_heads, unit_values, None if age is None else age.contiguous(), branches, *tensors
    )
    return query, key, value


class _ConvolvedUnits(torch.autograd.Function):
    """Keeps its inputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        num_heads: int,
        unit_values: bool,
        age: Tensor | None,
        branches: Tensor | None,
        x: Tensor,
        weight: Tensor,
        tail: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.num_heads, ctx.unit_values = num_heads, unit_values
        batch, tokens, channels = x.shape
        width = channels // 3 // num_heads
        found = tuple(torch.empty(batch, tokens, num_heads, width, dtype=x.dtype) for _ in range(3))
        call = _call(num_heads, unit_values, age, x, weight, tail)
        if branches is not None:
            call.branches = branches.shape[1] - 1
        cpu_library.point(call, {**dict(zip(("query", "key", "value"), found, strict=True)), "cuts": branches})
        cpu_library.run("front", call, x.dtype, batch * 3 * num_heads)
        ctx.save_for_backward(age, x, weight, tail)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        age, x, weight, tail = ctx.saved_tensors
        call = _call(ctx.num_heads, ctx.unit_values, age, x, weight, tail)
        sent = [grad.contiguous() for grad in grads]
        of_x, of_tail = torch.empty_like(x), torch.empty_like(tail)
        of_weight = torch.empty(x.shape[0], *weight.shape, dtype=x.dtype)  # a part for each row
        cpu_library.point(call, dict(zip(("g_query", "g_key", "g_value"), sent, strict=True)))
        cpu_library.point(call, dict(zip(_GRADIENTS, (of_x, of_weight, of_tail), strict=True)))
        cpu_library.run("front_backward", call, x.dtype, x.shape[0] * 3 * ctx.num_heads)
        return None, None, None, None, of_x, of_weight.sum(0), of_tail


def _call(num_heads: int, unit_values: bool, age: Tensor | None, x: Tensor, weight: Tensor, tail: Tensor) -> _Front:
    batch, tokens, channels = x.shape
    width = channels // 3 // num_heads
    call = _Front(B=batch, T=tokens, H=num_heads, K=width, W=weight.shape[1], unit_values=unit_values, floor=NORM_FLOOR)
    cpu_library.point(call, {"x": x, "weight": weight, "tail": tail, "age": age})
    return call

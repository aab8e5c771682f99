"""Small layers every block shares.

Shapes: B batch, T tokens, H heads, K head width, D model width.
"""

import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nested_lm.config.mixers import Llama3Scaling
from nested_lm.errors import ConfigError
from nested_lm.nn.fast_linear import FastLinear, MLPDistance


class StepContext(NamedTuple):
    """What every block needs to know about the tokens of one call.

    position: tokens of the stream before this call.
    resets: where a document starts, at borders of chunks only; None when no row starts one in this call.
    documents: running number of each token's document in its row; None when no row ever started a second one.
    frozen: fast weights are read and not written.
    differentiable_twice: gradients of this call will be differentiated again, so that operations whose backward has no
        gradient of its own must not be used.
    final: no call follows, and no gradient will be asked for: what state a block returns does not matter.
    rows: in a final call, the stream of the state that each row goes on from; None: its own. Only given to mixers
        that say `takes_rows`.
    branches: in a final call, where the branches of each row begin, and the last one ends (`check_branches` in
        ops/memory/state.py). Only given to mixers that say `reads_branches`.
    """

    position: int
    resets: Bool[Tensor, "B T"] | None
    documents: Int[Tensor, "B T"] | None
    frozen: bool = False
    differentiable_twice: bool = False
    final: bool = False
    rows: Int[Tensor, " B"] | None = None
    branches: Int[Tensor, "B N"] | None = None


def once_only(backend: str) -> ConfigError:
    """What to raise where gradients are to be differentiated twice by a backend that was asked for and cannot."""
    return ConfigError(
        f"model.mixer.backend is `{backend}`, whose gradients have no gradients, and second-order writes in context "
        "need them; set model.mixer.backend=auto, or torch"
    )


def twice_differentiable() -> AbstractContextManager[None]:
    """Where attention uses the one form whose gradient has a gradient."""
    return sdpa_kernel(SDPBackend.MATH)


class RMSNorm(nn.Module):
    """Scale to unit root mean square over the last dimension, then by a learned vector. Computed in float32."""

    def __init__(self, width: int, *, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest D"]:
        """Normalise; the result has the input's dtype."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


def squared_relu(x: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
    """relu(x)². Keeps its result for backward and nothing else: the next layer keeps that as well."""
    return _SquaredReLU.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _SquaredReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x).square_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """2 relu(x), from the result. Differentiable, with the derivative 0 where x is not above 0."""
        (y,) = ctx.saved_tensors
        if not torch.is_grad_enabled():  # y / sqrt(y): torch's root of a zero takes ten times as long on processors
            return y.clamp_min(torch.finfo(y.dtype).tiny).rsqrt_().mul_(y).mul_(gradient).mul_(2)
        is_on = y > 0  # elsewhere the root has no derivative
        return gradient * torch.where(is_on, 2 * torch.where(is_on, y, 1).sqrt(), 0)


class SwiGLU(nn.Module):
    """Gated MLP of Transformer++: W_out(silu(W_gate x) * W_in x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_in = FastLinear(width, 2 * hidden)
        self.out = FastLinear(hidden, width)

    def forward(self, x: Float[Tensor, "B T D"], distance: MLPDistance | None = None) -> Float[Tensor, "B T D"]:
        """Apply to every token, with each sequence's own weights where a distance is given."""
        inner, outer = distance or (None, None)
        gate, value = self.gate_and_in(x, inner).chunk(2, dim=-1)
        return self.out(functional.silu(gate) * value, outer)

    def learned(self) -> tuple[Tensor, Tensor]:
        """Weights of both layers, without any distance."""
        return self.gate_and_in.weight, self.out.weight

    def initial_distance(self, batch_size: int) -> MLPDistance:
        """Fast copies that equal the learned weights."""
        return MLPDistance(self.gate_and_in.initial_distance(batch_size), self.out.initial_distance(batch_size))


def rotate(
    x: Float[Tensor, "B H T K"], position: int, base: float, scaling: Llama3Scaling | None = None
) -> Float[Tensor, "B H T K"]:
    """Turn pairs of channels by angles proportional to the token's position (rotary embedding).

    position: position of the first token. Angles are computed in float32 (float64 for float64 input).
    """
    half = x.shape[-1] // 2
    angle_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The order of operations is that of `transformers`, so that converted models turn by the same float32 angles.
    inverse = 1.0 / base ** (torch.arange(0, 2 * half, 2, device=x.device, dtype=angle_dtype) / (2 * half))
    if scaling is not None:
        inverse = _slowed(inverse, scaling)
    positions = torch.arange(position, position + x.shape[-2], device=x.device, dtype=angle_dtype)
    angles = positions[:, None] * inverse  # (T, K/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _slowed(inverse: Float[Tensor, " half"], scaling: Llama3Scaling) -> Float[Tensor, " half"]:
    """Divide the slow rotary angles by a factor, as Llama 3.1 was trained for its longer context."""
    wave = 2 * math.pi / inverse  # tokens of one turn
    slow = scaling.original_context / scaling.low_frequency
    fast = scaling.original_context / scaling.high_frequency
    keep = (scaling.original_context / wave - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    blended = (1 - keep) * inverse / scaling.factor + keep * inverse
    between = torch.where(wave < fast, inverse, blended)
    return torch.where(wave > slow, inverse / scaling.factor, between)


def tokens_since_reset(resets: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count tokens since the last document start in this call; very large before the first one."""
    index = torch.arange(resets.shape[1], device=resets.device)
    last = torch.where(resets, index, index.new_full((), -(2**40))).cummax(dim=1).values
    return index - last


_SHORT_CALL = 16
"""Tokens up to which a convolution is cheaper as one product than as torch's grouped convolution with its set-up."""


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, carried over calls and never across a document start."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))  # last column is the current token

    def forward(
        self, x: Float[Tensor, "B T D"], tail: Float[Tensor, "B W D"], resets: Bool[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W D"]]:
        """Convolve; `tail` holds the `width - 1` tokens before this call. Returns the result and the new tail."""
        past = tail.shape[1]
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        weight = self.weight.to(x.dtype)
        if resets is None and x.shape[1] <= _SHORT_CALL:
            windows = padded.unfold(1, past + 1, 1)  # (B, T, D, W)
            return (windows * weight).sum(dim=-1), self.next_tail(x, tail, None)
        if resets is None:
            convolved = functional.conv1d(padded.transpose(1, 2), weight[:, None], groups=x.shape[2])
            return convolved.transpose(1, 2), self.next_tail(x, tail, None)
        age = tokens_since_reset(resets)
        result = x * weight[:, past]
        for back in range(1, past + 1):
            shifted = padded[:, past - back : padded.shape[1] - back]
            result = result + shifted * weight[:, past - back] * (age >= back)[..., None]
        return result, self.next_tail(x, tail, age)

    def next_tail(
        self, x: Float[Tensor, "B T D"], tail: Float[Tensor, "B W D"], age: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B W D"]:
        """Last tokens of a call, for the next one; those before the last document start are 0."""
        past = tail.shape[1]
        if past == 0:
            return tail
        last = torch.cat([tail.to(x.dtype), x[:, -past:]], dim=1)[:, -past:]
        if age is None:
            return last
        back = torch.arange(past - 1, -1, -1, device=x.device)
        kept: Tensor = last * (back <= age[:, -1:])[..., None]
        return kept

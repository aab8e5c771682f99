"""DeltaNet and Gated DeltaNet: one matrix a head, in which every token replaces what its key has held.

Shapes: B batch, T tokens, H heads, K key width, V value width, W convolution width, D model width, X all channels.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config import baselines
from nested_lm.nn.layers import CausalConv, RMSNorm, StepContext
from nested_lm.nn.mixers.base import Mixer, zeros_for
from nested_lm.nn.mixers.delta_backend import run_recurrence
from nested_lm.nn.mixers.linear_attention import matrix_norm
from nested_lm.nn.part import Normal
from nested_lm.ops.memory.state import unit

DECAY_SPEED_MAX = 16.0
"""Speeds of the decay start uniform between 0 and this."""

DECAY_STEP = (1e-3, 0.1)
"""Steps of the decay start log-uniform in this range; the share kept of a token is exp(-speed * step)."""


class DeltaNetState(NamedTuple):
    """The matrix of each head, and the last tokens the convolution still needs."""

    matrix: Float[Tensor, "B H K V"]
    tail: Float[Tensor, "B W X"]


class _DeltaMixer(Mixer):
    """What both share: projections, convolution, the recurrence and its state.

    q, k, v = silu(conv(W x)), q and k of unit length, q divided by sqrt(K); the rate is `rate_max` * sigmoid(W_b x).
    """

    def __init__(
        self,
        width: int,
        config: baselines.DeltaNet | baselines.GatedDeltaNet,
        value_width: int,
        *,
        num_gates: int,
        epsilon: float,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.value_width = value_width
        heads = config.num_heads
        self.channels = (heads * config.head_width, heads * config.head_width, heads * value_width)
        self.qkv = nn.Linear(width, sum(self.channels), bias=False)
        self.conv = CausalConv(sum(self.channels), config.conv_width)
        self.gates = nn.Linear(width, num_gates * heads, bias=False)  # logits, the rate's first
        self.read_norm = RMSNorm(value_width, epsilon=epsilon)
        self.out = nn.Linear(heads * value_width, width, bias=False)

    def initial_state(self, batch_size: int) -> DeltaNetState:
        """Empty matrices, nothing in the convolution."""
        config, weight = self.config, self.qkv.weight
        return DeltaNetState(
            zeros_for(weight, batch_size, config.num_heads, config.head_width, self.value_width),
            zeros_for(weight, batch_size, config.conv_width - 1, sum(self.channels)),
        )

    def output_projections(self) -> list[nn.Linear]:
        """The projection of what the heads read."""
        return [self.out]

    def _read(
        self,
        x: Float[Tensor, "B T D"],
        context: StepContext,
        state: DeltaNetState,
        rate_logit: Float[Tensor, "B T H"],
        log_decay: Float[Tensor, "B T H"] | None,
    ) -> tuple[Float[Tensor, "B T H V"], DeltaNetState, dict[str, Tensor]]:
        """Write every token and read; reads are normalised."""
        config = self.config
        mixed, tail = self.conv(self.qkv(x), state.tail, context.resets)
        query, key, value = (
            part.unflatten(-1, (config.num_heads, -1)) for part in functional.silu(mixed).split(self.channels, dim=-1)
        )
        rate = config.rate_max * torch.sigmoid(rate_logit)
        if context.frozen:
            rate = torch.zeros_like(rate)
            log_decay = None if log_decay is None else torch.zeros_like(log_decay)
        reads, matrix = run_recurrence(
            "gated_delta_rule",
            unit(query) / math.sqrt(config.head_width),
            unit(key),
            value,
            rate=rate,
            log_decay=log_decay,
            state=state.matrix,
            resets=context.resets,
            backend=config.backend,
            recompute=self.recompute,
            differentiable_twice=context.differentiable_twice,
        )
        stats = {"rate": rate.detach().float().mean(), "fast_norm": matrix_norm(matrix)}
        return self.read_norm(reads).to(x.dtype), DeltaNetState(matrix, tail), stats

    @torch.no_grad()
    def initialise(self, normal: Normal) -> None:
        """Set the convolution."""
        normal(self.conv.weight, 1 / math.sqrt(self.config.conv_width))


class DeltaNet(_DeltaMixer):
    """out = W_out norm(q S), S written by the delta rule.

    Source: arXiv 2406.06484 with the normalisation and convolution of its section 3.4; rates above 1 as in arXiv
    2411.12537; arXiv 2512.24695 eq. 65 with the factor on the right side.
    """

    def __init__(self, width: int, config: baselines.DeltaNet, *, epsilon: float, recompute: bool) -> None:
        super().__init__(width, config, config.head_width, num_gates=1, epsilon=epsilon, recompute=recompute)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: DeltaNetState
    ) -> tuple[Float[Tensor, "B T D"], DeltaNetState, dict[str, Tensor]]:
        """Write every token into the matrices and read them."""
        reads, state, stats = self._read(x, context, state, self.gates(x), None)
        return self.out(reads.flatten(2)), state, stats


class GatedDeltaNet(_DeltaMixer):
    """out = W_out(norm(q S) * silu(W_g x)), S written by the delta rule and fading by exp(-speed * softplus(step)).

    Source: arXiv 2412.06464 eq. 10 and section 3.3. The form and the start of the decay, which are those of Mamba 2,
    are taken from the authors' published code; the matrix fades before a token writes.
    """

    def __init__(self, width: int, config: baselines.GatedDeltaNet, *, epsilon: float, recompute: bool) -> None:
        value_width = round(config.head_width * config.value_expansion)
        super().__init__(width, config, value_width, num_gates=2, epsilon=epsilon, recompute=recompute)
        self.log_speed = nn.Parameter(torch.empty(config.num_heads))
        self.step_bias = nn.Parameter(torch.empty(config.num_heads))
        self.output_gate = nn.Linear(width, config.num_heads * value_width, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: DeltaNetState
    ) -> tuple[Float[Tensor, "B T D"], DeltaNetState, dict[str, Tensor]]:
        """Write every token into the matrices and read them."""
        rate_logit, step = self.gates(x).chunk(2, dim=-1)
        log_decay = -self.log_speed.exp() * functional.softplus(step.to(self.step_bias.dtype) + self.step_bias)
        reads, state, stats = self._read(x, context, state, rate_logit, log_decay)
        stats["decay"] = log_decay.detach().float().exp().mean()
        return self.out(reads.flatten(2) * functional.silu(self.output_gate(x))), state, stats

    @torch.no_grad()
    def initialise(self, normal: Normal) -> None:
        """Set the convolution and the decay."""
        super().initialise(normal)
        for drawn in (self.log_speed, self.step_bias):
            normal(drawn, 1.0)
            drawn.copy_(torch.special.ndtr(drawn).clamp(1e-4, 1 - 1e-4))  # uniform
        self.log_speed.mul_(DECAY_SPEED_MAX).log_()
        low, high = (math.log(step) for step in DECAY_STEP)
        step = (low + (high - low) * self.step_bias).exp()
        self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

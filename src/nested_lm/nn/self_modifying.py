"""Self-modifying Titans: memories that generate their own keys, values, learning rates and retention.

Shapes: B batch, T tokens, H heads, K head width, E hidden width of a memory, W convolution width, D model width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.mixers import SelfModifying
from nested_lm.nn.layers import CausalConv, RMSNorm, StepContext
from nested_lm.ops import memory_chunked
from nested_lm.ops.memory import (
    MEMORIES,
    GateReadout,
    MemoryInputs,
    MemoryState,
    MemoryWeights,
    WriteRule,
    unit,
    zero_state,
)

START_OUTER_SCALE = 0.1
"""Second layers start this much smaller than 1/sqrt(fan-in): close to the identity, but with a gradient."""


class SelfModifyingState(NamedTuple):
    """Fast weights of every memory, and the last tokens the convolution still needs."""

    memory: MemoryState
    tail: Float[Tensor, "B W D"]


class SelfModifyingTitans(nn.Module):
    """Mixer of Hope: slow projections, short convolution, self-modifying memories, gated output.

    out = W_out(silu(W_gate x) * norm(read)), where `read` comes from the memories in `ops`; their keys, values and
    queries are silu(conv(W x)) scaled to unit length, one set a head.

    Args:
        width: model width.
        config: sizes and the write rule.
        epsilon: of the normalisation of reads.
        recompute: backward computes each chunk again instead of keeping its intermediate results.

    Source: arXiv 2512.24695 section 8 and figure 5; the placement of convolution, normalisation and output gate,
    which the paper leaves out, follows Titans (arXiv 2501.00663 section 4.4).
    """

    has_constant_state = True

    def __init__(self, width: int, config: SelfModifying, *, epsilon: float, recompute: bool) -> None:
        super().__init__()
        heads, head_width = config.num_heads, config.head_width
        hidden = round(config.expansion * head_width)
        self.config = config
        self.recompute = recompute
        self.rule = WriteRule(
            config.chunk,
            config.chunk_generators or config.chunk,
            config.erase,
            config.read,
            config.rates.memory,
            config.rates.generators,
        )
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.conv = CausalConv(3 * heads * head_width, config.conv_width)
        self.gates = nn.Linear(width, 2 * heads, bias=False)  # slow part of rate and decay
        self.gate_bias = nn.Parameter(torch.empty(2 * heads))
        self.readout_rate = nn.Parameter(torch.empty(heads, head_width))
        self.readout_decay = nn.Parameter(torch.empty(heads, head_width))
        self.start_inner = nn.Parameter(torch.empty(heads, len(MEMORIES), hidden, head_width))
        self.start_outer = nn.Parameter(torch.empty(heads, len(MEMORIES), head_width, hidden))
        self.read_norm = RMSNorm(head_width, epsilon=epsilon)
        self.output_gate = nn.Linear(width, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def initial_state(self, batch_size: int) -> SelfModifyingState:
        """Fast weights at their learned start, nothing in the convolution."""
        tail = self.qkv.weight.new_zeros(batch_size, self.config.conv_width - 1, self.qkv.weight.shape[0])
        return SelfModifyingState(zero_state(self._start(), batch_size), tail)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: SelfModifyingState
    ) -> tuple[Float[Tensor, "B T D"], SelfModifyingState, dict[str, Tensor]]:
        """Write every token into the memories and read them.

        Raises:
            ValueError: a document starts inside a chunk.
        """
        batch, tokens, _ = x.shape
        config = self.config
        self._check_resets(context)
        mixed, tail = self.conv(self.qkv(x), state.tail, context.resets)
        directions = unit(functional.silu(mixed).view(batch, tokens, 3, config.num_heads, config.head_width))
        query, key, value = directions.unbind(dim=2)
        rate, decay = (self.gates(x) + self.gate_bias).chunk(2, dim=-1)
        output = memory_chunked.self_modify(
            MemoryInputs(key, value, query, rate, decay),
            self._start(),
            GateReadout(self.readout_rate, self.readout_decay),
            state.memory,
            rule=self.rule,
            position=context.position,
            resets=context.resets,
            recompute=self.recompute,
        )
        reads = self.read_norm(output.reads).flatten(2)
        result = self.out(functional.silu(self.output_gate(x)) * reads.to(x.dtype))
        stats = self._statistics(output.rate, output.decay, output.state.current)
        return result, SelfModifyingState(output.state, tail), stats

    def _start(self) -> MemoryWeights:
        return MemoryWeights(self.start_inner, self.start_outer)

    def _check_resets(self, context: StepContext) -> None:
        """Refuse document starts that are not on a border: the memories would go on with another document's writes."""
        if context.resets is None:
            return
        position = context.position + torch.arange(context.resets.shape[1], device=context.resets.device)
        inside = context.resets & (position % self.rule.alignment != 0)
        if inside.any():
            row, token = (int(index) for index in inside.nonzero()[0])
            raise ValueError(
                f"row {row} starts a document at token {token} of this call (token {int(position[token])} of the "
                f"stream), inside a memory chunk of {self.rule.alignment}; start documents at multiples of the chunk"
            )

    @staticmethod
    @torch.no_grad()
    def _statistics(rate: Tensor, decay: Tensor, current: MemoryWeights) -> dict[str, Tensor]:
        norms = (current.inner.float().square().sum((-2, -1)) + current.outer.float().square().sum((-2, -1))).sqrt()
        mean = norms.mean(dim=(0, 1))  # over rows and heads
        stats = {"rate": rate.float().mean(), "decay": decay.float().mean()}
        return stats | {f"fast_norm/{name}": mean[index] for index, name in enumerate(MEMORIES)}

    @torch.no_grad()
    def initialise(self, normal: Callable[[Tensor, float], None]) -> None:
        """Set what is particular to this mixer; the linear layers have been set by the model.

        normal: draws a tensor from a centred normal distribution of the given standard deviation.
        """
        config = self.config
        heads = config.num_heads
        normal(self.conv.weight, 1 / math.sqrt(config.conv_width))
        normal(self.readout_rate, 1 / math.sqrt(config.head_width))
        normal(self.readout_decay, 1 / math.sqrt(config.head_width))
        normal(self.start_inner, 1 / math.sqrt(config.head_width))
        normal(self.start_outer, START_OUTER_SCALE / math.sqrt(self.start_outer.shape[-1]))
        kept = math.exp(-1 / config.decay_horizon_tokens)
        self.gate_bias[:heads] = math.log(config.rate_init / (1 - config.rate_init))
        self.gate_bias[heads:] = math.log(kept / (1 - kept))

"""Self-modifying Titans: memories that generate their own keys, values, learning rates and retention.

Shapes: B batch, T tokens, H heads, K head width, E hidden width of a memory, W convolution width, D model width.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.mixers import SelfModifying
from nested_lm.nn.layers import CausalConv, RMSNorm, StepContext, tokens_since_reset
from nested_lm.nn.mixers.base import Mixer, zeros_for
from nested_lm.nn.part import Kind, Normal
from nested_lm.nn.state import map_tensors
from nested_lm.ops.memory import backend as memory_backend
from nested_lm.ops.memory.state import (
    GateReadout,
    MemoryCall,
    MemoryInputs,
    MemoryState,
    MemoryWeights,
    take_rows,
    unit,
    zero_state,
)

START_OUTER_SCALE = 0.1
"""Second layers start this much smaller than 1/sqrt(fan-in): close to the identity, but with a gradient."""

START_INNER_SCALE = 2.0
"""Of the orthogonal starts of first layers. silu is half its input there, so hidden activations of unit keys start at
unit length, and those of orthogonal keys orthogonal: a write at rate 1 moves the answer all the way, and no other.
"""

OPEN = 1.2785
"""Bias at which silu is 1: output gates start open, or reads would get no gradient until the gates have learned to."""

START_LINEAR_SCALE = 0.1
"""Linear memories start at the identity plus noise this much smaller than 1/sqrt(fan-in)."""

CLOSED = 1e4
"""Gate logit of this size: rate and momentum are 0 and retention is 1 exactly, whatever the memories add to it."""


class SelfModifyingState(NamedTuple):
    """Fast weights of every memory, and the last tokens the convolution still needs."""

    memory: MemoryState
    tail: Float[Tensor, "B W D"]


class SelfModifyingTitans(Mixer):
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

    takes_rows = True
    roles: ClassVar[dict[str, Kind]] = {
        "start_inner": "memory",
        "start_outer": "memory",
        "readout_rate": "matrix",
        "readout_decay": "matrix",
    }

    def __init__(self, width: int, config: SelfModifying, *, epsilon: float, recompute: bool) -> None:
        super().__init__()
        heads, head_width = config.num_heads, config.head_width
        self.config = config
        self.recompute = recompute
        self.rule = config
        memories = len(self.rule.adapt)
        hidden = 0 if config.depth == 1 else round(config.expansion * head_width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.conv = CausalConv(3 * heads * head_width, config.conv_width)
        num_gates = 1 + (config.retention == "learned") + bool(config.momentum)
        self.gates = nn.Linear(width, num_gates * heads, bias=False)  # slow part of rate, decay and momentum
        self.gate_bias = nn.Parameter(torch.empty(num_gates * heads))
        self.readout_rate = nn.Parameter(torch.empty(heads, head_width)) if "eta" in self.rule.adapt else None
        self.readout_decay = nn.Parameter(torch.empty(heads, head_width)) if "alpha" in self.rule.adapt else None
        self.gain = nn.Parameter(torch.empty(heads, memories, head_width)) if config.normalise else None
        self.start_inner = nn.Parameter(torch.empty(heads, memories, hidden or head_width, head_width))
        self.start_outer = nn.Parameter(torch.empty(heads, memories, head_width, hidden)) if hidden else None
        self.read_norm = RMSNorm(head_width, epsilon=epsilon)
        self.output_gate = nn.Linear(width, heads * head_width)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    @property
    def reads_branches(self) -> bool:
        """Where the backend can read them. Scrambled values depend on a position that branches do not share."""
        if self.config.control is not None:
            return False
        return memory_backend.reads_branches(self.config.backend, self.rule, self.qkv.weight, self.start_weights())

    @property
    def frozen_reach(self) -> int:
        """Memories that nothing is written to know other tokens by the convolution only."""
        return self.config.conv_width - 1

    @property
    def memories(self) -> tuple[str, ...]:
        """Those that adapt, in the order of the state."""
        return self.rule.adapt

    def output_projections(self) -> list[nn.Linear]:
        """The projection of what the heads read."""
        return [self.out]

    def initial_state(self, batch_size: int) -> SelfModifyingState:
        """Fast weights at their learned start, nothing in the convolution."""
        tail = zeros_for(self.qkv.weight, batch_size, self.config.conv_width - 1, self.qkv.weight.shape[0])
        has_momentum = bool(self.config.momentum)
        return SelfModifyingState(zero_state(self.start_weights(), batch_size, momentum=has_momentum), tail)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: SelfModifyingState
    ) -> tuple[Float[Tensor, "B T D"], SelfModifyingState, dict[str, Tensor]]:
        """Write every token into the memories and read them."""
        config = self.config
        query, key, value, tail = convolved_units(
            self.conv,
            self.qkv(x),
            state.tail if context.rows is None else take_rows(state.tail, context.rows),
            context.resets,
            num_heads=config.num_heads,
            unit_values=config.unit_values,
            backend="torch" if context.differentiable_twice else config.backend,
            branches=context.branches,
        )
        gates = list((self.gates(x) + self.gate_bias).unflatten(-1, (-1, config.num_heads)).unbind(dim=2))
        if config.retention == "full":
            gates.insert(1, torch.full_like(gates[0], CLOSED))
        if context.frozen:
            gates = [torch.full_like(gate, sign * CLOSED) for gate, sign in zip(gates, (-1, 1, -1), strict=False)]
        if config.control == "queries_are_keys":
            query = key
        elif config.control == "scrambled_values":
            value = scramble(value, context.position)
        start = self.start_weights()
        readout = GateReadout(self.readout_rate, self.readout_decay, self.gain)
        inputs = MemoryInputs(key, value, query, *gates)
        if self.qkv.weight.dtype != start.inner.dtype:
            inputs, readout = map_tensors((inputs, readout), lambda tensor: tensor.to(start.inner.dtype))
        call = MemoryCall(
            context.position,
            context.resets,
            self.recompute,
            context.differentiable_twice,
            context.final,
            context.rows,
            context.branches,
        )
        chosen = memory_backend.select(config.backend, self.rule, inputs.key, start, call)
        output = chosen.run(inputs, start, readout, state.memory, rule=self.rule, call=call)
        reads = self.read_norm(output.reads).flatten(2)
        result = self.out(functional.silu(self.output_gate(x)) * reads.to(x.dtype))
        stats = {} if context.final else self._statistics(output.rate, output.decay, output.state.current)
        return result, SelfModifyingState(output.state, tail), stats

    def start_weights(self) -> MemoryWeights:
        """Learned start of every memory, in float32 at least: small writes add up in memories."""
        outer = self.start_outer
        if outer is None:  # linear memories have no second layer
            outer = self.start_inner[..., :0]
        dtype = torch.promote_types(outer.dtype, torch.float32)
        return MemoryWeights(self.start_inner.to(dtype), outer.to(dtype))

    @torch.no_grad()
    def _statistics(self, rate: Tensor, decay: Tensor, current: MemoryWeights) -> dict[str, Tensor]:
        norms = (current.inner.float().square().sum((-2, -1)) + current.outer.float().square().sum((-2, -1))).sqrt()
        mean = norms.mean(dim=(0, 1))  # over rows and heads
        stats = {"rate": rate.float().mean(), "decay": decay.float().mean()}
        return stats | {f"fast_norm/{name}": mean[index] for index, name in enumerate(self.rule.adapt)}

    @torch.no_grad()
    def initialise(self, normal: Normal) -> None:
        """Set convolution, gates and starts of the memories."""
        config = self.config
        heads = config.num_heads
        self.output_gate.bias.fill_(OPEN)
        rate, decay = self.gates.weight[:heads], self.gates.weight[heads : 2 * heads]
        weights = {"output": self.output_gate.weight, "rate": rate, "decay": decay}
        for name in config.flat_gates:
            weights[name].zero_()
        normal(self.conv.weight, 1 / math.sqrt(config.conv_width))
        for readout in (self.readout_rate, self.readout_decay):
            if readout is not None:
                normal(readout, 1 / math.sqrt(config.head_width))
        if self.start_outer is None:
            normal(self.start_inner, START_LINEAR_SCALE / math.sqrt(config.head_width))
            self.start_inner.add_(torch.eye(config.head_width, device=self.start_inner.device))
        else:
            drawn = torch.empty(self.start_inner.shape)
            normal(drawn, 1.0)
            scale = START_INNER_SCALE if config.damp else 1.0  # nothing holds long writes of undamped memories
            self.start_inner.copy_(scale * _orthogonal(drawn))
            normal(self.start_outer, START_OUTER_SCALE / math.sqrt(self.start_outer.shape[-1]))
        if self.gain is not None:
            self.gain.fill_(1 / math.sqrt(config.head_width))  # the branch starts at unit length, like its input
        kept = math.exp(-1 / config.decay_horizon_tokens)
        retention = (kept,) if config.retention == "learned" else ()
        rates, *others = self.gate_bias.view(-1, heads)
        for bias, share in zip(others, (*retention, config.momentum_init), strict=False):
            bias.fill_(math.log(share / (1 - share)))
        init = config.rate_init
        first, last = init if isinstance(init, tuple) else (init, init)
        shares = torch.linspace(first, last, heads, device=rates.device)
        rates.copy_(torch.logit((shares + config.rate_stretch) / (1 + 2 * config.rate_stretch)))


def scramble(value: Float[Tensor, "B T H K"], position: int) -> Float[Tensor, "B T H K"]:
    """Permute the coordinates of every token's value in one of 64 ways, by its position in the stream."""
    ways = torch.rand(64, value.shape[-1], generator=torch.Generator().manual_seed(0)).argsort(1).to(value.device)
    at = (position + torch.arange(value.shape[1], device=value.device)) % len(ways)
    return value.gather(-1, ways[at][None, :, None].expand_as(value))


def _orthogonal(drawn: Float[Tensor, "*_ E K"]) -> Float[Tensor, "*_ E K"]:
    """Turn normal matrices into ones with orthonormal columns, or rows where there are fewer."""
    tall = drawn if drawn.shape[-2] >= drawn.shape[-1] else drawn.mT
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # or the signs would depend on the library
    return q if drawn.shape[-2] >= drawn.shape[-1] else q.mT


def convolved_units(
    conv: CausalConv,
    x: Float[Tensor, "B T 3HK"],
    tail: Float[Tensor, "B W 3HK"],
    resets: Bool[Tensor, "B T"] | None,
    *,
    num_heads: int,
    unit_values: bool,
    backend: str,
    branches: Int[Tensor, "B N"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value of every head, unit(silu(conv(x))), and the tail of the next call.

    branches: see `StepContext`; with a front only.
    """
    front = memory_backend.front(backend, x)
    if front is None:
        assert branches is None, "rows branch in C only"
        mixed, tail = conv(x, tail, resets)
        query, key, value = functional.silu(mixed).unflatten(-1, (3, num_heads, -1)).unbind(dim=2)
        return unit(query), unit(key), unit(value) if unit_values else value, tail
    age = None if resets is None else tokens_since_reset(resets)
    options = {"num_heads": num_heads, "unit_values": unit_values, "branches": branches}
    return *front.convolved_units(x, conv.weight, tail, age, **options), conv.next_tail(x, tail, age)

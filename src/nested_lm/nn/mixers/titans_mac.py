"""Titans with memory as a context (MAC): each segment recalls the past, attends to it, and is then written.

Shapes: B batch, T tokens, H attention heads, K attention head width, S tokens of the segment so far, D model width,
M memories, E hidden width of a memory, N heads of the memory, J head width of the memory.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.baselines import TitansMAC
from nested_lm.nn.layers import RMSNorm, StepContext
from nested_lm.nn.mixers.base import Mixer
from nested_lm.nn.mixers.self_modifying import SelfModifyingState, SelfModifyingTitans
from nested_lm.nn.mixers.titans import Gate, PersistentAttention
from nested_lm.nn.mixers.window import attend
from nested_lm.nn.part import Normal
from nested_lm.ops.memory.recall import recall
from nested_lm.ops.memory.state import MemoryWeights, reset_rows, unit


class MACState(NamedTuple):
    """State of the memory, and what the running segment still needs.

    past: `memory` when the segment started, which is what its tokens recall.
    keys, values: of the segment's tokens so far, each beside those of what it recalled. Empty between segments.
    """

    memory: SelfModifyingState
    past: MemoryWeights
    keys: Float[Tensor, "B H S 2 K"]
    values: Float[Tensor, "B H S 2 K"]


class Tokens(NamedTuple):
    """Attention inputs of a call's tokens, projected all at once. Keys are rotated; `plain` is the unrotated query."""

    query: Float[Tensor, "B H T K"]
    plain: Float[Tensor, "B H T K"]
    key: Float[Tensor, "B H T K"]
    value: Float[Tensor, "B H T K"]
    lookup: Float[Tensor, "B T N J"]

    def part(self, begin: int, end: int) -> "Tokens":
        """Take some tokens."""
        return Tokens(*(x[:, :, begin:end] for x in self[:4]), self.lookup[:, begin:end])


class MemoryAsContext(Mixer):
    """MAC: recall h = M*(q), attend to [persistent | h | segment], write y, out = W_out(y * M(y)).

    A token sees what it and earlier tokens of its segment recalled, and those tokens themselves. Between segments the
    state is that of the memory; inside one it holds the segment's keys and values as well.

    Source: arXiv 2501.00663 eqs. 21-25. Deviations: a token does not see what later tokens of its segment recalled,
    because that depends on them (the literal concatenation [h | segment] is not causal); for the same reason the last
    read, M_t(y_t), is of the memory after the token's own write, not after the segment's. h has the positions of the
    tokens that recalled it.
    """

    def __init__(self, width: int, config: TitansMAC, *, epsilon: float, recompute: bool) -> None:
        super().__init__()
        memory = config.memory
        inner = memory.num_heads * memory.head_width
        self.segment = config.segment
        self.heads = (memory.num_heads, memory.head_width)
        self.memory = SelfModifyingTitans(width, memory, epsilon=epsilon, recompute=recompute)
        self.attention = PersistentAttention(width, config)
        self.lookup = nn.Linear(width, inner, bias=False)
        self.recalled_norm = RMSNorm(memory.head_width, epsilon=epsilon)
        self.recalled = nn.Linear(inner, width, bias=False)
        self.gate = Gate(width, epsilon=epsilon)
        self.out = nn.Linear(width, width, bias=False)

    def initial_state(self, batch_size: int) -> MACState:
        """The memory at its learned start, before the first segment."""
        memory = self.memory.initial_state(batch_size)
        empty = self.attention.empty_cache(batch_size).keys.unsqueeze(3).expand(-1, -1, -1, 2, -1)
        return MACState(memory, _of_memory(memory), empty, empty)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: MACState
    ) -> tuple[Float[Tensor, "B T D"], MACState, dict[str, Tensor]]:
        """Read the tokens segment by segment."""
        attention = self.attention
        plain, key, value = (attention.heads(part) for part in attention.qkv(x).chunk(3, dim=-1))
        rotated = (attention.rotated(part, context.position) for part in (plain, key))
        query, key = rotated
        lookup = unit(functional.silu(self.lookup(x)).unflatten(-1, self.heads))
        tokens = Tokens(query, plain, key, value, lookup)
        outputs, stats = [], {}
        begin = 0
        while begin < x.shape[1]:
            position = context.position + begin
            end = min(begin + self.segment - position % self.segment, x.shape[1])
            resets = None if context.resets is None else context.resets[:, begin:end]
            if position % self.segment == 0:
                state = _next_segment(state, resets)
            final = context.final and end == x.shape[1]
            here = context._replace(position=position, resets=resets, documents=None, final=final)
            output, state, stats = self._read(tokens.part(begin, end), here, state)
            outputs.append(output)
            begin = end
        if (context.position + x.shape[1]) % self.segment == 0:
            state = _next_segment(state, None)
        return self.out(torch.cat(outputs, dim=1)), state, stats

    def _read(
        self, tokens: Tokens, context: StepContext, state: MACState
    ) -> tuple[Float[Tensor, "B T D"], MACState, dict[str, Tensor]]:
        """Read some tokens of one segment."""
        recalls = recall(tokens.lookup, self.memory.start_weights(), state.past, self.memory.gain)
        recalled = self.recalled(self.recalled_norm(recalls).flatten(2).to(tokens.value.dtype))  # (B, T, D)
        key, value = self.attention.keys_and_values(recalled)
        pairs = (
            torch.stack([self.attention.rotated(key, context.position), tokens.key], dim=3),
            torch.stack([value, tokens.value], dim=3),
        )
        keys = torch.cat([state.keys.to(pairs[0].dtype), pairs[0]], dim=2)  # (B, H, S, 2, K)
        values = torch.cat([state.values.to(pairs[1].dtype), pairs[1]], dim=2)
        count, seen = tokens.query.shape[2], keys.shape[2]
        mask = torch.ones(count, seen, dtype=torch.bool, device=keys.device).tril(seen - count)
        mask = mask[:, :, None].expand(-1, -1, 2).flatten(1)[None, None]  # (1, 1, T, 2 S)
        persistent = self.attention.persistent(tokens.plain)
        mixed = attend(tokens.query, keys.flatten(2, 3), values.flatten(2, 3), mask, persistent)
        attended = mixed.transpose(1, 2).flatten(2)  # (B, T, D)
        remembered, memory, stats = self.memory(attended, context, state.memory)
        return self.gate(attended, remembered), MACState(memory, state.past, keys, values), stats

    @property
    def memories(self) -> tuple[str, ...]:
        """Those of the memory."""
        return self.memory.memories

    def output_projections(self) -> list[nn.Linear]:
        """Its own, and that of the memory."""
        return [*self.memory.output_projections(), self.out]

    def initialise(self, normal: Normal) -> None:
        """Set what the memory and the attention have beside linear layers."""
        self.memory.initialise(normal)
        self.attention.initialise(normal)


def _of_memory(state: SelfModifyingState) -> MemoryWeights:
    """Weights of `memory` alone, the last of the memories, as they stand."""
    return MemoryWeights(*(x[:, :, -1:] for x in state.memory.current))


def _next_segment(state: MACState, resets: Bool[Tensor, "B T"] | None) -> MACState:
    """Take the memory as it stands for the past, and see no tokens yet. resets: of the segment's tokens."""
    past = _of_memory(state.memory)
    if resets is not None:
        past = reset_rows(past, (~resets[:, 0]).to(past.inner.dtype))
    return MACState(state.memory, past, state.keys[:, :, :0].clone(), state.values[:, :, :0].clone())

"""Titans: a neural memory beside attention, as a context (MAC), as a gate (MAG) or as a layer before it (MAL).

The memory is the mixer `SelfModifyingTitans`, of which Titans' own (LMM) is a setting (configs/model/titans_lmm_demo).

Shapes: B batch, T tokens, H attention heads, K attention head width, P persistent tokens, D model width.

Source: arXiv 2501.00663 section 4. Deviations that all three share: persistent tokens are seen by the attention of
every token, and have no position; they are not written into the memory, whose learned start says as much. The product
of attention and memory, which the paper describes in words, is silu(norm(y)) * silu(norm(M)).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.baselines import TitansMAG, TitansMAL, TitansSection
from nested_lm.nn.layers import RMSNorm, StepContext, rotate
from nested_lm.nn.mixers.attention import last_tokens
from nested_lm.nn.mixers.attention_cache import AttentionState
from nested_lm.nn.mixers.base import Mixer, zeros_for
from nested_lm.nn.mixers.self_modifying import SelfModifyingState, SelfModifyingTitans
from nested_lm.nn.mixers.window import Persistent, attend_in_window
from nested_lm.nn.part import Normal, Part


class PersistentAttention(Part):
    """Projections and persistent tokens of an attention; who sees whom, the mixer says.

    Source: arXiv 2501.00663 eq. 19.
    """

    def __init__(self, width: int, config: TitansSection) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_width = width // config.num_heads
        self.rope_base = config.rope_base
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        count = config.num_persistent
        self.tokens = nn.Parameter(torch.empty(1, count, width)) if count else None

    def heads(self, x: Float[Tensor, "B T X"]) -> Float[Tensor, "B H T K"]:
        """Split channels into heads."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def rotated(self, x: Float[Tensor, "B H T K"], position: int) -> Float[Tensor, "B H T K"]:
        """Turn by the tokens' positions."""
        return rotate(x, position, self.rope_base)

    def keys_and_values(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]:
        """Keys, not yet rotated, and values."""
        key, value = functional.linear(x, self.qkv.weight[x.shape[-1] :]).chunk(2, dim=-1)
        return self.heads(key), self.heads(value)

    def persistent(self, query: Float[Tensor, "B H T K"]) -> Persistent | None:
        """The persistent tokens, for queries before their rotation; None without any."""
        if self.tokens is None:
            return None
        keys, values = self.keys_and_values(self.tokens)
        return Persistent(query, keys[0], values[0])

    def empty_cache(self, batch_size: int) -> AttentionState:
        """No tokens seen."""
        empty = zeros_for(self.qkv.weight, batch_size, self.num_heads, 0, self.head_width)
        return AttentionState(empty, empty, torch.zeros(batch_size, 0, dtype=torch.long, device=empty.device))

    def output_projections(self) -> list[nn.Linear]:
        """None: the mixer projects what was attended to."""
        return []

    def in_window(
        self, x: Float[Tensor, "B T D"], context: StepContext, cache: AttentionState, window: int
    ) -> tuple[Float[Tensor, "B T D"], AttentionState]:
        """Attend in a sliding window with the persistent tokens before it. Returns the cache of later calls."""
        batch, tokens, _ = x.shape
        query, key, value = (self.heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        documents = context.documents
        if documents is None:
            documents = torch.zeros(batch, tokens, dtype=torch.long, device=x.device)
        cache = cache.extended(self.rotated(key, context.position), value, documents)
        mixed = attend_in_window(
            self.rotated(query, context.position),
            cache.keys,
            cache.values,
            None if context.documents is None else cache.documents,
            window=window,
            persistent=self.persistent(query),
        )
        return mixed.transpose(1, 2).flatten(2), last_tokens(cache, window)

    @torch.no_grad()
    def initialise(self, normal: Normal) -> None:
        """Draw the persistent tokens as large as the normalised tokens they stand beside."""
        if self.tokens is not None:
            normal(self.tokens, 1.0)


class Gate(nn.Module):
    """The product of attention and memory: silu(norm(y)) * silu(norm(M)), each norm with a learned vector."""

    def __init__(self, width: int, *, epsilon: float) -> None:
        super().__init__()
        self.attended_norm = RMSNorm(width, epsilon=epsilon)
        self.remembered_norm = RMSNorm(width, epsilon=epsilon)

    def forward(self, attended: Float[Tensor, "B T D"], remembered: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Multiply."""
        attended, remembered = self.attended_norm(attended), self.remembered_norm(remembered)
        return functional.silu(attended) * functional.silu(remembered)


class WindowedTitansState(NamedTuple):
    """State of the memory, and keys and values of the last tokens."""

    memory: SelfModifyingState
    cache: AttentionState


class _WindowedTitans(Mixer):
    """What MAG and MAL share: a memory and sliding-window attention.

    The state keeps its size once the stream is longer than the window.
    """

    def __init__(self, width: int, config: TitansMAG | TitansMAL, *, epsilon: float, recompute: bool) -> None:
        super().__init__()
        self.window = config.window
        self.memory = SelfModifyingTitans(width, config.memory, epsilon=epsilon, recompute=recompute)
        self.attention = PersistentAttention(width, config)
        self.out = nn.Linear(width, width, bias=False)

    def initial_state(self, batch_size: int) -> WindowedTitansState:
        """The memory at its learned start, nothing in the window."""
        return WindowedTitansState(self.memory.initial_state(batch_size), self.attention.empty_cache(batch_size))

    @property
    def memories(self) -> tuple[str, ...]:
        """Those of the memory."""
        return self.memory.memories

    def documents(self, state: WindowedTitansState) -> Int[Tensor, "B S"]:
        """Document of each token in the window."""
        return state.cache.documents

    def output_projections(self) -> list[nn.Linear]:
        """Its own, and that of the memory."""
        return [*self.memory.output_projections(), self.out]

    def initialise(self, normal: Normal) -> None:
        """Set what the memory and the attention have beside linear layers."""
        self.memory.initialise(normal)
        self.attention.initialise(normal)


class MemoryAsGate(_WindowedTitans):
    """MAG: out = W_out(attention(x) * M(x)), both branches over the same tokens.

    Source: arXiv 2501.00663 eqs. 26-28.
    """

    def __init__(self, width: int, config: TitansMAG, *, epsilon: float, recompute: bool) -> None:
        super().__init__(width, config, epsilon=epsilon, recompute=recompute)
        self.gate = Gate(width, epsilon=epsilon)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: WindowedTitansState
    ) -> tuple[Float[Tensor, "B T D"], WindowedTitansState, dict[str, Tensor]]:
        """Attend, write and read the memory, multiply."""
        attended, cache = self.attention.in_window(x, context, state.cache, self.window)
        remembered, memory, stats = self.memory(x, context, state.memory)
        return self.out(self.gate(attended, remembered)), WindowedTitansState(memory, cache), stats


class MemoryAsLayer(_WindowedTitans):
    """MAL: out = W_out(attention(norm(M(x)))).

    Source: arXiv 2501.00663 eqs. 29-31. The norm between the two layers is that of every layer here.
    """

    def __init__(self, width: int, config: TitansMAL, *, epsilon: float, recompute: bool) -> None:
        super().__init__(width, config, epsilon=epsilon, recompute=recompute)
        self.norm = RMSNorm(width, epsilon=epsilon)

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: WindowedTitansState
    ) -> tuple[Float[Tensor, "B T D"], WindowedTitansState, dict[str, Tensor]]:
        """Write and read the memory, attend to what it answered."""
        remembered, memory, stats = self.memory(x, context, state.memory)
        attended, cache = self.attention.in_window(self.norm(remembered), context, state.cache, self.window)
        return self.out(attended), WindowedTitansState(memory, cache), stats

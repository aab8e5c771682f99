"""Reading a document's text into the memory before the question is asked: the `--memorize` variants.

What is memorised is the text that the choices of a document have in common before their answers begin, so that no
choice is favoured. Each pass reads it as training reads a document: a start token, the text, then end tokens up to the
next border of the model's memories. Then the question is read as without memorising, in the same stream.

Shapes: B rows of a batch, T tokens, M memories of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nested_lm.errors import ConfigError
from nested_lm.nn.mixers.attention_cache import AttentionState, BranchedState
from nested_lm.nn.mixers.delta_net import DeltaNetState
from nested_lm.nn.mixers.linear_attention import LinearAttentionState
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState, iterate_tensors, map_tensors
from nested_lm.ops.memory.state import MemoryState, MemoryWeights
from nested_lm.reading.calls import read, reading_mode
from nested_lm.reading.reader import Document
from nested_lm_lab.tasks.zeroshot.settings import Memorize

_WHOLE = "memory"
"""Name of the fast weights of a mixer that has one kind of them."""


def level_names(model: LanguageModel) -> tuple[str, ...]:
    """Memories of a model that can be chosen: those of its mixers, and `level0`... of its channels, by clock."""
    names: tuple[str, ...] = ()
    if any(not isinstance(layer, AttentionState) for layer in model.initial_state(1).layers):
        names = model.memories or (_WHOLE,)
    if model.writer is not None:
        names += tuple(f"level{level.level}" for level in model.writer.levels)
    return names


def check_memorize(model: LanguageModel, settings: Memorize) -> None:
    """Refuse what a model cannot do.

    Raises:
        ConfigError: the model has no memory that reading writes, not the memories that are named, or levels that are
            written for all rows of a batch at once.
    """
    names = level_names(model)
    if not names:
        raise ConfigError(
            "--memorize: reading writes no fast weights of this model, it only fills a cache; leave --memorize out"
        )
    unknown = [name for name in settings.levels or () if name not in names]
    if unknown:
        raise ConfigError(f"--memorize: this model has no memory {unknown[0]!r}; it has {', '.join(names)}")
    if settings.surprise is not None and model.writer is not None:
        raise ConfigError(
            "--memorize: with a surprise threshold, rows of a batch write different segments, and levels that are "
            "written in context write all rows at once; leave surprise= out for this model"
        )


@dataclass(frozen=True)
class MemorizedStarts:
    """States that have memorised the texts of documents.

    documents: all that are scored. boundary: start and end token. on_tokens: is told how many tokens have been read.
    """

    model: LanguageModel
    documents: Sequence[Document]
    settings: Memorize
    boundary: tuple[int, int]
    on_tokens: Callable[[int], None] | None = None

    def length(self, document: int) -> int:
        """Tokens read before a document."""
        return self.settings.passes * self._padded(document)

    def states(self, documents: Sequence[int]) -> StreamState:
        """States of some documents, a row for each.

        Raises:
            NumericsError: a prediction is not finite.
        """
        length = self._padded(documents[0])
        start, end = self.boundary
        stream = np.full((len(documents), length), end)
        stream[:, 0] = start
        real = np.zeros((len(documents), length), dtype=bool)  # tokens of the text
        for row, document in enumerate(documents):
            text = shared_text(self.documents[document])
            stream[row, 1 : len(text) + 1] = text
            real[row, 1 : len(text) + 1] = True
        device = next(self.model.parameters()).device
        tokens = torch.from_numpy(stream).to(device)
        with reading_mode(self.model):
            state = self.model.initial_state(len(documents))
            for _ in range(self.settings.passes):
                state = self._read(tokens, torch.from_numpy(real).to(device), state)
            return state if self.settings.levels is None else self._keep(state)

    def _padded(self, document: int) -> int:
        alignment = self.model.config.alignment
        return -(-(len(shared_text(self.documents[document])) + 1) // alignment) * alignment

    def _read(self, tokens: Tensor, real: Tensor, state: StreamState) -> StreamState:
        """One pass."""
        if self.settings.surprise is None:
            return read(self.model, tokens, state, on_tokens=self.on_tokens).state
        following, counted = tokens.roll(-1, dims=1), real.roll(-1, dims=1)  # the start token is no part of the text
        for part in torch.arange(tokens.shape[1]).split(self.model.config.alignment):
            before = state
            found = read(self.model, tokens[:, part], before, targets=following[:, part], on_tokens=self.on_tokens)
            losses = torch.from_numpy(found.nats).to(tokens.device)
            state = merge(before, found.state, self._is_surprising(losses, counted[:, part]))
        return state

    def _is_surprising(self, losses: Float[Tensor, "B T"], counted: Bool[Tensor, "B T"]) -> Bool[Tensor, "B"]:
        """Rows whose mean loss over the counted tokens reaches the threshold; a segment without any does not."""
        count = counted.sum(dim=1)
        return (count > 0) & ((losses * counted).sum(dim=1) >= self.settings.surprise * count)

    def _keep(self, state: StreamState) -> StreamState:
        """Set the memories that were not chosen back to their start."""
        model, levels = self.model, self.settings.levels
        assert levels is not None
        rows = iterate_tensors(state.layers)[0].shape[0]
        fresh = model.initial_state(rows)
        layers = keep_memories(fresh.layers, state.layers, set(levels), model)
        if model.writer is None:
            return replace(state, layers=layers)
        # The last segment's write waits for a token after it: read one, and take nothing but what was written and when.
        start = torch.full((rows, 1), self.boundary[0], device=next(model.parameters()).device)
        written = read(model, start, state).state.in_context
        kept = tuple(
            after if f"level{level.level}" in levels else before
            for level, before, after in zip(model.writer.levels, fresh.in_context.levels, written.levels, strict=True)
        )
        memory = written._replace(levels=kept, border=layers, window=written.window[:, :0])
        return replace(state, layers=layers, in_context=memory)


def shared_text(document: Document) -> np.ndarray:
    """Tokens after the start token that come before the answer of every sequence of a document and are the same."""
    first = min(sequence.first for sequence in document)
    rows = np.stack([sequence.tokens[1:first] for sequence in document])
    same = (rows == rows[0]).all(axis=0)
    return rows[0] if same.all() else rows[0][: int(np.argmin(same))]


def merge(before: StreamState, after: StreamState, written: Tensor) -> StreamState:
    """Fast weights of `after` in the rows that are `written`, of `before` in the others; all else of `after`."""

    def choose(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(written.view(-1, *[1] * (new.ndim - 1)), new, old)

    return replace(after, layers=_merge(before.layers, after.layers, choose))


def _merge(before: Any, after: Any, choose: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Walk two states of one form; `choose` says what becomes of fast weights."""
    if isinstance(after, MemoryState | MemoryWeights):
        old = iter(iterate_tensors(before))
        return map_tensors(after, lambda new: choose(next(old), new))
    if isinstance(after, DeltaNetState | LinearAttentionState):
        return after._replace(matrix=choose(before.matrix, after.matrix))
    if isinstance(after, tuple) and not isinstance(after, AttentionState | BranchedState):
        items = [_merge(a, b, choose) for a, b in zip(before, after, strict=True)]
        return type(after)(*items) if hasattr(after, "_fields") else tuple(items)
    return after


def keep_memories(fresh: Any, state: Any, names: set[str], model: LanguageModel) -> Any:
    """Mixer states in which the memories that are not named are fresh."""
    all_names = model.memories
    if not all_names:
        return state if _WHOLE in names else _merge(fresh, state, lambda old, _: old)
    mixer = next(module for module in model.modules() if isinstance(module, SelfModifyingTitans))
    kept = torch.tensor([name in names for name in mixer.rule.adapt], device=next(model.parameters()).device)

    def choose(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(kept.view(1, 1, -1, *[1] * (new.ndim - 3)), new, old)  # (B, H, M, ...)

    return _merge(fresh, state, choose)

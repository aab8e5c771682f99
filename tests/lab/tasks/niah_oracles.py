"""Models whose answers are known: one that finds needles in what it has read, one that knows nothing."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn

QUESTION = re.compile(r"special magic \w+ for ([\w-]+) mentioned in the provided text is(.*)\Z", re.DOTALL)
RECENT = 400  # tokens


@dataclass(frozen=True)
class OracleState:
    """Everything read while writing was on, and the last tokens, whether it was on or not."""

    memory: tuple[tuple[int, ...], ...]
    recent: tuple[tuple[int, ...], ...]
    frozen: bool = False
    grows: bool = False
    position: int = 0

    def select(self, rows):
        chosen = rows.tolist()
        return replace(
            self,
            memory=tuple(self.memory[row] for row in chosen),
            recent=tuple(self.recent[row] for row in chosen),
        )

    def freeze(self):
        return replace(self, frozen=True)

    def map(self, function):
        return self

    def num_bytes(self):
        return len(self.memory) * (self.position if self.grows else 1) * 1024


class Oracle(nn.Module):
    """Answers single needles. grows: its state does, a KiB a token, like a cache, whether it writes or not."""

    has_fast_weights = True
    frozen_reach = None

    def __init__(self, tokenizer, *, grows=False):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(alignment=1, writes_in_context=False, vocab_size=tokenizer.vocab_size)
        self.tokenizer = tokenizer
        self.has_constant_state = not grows
        self.rows = []  # read side by side, of each call

    def initial_state(self, rows):
        return OracleState(((),) * rows, ((),) * rows, grows=not self.has_constant_state)

    reads_branches = False

    def predict(self, tokens, places, *, state, final=False, rows=None, branches=None):
        self.rows.append(len(tokens))
        texts = tokens.tolist()
        if places is None:
            places = torch.cartesian_prod(torch.arange(len(texts)), torch.arange(len(texts[0])))
        logits = [
            self.answer(state.memory[row], (*state.recent[row], *texts[row][: at + 1])) for row, at in places.tolist()
        ]
        recent = tuple((*last, *ids)[-RECENT:] for last, ids in zip(state.recent, texts, strict=True))
        memory = state.memory
        if not state.frozen:
            memory = tuple((*known, *ids) for known, ids in zip(memory, texts, strict=True))
        after = replace(state, memory=memory, recent=recent, position=state.position + tokens.shape[1])
        empty = torch.zeros(0, self.tokenizer.vocab_size)
        return SimpleNamespace(
            logits=torch.stack(logits)[None] if logits else empty[None], state=state if final else after
        )

    def answer(self, memory, recent):
        logits = torch.zeros(self.tokenizer.vocab_size)
        asked = QUESTION.search(self.tokenizer.decode(recent[-RECENT:]))
        if asked is None:
            return logits
        value = re.search(rf"for {asked[1]} is: ([\w-]+)\.", self.tokenizer.decode(memory))
        if value is not None:
            answer = self.tokenizer.encode(f" {value[1]}")
            given = self.tokenizer.encode(asked[2]) if asked[2] else []
            follows = answer[len(given)] if answer[: len(given)] == given and len(given) < len(answer) else 0
            logits[follows] = 20.0
        return logits


class Blind(Oracle):
    """Cannot tell any token from another."""

    has_fast_weights = False

    def answer(self, memory, recent):
        return torch.zeros(self.tokenizer.vocab_size)

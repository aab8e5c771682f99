"""Tasks over tokens: generators of tokens and of the class that is right at every position (-100: not scored).

Shapes: B batch, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.learning.arms import configuration
from benchmarks.learning.protocol import IGNORED, RECIPE, Measures, Progress, share_of_right
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel

Make = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenTask:
    """One task over tokens; `benchmarks/learning/protocol.py` says what its methods do.

    make: batch, length, generator -> tokens (B, T) and targets (B, T), both below `vocab`.
    train_lengths: shortest and longest training length; each batch draws one. test_lengths: what is reported.
    grows: the longest training length grows from the shortest one in the first half of the training.
    stale: from tokens and targets, the answer that was right before it was overwritten (-100: not overwritten).
    """

    name: str
    about: str
    vocab: int
    make: Make
    train_lengths: tuple[int, int]
    test_lengths: tuple[int, ...]
    steps: int
    rate: float = 3e-3
    grows: bool = False
    stale: Callable[[Tensor, Tensor], Tensor] | None = None

    arms: ClassVar[None] = None
    unit: ClassVar[Literal["share"]] = "share"
    differences: ClassVar[tuple[str, ...]] = ()
    rates: ClassVar[None] = None

    @property
    def shown(self) -> tuple[str, ...]:
        """Whole strings, or tokens where a task is about recall, at the first length beyond the trained one."""
        return (f"{'strings' if self.stale is None else 'tokens'}@{self.test_lengths[1]}",)

    def configuration(self, arm: str) -> ModelConfig:
        """Return the configuration of a language model."""
        return configuration(arm, self.vocab)

    def build(self, arm: str, seed: int) -> LanguageModel:
        """Build the language model."""
        model = LanguageModel(self.configuration(arm))
        model.initialise(seed)
        return model

    def longest(self, progress: float) -> int:
        """Longest training length at this share of the training."""
        shortest, longest = self.train_lengths
        return shortest + round((longest - shortest) * min(1.0, 2 * progress)) if self.grows else longest

    def loss(self, model: LanguageModel, generator: torch.Generator, progress: Progress) -> Tensor:
        """Cross-entropy of the scored positions of a batch of one length."""
        span = self.longest(progress.share) - self.train_lengths[0] + 1
        length = self.train_lengths[0] + int(torch.randint(0, span, (1,), generator=generator))
        tokens, targets = self.make(RECIPE.batch, length, generator)
        logits = model(tokens).logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def tests(self, rows: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Tokens and targets of every test length."""
        return {length: self.make(rows, length, torch.Generator().manual_seed(length)) for length in self.test_lengths}

    def measure(self, model: LanguageModel, rows: int) -> Measures:
        """Share of right tokens, last positions and whole strings at every test length, and of stale answers."""
        return self._scores(rows, lambda tokens, _: model(tokens).logits.argmax(-1))

    def references(self, rows: int) -> dict[str, Measures]:
        """Score of always giving the answer that is most frequent in the test."""

        def most_frequent(tokens: Tensor, targets: Tensor) -> Tensor:
            return torch.full_like(tokens, int(targets[targets != IGNORED].mode().values))

        return {"guessing": self._scores(rows, most_frequent)}

    def _scores(self, rows: int, answer: Callable[[Tensor, Tensor], Tensor]) -> Measures:
        found: Measures = {}
        for length in self.test_lengths:
            tokens, targets = self.make(rows, length, torch.Generator().manual_seed(length))
            answers = answer(tokens, targets)
            found |= {f"{name}@{length}": value for name, value in share_of_right(answers, targets).items()}
            if self.stale is not None:
                stale = self.stale(tokens, targets)
                overwritten = stale != IGNORED
                found[f"stale@{length}"] = ((answers == stale) & overwritten).sum().item() / overwritten.sum().item()
        return found

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Lengths, steps and rate."""
        lengths = [self.train_lengths, self.test_lengths]
        more = [name for name, given in (("grows", self.grows), ("drawn places", self.stale is not None)) if given]
        return [self.name, *lengths, self.rate, steps, RECIPE.batch, rows, RECIPE.warmup_steps, *more]


def parity(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random bits; is the number of ones so far odd?"""
    bits = torch.randint(0, 2, (batch, length), generator=generator)
    return bits, bits.cumsum(1) % 2


def counted(period: int, classes: tuple[int, ...], symbols: tuple[int, ...]) -> Make:
    """Build the language (w)* for one word w: after each symbol, the class of what may follow.

    Sequences are a start token 0 and the word repeated. Only counting modulo the period tells where a word ends.
    """

    def make(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        del generator
        position = torch.arange(length)
        tokens = torch.tensor(symbols)[(position - 1) % len(symbols)]
        tokens[0] = 0
        targets = torch.tensor(classes)[position % period]
        return tokens.expand(batch, -1), targets.expand(batch, -1)

    return make


def counters(symbols: int) -> Make:
    """Build the language a^n b^n (two symbols) or a^n b^n c^n (three); class: which symbols may follow.

    0: a or b, 1: b only, 2: c only, 3: end. The start, where the string may not end, and positions after the end are
    not scored.
    """

    def make(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        most = (length - 1) // symbols
        n = torch.randint(max(1, most // 2), most + 1, (batch, 1), generator=generator)
        position = torch.arange(length)[None]  # 0 is the start token
        tokens = ((position - 1).clamp_min(0) // n + 1).clamp_max(symbols) * (position > 0) * (position <= symbols * n)
        seen = position  # symbols read
        targets = torch.full((batch, length), IGNORED)
        targets[(seen > 0) & (seen <= n)] = 0
        targets[(seen > n) & (seen < 2 * n)] = 1
        if symbols == 3:
            targets[(seen >= 2 * n) & (seen < 3 * n)] = 2
        targets[seen == symbols * n] = 3
        return tokens, targets

    return make


def shuffle_2(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two kinds of brackets, each balanced, freely interleaved; class: which kinds are open.

    Tokens 1, 2 open and 3, 4 close a kind; 0 starts.
    """
    depth = torch.zeros(batch, 2, dtype=torch.long)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    targets = torch.zeros(batch, length, dtype=torch.long)
    rows = torch.arange(batch)
    for t in range(1, length):
        kind = torch.randint(0, 2, (batch,), generator=generator)
        closing = torch.rand(batch, generator=generator) < 0.5
        closing &= depth[rows, kind] > 0
        depth[rows, kind] += torch.where(closing, -1, 1)
        tokens[:, t] = torch.where(closing, 3, 1) + kind
        targets[:, t] = (depth[:, 0] > 0) + 2 * (depth[:, 1] > 0).long()
    return tokens, targets


_SWAPS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def permutations(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random permutations of three things (S3); class: their product so far."""
    tokens = torch.randint(0, 6, (batch, length), generator=generator)
    state = torch.arange(3).expand(batch, 3)
    targets = torch.empty_like(tokens)
    for t in range(length):
        state = state.gather(1, _SWAPS[tokens[:, t]])
        targets[:, t] = (state[:, None] == _SWAPS).all(-1).long().argmax(1)
    return tokens, targets


KEYS, VALUES = 16, 16
FILLER = KEYS + VALUES
RECALL_VOCAB = FILLER + 1


def _distinct(batch: int, count: int, below: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, below, generator=generator).argsort(1)[:, :count]


def reassigned(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six keys get values, three of them new ones later, at drawn places among filler; then every key is asked for.

    The latest value is right.
    """
    keys = _distinct(batch, 6, KEYS, generator)
    values = torch.randint(0, VALUES, (batch, 6), generator=generator)
    shift = torch.randint(1, VALUES, (batch, 3), generator=generator)
    changed = (values[:, :3] + shift) % VALUES
    order = _distinct(batch, 6, 6, generator)
    places = _distinct(batch, 9, (length - 6) // 2, generator)  # of six first values and three new ones
    first, later = places[:, :3].minimum(places[:, 6:]), places[:, :3].maximum(places[:, 6:])
    places = 2 * torch.cat([first, places[:, 3:6], later], dim=1)
    told = torch.full((batch, length - 6), FILLER)
    told.scatter_(1, places, torch.cat([keys, keys[:, :3]], dim=1))
    told.scatter_(1, places + 1, torch.cat([values, changed], dim=1) + KEYS)
    targets = torch.full((batch, length), IGNORED)
    targets[:, length - 6 :] = torch.cat([changed, values[:, 3:]], dim=1).gather(1, order)
    return torch.cat([told, keys.gather(1, order)], dim=1), targets


def stale_answer(tokens: Tensor, targets: Tensor) -> Tensor:
    """Value that an overwritten key had at first, at the positions that ask for it."""
    stale = torch.full_like(targets, IGNORED)
    told = tokens[:, :-6].unflatten(1, (-1, 2))  # keys stand at even places
    for place in range(6):
        is_told = told[..., 0] == tokens[:, tokens.shape[1] - 6 + place, None]
        old = told[torch.arange(len(tokens)), is_told.long().argmax(1), 1] - KEYS
        stale[:, tokens.shape[1] - 6 + place] = torch.where(is_told.sum(1) == 2, old, IGNORED)
    return stale


TOKEN_TASKS = (
    TokenTask(
        "parity",
        "Is the number of ones so far odd? Trained on 40 random bits.",
        4,
        parity,
        (40, 40),
        (40, 100, 160, 320),
        1800,
    ),
    TokenTask(
        "aa_star",
        "The language (aa)*: may the string end here? Trained to length 40.",
        4,
        counted(2, (0, 1), (1,)),
        (8, 40),
        (40, 100),
        400,
    ),
    TokenTask(
        "abab_star",
        "The language (abab)*: which symbols may follow? Trained to length 40.",
        4,
        counted(4, (0, 1, 2, 1), (1, 2)),
        (8, 40),
        (40, 100),
        400,
    ),
    TokenTask(
        "a_n_b_n",
        "Which symbols may follow? Trained to length 41.",
        4,
        counters(2),
        (16, 41),
        (41, 101),
        300,
    ),
    TokenTask(
        "a_n_b_n_c_n",
        "Which symbols may follow? Trained to length 41.",
        4,
        counters(3),
        (16, 41),
        (41, 101),
        300,
    ),
    TokenTask(
        "shuffle_2",
        "Two kinds of brackets, freely interleaved: which kinds are open? Trained to length 40.",
        5,
        shuffle_2,
        (8, 40),
        (40, 100),
        300,
    ),
    TokenTask(
        "reassigned",
        "Six keys get values, three of them new ones later, at drawn places; which value has each key now? `stale`: "
        "share of overwritten keys answered with the old value.",
        RECALL_VOCAB,
        reassigned,
        (40, 40),
        (40, 80),
        1500,
        stale=stale_answer,
    ),
    TokenTask(
        "s3",
        "Word problem of S3: the product of the permutations so far. The training length grows from 4 to 24.",
        6,
        permutations,
        (4, 24),
        (24, 48),
        1500,
        grows=True,
    ),
)

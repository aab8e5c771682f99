"""Tasks of recall: facts told once and asked for later, in sequences whose layout is drawn anew every time.

Known solvers solve them when they are trained to: the distance from fact to question is uniform, and sequences get
longer once the shorter ones are answered. A fact is two tokens, key and value; a question is the mark and the key, or
the key alone in MQAR; the target of the question's last token is the value.

Shapes: B batch, T tokens, N facts.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.learning.arms import configuration
from benchmarks.learning.protocol import IGNORED, RECIPE, Measures, Progress
from nested_lm.config.model import ModelConfig
from nested_lm.data.corpora import CORPORA, read_documents
from nested_lm.nn.model import LanguageModel

FILLERS, SYMBOLS = 64, 64
"""Tokens 0-63 are filler, 64-127 keys, 128-191 values, 192 marks a question."""
KEY, VALUE, MARK = FILLERS, FILLERS + SYMBOLS, FILLERS + 2 * SYMBOLS
FACTS = 4
STAGES = (64, 128, 256)
"""Longest training length, stage after stage."""
MULTIPLES = (1, 4, 16, 64)
"""Lengths that are tested, in trained lengths."""
_PIECE = 1024  # tokens read at once in the test, so that long rows fit into memory
_TEXT_CHARACTERS = 1 << 20


def _distinct(batch: int, count: int, below: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, below, generator=generator).argsort(1)[:, :count]


@functools.cache
def _text() -> Tensor:
    """The beginning of the shipped corpus, its 63 most frequent characters as 0-62, all others as 63."""
    text = ""
    for document in read_documents(CORPORA["sotu"]):
        text += document.text
        if len(text) >= _TEXT_CHARACTERS:
            break
    text = text[:_TEXT_CHARACTERS]
    known = {character: index for index, (character, _) in enumerate(Counter(text).most_common(FILLERS - 1))}
    return torch.tensor([known.get(character, FILLERS - 1) for character in text])


@dataclass(frozen=True)
class Recall:
    """Four facts and their questions at drawn places of a row of filler.

    filler: random tokens, or running text. steps, rate: of the optimizer. batch_tokens: of a step.

    The ramp: sequences of up to 64 tokens until the mean accuracy of the latest batches is `passed`, then up to 128,
    then up to 256; the length of a batch is drawn.
    """

    name: str
    about: str
    filler: Literal["noise", "text"]
    steps: int = 2000
    rate: float = 3e-3
    batch_tokens: int = 4096
    passed: float = 0.9

    arms: ClassVar[None] = None
    unit: ClassVar[Literal["share"]] = "share"
    differences: ClassVar[tuple[str, ...]] = ()
    rates: ClassVar[None] = None
    shown: ClassVar[tuple[str, ...]] = ("locked in", *(f"tokens@{m * STAGES[-1]}" for m in MULTIPLES[::2]))

    def configuration(self, arm: str) -> ModelConfig:
        """Return the configuration of a language model."""
        return configuration(arm, MARK + 1)

    def build(self, arm: str, seed: int) -> LanguageModel:
        """Build the language model."""
        model = LanguageModel(self.configuration(arm))
        model.initialise(seed)
        return model

    def make(self, batch: int, length: int, generator: torch.Generator, *, far: bool = False) -> tuple[Tensor, Tensor]:
        """Draw tokens (B, T) and targets. far: facts at the beginning, questions at the end."""
        tokens = self._filler(batch, length, generator)
        targets = torch.full((batch, length), IGNORED)
        keys = _distinct(batch, FACTS, SYMBOLS, generator) + KEY
        values = torch.randint(0, SYMBOLS, (batch, FACTS), generator=generator) + VALUE
        if far:
            told = torch.arange(FACTS).expand(batch, -1)
            asked = told + length // 2 - FACTS
        else:
            told, asked = _distinct(batch, 2 * FACTS, length // 2, generator).view(batch, FACTS, 2).sort(2)[0].unbind(2)
        tokens.scatter_(1, 2 * told, keys).scatter_(1, 2 * told + 1, values)
        tokens.scatter_(1, 2 * asked, torch.full_like(keys, MARK)).scatter_(1, 2 * asked + 1, keys)
        targets.scatter_(1, 2 * asked + 1, values)
        return tokens, targets

    def _filler(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        if self.filler == "noise":
            return torch.randint(0, FILLERS, (batch, length), generator=generator)
        begin = torch.randint(0, len(_text()) - length, (batch, 1), generator=generator)
        return _text()[begin + torch.arange(length)]

    def loss(self, model: LanguageModel, generator: torch.Generator, progress: Progress) -> Tensor:
        """Cross-entropy of the questions of a batch of one length."""
        longest = STAGES[progress.stage]
        length = 16 * int(torch.randint(STAGES[0] // 16, longest // 16 + 1, (1,), generator=generator))
        tokens, targets = self.make(self.batch_tokens // length, length, generator)
        logits = model(tokens).logits
        if progress.passes(_accuracy(logits.detach().argmax(-1), targets), self.passed):
            progress.next_stage(len(STAGES))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def measure(self, model: LanguageModel, rows: int) -> Measures:
        """Share of right answers at 1, 4, 16 and 64 trained lengths; 1 where at least .95 are right at the first."""
        found: Measures = {}
        for length in (multiple * STAGES[-1] for multiple in MULTIPLES):
            for name, far in (("tokens", False), ("far", True)):
                count = max(4, min(rows, rows * _PIECE // length))
                tokens, targets = self.make(count, length, torch.Generator().manual_seed(length), far=far)
                found[f"{name}@{length}"] = _accuracy(_answers(model, tokens), targets)
        return {"locked in": float(found[f"tokens@{STAGES[-1]}"] >= 0.95)} | found

    def references(self, rows: int) -> dict[str, Measures]:
        """Guessing a value."""
        del rows
        return {"guessing": {name: 1 / SYMBOLS for name in self.shown if name != "locked in"}}

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Lengths, steps and ramp."""
        sizes = [FACTS, STAGES, MULTIPLES, self.batch_tokens, self.passed]
        return [self.name, *sizes, self.rate, steps, rows, RECIPE.warmup_steps]


@dataclass(frozen=True)
class MQAR:
    """Multi-query associative recall: K facts, then K + 48 questions, keys drawn at random.

    Each cell is trained at three rates until nearly all answers are right; the best by the training loss counts.
    Models are as wide as K facts need: a linear memory holds about as many as its keys have dimensions.

    Source: Zoology, arXiv 2312.04927.
    """

    facts: int
    steps: int = 3000
    batch_tokens: int = 4096
    solved: float = 0.99

    arms: ClassVar[tuple[str, ...]] = ("hope", "hope_flat", "transformer", "delta_net", "gated_delta_net", "titans_lmm")
    unit: ClassVar[Literal["share"]] = "share"
    differences: ClassVar[tuple[str, ...]] = ()
    rate: ClassVar[float] = 3e-3
    rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-3, 1e-2)
    shown: ClassVar[tuple[str, ...]] = ("tokens",)

    @property
    def name(self) -> str:
        """Of the task."""
        return f"mqar_{self.facts}"

    @property
    def about(self) -> str:
        """What is asked."""
        return f"Multi-query associative recall of {self.facts} of 128 keys, best of three rates."

    def configuration(self, arm: str) -> ModelConfig:
        """Return the configuration of a language model."""
        return configuration(arm, 4 * SYMBOLS, head_width=max(16, self.facts))

    def build(self, arm: str, seed: int) -> LanguageModel:
        """Build the language model."""
        model = LanguageModel(self.configuration(arm))
        model.initialise(seed)
        return model

    def make(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw tokens (B, T), T = 3K + 48, and targets."""
        symbols, told = 2 * SYMBOLS, 2 * self.facts
        keys = _distinct(batch, self.facts, symbols, generator)
        values = torch.randint(0, symbols, (batch, self.facts), generator=generator) + symbols
        asked = torch.randint(0, self.facts, (batch, self.facts + 48), generator=generator)
        pairs = torch.stack([keys, values], dim=2).flatten(1)
        targets = torch.full((batch, told + asked.shape[1]), IGNORED)
        targets[:, told:] = values.gather(1, asked)
        return torch.cat([pairs, keys.gather(1, asked)], dim=1), targets

    def loss(self, model: LanguageModel, generator: torch.Generator, progress: Progress) -> Tensor:
        """Cross-entropy of the questions."""
        tokens, targets = self.make(self.batch_tokens // (3 * self.facts + 48), generator)
        logits = model(tokens).logits
        progress.solved = progress.passes(_accuracy(logits.detach().argmax(-1), targets), self.solved)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def measure(self, model: LanguageModel, rows: int) -> Measures:
        """Share of right answers."""
        tokens, targets = self.make(rows, torch.Generator().manual_seed(self.facts))
        return {"tokens": _accuracy(_answers(model, tokens), targets)}

    def references(self, rows: int) -> dict[str, Measures]:
        """Guessing a value."""
        del rows
        return {"guessing": {"tokens": 1 / (2 * SYMBOLS)}}

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Facts, rates and steps."""
        return [self.name, self.facts, self.rates, steps, self.batch_tokens, self.solved, rows, RECIPE.warmup_steps]


def _accuracy(answers: Tensor, targets: Tensor) -> float:
    scored = targets != IGNORED
    return ((answers == targets) & scored).sum().item() / scored.sum().item()


def _answers(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Most probable token after every token (B, T), read piece by piece with the state carried on."""
    state, found = None, []
    for begin in range(0, tokens.shape[1], _PIECE):
        output = model(tokens[:, begin : begin + _PIECE], state=state)
        state = output.state
        found.append(output.logits.argmax(-1))
    return torch.cat(found, dim=1)


RECALL_TASKS = (
    Recall(
        "recall_noise",
        "Four facts and their questions at drawn places among random tokens, trained at 64 to 256 tokens. `locked in`: "
        "share of the seeds with at least .95 at 256.",
        "noise",
    ),
    Recall("recall_text", "The same among running text, character by character.", "text"),
    *(MQAR(facts) for facts in (4, 16, 64)),
)

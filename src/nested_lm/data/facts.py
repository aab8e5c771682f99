"""Facts and questions that are written into training rows, so that training asks for what was read.

A fact is a sentence with a key and a value that were never seen together before; its question stands a drawn number of
tokens later and ends with the value. Text without them hardly ever asks for a word that stood far away, and a memory
that nothing asks is not learned. Keys come from `fact_words.txt`, which shares no word with the needle suite's lists.

Source: drawing the distance from fact to question uniformly in training turns a haystack at chance into one that is
solved (arXiv 2609.16183).

Shapes: B rows, T tokens of a row.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch

from nested_lm.config.train import FactKind, Facts
from nested_lm.data.loader import Batch
from nested_lm.data.packing import IGNORED_TARGET
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError

STATEMENT = " One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} "
    "mentioned in the provided text is"
)
"""RULER's wording, which the needle suite asks in."""

_DRAWS = 16  # places that are tried for a fact and its question before the row counts as full
_SAMPLES = 256  # facts whose lengths are measured


class Pair(NamedTuple):
    """Tokens of a fact, of its question, and of the answer that ends the question."""

    fact: np.ndarray
    question: np.ndarray
    answer: np.ndarray

    @property
    def tokens(self) -> int:
        """Of all three."""
        return sum(map(len, self))


def vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Adjectives and nouns that keys are made of."""
    text = (files("nested_lm.data") / "fact_words.txt").read_text(encoding="utf-8")
    adjectives, nouns = text.split("\n\n")
    return tuple(adjectives.split()), tuple(nouns.split())


def refuse_shared_words(facts: Facts, tested: Sequence[str], *, source: str) -> None:
    """Refuse to test on words that facts of the training had as keys.

    Args:
        facts: of the training.
        tested: words that the test draws its keys from.
        source: of the test's words, for the message.

    Raises:
        DataError: with how many words are shared, and some of them.
    """
    trained = {part for key in facts.keys or () for part in key.split("-")} or set().union(*vocabulary())
    shared = sorted(trained & {part for word in tested for part in word.split("-")})
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(trained)} words that facts were trained with are words of {source} too: "
            f"{', '.join(shared[:5])}{', ...' if len(shared) > 5 else ''}\n"
            "  What was trained cannot be tested. Train with other train.stream.facts.keys, or leave them out."
        )


class FactWriter:
    """Writes facts and questions over the text of batches, the same for any number of ranks and after a resume.

    A row's facts are a function of seed, step and the row's place in the step. They lie in the longest piece of a
    document in the row. Of what is written only answers are scored.

    Raises:
        ConfigError: facts that do not fit the shortest context, with the tokens they take.
    """

    def __init__(self, facts: Facts, tokenizer: TextTokenizer, *, seed: int, shortest_context: int) -> None:
        self._facts = facts
        self._tokenizer = tokenizer
        self._seed = seed
        self._words = vocabulary()
        self._refuse_long(shortest_context)

    def write(self, batch: Batch, *, step: int, tokens: int, first_row: int) -> Batch:
        """Return the batch with facts. tokens: trained before it. first_row: place of its first row in the step."""
        inputs, targets = (part.numpy().copy() for part in (batch.inputs, batch.targets))
        for row in range(len(inputs)):
            rng = np.random.default_rng((self._seed, step, first_row + row))
            if rng.random() < self._facts.share:
                self._write_row(inputs[row], targets[row], batch.resets[row].numpy(), self._farthest(tokens), rng)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), batch.resets)

    def draw(self, rng: np.random.Generator, count: int) -> list[Pair]:
        """Draw facts with different keys."""
        texts: list[str] = []
        for key in self._draw_keys(rng, count):
            texts += _texts(self._facts.kinds[int(rng.integers(len(self._facts.kinds)))], key, self._words, rng)
        encoded = self._tokenizer.encode_many(texts)
        return [Pair(*encoded[at : at + 3]) for at in range(0, len(encoded), 3)]

    def _draw_keys(self, rng: np.random.Generator, count: int) -> list[str]:
        if self._facts.keys is not None:
            return list(rng.choice(sorted(set(self._facts.keys)), size=count, replace=False))
        adjectives, nouns = self._words
        drawn = rng.choice(len(adjectives) * len(nouns), size=count, replace=False)
        return [f"{adjectives[index % len(adjectives)]}-{nouns[index // len(adjectives)]}" for index in drawn]

    def _farthest(self, tokens: int) -> int:
        """Largest distance after so many trained tokens."""
        nearest, farthest = self._facts.distances
        if tokens >= self._facts.ramp_tokens:
            return farthest
        return nearest + (farthest - nearest) * tokens // self._facts.ramp_tokens

    def _write_row(
        self, inputs: np.ndarray, targets: np.ndarray, resets: np.ndarray, farthest: int, rng: np.random.Generator
    ) -> None:
        begin, end = _longest_piece(targets, resets)
        begin += 1  # the start token stays, and the token before a fact predicts it
        taken = np.zeros(end - begin, dtype=bool)
        nearest = self._facts.distances[0]
        most = max(1, len(inputs) // self._facts.every_tokens)
        for pair in self.draw(rng, int(rng.integers(1, most + 1))):
            room = end - begin - pair.tokens
            if room < nearest:
                continue
            for _ in range(_DRAWS):
                distance = int(rng.integers(nearest, min(farthest, room) + 1))
                at = int(rng.integers(room - distance + 1))
                asked = at + len(pair.fact) + distance
                stop = asked + len(pair.question) + len(pair.answer)
                if taken[at : at + len(pair.fact)].any() or taken[asked:stop].any():
                    continue
                taken[at : at + len(pair.fact)] = taken[asked:stop] = True
                _overwrite(inputs, targets, begin + at, pair.fact)
                _overwrite(inputs, targets, begin + asked, np.concatenate([pair.question, pair.answer]))
                targets[begin + stop - len(pair.answer) - 1 : begin + stop - 1] = pair.answer
                break

    def _refuse_long(self, context: int) -> None:
        """Refuse facts that cannot all be written into a row of the shortest context."""
        drawn = self.draw(np.random.default_rng(0), min(_SAMPLES, len(set(self._facts.keys or range(_SAMPLES)))))
        longest, nearest = max(pair.tokens for pair in drawn), self._facts.distances[0]
        if longest + nearest + 1 > context:
            raise ConfigError(
                f"a fact with its question takes up to {longest} tokens with this tokenizer, and {nearest} between "
                f"them (train.stream.facts.distances): more than the {context} tokens of the shortest context\n"
                f"  Use contexts of at least {longest + nearest + 1} tokens, other facts.kinds, or shorter distances."
            )
        mean = sum(pair.tokens for pair in drawn) / len(drawn)
        if mean > self._facts.every_tokens:
            raise ConfigError(
                f"a fact with its question takes {mean:.0f} tokens in the mean with this tokenizer, and a row has up "
                f"to one for every {self._facts.every_tokens} tokens: they do not fit\n"
                f"  Set train.stream.facts.every_tokens to {math.ceil(mean)} or more."
            )


def _texts(
    kind: FactKind, key: str, words: tuple[tuple[str, ...], tuple[str, ...]], rng: np.random.Generator
) -> tuple[str, str, str]:
    """Fact, question and answer."""
    number = str(rng.integers(10**6, 10**7))
    match kind:
        case "note":
            return f" {key}: {number}.", f" {key}:", f" {number}"
        case "number":
            value = number
        case "word":
            value = words[1][int(rng.integers(len(words[1])))]
    return STATEMENT.format(kind=kind, key=key, value=value), QUESTION.format(kind=kind, key=key), f" {value}"


def _longest_piece(targets: np.ndarray, resets: np.ndarray) -> tuple[int, int]:
    """First and one past the last scored position of the row's longest document piece."""
    starts = np.flatnonzero(resets)
    ends = [*starts[1:], len(targets)]
    sizes = [int((targets[start:end] != IGNORED_TARGET).sum()) for start, end in zip(starts, ends, strict=True)]
    longest = int(np.argmax(sizes))
    return int(starts[longest]), int(starts[longest]) + sizes[longest]


def _overwrite(inputs: np.ndarray, targets: np.ndarray, at: int, tokens: np.ndarray) -> None:
    """Put tokens in the place of text. Neither they nor the token after them are scored: nothing foretells them."""
    inputs[at : at + len(tokens)] = tokens
    targets[at - 1 : at + len(tokens)] = IGNORED_TARGET

"""Tasks whose text is a list of words: which ones stand in it most often?

Source: RULER (arXiv 2404.06654), common_words_extraction.py and freq_words_extraction.py. Deviations: words are
adjective-noun pairs at every length; the last entry is cut, or the gap filled with dots, so that lengths are exact.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.tasks.needles.prompts import Prompt, Sample, make_rng
from nested_lm_lab.tasks.needles.tasks import Task
from nested_lm_lab.tasks.needles.words import draw_letters, draw_words

_NUM_COMMON = 10
_LONG = 4096
"""From this length on, common words stand in the list 30 times and others 3 times; below, 6 times and once."""

_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # zeta(2), to which the shares of all ranks add up
_CODED_LETTERS = 6
_TOKENS_A_WORD = 50  # of the prompt, for each word of the coded vocabulary
_FEWEST_WORDS = 8
_DOTS = " ...."
_FEWEST_LIST_TOKENS = 250
"""Of coded text. Ranks are told apart from 53 words on, which fit where one takes less than five tokens on average."""


class _Frame(NamedTuple):
    """Tokens around the list, and the room between."""

    header: np.ndarray
    question: np.ndarray
    room: int

    def prompt(self, entries: Sequence[np.ndarray]) -> Prompt:
        """Put the list in, cut to the room there is."""
        text = np.concatenate(entries)[: self.room]
        assert len(text) == self.room
        return Prompt(np.concatenate([self.header, text, self.question]).astype(np.int64), None, ())


def make_list_sample(task: Task, tokenizer: TextTokenizer, *, length: int, seed: int, number: int) -> Sample:
    """Make the prompt of one sample, and its control, in which the words that are asked for do not stand.

    Raises:
        DataError: `length` is too short.
    """
    rng = make_rng(seed, task.name, length, number, 0)
    make = _common_words if task.shape == "common_words" else _frequent_words
    return make(task, tokenizer, length, rng)


def _frame(task: Task, tokenizer: TextTokenizer, length: int, header: str, question: str) -> _Frame:
    encoded = tokenizer.encode_many([header, question])
    start = np.concatenate([[tokenizer.start_of_text], encoded[0]])
    frame = _Frame(start, encoded[1], length - len(start) - len(encoded[1]))
    if frame.room <= 0:
        raise _too_short(task, length, length - frame.room + 1)
    return frame


def _too_short(task: Task, length: int, shortest: int) -> DataError:
    return DataError(
        f"a prompt of {length:,} tokens has no room for task {task.name}\n"
        f"  It takes {shortest:,} tokens or more with this tokenizer. Use longer lengths."
    )


def _largest(count_of: Callable[[int], int], room: int) -> int:
    """The largest size whose tokens fit; -1 when not even 0 does. count_of grows with the size."""
    if count_of(0) > room:
        return -1
    low, high = 0, 1
    while count_of(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_of(middle) <= room else (low, middle)
    return low


def _common_words(task: Task, tokenizer: TextTokenizer, length: int, rng: np.random.Generator) -> Sample:
    frame = _frame(
        task,
        tokenizer,
        length,
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n",
        f"\nQuestion: What are the {_NUM_COMMON} most common words in the above list? Answer: The top {_NUM_COMMON} "
        "words that appear most often in the list are:",
    )
    often, seldom = (30, 3) if length >= _LONG else (6, 1)
    # An entry takes three tokens at the least: its number, a point and a word.
    words = draw_words(rng, _NUM_COMMON + frame.room // 3 // seldom + 2 * often * _NUM_COMMON + 8)
    encoded = tokenizer.encode_many([f" {word}" for word in words])
    numbers: list[np.ndarray] = []

    def number(index: int) -> np.ndarray:
        while len(numbers) <= index:
            first = len(numbers)
            numbers.extend(tokenizer.encode_many([f" {at + 1}." for at in range(first, 2 * first + 64)]))
        return numbers[index]

    def entries(common: Sequence[int], others: int) -> list[int]:
        picked = [*common] * often + [*range(_NUM_COMMON, _NUM_COMMON + others)] * seldom
        return [picked[index] for index in np.random.default_rng(shuffle).permutation(len(picked))]

    def tokens(picked: Sequence[int]) -> int:
        return sum(len(number(at)) + len(encoded[word]) for at, word in enumerate(picked))

    shuffle = int(rng.integers(2**63))
    common = list(range(_NUM_COMMON))

    def prompt(chosen: Sequence[int]) -> Prompt:
        others = _largest(lambda size: tokens(entries(chosen, size)), frame.room)
        if others < 0:
            raise _too_short(task, length, length - frame.room + tokens(entries(chosen, 0)))
        picked = entries(chosen, others)
        # Words that stand there once fill what is left; the last is cut.
        spare = itertools.count(_NUM_COMMON + others)
        while tokens(picked) < frame.room:
            picked.append(next(spare))
        return frame.prompt([part for at, word in enumerate(picked) for part in (number(at), encoded[word])])

    references = tuple(words[:_NUM_COMMON])
    answer = tokenizer.encode("".join(f" {at + 1}. {word}" for at, word in enumerate(references)))
    return Sample((prompt(common),), prompt([]), None, frame.question, np.array(answer), references)


def _frequent_words(task: Task, tokenizer: TextTokenizer, length: int, rng: np.random.Generator) -> Sample:
    frame = _frame(
        task,
        tokenizer,
        length,
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words.",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
    )
    size = max(length // _TOKENS_A_WORD, _FEWEST_WORDS)
    coded = draw_letters(rng, size + 3, length=_CODED_LETTERS, letters="abcdefghijklmnopqrstuvwxyz")
    asked, spare = coded[1:4], coded[size:]
    shares = np.arange(1, size + 1) ** -_ALPHA / _ZETA
    shuffle = int(rng.integers(2**63))

    def prompt(words: Sequence[str]) -> Prompt:
        encoded = tokenizer.encode_many([_DOTS, *(f" {word}" for word in words[1:size])])
        lengths = np.array([len(tokens) for tokens in encoded])
        total = _largest(lambda count: int(((count * shares).astype(int) * lengths).sum()), frame.room)
        counts = (total * shares).astype(int)
        picked = np.random.default_rng(shuffle).permutation(np.repeat(np.arange(size), counts))
        gap = frame.room - int((counts * lengths).sum())
        return frame.prompt([*(encoded[word] for word in picked), np.tile(encoded[0], gap // lengths[0] + 1)])

    if frame.room < _FEWEST_LIST_TOKENS:
        raise _too_short(task, length, length - frame.room + _FEWEST_LIST_TOKENS)
    replaced = [coded[0], *spare, *coded[4:]]
    answer = np.array(tokenizer.encode("".join(f" {word}" for word in asked)))
    return Sample((prompt(coded),), prompt(replaced), None, frame.question, answer, tuple(asked))

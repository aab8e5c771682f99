"""Prompts of exactly as many tokens as asked for.

Header, sentences, needles and question are tokenised by themselves and joined as ids; the text is filled up with whole
sentences, and the last one before a needle or the question is cut short where it must be. A needle therefore begins at
exactly the token its depth says. What must not be cut has noise before it instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.tasks.needles.haystack import NOISE, Haystack, Unit
from nested_lm_lab.tasks.needles.tasks import Asked, Task, ask

_LATEST = 0.9
"""Needles at random depths lie in this first share of the text, so that all of them find room."""

_ATTEMPTS = 20

Placed = Sequence[tuple[float, Unit]]
"""Needles among the text, each with the share of the text before it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, the start token first and the question last. depth: of the needle, None when random.

    needles: index of the first token of each asked needle.
    """

    tokens: np.ndarray
    depth: float | None
    needles: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One question over the same text at several depths, and its controls.

    prompts: one a depth. without: the same text without the needles that are asked for. only: header, needles and
    question with no text; None where there is no needle. question, answer: token ids. references: as in `Asked`.
    words: of the question, where a scorer needs them.
    """

    prompts: tuple[Prompt, ...]
    without: Prompt
    only: np.ndarray | None
    question: np.ndarray
    answer: np.ndarray
    references: tuple[str, ...]
    words: str = ""

    @property
    def rows(self) -> tuple[Prompt, ...]:
        """All prompts of the full length, the control last."""
        return (*self.prompts, self.without)


def make_rng(seed: int, task: str, length: int, sample: int, attempt: int) -> np.random.Generator:
    """The random numbers of one sample. No other sample, length or task shares or shifts them."""
    return np.random.default_rng(xxhash.xxh3_64_intdigest(f"{seed}/{task}/{length}/{sample}/{attempt}".encode()))


def make_sample(
    task: Task,
    tokenizer: TextTokenizer,
    haystack: Haystack,
    *,
    length: int,
    depths: Sequence[float],
    seed: int,
    number: int,
) -> Sample:
    """Make the prompts of one sample of a task with needles.

    Args:
        length: tokens of each prompt: the start token and the question included, the answer not.
        depths: of the needle, 0 right after the header, 1 right before the question; for tasks with one needle.
        seed, number: which sample.

    Raises:
        DataError: no room for needles and question, or the haystack is too short or holds the answer.
    """
    for attempt in range(_ATTEMPTS):
        rng = make_rng(seed, task.name, length, number, attempt)
        builder = _Builder(task.name, tokenizer, haystack, ask(task, rng), length, rng)
        sample = builder.build(depths if task.has_depth else None)
        text = tokenizer.decode(sample.without.tokens[: length - len(sample.question)]).lower()
        if not any(reference.lower() in text for reference in sample.references):
            return sample
    raise DataError(
        f"{_ATTEMPTS} draws of an answer for task {task.name} were all in the haystack already: {haystack.identity}. "
        "Use other text"
    )


def scatter(
    name: str, tokenizer: TextTokenizer, haystack: Haystack, asked: Asked, *, length: int, rng: np.random.Generator
) -> Sample:
    """Make one sample whose needles lie in their order at random depths. The text may hold the answer's words.

    name: of the task, for messages.

    Raises:
        DataError: no room for needles and question, or the haystack is too short.
    """
    return _Builder(name, tokenizer, haystack, asked, length, rng).build(None)


class _Builder:
    """Puts one sample together."""

    def __init__(
        self,
        name: str,
        tokenizer: TextTokenizer,
        haystack: Haystack,
        asked: Asked,
        length: int,
        rng: np.random.Generator,
    ) -> None:
        self.name, self.asked, self.length = name, asked, length
        encoded = tokenizer.encode_many([asked.header, asked.question, asked.answer, *asked.needles, *asked.others])
        self.header = np.concatenate([[tokenizer.start_of_text], encoded[0]])
        self.question, self.answer = encoded[1], encoded[2]
        self.needles = encoded[3 : 3 + len(asked.needles)]
        self.others = encoded[3 + len(asked.needles) :]
        self.room = length - len(self.header) - len(self.question)
        self._require_room()
        noise = np.concatenate(tokenizer.encode_many(NOISE))
        longest = max(len(unit) for unit in (*self.needles, *self.others))
        self.noise = np.tile(noise, 2 * longest // len(noise) + 2)
        self.places = [
            *np.sort(rng.uniform(0, _LATEST, len(asked.needles))),
            *rng.uniform(0, _LATEST, len(asked.others)),
        ]
        self.units = self._materialise(haystack.units(rng, asked.keys))

    def _require_room(self) -> None:
        hidden = sum(len(unit) for unit in (*self.needles, *self.others))
        if self.room < hidden:
            shortest = self.length - self.room + hidden
            raise DataError(
                f"a prompt of {self.length:,} tokens has no room for task {self.name}\n"
                f"  Header, needles and question take {shortest:,} tokens with this tokenizer. Use longer lengths."
            )

    def _materialise(self, stream: Iterator[Unit]) -> list[Unit]:
        """Units that fill the text, and as many more as cutting may cost.

        Every cut drops less than a unit; there are two in a prompt.
        """
        found, total, longest = [], 0, 0
        for unit in stream:
            found.append(unit)
            total += len(unit.tokens)
            longest = max(longest, len(unit.tokens))
            if total >= self.room + 2 * longest:
                break
        return found

    def build(self, depths: Sequence[float] | None) -> Sample:
        """All prompts of the sample. depths: of the one needle; None: needles lie at random ones."""
        asked = [Unit(tokens, whole=True, needle=index) for index, tokens in enumerate(self.needles)]
        placed = list(zip(self.places, [*asked, *(Unit(tokens, whole=True) for tokens in self.others)], strict=True))
        others = placed[len(asked) :]
        if depths is not None:
            prompts = [self._at_depth(depth, asked[0], others) for depth in depths]
        else:
            prompts = [self._prompt(_Filling(self, placed).take(self.room), None)]
        without = self._prompt(_Filling(self, others).take(self.room), None)
        only = np.concatenate([self.header, *self.needles, *self.others, self.question])
        return Sample(tuple(prompts), without, only, self.question, self.answer, self.asked.references)

    def _at_depth(self, depth: float, needle: Unit, others: Placed) -> Prompt:
        filling = _Filling(self, others, reserved=len(needle.tokens))
        around = self.room - len(needle.tokens)
        before = round(depth * around)
        return self._prompt([*filling.take(before), needle, *filling.take(around - before)], depth)

    def _prompt(self, units: list[Unit], depth: float | None) -> Prompt:
        ends = np.cumsum([len(self.header), *(len(unit.tokens) for unit in units)])
        starts = {unit.needle: int(end) for unit, end in zip(units, ends[:-1], strict=True) if unit.needle is not None}
        tokens = np.concatenate([self.header, *(unit.tokens for unit in units), self.question]).astype(np.int64)
        assert len(tokens) == self.length
        return Prompt(tokens, depth, tuple(starts[number] for number in sorted(starts)))


class _Filling:
    """Takes a sample's text from its start, with the needles in it that have a place of their own.

    A needle stands behind the first sentence that reaches its place, or before it where the end of the text leaves no
    more room. placed: share of the plain text before each, and the needle. reserved: tokens of the needle put in by
    depth.
    """

    def __init__(self, builder: _Builder, placed: Placed, *, reserved: int = 0) -> None:
        self.builder = builder
        # The same places with and without the asked needles, so that both texts agree up to the first of those, or up
        # to where the end of the text moves a needle.
        plain = builder.room - sum(len(tokens) for tokens in (*builder.needles, *builder.others))
        self.waiting = sorted(((share * plain, unit) for share, unit in placed), key=lambda entry: entry[0])
        self.stream = iter(builder.units)
        self.next = next(self.stream)
        self.plain_tokens = 0
        self.left = builder.room - reserved

    def take(self, count: int) -> list[Unit]:
        """Units of exactly `count` tokens, and the needles that no later call has room for among them.

        Raises:
            DataError: those take more than `count` tokens: the needle put in by depth stands in the way.
        """
        taken = []
        self.left -= count
        owed = self._owed()
        if owed > count:
            raise DataError(
                f"a prompt of {self.builder.length:,} tokens has no room for all needles of task {self.builder.name} "
                "on either side of the one that is asked for\n  Use longer lengths, or depths nearer to 0 or 1."
            )
        while count:
            free = count - owed
            due = bool(self.waiting) and self.waiting[0][0] <= self.plain_tokens
            unit = self.waiting[0][1] if due or not free else self.next
            if (due and len(unit.tokens) <= count) or not free:
                del self.waiting[0]
                owed = max(owed - len(unit.tokens), 0)
            else:
                if not due and (len(unit.tokens) <= free or not unit.whole):
                    self.next = next(self.stream)
                if len(unit.tokens) > free:  # its start if it may be cut, else noise
                    unit = Unit((self.builder.noise if unit.whole else unit.tokens)[:free])
                self.plain_tokens += len(unit.tokens)
            taken.append(unit)
            count -= len(unit.tokens)
        return taken

    def _owed(self) -> int:
        """Tokens of the first needles that must be taken now, so that the later ones find room in what is left."""
        sizes = [len(unit.tokens) for _, unit in self.waiting]
        return next(sum(sizes[:first]) for first in range(len(sizes) + 1) if sum(sizes[first:]) <= self.left)

"""Prompts of exactly as many tokens as asked for.

Header, sentences, needles and question are tokenised by themselves and joined as ids. The plain text of a sample is the
same at every depth and in its control: whole sentences, of which the first is cut at its beginning so that the length
comes out. Every needle, asked for or not, stands between two of them, so that nothing but its key tells the one that is
asked for from the others, and a prompt differs from its control by the needle alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError
from nested_lm_lab.tasks.needles.haystack import NOISE, Haystack, Unit
from nested_lm_lab.tasks.needles.tasks import Asked, Task, ask

_DEPTHS = tuple(index / 39 for index in range(40))
"""RULER's 40 depths: where needles lie that have no depth of their own."""

_ATTEMPTS = 20

_BROKEN = "\ufffd"
"""What half a character is decoded to."""


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

    prompts: one a depth. without: the same text without the needles that are asked for, shorter by these. only: header,
    needles and question with no text; None where there is no needle. question, answer: token ids. references: as in
    `Asked`. words: of the question, where a scorer needs them.
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
        depths: of the needle, 0 after the text's first sentence, 1 right before the question; for tasks with one.
        seed, number: which sample.

    Raises:
        DataError: no room for needles and question, or the haystack is too short or holds the answer.
    """
    for attempt in range(_ATTEMPTS):
        rng = make_rng(seed, task.name, length, number, attempt)
        asked = ask(task, rng, joint=haystack.joint)
        builder = _Builder(task.name, tokenizer, haystack, asked, length, rng)
        chain = task.shape == "variables"
        sample = builder.at_depths(depths) if task.has_depth else builder.scattered(ordered=chain)
        text = tokenizer.decode(sample.without.tokens[: -len(sample.question)].tolist()).lower()
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
    return _Builder(name, tokenizer, haystack, asked, length, rng).scattered(ordered=True)


@dataclass(frozen=True)
class _Placed:
    """A needle and its place: a share of the plain text, and what decides between needles at one border.

    number: among the asked ones; None for another needle.
    """

    tokens: np.ndarray
    depth: float
    rank: float
    number: int | None = None


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
        self.name, self.asked, self.length, self.rng = name, asked, length, rng
        self.tokenizer = tokenizer
        encoded = tokenizer.encode_many([asked.header, asked.question, asked.answer, *asked.needles, *asked.others])
        self.header = np.concatenate([[tokenizer.start_of_text], encoded[0]])
        self.question, self.answer = encoded[1], encoded[2]
        self.needles = encoded[3 : 3 + len(asked.needles)]
        self.others = encoded[3 + len(asked.needles) :]
        self.room = length - len(self.header) - len(self.question)
        hidden = sum(len(unit) for unit in (*self.needles, *self.others))
        if self.room < hidden:
            raise DataError(
                f"a prompt of {length:,} tokens has no room for task {name}\n"
                f"  Header, needles and question take {length - self.room + hidden:,} tokens with this tokenizer. Use "
                "longer lengths."
            )
        self.pieces = self._fill(haystack.units(rng, asked.keys), self.room - hidden)
        self.borders = np.cumsum([len(piece) for piece in self.pieces])
        if not len(self.borders):
            self.borders = np.zeros(1, dtype=np.int64)

    def _fill(self, stream: Iterator[Unit], room: int) -> list[np.ndarray]:
        """Whole units of exactly `room` tokens, after the end of the first unit that found no room."""
        found: list[np.ndarray] = []
        while room:
            unit = next(stream)
            if len(unit.tokens) > room:
                return [self._end_of(unit, room), *found]
            found.append(unit.tokens)
            room -= len(unit.tokens)
        return found

    def _end_of(self, unit: Unit, count: int) -> np.ndarray:
        """The last tokens of a unit; of noise where the unit must stay whole or would be cut inside a character."""
        end = unit.tokens[-count:]
        if not unit.whole:
            text = self.tokenizer.decode(end.tolist())
            if _BROKEN not in text or _BROKEN in self.tokenizer.decode(unit.tokens.tolist()):
                return end
        noise = np.concatenate(self.tokenizer.encode_many(NOISE))
        return np.tile(noise, count // len(noise) + 1)[-count:]

    def at_depths(self, depths: Sequence[float]) -> Sample:
        """The asked needle at each depth. The others lie at depths like it, so that their places tell nothing.

        With two depths or more they are drawn from those, else from RULER's.
        """
        places = depths if len(depths) > 1 else _DEPTHS
        others = [_Placed(tokens, float(self.rng.choice(places)), float(self.rng.random())) for tokens in self.others]
        rank = float(self.rng.random())
        prompts = [self._prompt([*others, _Placed(self.needles[0], depth, rank, number=0)], depth) for depth in depths]
        return self._sample(prompts, others)

    def scattered(self, *, ordered: bool) -> Sample:
        """All needles at random depths. ordered: the asked ones follow each other as they were given."""
        depths = self.rng.choice(_DEPTHS, len(self.needles))
        ranks = self.rng.random(len(self.needles))
        if ordered:
            depths, ranks = np.sort(depths), np.sort(ranks)
        asked = [
            _Placed(tokens, float(depth), float(rank), number)
            for number, (tokens, depth, rank) in enumerate(zip(self.needles, depths, ranks, strict=True))
        ]
        others = [_Placed(tokens, float(self.rng.choice(_DEPTHS)), float(self.rng.random())) for tokens in self.others]
        return self._sample([self._prompt([*others, *asked], None)], others)

    def _sample(self, prompts: list[Prompt], others: list[_Placed]) -> Sample:
        only = np.concatenate([self.header, *self.needles, *self.others, self.question])
        without = self._prompt(others, None)
        return Sample(tuple(prompts), without, only, self.question, self.answer, self.asked.references)

    def _prompt(self, placed: Sequence[_Placed], depth: float | None) -> Prompt:
        borders = np.array([self._border(needle.depth) for needle in placed], dtype=np.int64)
        parts, starts, at = [self.header], {}, len(self.header)
        order = sorted(range(len(placed)), key=lambda index: (borders[index], placed[index].rank))
        for index, piece in enumerate([np.zeros(0, dtype=np.int64), *self.pieces]):
            parts.append(piece)
            at += len(piece)
            while order and borders[order[0]] == index:
                needle = placed[order.pop(0)]
                if needle.number is not None:
                    starts[needle.number] = at
                parts.append(needle.tokens)
                at += len(needle.tokens)
        tokens = np.concatenate([*parts, self.question]).astype(np.int64)
        return Prompt(tokens, depth, tuple(starts[number] for number in sorted(starts)))

    def _border(self, depth: float) -> int:
        """How many pieces stand before a needle: the border nearest to its share of the text, after the first piece."""
        if not self.pieces:
            return 0
        return 1 + int(np.abs(self.borders - depth * self.borders[-1]).argmin())

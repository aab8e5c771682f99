"""One task at one length: makes the samples, reads them in batches, scores them and their controls."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.reading.calls import OutOfRoomError, TokenScores
from nested_lm_lab.tasks.needles.answers import answer_greedily
from nested_lm_lab.tasks.needles.prompts import Prompt, Sample
from nested_lm_lab.tasks.needles.reading import Reader
from nested_lm_lab.tasks.needles.suite import Suite

_PENDING_TOKENS = 1 << 24
"""Prompts that wait for others whose question is as long: read them before they take more memory than this."""


@dataclass(frozen=True)
class Batching:
    """How many questions each length has, and how many prompts are read side by side."""

    samples: int
    batch_rows: int


_AnswerScore = tuple[float, bool, int]
"""Of one answer: nats a token, exact, rank of its first token."""

_Made = TypeVar("_Made")


class Row(NamedTuple):
    """What became of one prompt of the full length. frozen: the same without writes after the text."""

    sample: int
    depth: float | None
    distance: int | None
    has_needle: bool
    match: float
    nats: float
    exact: bool
    rank: int
    frozen: _AnswerScore | None
    output: str


class ControlRow(NamedTuple):
    """What became of one sample's question without its text, or without writes: nats, exact, rank.

    unwritten: after a prompt that was read without a single write, start to end; None for a model that writes nothing.
    """

    sample: int
    only: _AnswerScore | None
    reset: _AnswerScore
    unwritten: _AnswerScore | None


class Measured(NamedTuple):
    """All rows of one task and length, samples ascending.

    tokens: of all prompts, those of rows and those read without a write, which take `seconds` too.
    """

    rows: list[Row]
    controls: list[ControlRow]
    state_bytes: int
    tokens: int
    tokens_read: int
    seconds: float


class _Entry(NamedTuple):
    """One prompt of one sample."""

    number: int
    sample: Sample
    prompt: Prompt
    has_needle: bool


def measure_length(reader: Reader, tokenizer: TextTokenizer, suite: Suite, length: int, batching: Batching) -> Measured:
    """Read and score all samples.

    Raises:
        DataError: no prompt of this length can be made.
        OutOfRoomError: not even one prompt fits into memory.
        NumericsError: a score is not finite.
    """
    return _LengthMeasurement(reader, tokenizer, suite, length, batching).run()


class _LengthMeasurement:
    def __init__(self, reader: Reader, tokenizer: TextTokenizer, suite: Suite, length: int, batching: Batching) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.suite, self.length, self.samples = suite, length, batching.samples
        self.batch_rows = batching.batch_rows
        self.state_bytes = 0

    def run(self) -> Measured:
        """Measure."""
        started = time.perf_counter()
        read = self.reader.tokens_read
        rows: list[Row] = []
        controls: list[ControlRow] = []
        prompts = 0
        for entries in self._batches():
            prompts += sum(len(entry.prompt.tokens) for entry in entries)
            rows += self._side_by_side(self._score, entries)
            if asked := [entry for entry in entries if not entry.has_needle]:
                controls += self._control(asked)
        unwritten = sum(row.unwritten is not None for row in controls)
        return Measured(
            sorted(rows, key=lambda row: (row.sample, not row.has_needle, row.depth or 0.0)),
            sorted(controls, key=lambda row: row.sample),
            self.state_bytes,
            prompts + unwritten * self.length,
            self.reader.tokens_read - read,
            time.perf_counter() - started,
        )

    def _batches(self) -> Iterator[list[_Entry]]:
        """Prompts that are equally long, and whose questions are, samples together."""
        waiting: dict[tuple[int, int], list[_Entry]] = defaultdict(list)
        for number in range(self.samples):
            sample = self.suite.make(self.length, number)
            for prompt in sample.rows:
                sizes = len(sample.question), len(prompt.tokens)
                waiting[sizes].append(_Entry(number, sample, prompt, prompt is not sample.without))
            for sizes in [sizes for sizes, group in waiting.items() if len(group) + self.suite.rows > self.batch_rows]:
                yield waiting.pop(sizes)
            if sum(map(len, waiting.values())) * self.length > _PENDING_TOKENS:
                yield waiting.pop(max(waiting, key=lambda sizes: len(waiting[sizes])))
        yield from waiting.values()

    def _side_by_side(self, read: Callable[[Sequence[_Entry]], list[_Made]], entries: Sequence[_Entry]) -> list[_Made]:
        """Read entries together, fewer at a time where memory ends. Returns what `read` makes of each."""
        if len(entries) <= self.batch_rows:
            try:
                return read(entries)
            except OutOfRoomError:
                if len(entries) == 1:
                    raise
                self.batch_rows = len(entries) - len(entries) // 2
        middle = len(entries) - len(entries) // 2
        return self._side_by_side(read, entries[:middle]) + self._side_by_side(read, entries[middle:])

    def _score(self, entries: Sequence[_Entry]) -> list[Row]:
        size = len(entries[0].sample.question)
        state = self.reader.read(np.stack([entry.prompt.tokens[:-size] for entry in entries]))
        self.state_bytes = max(self.state_bytes, state.num_bytes() // len(entries))
        questions = np.stack([entry.sample.question for entry in entries])
        answers = [entry.sample.answer for entry in entries]
        forced = self.reader.ask(state, questions, answers)
        outputs = answer_greedily(
            self.reader.model,
            self.tokenizer,
            state,
            questions,
            max_new_tokens=self.suite.max_new_tokens,
            settled=[functools.partial(self._settled, entry.sample) for entry in entries],
        )
        frozen: list[_AnswerScore] | list[None] = [None] * len(entries)
        if self.reader.model.has_fast_weights:
            frozen = _each(self.reader.ask(state.freeze(), questions, answers))
        return [
            Row(
                entry.number,
                entry.prompt.depth,
                len(entry.prompt.tokens) - size - entry.prompt.needles[0] if entry.prompt.needles else None,
                entry.has_needle,
                self.suite.match(output, entry.sample),
                *score,
                kept,
                output,
            )
            for entry, output, score, kept in zip(entries, outputs, _each(forced), frozen, strict=True)
        ]

    def _settled(self, sample: Sample, output: str) -> bool:
        return self.suite.settled(output, sample)

    def _control(self, entries: Sequence[_Entry]) -> list[ControlRow]:
        """Ask each sample without its text, and after a text that wrote nothing. entries: one a sample."""
        start = np.array([[self.tokenizer.start_of_text]])
        rows = []
        writes = self.reader.model.has_fast_weights
        found = self._side_by_side(self._unwritten, entries) if writes else [None] * len(entries)
        for entry, unwritten in zip(entries, found, strict=True):
            sample = entry.sample
            size = len(sample.question)
            only = None if sample.only is None else self._ask(sample.only[None, :-size], sample)
            rows.append(ControlRow(entry.number, only, self._ask(start, sample), unwritten))
        return rows

    def _unwritten(self, entries: Sequence[_Entry]) -> list[_AnswerScore]:
        """Ask each sample at its middle depth, with writes frozen from the text's first token on."""
        samples = [entry.sample for entry in entries]
        size = len(samples[0].question)
        prompts = [sample.prompts[len(sample.prompts) // 2].tokens[:-size] for sample in samples]
        state = self.reader.read(np.stack(prompts), writes=False)
        questions = np.stack([sample.question for sample in samples])
        return _each(self.reader.ask(state, questions, [sample.answer for sample in samples]))

    def _ask(self, text: np.ndarray, sample: Sample) -> _AnswerScore:
        return _each(self.reader.ask(self.reader.read(text), sample.question[None], [sample.answer]))[0]


def _each(found: Sequence[TokenScores]) -> list[_AnswerScore]:
    return [(float(scores.nats.mean()), scores.greedy, int(scores.ranks[0])) for scores in found]

"""Reading many prompts of one length: in segments with carried state, what several have in common only once.

Shapes: R prompts, T tokens of a prompt, Q of a question.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import OutOfRoomError, TokenScores, memory_watch, read
from nested_lm.reading.reader import OwnStates, Scored
from nested_lm.reading.reader import Reader as SequenceReader
from nested_lm_lab.tasks.needles.stops import LIMIT_WORDS

MIB = 1 << 20

_SEGMENTS = 8
"""Short prompts are read in this many segments at the least: they part at borders of segments."""

_SEGMENT_RANGE = (128, 512)  # tokens

_COPIES = 2
"""A state is there twice while it grows or is forked."""


@dataclass
class Reader:
    """Reads prompts with one model, within a limit, and counts.

    max_state_bytes: of the states of all rows that are read side by side.
    on_tokens: told tokens of prompts as they are done, shared or not. tokens_read: those of texts that the
    model read; questions and answers come on top.
    """

    model: LanguageModel
    max_state_bytes: int
    on_tokens: Callable[[int], None]
    tokens_read: int = field(default=0, init=False)

    def read(self, prompts: Int[np.ndarray, "R T"], *, writes: bool = True) -> StreamState:
        """Read prompts from fresh states. Returns their states, a row for each.

        Prompts that agree up to the end of a segment are one row until then; where they part, its state is forked.
        That is exact: a state is a function of the tokens before it. writes: False never writes fast weights; where a
        state then depends on its last tokens only, no others are read.

        Raises:
            OutOfRoomError: memory ended, or the states would pass the limit.
        """
        if not writes and self.model.frozen_reach is not None:
            kept = max(self.model.frozen_reach, 1)
            self.on_tokens(prompts[:, :-kept].size)
            prompts = prompts[:, -kept:]
        rows, length = prompts.shape
        step = segment_length(length, self.model.config.alignment)
        group = np.zeros(rows, dtype=np.int64)  # the row that stands for each prompt
        with memory_watch():
            state = self.model.initial_state(1) if writes else self.model.initial_state(1).freeze()
            count = 1
            for begin in range(0, length, step):
                part = prompts[:, begin : begin + step]
                parents, first, group = part_ways(group, part)
                if len(parents) != count:  # rows never join, and keep their order
                    state, count = state.select(torch.tensor(parents)), len(parents)
                state = read(self.model, part[first], state).state
                self._check(state, count, rows, begin + part.shape[1], length)
                self.tokens_read += part[first].size
                self.on_tokens(part.size)
            return state.select(torch.from_numpy(group))

    def ask(
        self, state: StreamState, questions: Int[np.ndarray, "R Q"], answers: Sequence[Int[np.ndarray, "A"]]
    ) -> list[TokenScores]:
        """Score an answer after each question, from the state of its row, which is not changed. Raises as `read`."""
        texts = [np.concatenate(pair) for pair in zip(questions, answers, strict=True)]
        documents = [(Scored(text, questions.shape[1]),) for text in texts]
        found = SequenceReader(self.model, rows=len(texts)).score(documents, starts=OwnStates(state))
        return [scores for (scores,) in found]

    def _check(self, state: StreamState, count: int, rows: int, position: int, length: int) -> None:
        """Refuse, as early as it can be known, states that will be too large once all prompts have parted."""
        each = state.num_bytes() / count
        if not self.model.has_constant_state:
            each *= length / position
        needed = _COPIES * rows * each
        if needed > self.max_state_bytes:
            what = "a state" if rows == 1 else f"{rows} states"
            raise OutOfRoomError(
                f"{what} of {length:,} tokens: {needed / MIB:,.0f} MiB while it is copied, and {LIMIT_WORDS} "
                f"{self.max_state_bytes / MIB:,.0f} MiB (--max-state-mib)"
            )


def segment_length(length: int, alignment: int) -> int:
    """Tokens of one call when prompts of `length` are read: a multiple of the model's chunks."""
    low, high = _SEGMENT_RANGE
    wanted = min(max(length // _SEGMENTS, low), high)
    return max(round(wanted / alignment), 1) * alignment


def part_ways(
    group: Int[np.ndarray, "R"], part: Int[np.ndarray, "R T"]
) -> tuple[list[int], list[int], Int[np.ndarray, "R"]]:
    """Find which prompts go on together over the next tokens.

    group: the row each prompt shares so far.

    Returns: for each row from here on the row it comes from and a prompt that it stands for; and the new groups.
    """
    rows: dict[tuple[int, bytes], int] = {}
    parents: list[int] = []
    first: list[int] = []
    after = np.empty_like(group)
    for prompt in np.argsort(group, kind="stable"):  # children in the order of their parents
        key = (int(group[prompt]), part[prompt].tobytes())
        if key not in rows:
            rows[key] = len(parents)
            parents.append(key[0])
            first.append(int(prompt))
        after[prompt] = rows[key]
    return parents, first, after

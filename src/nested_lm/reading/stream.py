"""Reading documents into a stream, one after the other, in memory that does not grow with their length.

A document is read as in training: a start token, then its text. What predicts its last token's successor is scored on
the end token, which is not read: the next document's start token follows.

Shapes: T tokens.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import check_room, read, segment_room
from nested_lm.reading.reader import Scored


@dataclass(frozen=True)
class Boundary:
    """Tokens around every document."""

    start: int
    end: int

    def scored(self, document: Int[np.ndarray, "T"]) -> Scored:
        """A document of which every token and the end token are scored."""
        return Scored(np.concatenate([[self.start], document, [self.end]]))


class StreamReader:
    """Reads documents into one stream.

    Tokens wait until they fill a segment, so that many short documents cost as little a token as a long one.

    state: where the stream stands; documents given to `read` may still wait, until `finish`.
    tokens, nats: read and scored so far.
    """

    def __init__(
        self, model: LanguageModel, state: StreamState | None, *, boundary: Boundary, max_state_bytes: int | None = None
    ) -> None:
        self.model = model
        self.state = model.initial_state(1) if state is None else state
        self.tokens, self.nats = 0, 0.0
        self._boundary, self._max_state_bytes = boundary, max_state_bytes
        self._waiting: list[np.ndarray] = []  # (2, T) inputs and targets of each document
        check_room(model, self.state, max_state_bytes)

    def read(self, document: Int[np.ndarray, "T"]) -> None:
        """Read a document's tokens, given without start and end token.

        Raises:
            OutOfRoomError: the state has outgrown its limit.
            NumericsError: a prediction is not finite.
        """
        tokens = self._boundary.scored(document).tokens
        self._waiting.append(np.stack([tokens[:-1], tokens[1:]]))
        if sum(part.shape[1] for part in self._waiting) >= segment_room(self.model, self.state.position):
            self._read(whole_segments=True)

    def finish(self) -> StreamState:
        """Read what waits, and return the state. Raises as `read`."""
        self._read(whole_segments=False)
        return self.state

    def _read(self, *, whole_segments: bool) -> None:
        """Read what waits; with `whole_segments` as far as the last border of segments in it."""
        if not self._waiting:
            return
        waiting = np.concatenate(self._waiting, axis=1)
        count = waiting.shape[1]
        if whole_segments:
            count -= (count - segment_room(self.model, self.state.position)) % segment_room(self.model, 0)
        (inputs,), (targets,) = (part[:, :count] for part in np.split(waiting, 2))
        found = read(self.model, inputs[None], self.state, targets=targets[None], max_state_bytes=self._max_state_bytes)
        self.state = found.state
        self.tokens += count
        self.nats += float(found.nats.sum())
        self._waiting = [waiting[:, count:]] if count < waiting.shape[1] else []

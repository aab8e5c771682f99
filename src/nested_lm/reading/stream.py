"""Reading documents into a stream, one after the other, in memory that does not grow with their length.

A document is read as in training: a start token, then its text. What predicts its last token's successor is scored on
the end token, which is not read: the next document's start token follows.

Shapes: T tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from nested_lm.errors import CheckpointError, NumericsError
from nested_lm.nn.loss import token_losses
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import predictions_error
from nested_lm.nn.state import StreamState
from nested_lm.reading.generation import segment_room
from nested_lm.reading.memory_file import describe_bytes


@dataclass(frozen=True)
class Boundary:
    """Tokens around every document."""

    start: int
    end: int


class StreamReader:
    """Reads documents into one stream.

    Tokens wait until they fill a segment, so that many short documents cost as little a token as a long one.

    state: where the stream stands; documents given to `read` may still wait, until `finish`.
    tokens, nats: read and scored so far.
    """

    def __init__(
        self, model: LanguageModel, state: StreamState | None, *, boundary: Boundary, max_state_bytes: int
    ) -> None:
        self.model = model
        self.state = model.initial_state(1) if state is None else state
        self.tokens, self.nats = 0, 0.0
        self._boundary, self._max_state_bytes = boundary, max_state_bytes
        self._inputs: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._waiting = 0
        self._check_size()

    def read(self, document: Int[np.ndarray, "T"]) -> None:
        """Read a document's tokens, given without start and end token.

        Raises:
            CheckpointError: the state has outgrown its limit.
            NumericsError: a prediction is not finite.
        """
        self._inputs.append(np.concatenate([[self._boundary.start], document]))
        self._targets.append(np.concatenate([document, [self._boundary.end]]))
        self._waiting += len(document) + 1
        if self._waiting < segment_room(self.model, self.state.position):
            return
        inputs, targets = np.concatenate(self._inputs), np.concatenate(self._targets)
        begin = 0
        while len(inputs) - begin >= (room := segment_room(self.model, self.state.position)):
            self._step(inputs[begin : begin + room], targets[begin : begin + room])
            begin += room
        self._inputs, self._targets, self._waiting = [inputs[begin:]], [targets[begin:]], len(inputs) - begin

    def finish(self) -> StreamState:
        """Read what waits, and return the state. Raises as `read`."""
        if self._waiting:
            self._step(np.concatenate(self._inputs), np.concatenate(self._targets))
            self._inputs, self._targets, self._waiting = [], [], 0
        return self.state

    @torch.no_grad()
    def _step(self, inputs: Int[np.ndarray, "T"], targets: Int[np.ndarray, "T"]) -> None:
        device = next(self.model.parameters()).device
        tokens = torch.from_numpy(inputs)[None].to(device)
        output = self.model(tokens, state=self.state)
        nats = float(token_losses(output.logits, torch.from_numpy(targets)[None].to(device)).double().sum())
        if not np.isfinite(nats):
            raise nonfinite(self.model, tokens, self.state)
        self.state = output.state
        self.tokens += len(inputs)
        self.nats += nats
        self._check_size()

    def _check_size(self) -> None:
        size = self.state.num_bytes()
        if size <= self._max_state_bytes:
            return
        limit, read = describe_bytes(self._max_state_bytes), f"{self.state.position:,} tokens"
        if self.model.has_constant_state:
            raise CheckpointError(
                f"the state of this model takes {describe_bytes(size)}, the limit is {limit}; nothing was written\n"
                "  Its size does not depend on how much is read: raise the limit."
            )
        raise CheckpointError(
            f"the state takes {describe_bytes(size)} after {read}, the limit is {limit}; nothing was written\n"
            "  This model keeps keys and values of every token, so its memory grows with what it reads. Read less, "
            "raise the limit, or use a model with constant state, such as Hope."
        )


def nonfinite(model: LanguageModel, tokens: torch.Tensor, state: StreamState) -> NumericsError:
    """The error for a call whose predictions are not finite, with the layer, the memory and the token."""
    return predictions_error(
        model,
        tokens,
        state,
        consequence="Nothing was written. The checkpoint has diverged, or the stream drove a memory out of range: use "
        "an earlier checkpoint, or start a new memory.",
    )

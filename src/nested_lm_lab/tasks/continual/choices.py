"""Preferring one of several answers: likelihoods of the answers after contexts that all go on from one state.

The state is forked, never changed: asking writes nothing.

Shapes: B contexts of one length, C answers, T tokens of the longest answer.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import read
from nested_lm.reading.reader import Reader, Scored
from nested_lm_lab.evaluation.progress import Progress

_MIB = 1 << 20


def score_choices(
    model: LanguageModel,
    state: StreamState | None,
    contexts: Sequence[Int[np.ndarray, "n"]],
    choices: Sequence[Sequence[int] | Int[np.ndarray, "m"]],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Float[np.ndarray, "contexts choices"]:
    """Mean nats a token of every answer after every context. What they have in common is read once.

    Args:
        state: of one stream; None for one that has read nothing.
        contexts, choices: token ids, at least one each.
        progress: told of `choice_tokens` in all.

    Raises:
        NumericsError: a likelihood is not finite.
    """
    documents = [
        tuple(Scored(np.concatenate([context, choice]), len(context)) for choice in choices) for context in contexts
    ]
    told = [0]

    def tell(tokens: int) -> None:
        told.append(tokens)
        if progress is not None:
            progress.add(tokens)

    found = Reader(model, rows=batch_size, on_tokens=tell).score(documents, starts=state)
    tell(choice_tokens(contexts, choices) - sum(told))  # what did not have to be read again
    return np.array([[scores.nats.mean() for scores in document] for document in found])


def choice_tokens(contexts: Sequence[np.ndarray], choices: Sequence[Sequence[int] | np.ndarray]) -> int:
    """Tokens of contexts, and after each of all answers but their last token."""
    return sum(map(len, contexts)) + len(contexts) * sum(len(choice) - 1 for choice in choices)


def read_stream(
    model: LanguageModel,
    state: StreamState | None,
    documents: Sequence[Int[np.ndarray, "n"]],
    *,
    start: int,
    max_state_mib: int,
    progress: Progress | None = None,
) -> StreamState:
    """Read documents one after the other, each behind a start token, and return the state.

    Raises:
        OutOfRoomError: the state has outgrown its limit.
        NumericsError: a prediction is not finite.
    """
    tokens = np.concatenate([np.concatenate([[start], document]) for document in documents])
    told = None if progress is None else progress.add
    return read(model, tokens[None], state, max_state_bytes=max_state_mib * _MIB, on_tokens=told).state

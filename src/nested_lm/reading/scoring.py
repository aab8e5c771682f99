"""Negative log-likelihood of every token of documents that all go on from one state, which does not change.

Shapes: B rows of a batch, T tokens of the longest document, n tokens of a document.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from nested_lm.nn.loss import IGNORED_TARGET, token_losses
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.generation import segment_room
from nested_lm.reading.stream import Boundary, nonfinite


@torch.no_grad()
def score_documents(
    model: LanguageModel,
    documents: Sequence[Int[np.ndarray, "n"]],
    *,
    state: StreamState | None,
    boundary: Boundary,
    batch_size: int,
) -> list[Float[np.ndarray, "n"]]:
    """Score documents, in segments with carried state, each as if it were the only one that follows the state.

    Args:
        documents: token ids without start and end token.
        state: of one stream; None for a stream that begins. Every document gets a fork of it.
        batch_size: documents read side by side; those of like length share a batch.

    Returns:
        Nats of each token and of the end token, in float64, for each document in the order given.

    Raises:
        NumericsError: a prediction is not finite.
    """
    lent = model.initial_state(1) if state is None else state
    order = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    scores = [np.empty(len(document) + 1) for document in documents]
    for first in range(0, len(order), batch_size):
        _score_batch(model, documents, order[first : first + batch_size], lent, boundary, scores)
    return scores


def _score_batch(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    rows: list[int],
    lent: StreamState,
    boundary: Boundary,
    scores: list[np.ndarray],
) -> None:
    """Score some documents, longest first, and put their nats into `scores`."""
    device = next(model.parameters()).device
    carried = lent.select(torch.zeros(len(rows), dtype=torch.long))
    inputs = np.zeros((len(rows), len(documents[rows[0]]) + 1), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED_TARGET)
    for row, index in enumerate(rows):
        end = len(documents[index])
        inputs[row, 0], inputs[row, 1 : end + 1] = boundary.start, documents[index]
        targets[row, :end], targets[row, end] = documents[index], boundary.end
    begin = 0
    while begin < inputs.shape[1]:
        active = sum(len(scores[index]) > begin for index in rows)
        if active < len(rows):  # longest first: the rows that go on come first
            rows, carried = rows[:active], carried.select(torch.arange(active))
        end = begin + segment_room(model, carried.position)
        tokens = torch.from_numpy(inputs[:active, begin:end]).to(device)
        output = model(tokens, state=carried)
        losses = token_losses(output.logits, torch.from_numpy(targets[:active, begin:end]).to(device))
        found = losses.double().cpu().numpy()
        if not np.isfinite(found).all():
            raise nonfinite(model, tokens, carried)
        for row, index in enumerate(rows):
            kept = scores[index][begin:end]
            kept[:] = found[row, : len(kept)]
        carried, begin = output.state, end

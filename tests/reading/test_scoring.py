"""Scoring documents that go on from one state: batches equal single streams, and the lent state stays as it was."""

import numpy as np
import pytest
import torch

from nested_lm.errors import NumericsError
from nested_lm.nn.loss import token_losses
from nested_lm.nn.state import iterate_tensors
from nested_lm.reading import calls
from nested_lm.reading.reader import Reader
from nested_lm.reading.stream import Boundary
from tests.reading.models import PARTS, build, documents, overflowing, tokens

LIMIT = 1e-10  # relative, float64
TWO = Boundary(start=0, end=60)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr(calls, "SEGMENT_TOKENS", 16)
    with torch.no_grad():
        yield


def score(model, given, *, state=None, batch_size=3):
    sequences = [(TWO.scored(document),) for document in given]
    return [scores.nats for (scores,) in Reader(model, rows=batch_size).score(sequences, starts=state)]


def expected(model, document, state):
    """Scores of one document in one call."""
    inputs = torch.from_numpy(np.concatenate([[0], document]))[None]
    targets = torch.from_numpy(np.concatenate([document, [60]]))[None]
    return token_losses(model(inputs, state=state).logits, targets)[0].numpy()


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("lent", [False, True])
def test_a_batch_of_documents_is_so_many_streams(name, lent):
    model, given = build(name), documents(7, 41, 15, 1, 33)
    state = model(tokens(1, 27, seed=9)).state if lent else None
    together, alone = score(model, given, state=state), score(model, given, state=state, batch_size=1)
    for document, one, other in zip(given, together, alone, strict=True):
        whole = expected(model, document, state)
        assert one.shape == (len(document) + 1,)
        np.testing.assert_allclose(one, whole, rtol=LIMIT, atol=LIMIT)
        np.testing.assert_allclose(other, whole, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("name", PARTS)
def test_a_lent_state_is_not_changed_and_is_used(name):
    model, given = build(name), documents(20, 9)
    state = model(tokens(1, 27, seed=9)).state
    tensors = iterate_tensors((state.layers, state.in_context))
    before = [tensor.clone() for tensor in tensors]
    with_memory = score(model, given, state=state)
    assert all(map(torch.equal, tensors, before))
    assert state.position == 27
    without = score(model, given)
    assert all(np.abs(a - b).max() > 1e-6 for a, b in zip(with_memory, without, strict=True))


def test_numbers_that_are_not_finite_are_named():
    with pytest.raises(NumericsError, match="layer 0, mixer"):
        score(overflowing("hope", layer=0), documents(4, 5))

"""Reading documents into a stream: where calls end makes no difference, limits hold, bad numbers are named."""

import numpy as np
import pytest
import torch

from nested_lm.errors import CheckpointError, NumericsError
from nested_lm.nn.loss import token_losses
from nested_lm.nn.state import iterate_tensors
from nested_lm.reading import calls
from nested_lm.reading.stream import Boundary, StreamReader
from tests.reading.models import MIB, PARTS, build, documents, overflowing

LIMIT = 1e-10  # relative, float64
TWO = Boundary(start=0, end=60)  # a start token that is not the end token


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr(calls, "SEGMENT_TOKENS", 16)
    with torch.no_grad():
        yield


def read(model, given, *, state=None, boundary=TWO, limit=MIB):
    reader = StreamReader(model, state, boundary=boundary, max_state_bytes=limit)
    for document in given:
        reader.read(document)
    return reader.finish(), reader


def difference(one, other):
    trees = ([t.double() for t in iterate_tensors((s.layers, s.in_context))] for s in (one, other))
    pairs = zip(*trees, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs if a.numel())


@pytest.mark.parametrize("name", PARTS)
def test_documents_in_segments_are_one_pass_over_their_tokens(name):
    model, given = build(name), documents(3, 50, 1, 20)
    state, reader = read(model, given)
    whole = torch.from_numpy(np.concatenate([np.concatenate([[0], document]) for document in given]))[None]
    targets = torch.from_numpy(np.concatenate([np.concatenate([document, [60]]) for document in given]))[None]
    expected = model(whole)
    assert state.position == reader.tokens == whole.shape[1] == 78
    assert difference(state, expected.state) < LIMIT
    nats = token_losses(expected.logits, targets).sum().item()
    assert reader.nats == pytest.approx(nats, rel=LIMIT)
    # An identical state would also come from an empty memory if reading had no effect.
    assert difference(state, model(whole.flip(1)).state) > 1e-3


@pytest.mark.parametrize("name", PARTS)
def test_reading_on_is_reading_at_once(name):
    model, given = build(name), documents(9, 30, 14)
    first, _ = read(model, given[:2])
    kept = [tensor.clone() for tensor in iterate_tensors((first.layers, first.in_context))]
    second, reader = read(model, given[2:], state=first)
    assert reader.tokens == 15
    assert difference(second, read(model, given)[0]) < LIMIT
    assert all(map(torch.equal, kept, iterate_tensors((first.layers, first.in_context))))


def test_calls_are_short_and_end_on_borders(monkeypatch):
    model, lengths = build("hope"), []
    predict = model.predict

    def counted(tokens, places, *, state, **options):
        lengths.append((state.position, tokens.shape[1]))
        return predict(tokens, places, state=state, **options)

    monkeypatch.setattr(model, "predict", counted)
    state, _ = read(model, documents(4, 4, 4, 70))
    read(model, documents(40), state=state)
    assert lengths == [(0, 16), (16, 16), (32, 16), (48, 16), (64, 16), (80, 6), (86, 10), (96, 16), (112, 15)]


def test_a_growing_state_is_refused_beyond_its_limit():
    model = build("transformer")
    grown, _ = read(model, documents(60))
    with pytest.raises(CheckpointError, match=r"after 32 tokens, the limit is .*\n.* grows with what it reads"):
        read(model, documents(60), limit=grown.num_bytes() // 2)
    read(model, documents(60), limit=grown.num_bytes())


def test_a_constant_state_beyond_the_limit_is_refused_before_anything_is_read():
    model = build("hope")
    with pytest.raises(CheckpointError, match="does not depend on how much is read"):
        StreamReader(model, None, boundary=TWO, max_state_bytes=model.initial_state(1).num_bytes() - 1)


def test_numbers_that_are_not_finite_are_named():
    model = build("hope")
    model.embedding.weight[7] = torch.inf
    given = [np.array([5, 6, 8, 9]), np.array([7, 5])]
    with pytest.raises(NumericsError, match=r"parameter embedding\.weight"):
        read(model, given)
    with pytest.raises(NumericsError, match=r"after 0 tokens of the stream; first seen in layer 1, .*token 0"):
        read(overflowing("hope", layer=1), given)

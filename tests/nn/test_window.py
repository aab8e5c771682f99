"""Sliding-window attention against a softmax written out, in float64."""

import pytest
import torch

from nested_lm.config.mixers import FullAttention
from nested_lm.nn.layers import StepContext
from nested_lm.nn.mixers.attention import Attention
from nested_lm.nn.mixers.window import Persistent, attend_in_window

LIMIT = 1e-12  # relative, float64: one softmax and two products


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(query, keys, values, documents, window, persistent=None):
    """Softmax over the visible keys of each query, one at a time."""
    batch, heads, tokens, width = query.shape
    past = keys.shape[2] - tokens
    share = heads // keys.shape[1]
    mixed = torch.empty_like(query)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                now = past + t
                seen = [
                    s
                    for s in range(max(0, now - window + 1), now + 1)
                    if documents is None or documents[b, s] == documents[b, now]
                ]
                scores = keys[b, h // share, seen] @ query[b, h, t]
                found = values[b, h // share, seen]
                if persistent is not None:
                    scores = torch.cat([persistent.keys[h] @ persistent.query[b, h, t], scores])
                    found = torch.cat([persistent.values[h], found])
                mixed[b, h, t] = (scores / width**0.5).softmax(0) @ found
    return mixed


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("window", [1, 4, 7, 40])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 9), (13, 0), (13, 3), (13, 20), (16, 3)])
def test_equals_the_softmax_written_out(tokens, past, window, with_documents):
    total = tokens + past
    query, keys, values = draw(2, 4, tokens, 6), draw(2, 2, total, 6, seed=1), draw(2, 2, total, 6, seed=2)
    documents = None
    if with_documents:
        documents = (torch.arange(total) >= torch.tensor([[total // 2], [total - 2]])).long()
    found = attend_in_window(query, keys, values, documents, window=window)
    torch.testing.assert_close(found, written_out(query, keys, values, documents, window), rtol=0, atol=LIMIT)


@pytest.mark.parametrize(("tokens", "past"), [(1, 5), (11, 0), (11, 6)])
def test_persistent_tokens_are_seen_by_all_in_one_softmax(tokens, past):
    total = tokens + past
    query, keys, values = draw(2, 3, tokens, 4), draw(2, 3, total, 4, seed=1), draw(2, 3, total, 4, seed=2)
    persistent = Persistent(draw(2, 3, tokens, 4, seed=3), draw(3, 5, 4, seed=4), draw(3, 5, 4, seed=5))
    found = attend_in_window(query, keys, values, None, window=4, persistent=persistent)
    expected = written_out(query, keys, values, None, 4, persistent)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)


def mixer(window, **settings):
    torch.manual_seed(0)
    config = FullAttention(kind="attention", num_heads=4, window=window, **settings)
    return Attention(16, config).double()


def test_a_window_of_the_whole_call_is_full_attention():
    x = draw(2, 9, 16)
    results = []
    for window in (None, 9, 100):
        attention = mixer(window, num_kv_heads=2)
        results.append(attention(x, StepContext(0, None, None), attention.initial_state(2))[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


def test_the_cache_stops_growing_and_positions_go_on():
    attention, x = mixer(5), draw(2, 40, 16)
    whole, _, _ = attention(x, StepContext(0, None, None), attention.initial_state(2))
    state, outputs = attention.initial_state(2), []
    for t in range(40):
        out, state, _ = attention(x[:, t : t + 1], StepContext(t, None, None), state)
        outputs.append(out)
        assert state.keys.shape[2] == state.documents.shape[1] == min(t + 1, 4)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-12)


def test_only_a_window_has_constant_state():
    assert mixer(5).has_constant_state
    assert not mixer(None).has_constant_state


def test_a_window_of_one_keeps_the_number_of_the_document():
    attention = mixer(1)
    documents = torch.tensor([[3], [5]])
    state = attention(draw(2, 1, 16), StepContext(0, None, documents), attention.initial_state(2))[1]
    assert state.documents.tolist() == [[3], [5]]


def test_far_tokens_have_no_influence():
    attention, x = mixer(4), draw(1, 12, 16)
    changed = x.clone()
    changed[0, 2] += 1
    context, state = StepContext(0, None, None), attention.initial_state(1)
    before, after = (attention(given, context, state)[0] for given in (x, changed))
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.allclose(before[:, 5], after[:, 5])

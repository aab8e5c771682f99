"""Streams forked from one keep what they have in common once, and answer as copies of it would."""

import pytest
import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.branched_cache import BranchedState
from nested_lm.nn.model import LanguageModel

VOCAB = 23


def build(**mixer):
    config = {
        "vocab_size": VOCAB,
        "width": 16,
        "num_layers": 2,
        "mixer": {"kind": "attention", "num_heads": 4} | mixer,
        "channel": {"kind": "swiglu", "expansion": 2.0},
    }
    model = LanguageModel(ModelConfig.model_validate(config)).double()
    model.initialise(3)
    return model


def drawn(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def copied(state):
    """The same state with rows of their own."""
    return state.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))


@torch.no_grad()
@pytest.mark.parametrize("mixer", [{}, {"num_kv_heads": 2}, {"window": 8}], ids=["full", "grouped", "window"])
def test_forks_of_forks_predict_what_copies_do(mixer):
    model = build(**mixer)
    start = model(drawn(1, 90)).state
    questions, answers, more = drawn(3, 5, seed=1), drawn(6, 4, seed=2), drawn(6, 1, seed=3)

    def run(prepared):
        first = model(questions, state=prepared(start.select(torch.zeros(3, dtype=torch.long))))
        rows = torch.tensor([0, 0, 2, 1, 2, 1])
        second = model(answers, state=prepared(first.state.select(rows)))
        third = model(more, state=second.state)
        return (first.logits, second.logits, third.logits), third.state

    found, state = run(lambda state: state)
    expected, _ = run(copied)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    is_branched = [isinstance(layer, BranchedState) for layer in state.layers]
    assert is_branched == [not mixer.get("window")] * 2
    if all(is_branched):
        cache = start.layers[0].keys
        assert state.layers[0].trunk.keys.data_ptr() == cache.data_ptr(), "the trunk was copied"
        assert state.num_bytes() < start.num_bytes() + 6 * model(drawn(1, 11)).state.num_bytes()


@torch.no_grad()
def test_a_short_trunk_is_copied():
    model = build()
    state = model(drawn(1, 9)).state.select(torch.zeros(2, dtype=torch.long))
    after = model(drawn(2, 5), state=state).state
    assert not any(isinstance(layer, BranchedState) for layer in after.layers)


@torch.no_grad()
def test_a_branch_that_begins_a_document_forgets_the_trunk():
    model = build()
    start = model(drawn(1, 60)).state
    rows = torch.zeros(2, dtype=torch.long)
    tokens, question = drawn(2, 6, seed=4), drawn(2, 3, seed=5)
    resets = torch.zeros(2, 6, dtype=torch.bool)
    resets[1, 2] = True
    branches = model(question, state=start.select(rows)).state
    assert isinstance(branches.layers[0], BranchedState)
    found = model(tokens, state=branches, resets=resets)
    expected = model(tokens, state=model(question, state=copied(start.select(rows))).state, resets=resets)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    follow = drawn(2, 4, seed=6)
    torch.testing.assert_close(
        model(follow, state=found.state).logits, model(follow, state=expected.state).logits, rtol=0, atol=1e-12
    )


def test_rows_that_are_not_there_are_refused():
    state = build().initial_state(1)
    with pytest.raises(IndexError, match="of a state of 1 streams"):
        state.select(torch.tensor([1]))

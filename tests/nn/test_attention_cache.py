"""Streams forked from one keep what they have in common once, and answer as copies of it would."""

import pytest
import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.mixers.attention_cache import BranchedState
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.identity import identify
from nested_lm.reading.memory_file import load_memory, save_memory

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
        assert state.num_bytes() == copied(state).num_bytes(), "each stream counts by itself"


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


@torch.no_grad()
def test_branches_that_outgrow_the_trunk_get_copies_of_it():
    model = build()
    forked = model(drawn(1, 40)).state.select(torch.zeros(4, dtype=torch.long))
    first, second = drawn(4, 6, seed=7), drawn(4, 5, seed=8)
    branches = model(first, state=forked).state
    assert isinstance(branches.layers[0], BranchedState)
    found = model(second, state=branches)
    assert not isinstance(found.state.layers[0], BranchedState)
    expected = model(second, state=model(first, state=copied(forked)).state)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_trunk_of_another_precision_is_read_as_a_copy_of_it_is():
    model = build()
    forked = model(drawn(1, 40)).state.select(torch.zeros(2, dtype=torch.long))
    lower = model.to(torch.bfloat16)
    found = lower(drawn(2, 5, seed=9), state=forked)
    expected = lower(drawn(2, 5, seed=9), state=copied(forked))
    assert isinstance(found.state.layers[0], BranchedState)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0.02)


@torch.no_grad()
def test_a_branch_is_stored_like_any_stream(tmp_path):
    model = build()
    identity = identify(model, tokenizer_hash="t", label="l")
    forked = model(drawn(1, 40)).state.select(torch.zeros(2, dtype=torch.long))
    branches = model(drawn(2, 5, seed=9), state=forked).state
    save_memory(tmp_path / "both.memory", branches, identity)
    loaded = load_memory(tmp_path / "both.memory", model, identity)
    follow = drawn(2, 4, seed=3)
    torch.testing.assert_close(
        model(follow, state=loaded).logits, model(follow, state=branches).logits, rtol=0, atol=1e-12
    )


def test_rows_that_are_not_there_are_refused():
    state = build().initial_state(1)
    with pytest.raises(IndexError, match="of a state of 1 streams"):
        state.select(torch.tensor([1]))

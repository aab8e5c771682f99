"""Rows of tokens that branch: what each branch predicts is what it predicts when it is read by itself."""

import itertools

import pytest
import torch

from nested_lm.nn.state import iterate_tensors
from tests.nn.test_final import TOLERANCE, build, tokens

PRESETS = ("hope/demo", "baselines/titans_lmm_demo")
STEMS = (1, 2, 41, 64, 71)  # shorter than the convolution; within a chunk; at a border
BRANCHES = ((5, 70, 3), (0, 1, 9), (64, 0, 0))  # tokens of each row's branches; some are empty


def packed(stem, branches, seed=1):
    """Rows of stem and branches behind each other, and where these begin and end."""
    width = stem + max(map(sum, branches)) + 2
    rows = tokens(len(branches), width, seed)
    sizes = torch.tensor([[stem, *row] for row in branches])
    return rows, sizes.cumsum(dim=1)


def assert_alone(model, state, rows, branches, logits):
    """Each branch predicts what it does when it is read behind the stem by itself."""
    for row, (stem, *ends) in enumerate(branches.tolist()):
        alone = state.select(torch.tensor([row]))
        for begin, end in itertools.pairwise([stem, *ends]):
            text = torch.cat([rows[row, :stem], rows[row, begin:end]])[None]
            expected = model(text, state=alone).logits[0]
            torch.testing.assert_close(logits[row, :stem], expected[:stem], rtol=TOLERANCE, atol=TOLERANCE)
            torch.testing.assert_close(logits[row, begin:end], expected[stem:], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("position", [0, 23])
@torch.no_grad()
def test_each_branch_predicts_what_it_does_alone(preset, stem, position):
    model = build(preset)
    assert model.reads_branches
    state = model(tokens(3, position, 0)).state if position else model.initial_state(3)
    held = [tensor.clone() for tensor in iterate_tensors(state.layers)]
    rows, branches = packed(stem, BRANCHES)
    found = model.predict(rows, None, state=state, final=True, branches=branches)
    assert found.state is state
    assert all(torch.equal(a, b) for a, b in zip(held, iterate_tensors(state.layers), strict=True))
    assert torch.isfinite(found.logits).all()
    assert_alone(model, state, rows, branches, found.logits)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_many_short_branches_that_are_read_together(preset):
    model = build(preset)
    state = model(tokens(2, 23, 0)).state
    rows, branches = packed(30, ((3, 1, 0, 2) * 12, (14, 9, 10, 11, 1) + (1,) * 43))  # the 11th token meets a border
    assert_alone(
        model, state, rows, branches, model.predict(rows, None, state=state, final=True, branches=branches).logits
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stem", [5, 41, 71])  # in the chunk of the state; beyond a border
@torch.no_grad()
def test_of_rows_that_go_on_from_one_stream(preset, stem):
    model = build(preset)
    state = model(tokens(2, 23, 0)).state
    rows, branches = packed(stem, BRANCHES[::-1])  # the first row's only branch moves its borders
    streams = torch.tensor([1, 1, 0])
    found = model.predict(rows, None, state=state, final=True, rows=streams, branches=branches).logits
    expected = model.predict(rows, None, state=state.select(streams), final=True, branches=branches).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_in_float64_of_rules_with_borders_of_their_own():
    model = build(
        "hope/demo", "model.mixer.chunk=8", "model.mixer.chunk_generators=32", "model.mixer.erase_since=border"
    )
    model.double()
    rows, branches = packed(13, BRANCHES)
    found = model.predict(rows, None, state=model.initial_state(len(rows)), final=True, branches=branches).logits
    for row, edges in enumerate(branches.tolist()):
        for begin, end in itertools.pairwise(edges):
            expected = model(torch.cat([rows[row, :13], rows[row, begin:end]])[None]).logits[0, 13:]
            torch.testing.assert_close(found[row, begin:end], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_frozen_states_and_chosen_predictions():
    model = build("hope/demo")
    state = model(tokens(3, 64, 0)).state.freeze()
    rows, branches = packed(20, BRANCHES)
    everything = model.predict(rows, None, state=state, final=True, branches=branches).logits
    chosen = torch.tensor([[0, 19], [2, 50], [0, 21]])
    found = model.predict(rows, chosen, state=state, final=True, branches=branches).logits[0]
    torch.testing.assert_close(found, everything[chosen[:, 0], chosen[:, 1]], rtol=TOLERANCE, atol=TOLERANCE)
    alone = model(torch.cat([rows[2, :20], rows[2, 20:84]])[None], state=state.select(torch.tensor([2]))).logits[0, 50]
    torch.testing.assert_close(found[1], alone, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "branches",
    [[[0, 4]], [[5]], [[3, 2]], [[3, 99]], [[3, 6, 5]]],
    ids=["no stem", "no branch", "falling", "outside", "falling later"],
)
@torch.no_grad()
def test_refuses_borders_that_are_none(branches):
    model = build("hope/demo")
    with pytest.raises(ValueError, match="branches"):
        model.predict(tokens(1, 9, 0), None, state=model.initial_state(1), final=True, branches=torch.tensor(branches))


@torch.no_grad()
def test_refuses_stems_of_several_lengths():
    model = build("hope/demo")
    with pytest.raises(ValueError, match="a line for each row"):
        model.predict(tokens(2, 9, 0), None, state=model.initial_state(2), final=True, branches=torch.tensor([[3, 9]]))
    with pytest.raises(ValueError, match="of one length in all rows"):
        model.predict(
            tokens(2, 9, 0), None, state=model.initial_state(2), final=True, branches=torch.tensor([[3, 9], [4, 9]])
        )


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("baselines/transformer_demo", ()),
        ("hope/demo_in_context", ()),
        ("hope/demo_paper", ()),
        ("baselines/titans_mac_demo", ()),
        ("hope/demo", ("model.mixer.backend=torch",)),
    ],
)
@torch.no_grad()
def test_models_that_do_not_read_them_say_so(preset, overrides):
    model = build(preset, *overrides)
    assert not model.reads_branches
    with pytest.raises(ValueError, match="reads branches"):
        model.predict(tokens(1, 9, 0), None, state=model.initial_state(1), final=True, branches=torch.tensor([[3, 9]]))


def test_refuses_gradients():
    model, branches = build("hope/demo"), torch.tensor([[3, 9]])
    with pytest.raises(ValueError, match="without gradients"):
        model.predict(tokens(1, 9, 0), None, state=model.initial_state(1), final=True, branches=branches)

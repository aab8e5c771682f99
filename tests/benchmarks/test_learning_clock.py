"""The task of two clocks: its tokens, its arms, and the lesion."""

import pytest
import torch
from benchmarks.learning.clock import CLOCK, LEVELS, ROW_TOKENS, SYMBOLS, TABLE_TOKENS, lesioned, losses, streams

from nested_lm.nn.sizing import count_parameters
from nested_lm.nn.state import iterate_tensors


def test_every_token_follows_the_chain_of_its_row_or_the_table_of_its_stretch():
    tokens = streams(2, ROW_TOKENS, torch.Generator().manual_seed(0))
    assert tokens.shape == (2, ROW_TOKENS)
    successors = []
    for row in tokens.tolist():
        chain, tables = {}, {}
        last = 0
        for t, token in enumerate(row):
            known, key = (chain, last) if token < SYMBOLS else (tables, (t // TABLE_TOKENS, last))
            assert known.setdefault(key, token) == token
            last = token
        assert len(chain) > 0.8 * 2 * SYMBOLS  # a symbol that nothing leads to has no entry
        assert len({tuple(v for (n, _), v in tables.items() if n == stretch) for stretch in range(4)}) == 4
        successors.append(chain)
    assert successors[0] != successors[1]
    share = (tokens < SYMBOLS).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)


def test_arms_have_nearly_equal_parameters():
    sizes = {arm: count_parameters(CLOCK.configuration(arm))["total"] for arm in LEVELS}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes


@pytest.mark.parametrize(("arm", "restarts"), [("nested_2", True), ("chained_2", False)])
def test_lesion_sets_back_the_slowest_level_only(arm, restarts):
    model = CLOCK.build(arm, 0)
    with torch.no_grad():
        state = model(streams(1, TABLE_TOKENS + 1, torch.Generator().manual_seed(0))).state
    before, after = state.in_context.levels, lesioned(state).in_context.levels
    norms = [[sum(t.norm().item() for t in iterate_tensors(level.distance)) for level in s] for s in (before, after)]
    assert norms[0][1] > 0
    assert (norms[0][0] == 0) == restarts  # the slow level has just ticked
    assert norms[1] == [norms[0][0], 0]


def test_measures_and_references_name_the_same():
    with torch.no_grad():
        found = CLOCK.measure(CLOCK.build("unwritten", 0), 16)
    assert set(CLOCK.references(16)["guessing"]) == set(found)  # nothing is written that could be lost
    with torch.no_grad():
        written = CLOCK.measure(CLOCK.build("nested_2", 0), 16)
    assert set(written) - set(found) == {"lesion, last third", "lesion, new table"}


def test_losses_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]).log_softmax(-1)
    found = losses(logits, torch.tensor([[0, 1]]))
    assert found[0].tolist() == pytest.approx([0.6931, 3.0486], abs=1e-4)

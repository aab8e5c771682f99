"""The task of contexts that come back: its tokens, its arms, and the lesion."""

import pytest
import torch
from benchmarks.learning.clock import CLOCK, CONTEXT_TOKENS, LEVELS, SYMBOLS, TABLE_TOKENS, contexts, lesioned, losses

from nested_lm.nn.sizing import count_parameters
from nested_lm.nn.state import iterate_tensors


def test_every_token_follows_the_chain_of_its_context_or_the_table_of_its_stretch():
    tokens = contexts(torch.tensor([[0, 1, 0], [2, 3, 1]]), torch.Generator().manual_seed(0))
    assert tokens.shape == (2, 3 * CONTEXT_TOKENS)
    for row, plan in zip(tokens.tolist(), ("ABA", "CDB"), strict=True):
        chains, tables = {}, {}
        last = 0
        for t, token in enumerate(row):
            known, where = (chains, plan[t // CONTEXT_TOKENS]) if token < SYMBOLS else (tables, t // TABLE_TOKENS)
            assert known.setdefault((where, last), token) == token
            last = token
        assert (
            0.8 * 2 * SYMBOLS < len(chains) / len(set(plan)) <= 2 * SYMBOLS
        )  # a symbol that nothing leads to has no entry
    share = (tokens < SYMBOLS).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)


def test_no_context_follows_itself_in_training(monkeypatch):
    plans = []
    monkeypatch.setattr(
        "benchmarks.learning.clock.contexts",
        lambda plan, generator: plans.append(plan) or torch.zeros(len(plan), 2, dtype=torch.long),
    )
    CLOCK.loss(CLOCK.build("unwritten", 0), torch.Generator().manual_seed(0), 0.0)
    (plan,) = plans
    assert plan.shape == (16, 3)
    assert (plan[:, 1:] != plan[:, :-1]).all()
    assert set(plan.flatten().tolist()) == {0, 1, 2, 3}


def test_arms_have_nearly_equal_parameters():
    sizes = {arm: count_parameters(CLOCK.configuration(arm))["total"] for arm in LEVELS}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes


def test_lesion_sets_back_the_slowest_level_only():
    model = CLOCK.build("levels_3", 0)
    tokens = contexts(torch.tensor([[0]]), torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model(torch.cat([tokens, tokens[:, :1]], dim=1)).state
    before, after = state.in_context.levels, lesioned(state).in_context.levels
    norms = [[sum(t.norm().item() for t in iterate_tensors(level.distance)) for level in s] for s in (before, after)]
    assert min(norms[0]) > 0
    assert norms[1][:2] == norms[0][:2]
    assert norms[1][2] == 0


def test_losses_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]).log_softmax(-1)
    found = losses(logits, torch.tensor([[0, 1]]))
    assert found[0].tolist() == pytest.approx([0.6931, 3.0486], abs=1e-4)

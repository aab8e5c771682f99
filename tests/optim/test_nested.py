"""Nested levels in training (eq. 72): what a level goes back to, when, and how that start is learned."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from nested_lm.config.train import AdamW, Muon
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock

STEP_TOKENS = 8
PERIODS = (8, 16, 64)
ADAMW = AdamW(kind="adamw", rate=1e-2, weight_decay=0.1)
MUON = Muon(kind="muon", rate=1e-2, adamw_rate=1e-2)


class Role(NamedTuple):
    kind: str
    level: int | None = None


ROLES = {
    "outside": Role("matrix"),
    "fast": Role("matrix", 0),
    "fast_norm": Role("vector", 0),
    "middle": Role("matrix", 1),
    "slow": Role("matrix", 2),
}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn((4,) if "norm" in name else (4, 4), generator=generator)) for name in ROLES}


def clocked(config=ADAMW, *, seed=0, restarts=True):
    named = parameters(seed)
    return ClockedOptimizer(named, plan_groups(named, ROLES, config), LevelClock(PERIODS), config, restarts=restarts)


def gradient(name, step, shape):
    generator = torch.Generator().manual_seed(1000 * step + list(ROLES).index(name))
    return torch.randn(shape, generator=generator)


def run(optimizer, first, last):
    for step in range(first, last + 1):
        for name, parameter in optimizer.parameters.items():
            parameter.grad = gradient(name, step, parameter.shape)
        optimizer.step(step * STEP_TOKENS, 0.5)


def weights(optimizer):
    return {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def stepped_alone(name, spans, config=ADAMW):
    """The parameter of this name, stepped by an ordinary optimizer on the sum of the gradients of each span."""
    weight = parameters()[name]
    optimizer = torch.optim.AdamW(
        [weight], lr=0.5 * config.rate, betas=(config.beta1, config.beta2), eps=config.epsilon
    )
    optimizer.param_groups[0]["weight_decay"] = 0.0 if "norm" in name else config.weight_decay
    for span in spans:
        weight.grad = sum(gradient(name, step, weight.shape) for step in span)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", ["fast", "fast_norm"])
def test_a_level_goes_back_to_a_start_learned_on_the_slower_clock(name):
    optimizer = clocked()
    run(optimizer, 1, 6)  # the middle level's clock ticks after steps 2, 4 and 6
    torch.testing.assert_close(optimizer.parameters[name], stepped_alone(name, [(1, 2), (3, 4), (5, 6)]))


def test_the_level_in_the_middle_follows_the_slowest_and_that_one_has_no_start():
    optimizer = clocked()
    run(optimizer, 1, 8)
    eight = [range(1, 9)]
    torch.testing.assert_close(optimizer.parameters["middle"], stepped_alone("middle", eight))
    torch.testing.assert_close(optimizer.parameters["slow"], stepped_alone("slow", eight))
    assert {name.split("/")[2] for name in optimizer.state_tensors() if name.startswith("start/weights")} == {
        "fast",
        "fast_norm",
        "middle",
    }


def test_between_two_ticks_a_level_learns_on_from_its_start_with_fresh_moments():
    optimizer = clocked()
    run(optimizer, 1, 2)
    start = optimizer.parameters["fast"].detach().clone()
    run(optimizer, 3, 3)
    alone = nn.Parameter(start.clone())
    alone.grad = gradient("fast", 3, alone.shape)
    single = torch.optim.AdamW([alone], lr=0.5e-2, betas=(0.9, 0.95), eps=ADAMW.epsilon, weight_decay=0.1)
    single.step()
    torch.testing.assert_close(optimizer.parameters["fast"], alone)
    assert not torch.equal(optimizer.parameters["fast"], start)


def test_parameters_outside_the_levels_are_stepped_as_without_nesting():
    nested, plain = clocked(), clocked(restarts=False)
    run(nested, 1, 9)
    run(plain, 1, 9)
    assert_same(
        {"outside": nested.parameters["outside"], "slow": nested.parameters["slow"]},
        {"outside": plain.parameters["outside"], "slow": plain.parameters["slow"]},
    )
    assert not torch.equal(nested.parameters["fast"], plain.parameters["fast"])


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_continues_bit_identically_from_any_phase_of_a_period(config, stop):
    whole = clocked(config)
    run(whole, 1, 11)
    first = clocked(config)
    run(first, 1, stop)
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    second = clocked(config, seed=99)
    with torch.no_grad():
        for name, value in weights(first).items():
            second.parameters[name].copy_(value)
    second.load_state_tensors(saved)
    run(second, stop + 1, 11)
    assert_same(weights(whole), weights(second))
    assert_same(whole.state_tensors(), second.state_tensors())


def test_a_skipped_step_teaches_the_starts_nothing():
    optimizer = clocked()
    run(optimizer, 1, 1)
    for name, parameter in optimizer.parameters.items():
        parameter.grad = gradient(name, 2, parameter.shape)
    optimizer.skip()
    run(optimizer, 3, 4)
    torch.testing.assert_close(optimizer.parameters["fast"], stepped_alone("fast", [(1, 3, 4)]))


def test_a_state_without_the_starts_is_refused():
    plain = clocked(restarts=False)
    run(plain, 1, 2)
    with pytest.raises(ValueError, match="the start of fast, which nested levels go back to, is missing"):
        clocked().load_state_tensors(plain.state_tensors())


def test_starts_are_refused_where_levels_are_not_nested():
    nested = clocked()
    run(nested, 1, 2)
    with pytest.raises(ValueError, match="belongs to no parameter"):
        clocked(restarts=False).load_state_tensors(nested.state_tensors())

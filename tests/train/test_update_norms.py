import pytest
import torch
from torch import nn

from nested_lm.config.train import AdamW
from nested_lm.nn.model import ParameterRole
from nested_lm.ops.memory.rule import MEMORIES
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock
from nested_lm.train.hooks.update_norms import UpdateNorms

ROLES = {
    "matrix": ParameterRole("matrix", None),
    "slow": ParameterRole("matrix", 0),
    "inner": ParameterRole("memory", None),
    "outer": ParameterRole("memory", None),
}


def norms(*, every, period_steps=3, total=100):
    parameters = {
        "matrix": nn.Parameter(torch.full((2, 2), 2.0)),
        "slow": nn.Parameter(torch.full((2, 2), 1.0)),
        "inner": nn.Parameter(torch.ones(2, len(MEMORIES), 3, 3)),
        "outer": nn.Parameter(torch.ones(2, len(MEMORIES), 3, 3)),
    }
    config = AdamW(kind="adamw", rate=1e-3)
    optimizer = ClockedOptimizer(
        parameters, plan_groups(parameters, ROLES, config), LevelClock((8 * period_steps,)), config
    )
    return UpdateNorms(optimizer, every_steps=every, step_tokens=8, total_steps=total, memories=MEMORIES), parameters


def test_values_by_hand_and_memories_apart():
    measured, parameters = norms(every=1)
    measured.before_update(3)
    with torch.no_grad():
        parameters["matrix"] += 0.1
        for index in range(len(MEMORIES)):
            parameters["inner"][:, index] += 0.01 * (index + 1)
    measured.after_update(3)
    assert measured.fields(is_logged=False) == {}
    found = measured.fields(is_logged=True)
    assert found["update_norm/matrix"] == pytest.approx(0.1 / 2)
    assert found["update_norm/level0/matrix"] == 0.0
    for index, memory in enumerate(MEMORIES):  # half of each memory's starts moved
        assert found[f"update_norm/memory/{memory}"] == pytest.approx(0.01 * (index + 1) / 2**0.5, rel=1e-4)
    assert measured.fields(is_logged=True) == {}


def test_each_group_is_copied_once_an_interval_at_its_last_due_step():
    measured, _ = norms(every=10, total=25)
    copied = {step: sorted(measured.due(step)) for step in range(1, 26)}
    always = sorted({"matrix", *(f"memory/{memory}" for memory in MEMORIES)})
    assert {step: labels for step, labels in copied.items() if labels} == {
        9: ["level0/matrix"],  # due at 3, 6, 9 before the record of step 10
        10: always,
        18: ["level0/matrix"],
        20: always,
        24: ["level0/matrix"],
        25: always,  # the last step is logged too
    }


def test_a_level_that_is_not_due_within_an_interval_is_absent():
    measured, _ = norms(every=2, period_steps=5)
    steps = [step for step in range(1, 21) if "level0/matrix" in measured.due(step)]
    assert steps == [5, 10, 15, 20]

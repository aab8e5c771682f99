from typing import NamedTuple

import pytest
import torch

from nested_lm.config.train import AdamW, Deep, MatrixOptimizer, Muon
from nested_lm.config.update_rules import GradientDescent, Momentum
from nested_lm.optim.groups import plan_groups

ADAMW = AdamW(kind="adamw", rate=1e-3, weight_decay=0.1)
MUON = Muon(kind="muon", rate=2e-3, adamw_rate=5e-4, weight_decay=0.2)

MOMENTUM = Momentum(kind="momentum", inertia=0.5)
DEEP = Deep(kind="deep", rule=MOMENTUM, rate=2e-3, adamw_rate=5e-4, weight_decay=0.2)
DESCENT = MatrixOptimizer(rule=GradientDescent(kind="gd"), rate=0.5, weight_decay=0.0)


class Role(NamedTuple):
    kind: str
    level: int | None = None


ROLES = {
    "embedding.weight": Role("embedding"),
    "blocks.0.q.weight": Role("matrix"),
    "blocks.0.norm.weight": Role("vector"),
    "blocks.0.mixer.start_k": Role("memory"),
    "blocks.0.mixer.start_v": Role("memory"),
    "blocks.0.levels.0.up.weight": Role("matrix", 0),
    "blocks.0.levels.1.up.weight": Role("matrix", 1),
    "blocks.0.levels.1.norm.weight": Role("vector", 1),
}
SHAPES = {"vector": (4,), "memory": (2, 4, 4), "matrix": (4, 4), "embedding": (8, 4)}
PARAMETERS = {name: torch.zeros(SHAPES[role.kind]) for name, role in ROLES.items()}


@pytest.mark.parametrize("config", [ADAMW, MUON, DEEP])
def test_every_parameter_is_in_exactly_one_group(config):
    groups = plan_groups(PARAMETERS, ROLES, config)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(PARAMETERS)
    assert len({group.label for group in groups}) == len(groups)


@pytest.mark.parametrize("config", [ADAMW, MUON, DEEP])
def test_only_matrices_decay_and_levels_are_kept(config):
    for group in plan_groups(PARAMETERS, ROLES, config):
        for name in group.names:
            assert group.level == ROLES[name].level
            assert group.weight_decay == (config.weight_decay if ROLES[name].kind == "matrix" else 0.0)


@pytest.mark.parametrize(("config", "method"), [(MUON, "muon"), (DEEP, "momentum")])
def test_the_rule_takes_the_matrices_and_adamw_the_rest(config, method):
    for group in plan_groups(PARAMETERS, ROLES, config):
        is_matrix = ROLES[group.names[0]].kind == "matrix"
        assert group.method == (method if is_matrix else "adamw")
        assert group.rate == (2e-3 if is_matrix else 5e-4)


@pytest.mark.parametrize("config", [ADAMW, MUON, DEEP])
def test_a_level_s_own_optimizer_takes_its_matrices_only(config):
    own = config.model_copy(update={"levels": (None, DESCENT)})
    plain = {group.label: group for group in plan_groups(PARAMETERS, ROLES, config)}
    for group in plan_groups(PARAMETERS, ROLES, own):
        if group.label == "level1/matrix":
            assert (group.method, group.rate, group.weight_decay, group.level) == ("gd", 0.5, 0.0, 1)
        else:
            assert group == plain[group.label]


def test_labels_name_kind_and_level():
    labels = {group.label for group in plan_groups(PARAMETERS, ROLES, ADAMW)}
    assert labels == {
        "embedding",
        "matrix",
        "vector",
        "memory",
        "level0/matrix",
        "level1/matrix",
        "level1/vector",
    }


def test_gaps_and_doubles_are_refused():
    with pytest.raises(ValueError, match=r"without a role: \['extra'\]"):
        plan_groups({**PARAMETERS, "extra": torch.zeros(1)}, ROLES, ADAMW)
    fewer = {name: value for name, value in PARAMETERS.items() if name != "embedding.weight"}
    with pytest.raises(ValueError, match=r"without a parameter: \['embedding.weight'\]"):
        plan_groups(fewer, ROLES, ADAMW)
    tied = {**PARAMETERS, "head.weight": PARAMETERS["embedding.weight"]}
    with pytest.raises(ValueError, match="stepped twice"):
        plan_groups(tied, {**ROLES, "head.weight": Role("embedding")}, ADAMW)
    with pytest.raises(ValueError, match="matrices are 2-D"):
        plan_groups({"w": torch.zeros(2, 2, 2)}, {"w": Role("matrix")}, MUON)

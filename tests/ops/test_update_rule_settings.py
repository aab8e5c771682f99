"""Settings of the update rules: equal to the sections of presets, and refused where a rule would not work."""

import math
from dataclasses import fields

import pytest
import torch
from pydantic import TypeAdapter

from nested_lm.config import update_rules as sections
from nested_lm.ops.update_rules.base import UpdateRule
from nested_lm.ops.update_rules.registry import RULES, make_rule


def test_sections_and_rules_have_the_same_fields_and_defaults():
    adapter = TypeAdapter(sections.UpdateRule)
    for kind, rule in RULES.items():
        section = adapter.validate_python({"kind": kind})
        assert section.settings == {field.name: field.default for field in fields(rule)}
        assert make_rule(kind, section.settings) == rule()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no update rule 'lion'; the kinds are gd, momentum"):
        make_rule("lion", {})
    with pytest.raises(ValueError, match="momentum has no setting nesterov; it has inertia"):
        make_rule("momentum", {"nesterov": True})
    with pytest.raises(ValueError, match="gd has no setting inertia; it has none"):
        make_rule("gd", {"inertia": 0.5})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("momentum", {"inertia": 1.1}, r"Momentum.inertia is 1.1; it must be at least 0 and at most 1"),
        ("momentum", {"inertia": math.nan}, "is nan"),
        ("delta_momentum", {"erase": 0.95}, "DeltaMomentum.erase is 0.95; it must be at least 0 and at most 0.9"),
        ("delta_momentum", {"square_keep": 1.0}, "at least 0 and below 1"),
        ("preconditioned_momentum", {"epsilon": 0.0}, "above 0 and finite"),
        ("preconditioned_momentum", {"epsilon": math.inf}, "above 0 and finite"),
        ("dmgd", {"memory_rate": 1.5}, "objective l2 and inertia 0.9 the memory is stable up to 1"),
        ("dmgd", {"objective": "dot"}, "objective dot and inertia 0.9 the memory is stable up to 0.1"),
        ("dmgd", {"objective": "cosine", "memory_rate": 0.1}, "must be one of"),
        ("dmgd", {"hidden": 1}, "at least 4"),
        ("adam", {"mean_keep": 1.0}, "below 1"),
        ("muon", {"iterations": 0}, "at least 1"),
        ("m3", {"mode": "fast"}, "'ema' or 'literal'"),
        ("m3", {"slow_weight": -0.1}, "at least 0 and finite"),
        ("m3", {"slow_every": 0}, "at least 1"),
    ],
)
def test_values_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make_rule(kind, settings)


@pytest.mark.parametrize("kind", [kind for kind, rule in RULES.items() if rule.shape == "matrix"])
def test_a_vector_is_refused_by_matrix_rules(kind):
    with pytest.raises(ValueError, match="pass a vector as a matrix of one row"):
        make_rule(kind, {}).update(torch.zeros(3), torch.zeros(3), None, rate=0.1)


def test_elementwise_rules_take_vectors():
    for kind, rule in RULES.items():
        if rule.shape == "any":
            made = make_rule(kind, {})
            weights, _ = made.update(torch.zeros(3), torch.ones(3), made.initial_state(torch.zeros(3)), rate=0.1)
            assert weights.max() < 0


def test_the_interface_is_abstract():
    with pytest.raises(TypeError):
        UpdateRule()

"""What a configuration of the memories accepts beside the write rule's own checks."""

import pytest
from pydantic import ValidationError

from nested_lm.config.load import config_hash, load_run
from nested_lm.config.mixers import STORED, SelfModifying
from nested_lm.ops.memory.rule import NAMED, WriteRule

TITANS = {"kind": "self_modifying", "num_heads": 2, "adapt": ("memory",), "targets": "values", "erase": "none"}
TITANS |= {"rates": {"memory": 0.1}}


def test_runs_of_earlier_versions_said_true_for_the_sum():
    earlier, now = (SelfModifying.model_validate(TITANS | {"momentum": said}) for said in (True, "sum"))
    assert earlier == now
    assert config_hash(earlier) == config_hash(now)
    assert SelfModifying.model_validate(TITANS | {"momentum": False}).momentum is False


@pytest.mark.parametrize("said", ["true", "average", 1, None])
def test_other_words_for_a_momentum_are_refused(said):
    with pytest.raises(ValidationError, match="'sum' or 'mean'"):
        SelfModifying.model_validate(TITANS | {"momentum": said})


@pytest.mark.parametrize(
    ("given", "repair"),
    [
        ({"momentum": "sum", "depth": 1}, "use momentum: mean"),
        ({"momentum": "sum", "erase": "both"}, "use momentum: mean"),
        ({"momentum": "mean", "depth": 1, "rates": {"memory": 0.12}}, "use rates up to 0.0625"),
        ({"rates": {"memory": 0.13}}, "use rates up to 0.125"),
        ({"depth": 1, "targets": "generated", "rates": {"memory": 0.1}}, "use rates up to 0.0625"),
        ({"depth": 1, "targets": "generated", "gradient": "self_referential", "erase": "both"}, None),
        ({"depth": 1, "targets": "generated", "objective": "dot"}, "use rates up to 0, or targets: values"),
        ({"damp": False}, "use damp: true, or depth: 1"),
        (
            {
                "depth": 1,
                "targets": "generated",
                "gradient": "self_referential",
                "erase": "both",
                "rates": {"memory": 1.5},
            },
            "use rates up to 0.6667 (up to 1 where the targets are values)",
        ),
    ],
)
def test_rules_that_grow_are_refused_with_the_repair(given, repair):
    if repair is None:
        SelfModifying.model_validate(TITANS | given)
        return
    with pytest.raises(ValidationError) as error:
        SelfModifying.model_validate(TITANS | given)
    assert repair in str(error.value)


def test_stored_runs_with_rules_that_grow_are_still_read():
    given = TITANS | {"damp": False}
    assert not SelfModifying.model_validate(given, context={STORED: True}).damp


@pytest.mark.parametrize("name", NAMED)
def test_a_named_rule_stands_for_its_fields(name):
    given = {"kind": "self_modifying", "num_heads": 2}
    named = SelfModifying.model_validate(given | {"rule": name})
    assert named == SelfModifying.model_validate(given | NAMED[name])
    assert SelfModifying.model_validate(given | {"rule": name, "read": "exclusive", "rate_stretch": 0.2}) == (
        SelfModifying.model_validate(given | NAMED[name] | {"read": "exclusive", "rate_stretch": 0.2})
    )
    assert "rule" not in named.model_dump()


@pytest.mark.parametrize(("name", "preset"), [("hope", "demo"), ("hope_paper", "demo_paper"), ("titans", "titans_lmm")])
def test_a_named_rule_is_that_of_its_preset(name, preset):
    preset = load_run("baselines/titans_lmm_demo" if preset == "titans_lmm" else f"hope/{preset}").model.mixer
    named = WriteRule(rule=name, chunk=preset.chunk)
    assert {field: getattr(preset, field) for field in WriteRule.model_fields} == dict(named)


@pytest.mark.parametrize("name", ["Hope", "", None, 1])
def test_a_rule_that_has_no_such_name_is_refused(name):
    with pytest.raises(ValidationError, match="is none of hope, hope_paper, titans, linear, delta; name one of them"):
        WriteRule.model_validate({"rule": name})


def test_the_section_is_the_rule():
    """One declaration: the mixer adds sizes and starts, and repeats no field of the rule."""
    assert issubclass(SelfModifying, WriteRule)
    assert not set(SelfModifying.__annotations__) & set(WriteRule.model_fields)

"""What a configuration of the memories accepts beside the write rule's own checks."""

import pytest
from pydantic import ValidationError

from nested_lm.config.load import config_hash
from nested_lm.config.mixers import STORED, SelfModifying

TITANS = {"kind": "self_modifying", "num_heads": 2, "adapt": ("memory",), "targets": "values", "erase": "none"}
TITANS |= {"rates": {"memory": 0.1}}


def test_runs_of_earlier_versions_said_true_for_the_sum():
    earlier, now = (SelfModifying.model_validate(TITANS | {"momentum": said}) for said in (True, "sum"))
    assert earlier == now
    assert config_hash(earlier) == config_hash(now)
    assert SelfModifying.model_validate(TITANS | {"momentum": False}).rule().momentum is False


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
    assert not SelfModifying.model_validate(given, context={STORED: True}).rule().damp

"""Levels and their in-context clock in a preset: what is refused, and with which repair."""

import pytest
from pydantic import ValidationError

from nested_lm.config.load import load_run
from nested_lm.config.model import ModelConfig
from nested_lm.errors import ConfigError

STEPS_OF_80 = [f"model.channel.levels.{level}.period_tokens=80" for level in range(2)]
SHARED = {"lifetime": "document", "meta_gradient": "first_order"}


def writes(period, **changes):
    return {"period_tokens": period, "rate": 0.1, "rule": {"kind": "gd"}} | changes


def model(*periods, in_context=(), shared=SHARED, wiring="sequential", mixer=None, num_layers=2):
    """A model with levels of these training periods; `in_context`: their writes, None without."""
    entries = [*in_context, *[None] * (len(periods) - len(in_context))]
    levels = [
        {"period_tokens": period, "expansion": 1.0, "in_context": entry}
        for period, entry in zip(periods, entries, strict=True)
    ]
    return ModelConfig.model_validate(
        {
            "vocab_size": 11,
            "width": 8,
            "num_layers": num_layers,
            "mixer": mixer or {"kind": "attention", "num_heads": 2},
            "channel": {"kind": "cms", "levels": levels, "wiring": wiring, "in_context": shared},
        }
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_context": [writes(4), writes(6)]}, r"in-context periods \[4, 6\] do not nest: .* try 8"),
        ({"in_context": [writes(4)], "shared": None}, r"`channel.in_context`, .* is missing; add in_context: "),
        ({"in_context": []}, r"channel.in_context is set, but no level is written in context"),
        ({"in_context": [writes(4, rate=-0.1)]}, "greater than or equal to 0"),
        ({"in_context": [writes(0)]}, "greater than 0"),
        ({"in_context": [writes(4, rule={"kind": "sgd"})]}, "'gd', 'momentum'"),
        ({"in_context": [writes(4, rule={"kind": "gd", "inertia": 0.5})]}, "Extra inputs are not permitted"),
        ({"in_context": [writes(4), writes(4)], "wiring": "nested"}, r"\[4, 4\]: with wiring nested .* try 8"),
    ],
)
def test_impossible_writes_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        model(64, 128, **settings)


@pytest.mark.parametrize(
    ("periods", "message"),
    [((64,), "needs a slower level"), ((64, 64), r"level periods \[64, 64\]: with wiring nested .* try 128")],
)
def test_nested_levels_need_a_slower_one(periods, message):
    with pytest.raises(ValidationError, match=message):
        model(*periods, wiring="nested", shared=None)


SECOND = SHARED | {"meta_gradient": "second_order"}


@pytest.mark.parametrize(
    ("mixer", "backend"),
    [({"kind": "self_modifying", "num_heads": 2}, "cpu"), ({"kind": "delta_net", "num_heads": 2}, "fla")],
)
def test_second_order_needs_what_can_be_differentiated_twice(mixer, backend):
    asked = mixer | {"backend": backend}
    with pytest.raises(ValidationError, match=rf"{mixer['kind']} with the backend .* only once; use backend: auto or"):
        model(64, in_context=[writes(4)], shared=SECOND, mixer=asked)
    assert model(64, in_context=[writes(4)], shared=SECOND, mixer=asked, num_layers=1).writes_in_context
    assert model(64, in_context=[writes(4)], shared=SECOND, mixer=mixer | {"backend": "auto"}).writes_in_context


def test_the_layers_above_the_lowest_writes_are_differentiated_twice():
    assert model(64, in_context=[writes(4)], shared=SECOND, num_layers=4).layers_differentiated_twice == range(1, 4)
    assert not model(64, in_context=[writes(4)], num_layers=4).layers_differentiated_twice
    assert not model(64, in_context=[writes(4, rate=0.0)], shared=SECOND, num_layers=4).layers_differentiated_twice
    levels = [{"period_tokens": 64}, {"period_tokens": 128, "in_context": writes(4)}]
    channel = {"kind": "layer_levels", "hidden": 8, "levels": levels, "in_context": SECOND}
    given = model(64, shared=None, num_layers=4).model_dump() | {"channel": channel}
    assert ModelConfig.model_validate(given).layers_differentiated_twice == range(3, 4)


def test_documents_start_on_borders_of_memories_and_levels():
    hope = {"kind": "self_modifying", "num_heads": 2, "chunk": 6}
    found = model(64, 128, in_context=[None, writes(4)], mixer=hope)
    assert found.alignment == 12
    assert model(64, 128, shared=None, mixer=hope).alignment == 6
    assert not model(64, in_context=[writes(4, rate=0.0)]).writes_in_context


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.compile=true"], "train.compile cannot compile a model whose levels are written in context"),
        (["train.context_length=80", "train.batch_size=1", *STEPS_OF_80], r"(?s)80 is not a multiple of 32.*try 64"),
        (["train.context_length=32"], r"(?s)none would ever write in training.*try a period of 8"),
    ],
)
def test_training_that_the_clock_cannot_serve_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_run("hope/demo_in_context", overrides)

"""MLPs of layers as levels: which belongs where, when each is stepped, and which settings are refused."""

import pytest
import torch
from pydantic import ValidationError

from nested_lm.config.layer_levels import LayerLevels
from nested_lm.config.model import ModelConfig
from nested_lm.config.train import AdamW
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock

PERIODS = [32, 64, 128]


def channel(*, periods=PERIODS, **settings):
    levels = [{"period_tokens": period} for period in periods]
    return {"kind": "layer_levels", "hidden": 20, "levels": levels} | settings


def config(num_layers=5, **settings):
    return ModelConfig.model_validate(
        {
            "vocab_size": 31,
            "width": 8,
            "num_layers": num_layers,
            "mixer": {"kind": "attention", "num_heads": 2},
            "channel": channel(**settings),
        }
    )


@pytest.mark.parametrize(
    ("levels", "layers", "expected"),
    [(1, 3, (0, 0, 0)), (3, 3, (0, 1, 2)), (3, 5, (0, 0, 1, 1, 2)), (3, 16, (0,) * 6 + (1,) * 5 + (2,) * 5)],
)
def test_layers_are_cut_into_runs_with_the_fastest_level_at_the_bottom(levels, layers, expected):
    found = LayerLevels.model_validate(channel(periods=PERIODS[:levels])).levels_of_layers(layers)
    assert found == expected


def test_the_mlp_and_its_norm_have_the_level_of_their_layer_and_nothing_else_has_one():
    roles = LanguageModel(config(assignment=[2, 0, 1, 0, 2])).parameter_roles()
    for layer, level in enumerate([2, 0, 1, 0, 2]):
        assert roles[f"blocks.{layer}.channel.mlp.gate_and_in.weight"] == ("matrix", level)
        assert roles[f"blocks.{layer}.channel.mlp.out.weight"] == ("matrix", level)
        assert roles[f"blocks.{layer}.channel.norm.weight"] == ("vector", level)
    assert {name for name, role in roles.items() if role.level is not None} == {
        name for name in roles if ".channel." in name
    }


def test_each_layer_is_stepped_by_the_clock_of_its_level():
    model = LanguageModel(config(num_layers=3))
    model.initialise(0)
    parameters = dict(model.named_parameters())
    settings = AdamW(kind="adamw", rate=1e-2)
    groups = plan_groups(parameters, model.parameter_roles(), settings)
    optimizer = ClockedOptimizer(parameters, groups, LevelClock(model.config.channel.periods), settings)
    names = [f"blocks.{layer}.channel.mlp.out.weight" for layer in range(3)]
    changed = {name: [] for name in [*names, "blocks.0.mixer.qkv.weight"]}
    for step in range(1, 5):
        before = {name: parameters[name].detach().clone() for name in changed}
        ids = torch.randint(0, 31, (1, 33))
        token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean().backward()
        optimizer.step(32 * step, 1.0)
        for name in changed:
            if not torch.equal(parameters[name], before[name]):
                changed[name].append(step)
    assert list(changed.values()) == [[1, 2, 3, 4], [2, 4], [4], [1, 2, 3, 4]]


def test_the_model_is_a_transformer_of_the_same_weights():
    ids = torch.randint(0, 31, (2, 11))
    levels = LanguageModel(config())
    levels.initialise(3)
    plain = config().model_dump() | {"channel": {"kind": "swiglu", "expansion": 2.5}}
    transformer = LanguageModel(ModelConfig.model_validate(plain))
    transformer.load_state_dict(levels.state_dict(), strict=True)
    assert torch.equal(levels(ids).logits, transformer(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 2}, "3 levels for 2 layers; .* leave 1 out"),
        ({"assignment": [0, 1, 2]}, "names the levels of 3 layers, the model has 5"),
        ({"assignment": [0, 0, 1, 1, 3]}, r"uses the levels \[0, 1, 3\]; it must use each of 0 to 2"),
        ({"assignment": [0, 0, 0, 1, 1]}, r"uses the levels \[0, 1\]; it must use each of 0 to 2"),
        ({"periods": [32, 48]}, "48 is not a multiple of 32"),
        ({"periods": []}, "at least 1 item"),
        ({"hidden": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_levels_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        config(**settings)

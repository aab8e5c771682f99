"""The first value that is not finite is found: its layer, part, memory, row and token."""

import dataclasses

import pytest
import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import locate_nonfinite
from nested_lm.nn.state import map_tensors
from tests.nn.in_context_models import settings
from tests.nn.test_model import HOPE, TRANSFORMER, tokens


def build(settings):
    model = LanguageModel(ModelConfig.model_validate(settings))
    model.initialise(0)
    return model.eval()


@pytest.mark.parametrize("settings", [HOPE, TRANSFORMER], ids=["hope", "transformer"])
def test_a_sound_model_has_nothing_to_name(settings):
    assert locate_nonfinite(build(settings), tokens(2, 19)) is None


@pytest.mark.parametrize(("part", "layer"), [("mixer", 0), ("channel", 1), ("norm", 1)])
def test_layer_part_row_and_token_are_named(part, layer):
    model = build(HOPE)
    target = getattr(model.blocks[layer], part)
    spoiled_token = 9

    def hook(_module, given, output):
        # The tokens of a part are told by what the embedding was given, since the replay reads some of them again.
        here = [t for t in range(place[0], place[0] + place[1]) if t == spoiled_token]
        if not here:
            return output
        values = (output[0] if isinstance(output, tuple) else output).clone()
        values[1, here[0] - place[0]] = float("inf")
        return (values, *output[1:]) if isinstance(output, tuple) else values

    place = [0, 0]
    original = model.forward

    def forward(ids, *, resets=None, state=None):
        place[:] = [0 if state is None else state.position, ids.shape[1]]
        return original(ids, resets=resets, state=state)

    model.forward = forward
    target.register_forward_hook(hook)
    found = locate_nonfinite(model, tokens(2, 19))
    assert (found.layer, found.part, found.row, found.token) == (layer, part, 1, spoiled_token)
    assert found.stream_position == spoiled_token
    assert f"layer {layer}, {part}" in str(found)
    assert "row 1, token 9 (token 9 of the stream)" in str(found)


@pytest.mark.parametrize("memory", ["k", "v", "memory"])
def test_the_memory_that_overflows_is_named(memory):
    """A fast weight near the largest float overflows when the next token is written."""
    model = build(HOPE)
    index = model.blocks[1].mixer.rule.adapt.index(memory)
    state = model(tokens(2, 5)).state
    huge = state.layers[1].memory.current.inner.clone()
    huge[1, 0, index] = 3e38
    layer = state.layers[1]
    broken = layer._replace(memory=layer.memory._replace(current=layer.memory.current._replace(inner=huge)))
    state = dataclasses.replace(state, layers=(state.layers[0], broken))
    found = locate_nonfinite(model, tokens(2, 12), state=state)
    assert (found.layer, found.row, found.part) == (1, 1, "mixer")
    assert memory in found.memories
    assert found.stream_position == 5 + found.token
    assert f"layer 1, mixer, memory {memory}" in str(found)


def test_a_parameter_is_named_before_anything_else():
    model = build(HOPE)
    with torch.no_grad():
        model.blocks[1].mixer.out.weight[0, 0] = float("nan")
    assert "parameter blocks.1.mixer.out.weight" in str(locate_nonfinite(model, tokens(1, 8)))


def test_a_state_that_came_in_bad_is_named():
    model = build(HOPE)
    state = model(tokens(1, 6)).state.map(
        lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor
    )
    assert "the state before the first token, layer 0, memory.border.inner" in str(
        locate_nonfinite(model, tokens(1, 4), state=state)
    )


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("mixer", ["attention", "self_modifying"])
def test_the_in_context_level_that_overflows_is_named(level, mixer):
    """A write of endless size; the token after the level's period is the first to read it."""
    model = build(settings(mixer))
    model.writer.levels = tuple(
        dataclasses.replace(written, rate=float("inf") if written.level == level else 0.0)
        for written in model.writer.levels
    )
    found = locate_nonfinite(model, tokens(2, 19) % 23)
    period = {0: 4, 2: 8}[level]
    assert (found.layer, found.part, found.levels, found.token) == (0, "channel", (level,), period)
    assert f"in-context level {level}" in str(found)


def test_gradients_that_wait_for_a_slow_level_are_named():
    model = build(settings())
    state = model(tokens(2, 6) % 23).state
    levels = state.in_context.levels
    spoiled = levels[1]._replace(pending=map_tensors(levels[1].pending, lambda tensor: tensor * float("nan")))
    state = dataclasses.replace(state, in_context=state.in_context._replace(levels=(levels[0], spoiled)))
    assert "in-context levels, levels.1.pending" in str(locate_nonfinite(model, tokens(2, 3) % 23, state=state))

"""What a mixer says about itself is all that the model goes by."""

import math
from typing import Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nested_lm.config.mixers import MixerSection
from nested_lm.nn.block import Block
from nested_lm.nn.channels.swiglu import ResidualSwiGLU
from nested_lm.nn.mixers import registry
from nested_lm.nn.mixers.base import Mixer, zeros_for
from nested_lm.nn.part import kinds
from nested_lm.nn.starts import check_starts
from tests.nn.test_model import HOPE_IN_TORCH, TRANSFORMER, build, tokens


class Averaging(MixerSection):
    kind: Literal["averaging"] = "averaging"


class Average(Mixer):
    """Running mean, with names of its own for everything."""

    roles = {"table": "matrix", "first": "memory"}  # noqa: RUF012

    def __init__(self, width, config, *, epsilon, recompute):
        super().__init__()
        self.project = nn.Linear(width, width, bias=False)
        self.back = nn.Linear(width, width, bias=False)
        self.table = nn.Parameter(torch.zeros(width, 2))
        self.first = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(2, width))

    def output_projections(self):
        return [self.back]

    def initial_state(self, batch_size):
        return zeros_for(self.first, batch_size, len(self.first))

    def forward(self, x, context, state):
        total = self.project(x).cumsum(1) + state[:, None]
        return self.back(total), total[:, -1], {}


class TestAMixerOfOnesOwn:
    @pytest.fixture
    def mixer(self, monkeypatch):
        monkeypatch.setitem(registry.MIXERS, Averaging, Average)
        return registry.build_mixer(Averaging(), 64, epsilon=1e-6, recompute=False)

    def test_its_parameters_have_the_roles_it_says(self, mixer):
        assert kinds(mixer) == {
            "table": "matrix",
            "first": "memory",
            "scale": "vector",
            "project.weight": "matrix",
            "back.weight": "matrix",
        }

    def test_the_projection_back_starts_smaller_whatever_its_name(self, mixer):
        block = Block(64, mixer, ResidualSwiGLU(64, 64, level=None, epsilon=1e-6), epsilon=1e-6)
        block.initialise(lambda tensor, std: tensor.normal_(std=std), residual=0.1)
        start = 1 / math.sqrt(64)
        assert float(mixer.project.weight.detach().std()) == pytest.approx(start, rel=0.1)
        assert float(mixer.back.weight.detach().std()) == pytest.approx(0.1 * start, rel=0.1)

    def test_one_that_does_not_say_cannot_be_built(self):
        class Silent(Mixer):
            def initial_state(self, batch_size):
                return ()

            def forward(self, x, context, state):
                return x, state, {}

        with pytest.raises(TypeError, match="output_projections"):
            Silent()


class Waits(TorchDispatchMode):
    """Counts the looks at a value, each of which makes the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [HOPE_IN_TORCH, TRANSFORMER], ids=["hope", "transformer"])
def test_layers_do_not_wait_for_the_device(settings):
    """Only the check of document starts looks at values, once, on the host."""
    counts = []
    for num_layers in (1, 3):
        model, ids = build(settings | {"num_layers": num_layers}), tokens(2, 16)
        resets = torch.zeros(2, 16, dtype=torch.bool)
        resets[0, 8] = True
        with Waits() as waits:
            model(ids, resets=resets).logits.square().mean().backward()
        counts.append(waits.count)
    with Waits() as waits:
        check_starts(resets, position=0, tokens=16, alignment=8)
    assert counts == [waits.count, waits.count]


def test_starts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"booleans of shape \(B, 4\).*torch.int64"):
        check_starts(torch.zeros(2, 4, dtype=torch.long), position=0, tokens=4, alignment=1)

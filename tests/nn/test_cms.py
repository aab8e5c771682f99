"""The Continuum Memory System's chain (eq. 70): order, residuals, and what an erased level does."""

import pytest
import torch

from nested_lm.config.channels import Level
from nested_lm.nn.channels.cms import ContinuumMemory
from nested_lm.nn.layers import squared_relu


def chain():
    levels = (Level(period_tokens=4, expansion=2.0), Level(period_tokens=8, expansion=0.5))
    memory = ContinuumMemory(6, levels, wiring="sequential", gated=False, epsilon=1e-6).double()
    for index, parameter in enumerate(memory.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return memory


def mlp(level, x):
    """relu(W_in norm(x))^2 through W_out, written out."""
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * level.norm.weight
    return (normed @ level.inner.weight.T).clamp_min(0).square() @ level.out.weight.T


def test_the_faster_level_comes_first_and_each_adds_to_its_input():
    memory = chain()
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    fast, slow = memory.levels
    first = x + mlp(fast, x)
    torch.testing.assert_close(memory(x, {}), first + mlp(slow, first))
    assert (fast.inner.out_features, slow.inner.out_features) == (12, 3)


def test_an_erased_level_is_the_identity():
    memory = chain()
    torch.nn.init.zeros_(memory.levels[0].out.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(memory(x, {}), x + mlp(memory.levels[1], x))


def test_independent_levels_read_the_same_input_and_are_summed_with_weights():
    levels = (Level(period_tokens=4, expansion=2.0), Level(period_tokens=8, expansion=0.5))
    memory = ContinuumMemory(6, levels, wiring="independent", gated=False, epsilon=1e-6).double()
    for index, parameter in enumerate(memory.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    fast, slow = memory.levels
    weights = memory.weights.detach()
    torch.testing.assert_close(memory(x, {}), x + weights[0] * mlp(fast, x) + weights[1] * mlp(slow, x))
    torch.nn.init.zeros_(fast.out.weight)
    torch.testing.assert_close(memory(x, {}), x + weights[1] * mlp(slow, x))
    memory.initialise()
    assert memory.weights.tolist() == [1.0, 1.0]
    assert [memory.level_of(name) for name in ("weights", "levels.1.norm.weight")] == [None, 1]


def test_any_number_of_levels_is_a_longer_chain():
    levels = tuple(Level(period_tokens=2**i, expansion=1.0) for i in range(7))
    memory = ContinuumMemory(6, levels, wiring="nested", gated=False, epsilon=1e-6).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = x
    for level in memory.levels:
        expected = expected + mlp(level, expected)
    torch.testing.assert_close(memory(x, {}), expected)


def test_gated_levels_multiply_a_gate_and_a_value():
    levels = (Level(period_tokens=4, expansion=2.0), Level(period_tokens=8, expansion=0.5))
    memory = ContinuumMemory(6, levels, wiring="sequential", gated=True, epsilon=1e-6).double()
    for index, parameter in enumerate(memory.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    x = expected = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for level in memory.levels:
        hidden = level.norm(expected) @ level.inner.weight.T
        gate, value = hidden.split(level.out.in_features, dim=-1)
        expected = expected + (gate * gate.sigmoid() * value) @ level.out.weight.T
    torch.testing.assert_close(memory(x, {}), expected)


class TestSquaredReLU:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_value_and_gradient_are_those_of_the_two_operations(self, dtype):
        x = torch.randn(64, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
        x[0], x[1] = 0.0, 1e-30  # at the corner, and where the square of a float32 is 0
        x.requires_grad_()
        found, expected = squared_relu(x), torch.relu(x).square()
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=1e-19)

    def test_derivatives_of_both_orders(self):
        x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        assert torch.autograd.gradcheck(squared_relu, (x,))
        assert torch.autograd.gradgradcheck(squared_relu, (x,))
        corner = torch.zeros(3, requires_grad=True)
        (gradient,) = torch.autograd.grad(squared_relu(corner).sum(), corner, create_graph=True)
        assert torch.equal(torch.autograd.grad(gradient.sum(), corner)[0], torch.zeros(3))

    def test_only_the_result_is_kept(self):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
            squared_relu(torch.randn(6, 5, requires_grad=True))
        assert kept == [(6, 5)]

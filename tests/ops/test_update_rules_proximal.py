"""Delta Gradient Descent against the argmin it stands for."""

import pytest
import torch
from torch.autograd import gradcheck

from nested_lm.ops.update_rules.base import Layer
from nested_lm.ops.update_rules.proximal import proximal_step, proximal_step_from_moments, proximal_step_one_row
from nested_lm.ops.update_rules.registry import make_rule

EXACT = 1e-12  # float64: the same minimum, reached in another way


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def argmin(weights, inputs, output_gradients, rate):
    """Solve eq. 56 as a least-squares problem: rows of W x = u, and of W = W_0 with weight 1 / rate."""
    identity = torch.eye(weights.shape[1], dtype=torch.float64) / rate**0.5
    left = torch.cat([inputs, identity])
    right = torch.cat([-output_gradients, weights.T / rate**0.5])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


@pytest.mark.parametrize("norm", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("rate", [0.05, 0.7, 5.0])
class TestOneRow:
    def problem(self, norm):
        x = draw(1, 6, seed=1)
        return draw(4, 6), norm * x / x.norm(), draw(1, 4, seed=2)

    def test_every_form_is_the_argmin(self, norm, rate):
        weights, x, g = self.problem(norm)
        exact = argmin(weights, x, g, rate)
        assert (proximal_step_one_row(weights, x[0], g[0], rate=rate) - exact).abs().max() < EXACT
        assert (proximal_step(weights, x, g, rate=rate) - exact).abs().max() < EXACT
        assert (proximal_step_from_moments(weights, x.T @ x, g.T @ x, rate=rate) - exact).abs().max() < EXACT

    def test_the_printed_rate_holds_for_unit_inputs_only(self, norm, rate):
        weights, x, g = self.problem(norm)
        printed = rate / (1 + rate)
        step = weights - printed * (weights @ x.T + g.T) @ x
        error = (step - argmin(weights, x, g, rate)).abs().max()
        assert (error < EXACT) == (norm == 1.0)


@pytest.mark.parametrize("rows", [1, 3, 6, 20])
@pytest.mark.parametrize("rate", [0.05, 5.0])
def test_rows_are_solved_together(rows, rate):
    weights, x, g = draw(4, 6), draw(rows, 6, seed=1), draw(rows, 4, seed=2)
    exact = argmin(weights, x, g, rate)
    assert (proximal_step(weights, x, g, rate=rate) - exact).abs().max() < 10 * EXACT
    assert (proximal_step_from_moments(weights, x.T @ x, g.T @ x, rate=rate) - exact).abs().max() < 10 * EXACT


def test_the_objective_is_stationary():
    weights, x, g, rate = draw(4, 6), draw(5, 6, seed=1), draw(5, 4, seed=2), 0.7
    new = proximal_step(weights, x, g, rate=rate).requires_grad_()
    objective = 0.5 * (x @ new.T + g).square().sum() + (new - weights).square().sum() / (2 * rate)
    (slope,) = torch.autograd.grad(objective, new)
    assert slope.abs().max() < EXACT


def test_by_hand():
    """W = 2, x = 2, g = 1, rate 0.5: rate' = 0.5 / 3, W' = 2 - (4 + 1) 2 / 6."""
    one = torch.tensor([1.0], dtype=torch.float64)
    new = proximal_step_one_row(2 * one.view(1, 1), 2 * one, one, rate=0.5)
    assert new.item() == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize("rows", [2, 7])
def test_a_batch_is_so_many_problems(rows):
    weights, x, g = draw(3, 4, 5), draw(3, rows, 5, seed=1), draw(3, rows, 4, seed=2)
    rates = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    together = proximal_step(weights, x, g, rate=rates.view(3, 1, 1))
    one_row = proximal_step_one_row(weights, x[:, 0], g[:, 0], rate=rates.view(3, 1, 1))
    for b in range(3):
        alone = proximal_step(weights[b], x[b], g[b], rate=rates[b])
        torch.testing.assert_close(together[b], alone, rtol=EXACT, atol=EXACT)
        alone = proximal_step_one_row(weights[b], x[b, 0], g[b, 0], rate=rates[b])
        torch.testing.assert_close(one_row[b], alone, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rows", [2, 6])
def test_derivatives(rows):
    inputs = [draw(3, 4), draw(rows, 4, seed=1), draw(rows, 3, seed=2), torch.tensor(0.3, dtype=torch.float64)]

    def step(weights, x, g, rate):
        return proximal_step(weights, x, g, rate=rate)

    assert gradcheck(step, [value.requires_grad_() for value in inputs])


def test_rate_zero_keeps_the_weights_and_large_rates_stay_bounded():
    weights, x, g = draw(4, 6), draw(3, 6, seed=1), draw(3, 4, seed=2)
    assert torch.equal(proximal_step(weights, x, g, rate=0.0), weights)
    far = proximal_step(weights, x, g, rate=1e6)
    torch.testing.assert_close(x @ far.T, -g, rtol=1e-4, atol=1e-4)  # the targets are met


def test_bfloat16_is_solved_in_float32():
    weights, x, g = draw(4, 6).bfloat16(), draw(9, 6, seed=1).bfloat16(), draw(9, 4, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        new = proximal_step(weights, x, g, rate=0.5)
    exact = argmin(weights.double(), x.double(), g.double(), 0.5)
    assert new.dtype == torch.bfloat16
    torch.testing.assert_close(new.double(), exact, rtol=2**-8, atol=1e-5)


class TestRule:
    """The same step as an update rule of weights that may lie beside a learned part."""

    def problem(self, *batch):
        x, g = draw(*batch, 5, 6, seed=1), draw(*batch, 5, 4, seed=2)
        return draw(*batch, 4, 6), x, g

    def update(self, erase, weights, x, g, *, learned=None, rate=0.7):
        rule = make_rule("dgd", {"erase": erase})
        new, state = rule.update(
            weights, g.mT @ x, rule.initial_state(weights), rate=rate, layer=Layer(x.mT @ x, learned)
        )
        assert state == rule.initial_state(weights)
        return new

    @pytest.mark.parametrize("rate", [0.05, 5.0])
    def test_it_is_the_argmin_for_what_is_erased(self, rate):
        weights, x, g = self.problem()
        learned = draw(4, 6, seed=3)
        exact = argmin(weights, x, g, rate)
        for erase, beside in (("written", learned), ("written", None), ("whole", None)):
            found = self.update(erase, weights, x, g, learned=beside, rate=rate)
            assert (found - exact).abs().max() < 10 * EXACT
        found = self.update("whole", weights, x, g, learned=learned, rate=rate)
        assert (learned + found - argmin(learned + weights, x, g, rate)).abs().max() < 10 * EXACT

    def test_a_batch_is_so_many_problems(self):
        weights, x, g = self.problem(3)
        together = self.update("whole", weights, x, g, learned=draw(4, 6, seed=3))
        for b in range(3):
            alone = self.update("whole", weights[b], x[b], g[b], learned=draw(4, 6, seed=3))
            assert (together[b] - alone).abs().max() < 10 * EXACT

    def test_a_large_rate_reaches_the_targets_and_goes_no_further(self):
        weights, x, g = self.problem()
        found = self.update("written", weights, x, g, rate=1e8)
        assert (x @ found.mT + g).abs().max() < 1e-5

    @pytest.mark.parametrize("erase", ["written", "whole"])
    def test_derivatives_reach_everything(self, erase):
        rule = make_rule("dgd", {"erase": erase})

        def new(weights, x, g, learned, rate):
            given = rule.initial_state(weights)
            return rule.update(weights, g.mT @ x, given, rate=rate, layer=Layer(x.mT @ x, learned))[0]

        inputs = [*self.problem(2), draw(4, 6, seed=3), torch.tensor(0.7, dtype=torch.float64)]
        assert gradcheck(new, [value.requires_grad_() for value in inputs], fast_mode=True)

    def test_what_does_not_fit_is_refused(self):
        weights, x, g = self.problem()
        rule, gradient = make_rule("dgd", {}), g.mT @ x
        state = rule.initial_state(weights)
        with pytest.raises(ValueError, match=r"needs the second moment .* pass layer=Layer\(second_moment\)"):
            rule.update(weights, gradient, state, rate=0.1)
        with pytest.raises(ValueError, match=r"second moment of shape \(6, 6\); got \(4, 6\) and \(5, 5\)"):
            rule.update(weights, gradient, state, rate=0.1, layer=Layer(x @ x.mT))
        with pytest.raises(ValueError, match="GradientDescent does not read the inputs of a layer"):
            make_rule("gd", {}).update(weights, gradient, state, rate=0.1, layer=Layer(x.mT @ x))
        with pytest.raises(ValueError, match="erase is 'all'; it must be 'written' or 'whole'"):
            make_rule("dgd", {"erase": "all"})

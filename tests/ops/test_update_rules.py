"""The update rules: worked numbers, independent forms, properties every rule has."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.autograd import gradcheck

from nested_lm.ops.update_rules.deep import DeepMomentumState, read
from nested_lm.ops.update_rules.momentum import along_gradient
from nested_lm.ops.update_rules.orthogonal import newton_schulz
from nested_lm.ops.update_rules.registry import make_rule

EXACT = 1e-12  # float64: the same formula in another order
BFLOAT16 = 0.03  # torch's Newton-Schulz runs in bfloat16: eight bits, five iterations

VARIANTS = {
    "gd": ("gd", {}),
    "momentum": ("momentum", {"inertia": 0.8}),
    "preconditioned_momentum": ("preconditioned_momentum", {"square_keep": 0.9}),
    "delta_momentum": ("delta_momentum", {"inertia": 0.8, "erase": 0.5}),
    "delta_momentum, preconditioned": ("delta_momentum", {"square_keep": 0.9}),
    "dmgd": ("dmgd", {"hidden": 5, "memory_rate": 0.7}),
    "dmgd, dot, adamw": ("dmgd", {"hidden": 4, "memory_rate": 0.1, "objective": "dot", "scale": "adamw"}),
    "adam": ("adam", {"square_keep": 0.9}),
    "muon": ("muon", {}),
    "muon, no look-ahead": ("muon", {"look_ahead": False, "iterations": 3}),
    "m3": ("m3", {"slow_every": 2}),
    "m3, literal": ("m3", {"mode": "literal", "slow_every": 2, "beta1": 0.5, "beta2": 0.3, "beta3": 0.7}),
}
every_rule = pytest.mark.parametrize(("kind", "settings"), VARIANTS.values(), ids=VARIANTS.keys())


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(rule, weights, gradients, *, rate=0.1, state=None):
    state = rule.initial_state(weights) if state is None else state
    for gradient in gradients:
        weights, state = rule.update(weights, gradient, state, rate=rate)
    return weights, state


@every_rule
class TestEveryRule:
    def test_a_batch_is_so_many_problems(self, kind, settings):
        """Each sequence alone, or joining late: nothing is shared, step counts included."""
        rule = make_rule(kind, settings)
        weights, gradients = draw(3, 4, 6), [draw(3, 4, 6, seed=s) for s in range(1, 6)]
        together, states = run(rule, weights, gradients)
        for b in range(3):
            alone, state = run(rule, weights[b], [g[b] for g in gradients])
            torch.testing.assert_close(together[b], alone, rtol=EXACT, atol=EXACT)
            for many, one in zip(states, state, strict=True):
                torch.testing.assert_close(many[b], one, rtol=EXACT, atol=EXACT)

    def test_a_sequence_that_starts_again_forgets(self, kind, settings):
        rule = make_rule(kind, settings)
        weights = draw(2, 4, 6)
        _, state = run(rule, weights, [draw(2, 4, 6, seed=s) for s in (1, 2, 3)])
        fresh = rule.initial_state(weights)
        is_new = torch.tensor([True, False]).view(2, 1, 1)
        mixed = type(state)(*(torch.where(is_new, new, old) for new, old in zip(fresh, state, strict=True)))
        later = [draw(2, 4, 6, seed=s) for s in (4, 5)]
        result, _ = run(rule, weights, later, state=mixed)
        expected, _ = run(rule, weights[0], [g[0] for g in later])
        torch.testing.assert_close(result[0], expected, rtol=EXACT, atol=EXACT)

    def test_derivatives_pass_through_three_updates(self, kind, settings):
        """Finite differences of the weights after three updates, in gradients, start and rate."""
        rule = make_rule(kind, settings)

        def final(weights, first, second, rate):
            return run(rule, weights, [first, second, first + second], rate=rate)[0]

        inputs = [draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2), torch.tensor(0.3, dtype=torch.float64)]
        assert gradcheck(final, [value.requires_grad_() for value in inputs], fast_mode=True)

    def test_second_order_meta_gradient(self, kind, settings):
        """The outer loss after inner steps whose gradients are differentiated as well (MAML)."""
        rule = make_rule(kind, settings)
        x, y = draw(5, 4, seed=3), draw(5, 3, seed=4)

        def outer(start):
            weights, state = start, rule.initial_state(start)
            for _ in range(3):
                inner = 0.5 * (torch.tanh(x @ weights.mT) - y).square().sum()
                (gradient,) = torch.autograd.grad(inner, weights, create_graph=True)
                weights, state = rule.update(weights, gradient, state, rate=0.1)
            return (x @ weights.mT - y).square().mean()

        assert gradcheck(outer, draw(3, 4, seed=5).requires_grad_())

    def test_a_zero_gradient_has_finite_derivatives(self, kind, settings):
        rule = make_rule(kind, settings)
        gradient = torch.zeros(3, 4, requires_grad=True)
        weights, _ = run(rule, torch.ones(3, 4), [gradient, gradient])
        assert torch.equal(weights, torch.ones(3, 4))
        (slope,) = torch.autograd.grad(weights.sum(), gradient)
        assert slope.isfinite().all()

    def test_rate_zero_keeps_the_weights(self, kind, settings):
        weights = draw(3, 4)
        after, _ = run(make_rule(kind, settings), weights, [draw(3, 4, seed=s) for s in (1, 2, 3)], rate=0.0)
        assert torch.equal(after, weights)

    def test_a_rate_for_each_sequence(self, kind, settings):
        rule = make_rule(kind, settings)
        weights, gradients = draw(2, 3, 4), [draw(2, 3, 4, seed=s) for s in (1, 2)]
        rates = torch.tensor([0.1, 0.4], dtype=torch.float64)
        both, _ = run(rule, weights, gradients, rate=rates.view(2, 1, 1))
        second, _ = run(rule, weights[1], [g[1] for g in gradients], rate=0.4)
        torch.testing.assert_close(both[1], second, rtol=EXACT, atol=EXACT)

    def test_bfloat16_weights_have_a_float32_state(self, kind, settings):
        rule = make_rule(kind, settings)
        weights = draw(3, 4).bfloat16()
        gradients = [draw(3, 4, seed=s).bfloat16() for s in (1, 2, 3)]
        after, state = run(rule, weights, gradients[:1])
        assert after.dtype == torch.bfloat16
        assert all(leaf.dtype == torch.float32 for leaf in state)
        exact, _ = run(rule, weights.float(), gradients[:1])
        assert torch.equal(after, exact.bfloat16())

    def test_autocast_changes_nothing(self, kind, settings):
        rule = make_rule(kind, settings)
        weights, gradients = draw(8, 8).float(), [draw(8, 8, seed=s).float() for s in (1, 2, 3)]
        plain, _ = run(rule, weights, gradients)
        with torch.autocast("cpu", torch.bfloat16):
            cast, _ = run(rule, weights, gradients)
        assert torch.equal(plain, cast)

    def test_nothing_is_changed_in_place(self, kind, settings):
        rule = make_rule(kind, settings)
        weights, gradient = draw(3, 4), draw(3, 4, seed=1)
        _, state = run(rule, weights, [gradient] * 3)
        before = [t.clone() for t in (weights, gradient, *state)]
        rule.update(weights, gradient, state, rate=0.1)
        assert all(torch.equal(a, b) for a, b in zip(before, (weights, gradient, *state), strict=True))

    def test_steps_descend(self, kind, settings):
        """Against a fixed gradient every rule goes down."""
        gradient = draw(4, 6, seed=1)
        weights, _ = run(make_rule(kind, settings), torch.zeros(4, 6, dtype=torch.float64), [gradient] * 4)
        assert (weights * gradient).sum() < 0

    def test_shapes_that_do_not_fit_are_refused(self, kind, settings):
        rule = make_rule(kind, settings)
        weights = draw(3, 4)
        with pytest.raises(ValueError, match=r"gradient has shape \(4, 3\), the weights \(3, 4\)"):
            rule.update(weights, draw(4, 3), rule.initial_state(weights), rate=0.1)

    def test_a_rule_cannot_be_changed(self, kind, settings):
        rule = make_rule(kind, settings)
        with pytest.raises(FrozenInstanceError):
            rule.inertia = 0.5


def test_gradient_descent_by_hand():
    weights, _ = run(make_rule("gd", {}), torch.tensor([1.0, 2.0]), [torch.tensor([4.0, -2.0])] * 2, rate=0.25)
    assert weights.tolist() == [-1.0, 3.0]


def test_momentum_by_hand():
    weights, state = run(make_rule("momentum", {"inertia": 0.5}), torch.zeros(2), [torch.ones(2)] * 3, rate=1.0)
    assert state.momentum.tolist() == [-1.75, -1.75]  # 1, then 0.5 + 1, then 0.75 + 1
    assert weights.tolist() == [-4.25, -4.25]


@pytest.mark.parametrize("inertia", [0.0, 0.9])
def test_momentum_equals_torch_sgd(inertia):
    parameter = torch.nn.Parameter(draw(3, 4))
    torch_sgd = torch.optim.SGD([parameter], lr=0.1, momentum=inertia)
    gradients = [draw(3, 4, seed=s) for s in range(1, 6)]
    ours, _ = run(make_rule("momentum", {"inertia": inertia}), parameter.detach().clone(), gradients)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        torch_sgd.step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=EXACT, atol=EXACT)


def test_past_gradients_fade_as_the_paper_says():
    """Section 4.2: with inertia 0.9, indices 0 to 6 hold 52%, 0 to 43 hold 99% of the momentum."""
    rule = make_rule("momentum", {"inertia": 0.9})
    shares = []
    for index in range(44):
        gradients = [torch.ones(1)] + [torch.zeros(1)] * index
        shares.append(-run(rule, torch.zeros(1), gradients, rate=0.1)[1].momentum.item())
    assert sum(shares[:7]) == pytest.approx(0.522, abs=5e-4)
    assert sum(shares) == pytest.approx(0.9903, abs=5e-5)


def test_adam_equals_torch_adam():
    parameter = torch.nn.Parameter(draw(3, 4))
    torch_adam = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    rule = make_rule("adam", {"epsilon": 1e-12})
    gradients = [draw(3, 4, seed=s) for s in range(1, 6)]
    ours, _ = run(rule, parameter.detach().clone(), gradients)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        torch_adam.step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-6)  # the count is float32


def test_preconditioned_momentum_by_hand():
    """Constant gradients of any size: P g is their sign, so the step is that of momentum on signs."""
    rule = make_rule("preconditioned_momentum", {"inertia": 0.5})
    weights, _ = run(rule, torch.zeros(2), [torch.tensor([4.0, -1e-3])] * 2, rate=1.0)
    torch.testing.assert_close(weights, torch.tensor([-2.5, 2.5]), rtol=1e-4, atol=0)


def test_delta_momentum_by_hand():
    """A gradient of rank one replaces what was held along it and leaves the rest to fade."""
    rule = make_rule("delta_momentum", {"inertia": 0.5, "erase": 0.5})
    held = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    gradient = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    _, state = rule.update(torch.zeros(2, 2), gradient, type(rule.initial_state(held))(held), rate=0.1)
    torch.testing.assert_close(state.momentum, torch.tensor([[-0.2, 1.0], [0.0, 2.0]]))


def test_delta_momentum_is_the_gradient_of_its_objective():
    """Eq. 49: half of |m u^T - P|^2 with P = I, both terms at one rate and the unit gradient as key."""
    momentum, gradient = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    unit = gradient / gradient.norm()
    value = torch.eye(3, dtype=torch.float64)
    objective = 0.5 * (momentum @ unit.T - value).square().sum()
    (slope,) = torch.autograd.grad(objective, momentum)
    torch.testing.assert_close(slope, along_gradient(momentum, unit) - unit, rtol=EXACT, atol=EXACT)
    rule = make_rule("delta_momentum", {"inertia": 0.9, "erase": 0.4})
    state = type(rule.initial_state(momentum))(momentum)
    _, after = rule.update(torch.zeros_like(momentum), unit, state, rate=0.4)
    # The paper flips the sign of the value term so that W + m descends.
    expected = 0.9 * momentum - 0.4 * slope - 2 * 0.4 * unit
    torch.testing.assert_close(after.momentum, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_both_orders_of_the_erase_product_agree(shape):
    momentum, gradient = draw(*shape), draw(*shape, seed=1)
    expected = momentum @ gradient.T @ gradient
    torch.testing.assert_close(along_gradient(momentum, gradient), expected, rtol=EXACT, atol=EXACT)


def test_delta_momentum_is_bounded_where_the_printed_rule_diverges():
    rule = make_rule("delta_momentum", {})
    gradient = 10 * draw(4, 6)
    state = rule.initial_state(gradient)
    printed = torch.zeros_like(gradient)
    for _ in range(100):
        _, state = rule.update(torch.zeros_like(gradient), gradient, state, rate=0.1)
        printed = printed @ (0.9 * torch.eye(6, dtype=torch.float64) - gradient.T @ gradient) - 0.1 * gradient
    assert state.momentum.norm() <= 0.1 * gradient.norm() / (1 - 0.9)
    assert not printed.norm() < 1e50


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_dmgd_memory_gradient_equals_autograd(objective):
    rule = make_rule("dmgd", {"hidden": 5, "objective": objective, "memory_rate": 0.1})
    unit = draw(2, 7, 4)
    leaves = [draw(2, 5, 4, seed=1), draw(2, 4, 5, seed=2)]
    inner, outer = (leaf.requires_grad_() for leaf in leaves)
    state = DeepMomentumState(inner, outer, draw(2, 5, 4, seed=3))
    answer, _, _ = read(state, unit)
    rows = 0.5 * (answer + unit).square() if objective == "l2" else answer * unit
    loss = rows.sum(dim=-1).mean(dim=-1).sum()
    expected = torch.autograd.grad(loss, (inner, outer))
    for ours, theirs in zip(rule.memory_gradient(state, unit), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def test_dmgd_step_written_out():
    """Two updates by hand: autograd for the memory, and the weights move by the new memory's answer."""
    rule = make_rule("dmgd", {"hidden": 6, "inertia": 0.8, "memory_rate": 0.5})
    weights, gradients = draw(3, 4), [draw(3, 4, seed=1), draw(3, 4, seed=2)]
    ours, _ = run(rule, weights, gradients, rate=0.2)
    start = rule.initial_state(weights).start
    moved, outer = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)

    def memory(rows, moved, outer):
        return torch.nn.functional.silu(rows @ (start + moved).T) @ outer.T / math.sqrt(6)

    for gradient in gradients:
        scale = gradient.square().sum(dim=1).mean().sqrt()
        rows = gradient / scale
        moved, outer = moved.requires_grad_(), outer.requires_grad_()
        loss = 0.5 * (memory(rows, moved, outer) + rows).square().sum(dim=1).mean()
        slopes = torch.autograd.grad(loss, (moved, outer))
        moved = (0.8 * moved - 0.5 * slopes[0]).detach()
        outer = (0.8 * outer - 0.5 * slopes[1]).detach()
        weights = weights + 0.2 * scale * memory(rows, moved, outer)
    torch.testing.assert_close(ours, weights, rtol=EXACT, atol=EXACT)


def test_dmgd_answers_what_comes_back_and_not_what_came_once():
    rule = make_rule("dmgd", {})
    same, zero = draw(12, 1) @ draw(1, 8, seed=1), torch.zeros(12, 8, dtype=torch.float64)
    _, known = run(rule, zero, [same] * 50)
    share = []
    for gradient in (same, draw(12, 8, seed=9)):
        step, _ = rule.update(zero, gradient, known, rate=1.0)
        share.append(-(step * gradient).sum().item() / gradient.square().sum().item())
    assert share[0] > 0.6
    assert share[1] < 0.5 * share[0]


@pytest.mark.parametrize(("objective", "rate"), [("l2", 1.0), ("dot", 0.1)])
def test_dmgd_is_bounded_at_its_largest_rate(objective, rate):
    """Hard gradients: constant of rank one, a single row, rows of very different size."""
    rule = make_rule("dmgd", {"objective": objective, "memory_rate": rate, "hidden": 4})
    zero = torch.zeros(24, 16, dtype=torch.float64)
    one_row = torch.cat([draw(1, 16), torch.zeros(23, 16, dtype=torch.float64)])
    rank_one = draw(24, 1) @ draw(1, 16, seed=1)
    for gradients in (
        [rank_one] * 300,
        [one_row] * 300,
        [draw(24, 16, seed=s) * draw(24, 1).exp() for s in range(300)],
    ):
        state = rule.initial_state(zero)
        for gradient in gradients:
            step, state = rule.update(zero, gradient, state, rate=1.0)
            assert step.norm() < 5 * gradient.norm()


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (64, 64)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    """And keeps the singular vectors, whatever the scale."""
    matrix = 1e-3 * draw(*shape)
    result = newton_schulz(matrix, iterations=5)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    bent = (u.T @ result @ v.T).diagonal()
    large = values / values.norm() > 2e-3  # smaller ones need more iterations
    assert large.float().mean() > 0.9
    assert bent[large].min() > 0.65
    assert bent.max() < 1.22
    torch.testing.assert_close(u @ bent.diag() @ v, result, rtol=1e-9, atol=1e-9)


def test_newton_schulz_of_a_diagonal_by_hand():
    """One iteration on singular values 0.6 and 0.8, whose norm is 1."""
    values = torch.tensor([0.6, 0.8], dtype=torch.float64)
    expected = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    result = newton_schulz(torch.diag(values), iterations=1)
    torch.testing.assert_close(result, torch.diag(expected), rtol=EXACT, atol=EXACT)
    assert torch.equal(newton_schulz(torch.zeros(3, 2), iterations=5), torch.zeros(3, 2))


@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_equals_torch_muon(shape, look_ahead):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    torch_muon = torch.optim.Muon(
        [parameter], lr=0.1, momentum=0.9, nesterov=look_ahead, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    rule = make_rule("muon", {"inertia": 0.9, "look_ahead": look_ahead})
    weights, state = torch.zeros(shape), rule.initial_state(parameter.detach())
    for seed in range(1, 5):
        before = parameter.detach().clone(), weights
        gradient = draw(*shape, seed=seed).float()
        parameter.grad = gradient.clone()
        torch_muon.step()
        weights, state = rule.update(weights, gradient, state, rate=0.1)
        torch.testing.assert_close(state.momentum, torch_muon.state[parameter]["momentum_buffer"], rtol=1e-5, atol=1e-6)
        theirs, ours = parameter.detach() - before[0], weights - before[1]
        assert (ours - theirs).norm() < BFLOAT16 * theirs.norm()


def algorithm_1(start, gradients, *, eta, b1, b2, b3, alpha, epsilon, f, iterations):
    """Algorithm 1 of arXiv 2512.24695, line by line; the range of line 3 is half-open."""

    def orthogonalise(m):
        a, b, c = 3.4445, -4.7750, 2.0315
        if m.norm() == 0:
            return m
        x = m / m.norm()
        for _ in range(iterations):
            x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
        return x

    theta = start
    first, second, v = torch.zeros_like(start), torch.zeros_like(start), torch.zeros_like(start)  # 1
    for k in range(len(gradients) // f + 1):  # 2
        second = second + b3 * sum(gradients[(k - 1) * f : k * f], torch.zeros_like(start)) if k else second  # 3
        slow = orthogonalise(second)  # 4
        for t in range(k * f, min((k + 1) * f, len(gradients))):  # 5
            g = gradients[t]  # 6
            first = first + b1 * g  # 7
            v = v + b2 * g**2  # 8
            fast = orthogonalise(first)  # 9
            theta = theta - eta * (fast + alpha * slow) / torch.sqrt(v + epsilon)  # 10
    return theta


@pytest.mark.parametrize("f", [1, 3, 4, 20])
def test_m3_literal_equals_algorithm_1(f):
    settings = {"beta1": 0.4, "beta2": 0.7, "beta3": 0.6, "slow_weight": 0.5, "slow_every": f, "epsilon": 1e-3}
    start, gradients = draw(4, 6), [draw(4, 6, seed=s) for s in range(1, 11)]
    ours, _ = run(make_rule("m3", {"mode": "literal", **settings}), start, gradients, rate=0.3)
    theirs = algorithm_1(start, gradients, eta=0.3, b1=0.4, b2=0.7, b3=0.6, alpha=0.5, epsilon=1e-3, f=f, iterations=5)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def test_m3_literal_steps_shrink_and_depend_on_the_scale_of_gradients():
    """Why `ema` is the default: sums over sums of squares."""
    rule = make_rule("m3", {"mode": "literal", "epsilon": 1e-12, "slow_every": 50})
    sizes = {}
    for scale in (1.0, 1e-4):
        weights, state = torch.zeros(8, 8, dtype=torch.float64), rule.initial_state(draw(8, 8))
        for t in range(1, 101):
            new, state = rule.update(weights, scale * draw(8, 8, seed=t), state, rate=1.0)
            sizes[scale, t] = (new - weights).square().mean().sqrt().item()
            weights = new
    assert sizes[1.0, 100] < 0.2 * sizes[1.0, 1]
    assert sizes[1e-4, 100] == pytest.approx(1e4 * sizes[1.0, 100], rel=0.01)


def test_m3_ema_steps_have_one_size_whatever_the_scale_and_time():
    rule = make_rule("m3", {"slow_every": 10})
    for scale in (1.0, 1e-6):
        weights, state = torch.zeros(6, 9, dtype=torch.float64), rule.initial_state(draw(6, 9))
        for t in range(1, 31):
            new, state = rule.update(weights, scale * draw(6, 9, seed=t), state, rate=0.5)
            assert (new - weights).square().mean().sqrt().item() == pytest.approx(0.5 * 0.2, rel=1e-9)
            weights = new


def test_m3_ema_memories_by_hand():
    """Constant gradients: the fast mean after t steps, the slow one after whole windows."""
    rule = make_rule("m3", {"beta1": 0.5, "beta2": 0.5, "beta3": 0.5, "slow_every": 2})
    gradient = draw(3, 3)
    _, state = run(rule, torch.zeros_like(gradient), [gradient] * 5)
    torch.testing.assert_close(state.fast, (1 - 0.5**5) * gradient)
    torch.testing.assert_close(state.square, (1 - 0.5**5) * gradient.square())
    torch.testing.assert_close(state.slow, (1 - 0.5**2) * gradient)  # windows of steps 1-2 and 3-4
    torch.testing.assert_close(state.collected, gradient)  # step 5
    torch.testing.assert_close(state.slow_direction, newton_schulz(state.slow, iterations=5))
    assert state.step.item() == 5


@pytest.mark.parametrize("k", [5.0, 20.0])
@pytest.mark.parametrize("bend", [0.5, 1.0])
def test_delta_momentum_settles_first_on_the_toy_problem(k, bend):
    """Eq. 53, psi = r^2 + k (r - theta + bend sin(w r))^2 from (-3.5, 2), until psi stays below 1e-3.

    The paper gives no constants; here w = 1, inertia 0.9 and erase 0.3, and each rule has the best of 200 rates.
    """
    rates = torch.logspace(-4, -0.5, 200, dtype=torch.float64).view(-1, 1, 1)

    def error(r, theta):
        return r - theta + bend * torch.sin(r)

    def steps_until_settled(kind, settings):
        rule = make_rule(kind, settings)
        point = torch.tensor([[-3.5, 2.0]], dtype=torch.float64).expand(200, 1, 2)
        state, settled = rule.initial_state(point), torch.zeros(200)
        for step in range(1, 181):
            r, theta = point.unbind(-1)
            slope_r = 2 * r + 2 * k * error(r, theta) * (1 + bend * torch.cos(r))
            gradient = torch.stack([slope_r, -2 * k * error(r, theta)], dim=-1)
            point, state = rule.update(point, gradient, state, rate=rates)
            r, theta = point.unbind(-1)
            is_low = (r.square() + k * error(r, theta).square() < 1e-3).flatten()
            settled = torch.where(is_low, settled, torch.tensor(float(step)))
        return settled.min().item()

    descent = steps_until_settled("gd", {})
    momentum = steps_until_settled("momentum", {"inertia": 0.9})
    delta = steps_until_settled("delta_momentum", {"inertia": 0.9, "erase": 0.3})
    assert delta < 0.6 * momentum
    assert delta < 0.6 * descent

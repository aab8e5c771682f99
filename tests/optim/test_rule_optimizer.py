"""Deep optimizers as torch optimizers: they equal their rules, and behave like torch's own."""

import io

import pytest
import torch
from torch import nn

from nested_lm.ops.update_rules.registry import make_rule
from nested_lm.optim.rule_optimizer import M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum, RuleOptimizer

CLASSES = {
    "preconditioned_momentum": (PreconditionedMomentum, {"square_keep": 0.9}),
    "delta_momentum": (DeltaMomentum, {"erase": 0.5}),
    "dmgd": (DeepMomentum, {"hidden": 5}),
    "m3": (M3, {"slow_every": 3}),
    "m3 literal": (M3, {"mode": "literal", "slow_every": 3}),
}
every_class = pytest.mark.parametrize(("kind", "make", "settings"), [(k.split()[0], *v) for k, v in CLASSES.items()])


def matrices(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 6), (5, 3))]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def run(optimizer, parameters, first, last):
    for step in range(first, last + 1):
        set_gradients(parameters, step)
        optimizer.step()


@every_class
class TestEveryClass:
    def test_equals_its_rule(self, kind, make, settings):
        parameters = matrices(torch.float64)
        rule = make_rule(kind, settings)
        expected = [p.detach().clone() for p in parameters]
        states = [rule.initial_state(p) for p in expected]
        optimizer = make(parameters, lr=0.02, weight_decay=0.5, **settings)
        for step in range(1, 8):
            set_gradients(parameters, step)
            for index, parameter in enumerate(parameters):
                decayed = expected[index] * (1 - 0.02 * 0.5)
                expected[index], states[index] = rule.update(decayed, parameter.grad, states[index], rate=0.02)
            optimizer.step()
        for parameter, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_saved_state_continues_bit_identically(self, kind, make, settings, dtype):
        whole = matrices(dtype)
        run(make(whole, lr=0.02, **settings), whole, 1, 9)

        first, second = matrices(dtype), matrices(dtype)
        optimizer = make(first, lr=0.02, **settings)
        run(optimizer, first, 1, 4)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = make(second, lr=0.5, **settings)  # lr comes from the state
        other.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            for old, new in zip(first, second, strict=True):
                new.copy_(old)
        run(other, second, 5, 9)
        assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))

    def test_loading_copies(self, kind, make, settings):
        parameters = matrices()
        optimizer = make(parameters, lr=0.02, **settings)
        run(optimizer, parameters, 1, 2)
        saved = optimizer.state_dict()
        before = {k: {n: t.clone() for n, t in s.items()} for k, s in saved["state"].items()}
        others = matrices()
        second = make(others, lr=0.02, **settings)
        second.load_state_dict(saved)
        run(second, others, 3, 5)
        for index, state in before.items():
            assert all(torch.equal(value, saved["state"][index][name]) for name, value in state.items())

    def test_accumulation_is_one_step_on_the_sum(self, kind, make, settings):
        torch.manual_seed(1)
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
        results = []
        for parts in (1, 4):
            weight = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))
            optimizer = make([weight], lr=0.02, **settings)
            for _ in range(3):
                optimizer.zero_grad()
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    ((a @ weight.T - b).square().sum() / 8).backward()
                optimizer.step()
            results.append(weight.detach())
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    def test_bfloat16_parameters_have_a_float32_state(self, kind, make, settings):
        parameters = matrices(torch.bfloat16)
        optimizer = make(parameters, lr=0.02, **settings)
        run(optimizer, parameters, 1, 3)
        for parameter in parameters:
            assert parameter.dtype == torch.bfloat16
            assert all(value.dtype == torch.float32 for value in optimizer.state[parameter].values())

    def test_closure_is_called_once_with_gradients_on(self, kind, make, settings):
        weight = nn.Parameter(torch.ones(4, 6))
        optimizer, calls = make([weight], lr=0.02, **settings), []

        def closure():
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            calls.append(loss.item())
            return loss

        assert optimizer.step(closure).item() == 24.0
        assert calls == [24.0]
        assert not torch.equal(weight.detach(), torch.ones(4, 6))

    def test_parameters_without_gradient_are_left_alone(self, kind, make, settings):
        parameters = matrices()
        set_gradients(parameters[:1], 1)
        before = parameters[1].detach().clone()
        optimizer = make(parameters, lr=0.02, weight_decay=0.1, **settings)
        optimizer.step()
        assert torch.equal(parameters[1], before)
        assert parameters[1] not in optimizer.state

    def test_a_schedule_of_torch_drives_it(self, kind, make, settings):
        parameters = matrices()
        optimizer = make(parameters, lr=1.0, **settings)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        run(optimizer, parameters, 1, 1)
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.5

    def test_sparse_gradients_are_refused(self, kind, make, settings):
        weight = nn.Parameter(torch.ones(4, 6))
        weight.grad = torch.ones(4, 6).to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            make([weight], lr=0.02, **settings).step()

    def test_not_a_number_spreads_as_in_torch(self, kind, make, settings):
        weight = nn.Parameter(torch.ones(4, 6))
        weight.grad = torch.full((4, 6), torch.nan)
        make([weight], lr=0.02, **settings).step()
        assert weight.isnan().any()

    @pytest.mark.parametrize(
        ("change", "message"), [({"lr": -1.0}, "lr is -1.0"), ({"weight_decay": float("inf")}, "weight_decay is inf")]
    )
    def test_bad_rates_are_refused(self, kind, make, settings, change, message):
        with pytest.raises(ValueError, match=message):
            make(matrices(), **{"lr": 0.02, **settings, **change})

    def test_learns_a_linear_map(self, kind, make, settings):
        torch.manual_seed(2)
        target, x = torch.randn(4, 6), torch.randn(64, 6)
        weight = nn.Parameter(torch.zeros(4, 6))
        optimizer = make([weight], lr=0.1, **settings)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (x @ (weight - target).T).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        shrinking = settings.get("mode") == "literal"
        assert losses[-1] < (0.9 if shrinking else 0.5) * losses[0]


def test_a_group_may_have_settings_of_its_own():
    first, second = matrices(torch.float64)
    optimizer = DeltaMomentum([{"params": [first]}, {"params": [second], "inertia": 0.5, "erase": 0.5}], lr=0.1)
    twin = nn.Parameter(second.detach().clone())
    alone = DeltaMomentum([twin], lr=0.1, inertia=0.5, erase=0.5)
    for step in (1, 2, 3):
        set_gradients([first, second], step)
        twin.grad = second.grad.clone()
        optimizer.step()
        alone.step()
    assert torch.equal(second, twin)


def test_a_bad_group_is_refused_and_not_kept():
    optimizer = DeltaMomentum(matrices(), lr=0.1)
    with pytest.raises(ValueError, match=r"DeltaMomentum\.inertia is 2\.0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "inertia": 2.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [DeltaMomentum, DeepMomentum, M3])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_matrix_rules_take_matrices_only(make, shape):
    with pytest.raises(ValueError, match="steps 2-D parameters"):
        make([nn.Parameter(torch.ones(shape))], lr=0.1)


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="cannot step complex parameters"):
        PreconditionedMomentum([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], lr=0.1)


def test_layout_is_that_of_the_state():
    parameters = matrices()
    optimizer = RuleOptimizer(parameters, make_rule("dmgd", {"hidden": 7}), lr=0.1)
    expected = {p: optimizer.state_layout(p) for p in parameters}
    run(optimizer, parameters, 1, 1)
    for parameter in parameters:
        assert {name: value.shape for name, value in optimizer.state[parameter].items()} == expected[parameter]


def test_a_rule_that_reads_inputs_is_refused():
    with pytest.raises(ValueError, match=r"DeltaGradientDescent needs .* class of that name in optim/delta_gradient"):
        RuleOptimizer([torch.nn.Parameter(torch.zeros(2, 3))], make_rule("dgd", {}), lr=0.1)

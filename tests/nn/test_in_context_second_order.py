"""Second-order writes below mixers whose fast backward has no gradient: every mixer, and which code it runs."""

import pytest
import torch

from nested_lm.errors import ConfigError
from nested_lm.nn.layers import StepContext
from nested_lm.nn.model import token_losses
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import front as front_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from tests.nn.in_context_models import MIXERS, build, finite_difference, relative, settings, tokens

LIMIT = 1e-10  # relative, float64

HOPE = MIXERS["self_modifying"]
LMM = HOPE | {"adapt": ["memory"], "targets": "values", "erase": "none", "momentum": "sum", "rates": {"memory": 0.4}}
TITANS = {"num_heads": 2, "num_persistent": 3}
EVERY = {
    "hope": HOPE,
    "lmm": LMM,
    "mac": {"kind": "titans_mac", "segment": 8, "memory": LMM} | TITANS,
    "mag": {"kind": "titans_mag", "window": 6, "memory": HOPE} | TITANS,
    "mal": {"kind": "titans_mal", "window": 6, "memory": LMM} | TITANS,
    "delta_net": {"kind": "delta_net", "num_heads": 2, "head_width": 4, "backend": "auto"},
    "gated_delta_net": {"kind": "gated_delta_net", "num_heads": 2, "head_width": 4},
    "linear_attention": {"kind": "linear_attention", "num_heads": 2, "head_width": 4},
    "sliding_window": MIXERS["attention"] | {"window": 6},
}


def given(mixer, order="second_order", **changes):
    return settings(order=order, rates=(0.003, 0.003), mixer="attention", **changes) | {"mixer": mixer}


@pytest.mark.parametrize("mixer", EVERY.values(), ids=EVERY.keys())
def test_the_gradient_is_that_of_the_loss(mixer):
    found, expected = finite_difference(build(given(mixer)), tokens(2, 21), None)
    assert found == pytest.approx(expected, rel=1e-6)
    first, _ = finite_difference(build(given(mixer, "first_order")), tokens(2, 21), None)
    assert abs(first - expected) > 1e-2 * abs(expected)


@pytest.mark.parametrize("recompute", ["chunk", "block"])
@pytest.mark.parametrize("mixer", [HOPE, EVERY["mac"]], ids=["hope", "mac"])
def test_recomputation_changes_nothing(mixer, recompute):
    ids, found = tokens(2, 21), []
    for kept in ("none", recompute):
        model = build(given(mixer), recompute=kept)
        loss = token_losses(model(ids[:, :-1]).logits, ids[:, 1:]).mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(relative(a, b) < LIMIT for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mixer", EVERY.values(), ids=EVERY.keys())
def test_what_is_differentiated_twice_gives_the_same_numbers(mixer):
    """Outputs and first derivatives of the mixer alone, in the fast form and in that of second-order training."""
    module = build(given(mixer)).blocks[1].mixer
    x = torch.randn(2, 18, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for twice in (False, True):
        context = StepContext(0, None, None, differentiable_twice=twice)
        y, _, _ = module(x, context, module.initial_state(2))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    assert all(relative(a, b) < LIMIT for a, b in zip(*found, strict=True))


@pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C compiler")
class TestWhichCodeRuns:
    @pytest.fixture
    def called(self, monkeypatch):
        """Names of the forms that are called, with what they are asked for."""
        names = []

        def watch(module, function, name):
            original = getattr(module, function)

            def watched(*args, **kwargs):
                names.append(name + " twice" * kwargs.get("differentiable_twice", False))
                return original(*args, **kwargs)

            monkeypatch.setattr(module, function, watched)

        watch(memory_chunked, "self_modify", "torch")
        watch(memory_cpu, "self_modify", "cpu")
        watch(front_cpu, "convolved_units", "front")
        return names

    def test_only_mixers_above_a_write_leave_the_fast_form(self, called):
        build(given(HOPE))(tokens(2, 4))
        assert called == ["front", "cpu", "torch twice"]

    def test_without_training_none_does(self, called):
        with torch.no_grad():
            build(given(HOPE))(tokens(2, 4))
        assert called == ["front", "cpu"] * 2

    def test_first_order_leaves_it_nowhere(self, called):
        build(given(HOPE, "first_order"))(tokens(2, 4))
        assert called == ["front", "cpu"] * 2


@pytest.mark.parametrize(
    ("name", "backend"), [("hope", "cpu"), ("mag", "cpu"), ("delta_net", "fla"), ("linear_attention", "fla")]
)
def test_a_backend_that_cannot_is_an_error_with_the_repair(name, backend):
    mixer = EVERY[name]
    asked = mixer | ({"memory": HOPE | {"backend": backend}} if "memory" in mixer else {"backend": backend})
    module = build(given(asked, "first_order")).blocks[1].mixer
    context = StepContext(0, None, None, differentiable_twice=True)
    with pytest.raises(ConfigError, match=rf"backend is `{backend}`, .* gradients have no gradients.*=auto, or tor"):
        module(torch.zeros(2, 4, 8, dtype=torch.float64), context, module.initial_state(2))

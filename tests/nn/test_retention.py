"""Retention held at 1 (table 6, "w/o weight decay"): what is written never fades, and only erasing forgets."""

import pytest
import torch

from nested_lm.config.mixers import SelfModifying
from nested_lm.nn.layers import StepContext
from nested_lm.nn.mixers.self_modifying import CLOSED, SelfModifyingTitans
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu

WIDTH, HEADS = 12, 2
ADAPT = ("k", "eta", "v", "memory")


def build(**settings) -> SelfModifyingTitans:
    config = SelfModifying(kind="self_modifying", num_heads=HEADS, head_width=6, chunk=4, adapt=ADAPT, **settings)
    mixer = SelfModifyingTitans(WIDTH, config, epsilon=1e-6, recompute=False).double()
    generator = torch.Generator().manual_seed(3)

    def normal(tensor: torch.Tensor, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * deviation)

    mixer.initialise(normal)
    with torch.no_grad():
        for parameter in (*mixer.parameters(),):
            if parameter.dim() == 2 and parameter.shape[1] == WIDTH:
                normal(parameter, WIDTH**-0.5)
    return mixer


def stream(tokens: int = 23) -> torch.Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def run(mixer: SelfModifyingTitans, x: torch.Tensor):
    return mixer(x, StepContext(position=0, resets=None, documents=None), mixer.initial_state(len(x)))


FORMS = [(False, "auto"), (False, "torch"), ("mean", "torch")]


@pytest.mark.parametrize(("momentum", "backend"), FORMS)
def test_it_equals_the_token_by_token_reference_with_a_gate_at_one(momentum, backend, monkeypatch):
    mixer = build(retention="full", momentum=momentum, backend=backend)
    outputs, state, stats = run(mixer, stream())
    gradients = torch.autograd.grad(outputs.square().sum(), list(mixer.parameters()))
    assert stats["decay"].item() == 1.0
    seen = []

    def reference(inputs, *arguments, recompute=False, differentiable_twice=False, **options):
        seen.append(torch.sigmoid(inputs.decay))
        return memory_reference.self_modify(inputs, *arguments, **options)

    for module in (memory_chunked, memory_cpu):
        monkeypatch.setattr(module, "self_modify", reference)
    expected, expected_state, _ = run(mixer, stream())
    assert bool((seen[0] == 1.0).all())
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.memory.current, expected_state.memory.current, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(
        gradients, torch.autograd.grad(expected.square().sum(), list(mixer.parameters())), strict=True
    ):
        assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max() + 1e-12


@pytest.mark.parametrize("momentum", [False, "mean"])
def test_it_equals_a_learned_gate_that_is_held_open_and_needs_no_weights_for_it(momentum):
    full, learned = build(retention="full", momentum=momentum), build(momentum=momentum)
    values = full.state_dict()
    gates = values["gates.weight"].unflatten(0, (-1, HEADS))
    bias = values["gate_bias"].unflatten(0, (-1, HEADS))
    values["gates.weight"] = torch.cat([gates[:1], torch.zeros_like(gates[:1]), gates[1:]]).flatten(0, 1)
    values["gate_bias"] = torch.cat([bias[:1], torch.full_like(bias[:1], CLOSED), bias[1:]]).flatten()
    learned.load_state_dict(values)
    torch.testing.assert_close(run(full, stream())[0], run(learned, stream())[0], rtol=1e-10, atol=1e-12)
    sizes = [sum(p.numel() for p in mixer.parameters()) for mixer in (full, learned)]
    assert sizes[1] - sizes[0] == HEADS * (WIDTH + 1)


def test_a_write_stays_where_a_learned_retention_lets_it_fade():
    quiet = torch.zeros(2, 400, WIDTH, dtype=torch.float64)  # writes nothing: its values are zero
    norms = {}
    for retention in ("learned", "full"):
        mixer = build(retention=retention, erase="none", rates={"memory": 0.5}, decay_horizon_tokens=50)
        written = run(mixer, stream(4))[1]
        before = sum(x.square().sum() for x in written.memory.current).sqrt()
        context = StepContext(position=4, resets=None, documents=None)
        after = sum(x.square().sum() for x in mixer(quiet, context, written)[1].memory.current).sqrt()
        norms[retention] = (after / before).item()
    assert norms["full"] > 3 * norms["learned"]


def test_an_alpha_memory_would_have_nothing_to_decide():
    with pytest.raises(ValueError, match=r"use adapt: \[k, v, memory\], or retention: learned"):
        SelfModifying(kind="self_modifying", num_heads=2, adapt=("k", "alpha", "v", "memory"), retention="full")

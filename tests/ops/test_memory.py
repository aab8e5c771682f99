"""Every backend against the token-by-token reference: outputs, states and every outer gradient, in float64."""

import itertools

import pytest
import torch

from nested_lm.ops import memory_chunked, memory_reference
from nested_lm.ops.memory import (
    GateReadout,
    MemoryInputs,
    MemoryState,
    MemoryWeights,
    WriteRule,
    unit,
    zero_state,
)

LIMIT = 1e-10  # relative, float64: rounding of a few hundred chained products, with room for other machines


def rule(chunk=16, erase="both", read="inclusive", rate_memory=1.0, rate_generators=1.0, chunk_generators=None):
    return WriteRule(chunk, chunk_generators or chunk, erase, read, rate_memory, rate_generators)


def problem(batch=2, tokens=37, heads=2, width=6, hidden=9, seed=0, dtype=torch.float64):
    """Inputs with different content in every row, a learned start and a state that has already been written."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=dtype) * scale).requires_grad_()

    inputs = MemoryInputs(
        unit(normal(batch, tokens, heads, width)).detach().requires_grad_(),
        unit(normal(batch, tokens, heads, width)).detach().requires_grad_(),
        unit(normal(batch, tokens, heads, width)).detach().requires_grad_(),
        normal(batch, tokens, heads),
        (normal(batch, tokens, heads) + 3.0).detach().requires_grad_(),
    )
    start = MemoryWeights(
        normal(heads, 5, hidden, width, scale=width**-0.5),
        normal(heads, 5, width, hidden, scale=0.3 * hidden**-0.5),
    )
    readout = GateReadout(normal(heads, width), normal(heads, width))
    written = MemoryWeights(
        normal(batch, heads, 5, hidden, width, scale=0.1), normal(batch, heads, 5, width, hidden, scale=0.1)
    )
    return inputs, start, readout, MemoryState(written, written)


def run(backend, args, **kwargs):
    """Outputs, end state, and gradients of a fixed random functional of both with respect to every input."""
    inputs, start, readout, state = args
    output = backend.self_modify(inputs, start, readout, state, **kwargs)
    results = [output.reads, *output.state.border, *output.state.current, output.rate, output.decay]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator, dtype=result.dtype) for result in results]
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    leaves = [*inputs, *start, *readout, *state.border]
    gradients = torch.autograd.grad(loss, leaves)
    return results, gradients


def worst(found, expected):
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
@pytest.mark.parametrize("erase", ["both", "input", "none"])
@pytest.mark.parametrize(("chunk", "tokens", "position"), [(1, 7, 0), (4, 13, 3), (16, 37, 5), (40, 43, 0)])
def test_chunked_equals_reference(read, erase, chunk, tokens, position):
    args = problem(tokens=tokens, width=4, hidden=5)
    kwargs = {"rule": rule(chunk, erase, read, 0.9, 0.4), "position": position, "resets": None}
    expected, expected_gradients = run(memory_reference, args, **kwargs)
    found, gradients = run(memory_chunked, args, **kwargs)
    assert worst(found, expected) < LIMIT
    assert worst(gradients, expected_gradients) < LIMIT


@pytest.mark.parametrize(("chunk", "chunk_generators"), [(4, 16), (16, 4), (1, 8), (8, 1), (6, 12)])
@pytest.mark.parametrize("position", [0, 5])
def test_two_chunk_sizes_equal_reference(chunk, chunk_generators, position):
    args = problem(tokens=37, width=4, hidden=5)
    pair = rule(chunk, chunk_generators=chunk_generators, rate_generators=0.5)
    kwargs = {"rule": pair, "position": position, "resets": None}
    expected, expected_gradients = run(memory_reference, args, **kwargs)
    found, gradients = run(memory_chunked, args, **kwargs)
    assert worst(found, expected) < LIMIT
    assert worst(gradients, expected_gradients) < LIMIT


@pytest.mark.parametrize("rates", [(1.0, 1.0), (2.0, 0.2), (0.2, 2.0)])
def test_rates_of_memory_and_generators_are_separate(rates):
    args = problem(tokens=21)
    kwargs = {"rule": rule(8, rate_memory=rates[0], rate_generators=rates[1]), "position": 0, "resets": None}
    expected, expected_gradients = run(memory_reference, args, **kwargs)
    found, gradients = run(memory_chunked, args, **kwargs)
    assert worst(found, expected) < LIMIT
    assert worst(gradients, expected_gradients) < LIMIT


@pytest.mark.parametrize("chunk_generators", [8, 4])
def test_resets_on_borders_equal_reference(chunk_generators):
    args = problem(tokens=24)
    resets = torch.zeros(2, 24, dtype=torch.bool)
    resets[0, 8] = resets[1, 16] = resets[1, 0] = True
    kwargs = {"rule": rule(8, chunk_generators=chunk_generators), "position": 0, "resets": resets}
    expected, expected_gradients = run(memory_reference, args, **kwargs)
    found, gradients = run(memory_chunked, args, **kwargs)
    assert worst(found, expected) < LIMIT
    assert worst(gradients, expected_gradients) < LIMIT


def test_recomputation_changes_nothing():
    args = problem(tokens=20)
    kwargs = {"rule": rule(8), "position": 0, "resets": None}
    expected, expected_gradients = run(memory_chunked, args, **kwargs)
    found, gradients = run(memory_chunked, args, **kwargs, recompute=True)
    for a, b in itertools.chain(zip(found, expected, strict=True), zip(gradients, expected_gradients, strict=True)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [memory_reference, memory_chunked], ids=["reference", "chunked"])
class TestEveryBackend:
    def test_split_anywhere_gives_the_same_stream(self, backend):
        inputs, start, readout, state = problem(tokens=19)
        whole = backend.self_modify(inputs, start, readout, state, rule=rule(8), position=0, resets=None)
        for cut in (1, 5, 8, 11, 18):
            first = backend.self_modify(
                MemoryInputs(*(x[:, :cut] for x in inputs)),
                start,
                readout,
                state,
                rule=rule(8),
                position=0,
                resets=None,
            )
            second = backend.self_modify(
                MemoryInputs(*(x[:, cut:] for x in inputs)),
                start,
                readout,
                first.state,
                rule=rule(8),
                position=cut,
                resets=None,
            )
            assert worst([torch.cat([first.reads, second.reads], dim=1)], [whole.reads]) < LIMIT
            assert worst(second.state.current, whole.state.current) < LIMIT
            assert worst(second.state.border, whole.state.border) < LIMIT

    def test_rows_do_not_see_each_other(self, backend):
        inputs, start, readout, state = problem(tokens=19)
        before = backend.self_modify(inputs, start, readout, state, rule=rule(8), position=0, resets=None)
        changed = MemoryInputs(*(torch.cat([x[:1] + 0.5, x[1:]]) for x in inputs))
        after = backend.self_modify(changed, start, readout, state, rule=rule(8), position=0, resets=None)
        assert not torch.allclose(after.reads[0], before.reads[0])
        assert worst([after.reads[1]], [before.reads[1]]) < 1e-14

    @pytest.mark.parametrize("read", ["inclusive", "exclusive"])
    def test_future_tokens_do_not_change_past_reads(self, backend, read):
        inputs, start, readout, state = problem(tokens=19)
        before = backend.self_modify(inputs, start, readout, state, rule=rule(8, read=read), position=0, resets=None)
        changed = MemoryInputs(*(torch.cat([x[:, :10], x[:, 10:] + 0.3], dim=1) for x in inputs))
        after = backend.self_modify(changed, start, readout, state, rule=rule(8, read=read), position=0, resets=None)
        assert worst([after.reads[:, :10]], [before.reads[:, :10]]) < 1e-14
        assert not torch.allclose(after.reads[:, 10:], before.reads[:, 10:])

    def test_gradient_through_the_writes_is_a_finite_difference(self, backend):
        inputs, start, readout, state = problem(batch=1, tokens=6, heads=1, width=2, hidden=3)

        def reads(*flat):
            out = backend.self_modify(
                MemoryInputs(*flat[:5]),
                MemoryWeights(*flat[5:7]),
                GateReadout(*flat[7:9]),
                state,
                rule=rule(4, rate_generators=0.5),
                position=0,
                resets=None,
            )
            return out.reads

        assert torch.autograd.gradcheck(reads, (*inputs, *start, *readout), fast_mode=True, atol=1e-6, rtol=1e-5)

    def test_zero_rate_writes_nothing_and_keeps_the_start(self, backend):
        inputs, start, readout, _ = problem(tokens=11)
        silent = inputs._replace(rate=torch.full_like(inputs.rate, -1e4))
        state = zero_state(start, 2)
        out = backend.self_modify(silent, start, readout, state, rule=rule(4), position=0, resets=None)
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in out.state.current)


@pytest.mark.parametrize("stream", ["independent", "repeated"])
def test_memory_is_alive_and_bounded_after_8k_tokens(stream):
    inputs, start, readout, _ = problem(batch=1, tokens=8192, heads=1, width=16, hidden=16, dtype=torch.float32)
    if stream == "repeated":
        inputs = MemoryInputs(*(x[:, :1].expand_as(x) for x in inputs))
    inputs = inputs._replace(decay=torch.full_like(inputs.decay, 7.6))
    with torch.no_grad():
        out = memory_chunked.self_modify(
            inputs, start, readout, zero_state(start, 1), rule=rule(16), position=0, resets=None
        )
    for tensor in out.state.current:
        norms = tensor.flatten(3).norm(dim=-1)
        assert torch.isfinite(norms).all()
        assert (norms > 1e-3).all()
        assert (norms < 100).all()

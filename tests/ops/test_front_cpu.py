"""Convolution, silu and unit length in C against torch: results, tails and gradients, in float64."""

import pytest
import torch

from nested_lm.nn.layers import CausalConv
from nested_lm.nn.mixers.self_modifying import convolved_units
from nested_lm.ops.memory.cpu import library as cpu_library

pytestmark = pytest.mark.skipif(cpu_library.reason_missing() is not None, reason="no C compiler")

LIMIT = 1e-12


def results(backend, shape, *, unit_values=True, resets=None, dtype=torch.float64):
    """Everything `convolved_units` gives, and the gradients of a fixed random functional of it."""
    batch, tokens, heads, width, window = shape
    torch.manual_seed(0)
    conv = CausalConv(3 * heads * width, window).to(dtype)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(batch, tokens, 3 * heads * width, dtype=dtype, requires_grad=True)
    tail = torch.randn(batch, window - 1, 3 * heads * width, dtype=dtype, requires_grad=True)
    found = convolved_units(conv, x, tail, resets, num_heads=heads, unit_values=unit_values, backend=backend)
    torch.manual_seed(1)
    loss = sum((part * torch.randn(part.shape, dtype=dtype)).sum() for part in found)
    leaves = [x, tail, conv.weight]
    return [*found, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_equal(one, other, limit=LIMIT):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("unit_values", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 11, 2, 6, 4), (1, 1, 3, 16, 4), (3, 2, 2, 20, 4), (2, 40, 2, 32, 3), (2, 7, 2, 8, 1)]
)
def test_the_c_is_torch(shape, unit_values):
    assert_equal(results("cpu", shape, unit_values=unit_values), results("torch", shape, unit_values=unit_values))


@pytest.mark.parametrize("starts", [[(0, 0)], [(0, 5), (1, 0)], [(0, 9), (0, 10), (1, 3)], [(1, 10)]])
def test_documents_are_not_seen_across_their_start(starts):
    resets = torch.zeros(2, 11, dtype=torch.bool)
    for row, token in starts:
        resets[row, token] = True
    shape = (2, 11, 2, 6, 4)
    assert_equal(results("cpu", shape, resets=resets), results("torch", shape, resets=resets))


def test_threads_and_rows_change_no_bit():
    shape = (3, 17, 2, 8, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results("cpu", shape, dtype=torch.float32)
        torch.set_num_threads(2)
        two = results("cpu", shape, dtype=torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_rows_shorter_than_the_floor_are_not_blown_up():
    conv = CausalConv(12, 2)
    torch.nn.init.ones_(conv.weight)
    x = torch.zeros(1, 3, 12, requires_grad=True)
    tail = torch.zeros(1, 1, 12)
    found = convolved_units(conv, x, tail, None, num_heads=2, unit_values=True, backend="cpu")
    assert all(torch.equal(part, torch.zeros_like(part)) for part in found)
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in found[:3]), x)
    assert gradient.isfinite().all()


def test_a_value_that_is_not_finite_stays_visible():
    x = torch.randn(1, 4, 12)
    x[0, 2, 5] = float("nan")
    conv = CausalConv(12, 2)
    torch.nn.init.ones_(conv.weight)
    query, key, value, _ = convolved_units(
        conv, x, torch.zeros(1, 1, 12), None, num_heads=2, unit_values=True, backend="cpu"
    )
    assert key[0, 2, 0].isnan().any()
    assert query.isfinite().all()
    assert value.isfinite().all()

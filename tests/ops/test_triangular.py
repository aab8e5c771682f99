"""The triangular solve: against torch, its backward against finite differences, and on the hardest keys."""

import pytest
import torch

from nested_lm.ops.triangular import unit_lower_inverse, unit_lower_solve


@pytest.mark.parametrize("size", [1, 3, 16, 17, 31, 48, 64, 100])
def test_inverse_of_any_size(size):
    lower = torch.randn(3, size, size, dtype=torch.float64).tril(-1) / size**0.5
    product = unit_lower_inverse(lower) @ (torch.eye(size, dtype=torch.float64) + lower)
    torch.testing.assert_close(
        product, torch.eye(size, dtype=torch.float64).expand(3, -1, -1), atol=1e-11, rtol=0
    )


def test_entries_above_the_diagonal_are_ignored():
    lower = torch.randn(2, 20, 20, dtype=torch.float64)
    assert torch.equal(unit_lower_inverse(lower), unit_lower_inverse(lower.tril(-1)))


def test_backward_is_a_finite_difference_also_when_the_factor_is_shared():
    lower = (torch.randn(2, 1, 18, 18, dtype=torch.float64).tril(-1) * 0.3).requires_grad_()
    right = torch.randn(2, 3, 18, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: unit_lower_solve(a.tril(-1), b), (lower, right))


def test_identical_keys_lose_no_digits_in_float32():
    size = 64
    lower = torch.ones(1, size, size).tril(-1) * 0.95  # the same unit key 64 times at rate 0.95
    exact = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower.double())
    assert (unit_lower_inverse(lower).double() - exact).abs().max() < 1e-5


def test_autocast_does_not_lower_the_precision():
    lower = torch.randn(1, 32, 32).tril(-1) * 0.1
    right = torch.randn(1, 32, 5)
    expected = unit_lower_solve(lower, right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unit_lower_solve(lower, right)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)

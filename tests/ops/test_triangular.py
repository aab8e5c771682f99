"""The triangular inverse: for any size, and on the hardest keys."""

import pytest
import torch

from nested_lm.ops.triangular import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 3, 16, 17, 31, 48, 64, 100])
def test_inverse_of_any_size(size):
    lower = torch.randn(3, size, size, dtype=torch.float64).tril(-1) / size**0.5
    product = unit_lower_inverse(lower) @ (torch.eye(size, dtype=torch.float64) + lower)
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64).expand(3, -1, -1), atol=1e-11, rtol=0)


@pytest.mark.parametrize("size", [5, 20])
def test_gradient_is_a_finite_difference(size):
    lower = (0.3 * torch.randn(2, size, size, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(unit_lower_inverse, (lower,), fast_mode=True)
    assert torch.autograd.gradgradcheck(unit_lower_inverse, (lower,), fast_mode=True)


def test_entries_above_the_diagonal_are_ignored():
    lower = torch.randn(2, 20, 20, dtype=torch.float64)
    assert torch.equal(unit_lower_inverse(lower), unit_lower_inverse(lower.tril(-1)))


def test_identical_keys_lose_no_digits_in_float32():
    size = 64
    lower = torch.ones(1, size, size).tril(-1) * 0.95  # the same unit key 64 times at rate 0.95
    exact = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower.double())
    assert (unit_lower_inverse(lower).double() - exact).abs().max() < 1e-5


def test_precision_of_the_rest_is_left_as_it_was_and_not_used(monkeypatch):
    seen = []
    solve = torch.linalg.solve_triangular

    def spy(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return solve(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "solve_triangular", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        unit_lower_inverse(torch.zeros(32, 32))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "highest"]

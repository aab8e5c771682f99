"""The optimizers against their definitions. The same for every model: they see matrices only.

Shapes: O outputs, I inputs of one weight matrix.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nested_lm.ops.update_rules.orthogonal import M3, QUINTIC, newton_schulz
from nested_lm.ops.update_rules.proximal import proximal_step, proximal_step_one_row
from nested_lm.optim import rule_optimizer
from nested_lm.optim.delta_gradient_descent import DeltaGradientDescent
from nested_lm_lab.audit.finding import Finding, at_most, between
from nested_lm_lab.audit.probe import difference
from nested_lm_lab.audit.subject import Subject

EXACT = 1e-10
"""Relative, float64: a handful of products and one solve."""


def optimizers(_subject: Subject) -> list[Finding]:
    """DGD is the argmin of eq. 56, M3 in literal mode is Algorithm 1, Newton-Schulz brings singular values near 1."""
    low, high = _singular_values()
    return [
        at_most("DGD of one row against the argmin of eq. 56", _dgd(_one_row, rows=1), EXACT),
        at_most("DGD of many rows against the argmin of eq. 56", _dgd(proximal_step, rows=7), EXACT),
        at_most("DGD as a torch optimizer against the argmin of eq. 56", _dgd(_torch_optimizer, rows=7), EXACT),
        at_most("literal M3 against Algorithm 1 line by line, 12 steps", _m3(), EXACT),
        between("smallest singular value after Newton-Schulz", low, 0.65, 1.2),
        between("largest singular value after Newton-Schulz", high, 0.65, 1.2),
    ]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Step(Protocol):
    """A step of DGD from old weights, with the rows read and the loss's gradient for their answers."""

    def __call__(
        self, old: Float[Tensor, "O I"], inputs: Float[Tensor, "T I"], errors: Float[Tensor, "T O"], /, *, rate: float
    ) -> Float[Tensor, "O I"]: ...


def _one_row(old: Tensor, inputs: Tensor, errors: Tensor, /, *, rate: float) -> Tensor:
    return proximal_step_one_row(old, inputs[0], errors[0], rate=rate)


def _torch_optimizer(old: Tensor, inputs: Tensor, errors: Tensor, /, *, rate: float) -> Tensor:
    """The step of a linear layer, gradients accumulated over two backward passes."""
    layer = nn.Linear(old.shape[1], old.shape[0], bias=False, dtype=old.dtype)
    with torch.no_grad():
        layer.weight.copy_(old)
    optimizer = DeltaGradientDescent([layer], lr=rate, reduction="sum")
    half = len(inputs) // 2
    for part in (slice(half), slice(half, None)):
        (layer(inputs[part]) * errors[part]).sum().backward()
    optimizer.step()
    return layer.weight.detach()


def _dgd(step: _Step, *, rows: int) -> float:
    """Worst distance from the minimum that conjugate stationarity gives: solve the normal equations row by row.

    argmin_W  1/2 sum |W x_t - u_t|^2 + 1/(2 rate) |W - W_0|^2 as a least-squares problem of stacked rows, solved by
    orthogonal factorisation: no formula of the code under test is used.
    """
    worst = 0.0
    for seed, (rate, length) in enumerate([(0.05, 0.3), (0.7, 1.0), (5.0, 2.5), (0.7, 2.5)]):
        old, inputs, errors = (
            _normal(4, 6, seed=seed),
            _normal(rows, 6, seed=seed + 10),
            _normal(rows, 4, seed=seed + 20),
        )
        inputs = inputs * (length / inputs.norm(dim=1, keepdim=True))
        stacked = torch.cat([inputs, torch.eye(6, dtype=torch.float64) / rate**0.5])
        wanted = torch.cat([-errors, old.T / rate**0.5])
        expected = torch.linalg.lstsq(stacked, wanted).solution.T
        worst = max(worst, difference(step(old, inputs, errors, rate=rate), expected))
    return worst


def _m3() -> float:
    """Algorithm 1 written out with plain sums, beside the rule as a torch optimizer."""
    settings = {"beta1": 0.9, "beta2": 0.8, "beta3": 0.7, "slow_weight": 0.4, "slow_every": 3, "epsilon": 1e-2}
    weight = torch.nn.Parameter(_normal(5, 4, seed=1))
    expected, rate = weight.detach().clone(), 0.02
    optimizer = rule_optimizer.M3([weight], lr=rate, mode="literal", **settings)
    steps, every = M3().iterations, 3
    fast, slow, square = (torch.zeros_like(expected) for _ in range(3))
    slow_direction = torch.zeros_like(expected)
    window: list[Tensor] = []
    worst = 0.0
    for t in range(12):
        gradient = _normal(5, 4, seed=100 + t)
        if t and t % every == 0:  # lines 3-4, with the window of `slow_every` gradients that just passed
            slow = slow + 0.7 * torch.stack(window[-every:]).sum(0)
            slow_direction = _newton_schulz(slow, steps)
        window.append(gradient)
        fast = fast + 0.9 * gradient  # line 7
        square = square + 0.8 * gradient**2  # line 8
        expected = expected - rate * (_newton_schulz(fast, steps) + 0.4 * slow_direction) / (square + 1e-2).sqrt()
        weight.grad = gradient.clone()
        optimizer.step()
        worst = max(worst, difference(weight.detach(), expected))
    return worst


def _newton_schulz(matrix: Float[Tensor, "O I"], iterations: int) -> Float[Tensor, "O I"]:
    """The quintic acting on singular values: U diag(p(...p(s / |s|))) V^T."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = QUINTIC
    values = values / values.norm()
    for _ in range(iterations):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def _singular_values() -> tuple[float, float]:
    """Smallest and largest, over wide, tall and square matrices whose singular values span a factor of 30."""
    found = []
    for seed, (rows, columns) in enumerate([(8, 20), (20, 8), (16, 16)]):
        left, _ = torch.linalg.qr(_normal(rows, rows, seed=seed))
        right, _ = torch.linalg.qr(_normal(columns, columns, seed=seed + 5))
        size = min(rows, columns)
        values = torch.logspace(-1.5, 0, size, dtype=torch.float64)
        matrix = left[:, :size] @ torch.diag(values) @ right[:size]
        found.append(torch.linalg.svdvals(newton_schulz(matrix, iterations=5)))
    return min(v.min().item() for v in found), max(v.max().item() for v in found)

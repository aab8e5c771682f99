"""Continuum Memory System: a chain of MLPs, each updated on its own clock.

Shapes: B batch, T tokens, D model width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nested_lm.config.channels import Level
from nested_lm.nn.layers import RMSNorm


class LevelMLP(nn.Module):
    """One level: pre-norm MLP with squared ReLU. Its caller adds the residual."""

    def __init__(self, width: int, hidden: int, *, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.inner = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Apply to every token."""
        return self.out(torch.relu(self.inner(self.norm(x))).square())


class ContinuumMemory(nn.Module):
    """Sequential chain, fastest level first; an erased level is the identity because each is a residual.

    The clocks belong to training: the optimizer steps level l every `period_tokens` tokens (clock A).

    Source: arXiv 2512.24695 eq. 70. Norms and residuals, which the paper omits for clarity, are pre-norm residual.
    """

    def __init__(self, width: int, levels: tuple[Level, ...], *, epsilon: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            LevelMLP(width, round(level.expansion * width), epsilon=epsilon) for level in levels
        )

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Pass through the chain."""
        for level in self.levels:
            x = x + level(x)
        return x

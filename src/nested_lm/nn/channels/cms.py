"""Continuum Memory System: MLPs that are each updated on their own clock.

Shapes: B batch, T tokens, L levels, E hidden width of a level, D model width.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.channels import Level
from nested_lm.nn.fast_linear import FastLinear, MLPDistance
from nested_lm.nn.layers import RMSNorm, squared_relu


class LevelMLP(nn.Module):
    """One level: pre-norm MLP, with squared ReLU or gated by silu. Its caller adds the residual.

    gated: `inner` stacks the gate's layer and the value's, so that both are written together.
    """

    def __init__(self, width: int, hidden: int, *, gated: bool, epsilon: float) -> None:
        super().__init__()
        self.gated = gated
        self.norm = RMSNorm(width, epsilon=epsilon)
        self.inner = FastLinear(width, 2 * hidden if gated else hidden)
        self.out = FastLinear(hidden, width)

    def forward(self, x: Float[Tensor, "B T D"], distance: MLPDistance | None = None) -> Float[Tensor, "B T D"]:
        """Apply to every token, with each sequence's own weights where a distance is given."""
        inner, outer = distance or (None, None)
        hidden = self.inner(self.norm(x), inner)
        if not self.gated:
            return self.out(squared_relu(hidden), outer)
        gate, value = hidden.chunk(2, dim=-1)
        return self.out(functional.silu(gate) * value, outer)

    def learned(self) -> tuple[Tensor, Tensor]:
        """Weights of both layers, without any distance."""
        return self.inner.weight, self.out.weight

    def initial_distance(self, batch_size: int) -> MLPDistance:
        """Fast copies that equal the learned weights. The norm's vector has no fast copy."""
        return MLPDistance(self.inner.initial_distance(batch_size), self.out.initial_distance(batch_size))


class ContinuumMemory(nn.Module):
    """Levels in a chain, fastest first, or side by side. An erased level changes nothing: each only adds.

    sequential, nested: x <- x + MLP_l(x), level after level. The two differ in when a level is set back.
    independent: x + sum over levels of weight_l MLP_l(x), with learned weights that are 1 at the start.

    The clocks belong to others: the optimizer steps level l every `period_tokens` training tokens (clock A), and
    `nn/channels/in_context.py` writes its fast copies while the model reads (clock B).

    Source: arXiv 2512.24695 eqs. 70 and 74. Norms and residuals, which the paper omits for clarity, are pre-norm
    residual.
    """

    def __init__(
        self,
        width: int,
        levels: tuple[Level, ...],
        *,
        wiring: Literal["sequential", "nested", "independent"],
        gated: bool,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            LevelMLP(width, round(level.expansion * width), gated=gated, epsilon=epsilon) for level in levels
        )
        self.weights = nn.Parameter(torch.ones(len(levels))) if wiring == "independent" else None  # (L,)

    def forward(self, x: Float[Tensor, "B T D"], distances: Mapping[int, MLPDistance]) -> Float[Tensor, "B T D"]:
        """Apply to every token. distances: of the levels that have fast copies, by level."""
        if self.weights is None:
            for index, level in enumerate(self.levels):
                x = x + level(x, distances.get(index))
            return x
        read = [level(x, distances.get(index)) for index, level in enumerate(self.levels)]
        return x + sum(weight * output for weight, output in zip(self.weights.to(x.dtype), read, strict=True))

    def level_mlps(self) -> dict[int, LevelMLP]:
        """The MLP of each level."""
        return dict(enumerate(self.levels))

    def level_of(self, name: str) -> int | None:
        """Level that a parameter belongs to, by its name in this module; the weights of the sum have none."""
        kind, _, rest = name.partition(".")
        return int(rest.partition(".")[0]) if kind == "levels" else None

    def initialise(self) -> None:
        """Set what is not a matrix or a norm: the weights of the sum."""
        if self.weights is not None:
            nn.init.ones_(self.weights)

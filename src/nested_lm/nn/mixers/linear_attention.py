"""Linear attention: the mixer that sums v k in one matrix a head and reads it with q.

Shapes: B batch, T tokens, H heads, K head width, D model width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nested_lm.config.baselines import LinearAttention as Config
from nested_lm.nn.layers import RMSNorm, StepContext
from nested_lm.nn.mixers.base import Mixer, zeros_for
from nested_lm.nn.mixers.delta_backend import run_recurrence


class LinearAttentionState(NamedTuple):
    """The matrix of each head."""

    matrix: Float[Tensor, "B H K K"]


class LinearAttention(Mixer):
    """out = W_out norm(q S), S the sum of all k v so far; q, k, v = W x.

    Source: arXiv 2512.24695 eqs. 14-18. Deviation: reads are normalised a head, because the sum has no bound (as in
    arXiv 2210.10340, which puts a normalisation in the place of the denominator of arXiv 2006.16236).
    """

    def __init__(self, width: int, config: Config, *, epsilon: float, recompute: bool) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        inner = config.num_heads * config.head_width
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.read_norm = RMSNorm(config.head_width, epsilon=epsilon)
        self.out = nn.Linear(inner, width, bias=False)

    def initial_state(self, batch_size: int) -> LinearAttentionState:
        """Empty matrices."""
        heads, width = self.config.num_heads, self.config.head_width
        return LinearAttentionState(zeros_for(self.qkv.weight, batch_size, heads, width, width))

    def output_projections(self) -> list[nn.Linear]:
        """The projection of what the heads read."""
        return [self.out]

    def forward(
        self, x: Float[Tensor, "B T D"], context: StepContext, state: LinearAttentionState
    ) -> tuple[Float[Tensor, "B T D"], LinearAttentionState, dict[str, Tensor]]:
        """Add every token to the matrices and read them."""
        config = self.config
        query, key, value = self.qkv(x).unflatten(-1, (3, config.num_heads, config.head_width)).unbind(dim=2)
        if config.feature_map == "elu":
            query, key = functional.elu(query) + 1, functional.elu(key) + 1
        if context.frozen:
            value = torch.zeros_like(value)  # adds nothing
        reads, matrix = run_recurrence(
            "linear_attention",
            query,
            key,
            value,
            state=state.matrix,
            resets=context.resets,
            backend=config.backend,
            recompute=self.recompute,
            differentiable_twice=context.differentiable_twice,
        )
        result = self.out(self.read_norm(reads).flatten(2).to(x.dtype))
        return result, LinearAttentionState(matrix), {"fast_norm": matrix_norm(matrix)}


@torch.no_grad()
def matrix_norm(matrix: Float[Tensor, "B H K V"]) -> Float[Tensor, ""]:
    """Mean norm of the matrices."""
    return matrix.float().norm(dim=(-2, -1)).mean()

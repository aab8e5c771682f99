"""A linear layer whose weights may differ from sequence to sequence: learned weights plus a distance from them.

Shapes: B batch, T tokens, I input width, O output width, E hidden width of an MLP, D model width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class MLPDistance(NamedTuple):
    """How far the weights of each sequence's copy of an MLP are from the learned ones.

    inner: of the layer (or the two stacked layers) that reads the model width. outer: of the layer back to it.
    """

    inner: Float[Tensor, "B E D"]
    outer: Float[Tensor, "B D E"]


class FastLinear(nn.Linear):
    """y = x (W + distance)ᵀ, without bias. The distance is an activation: a tensor a sequence, not a parameter.

    Both products are kept apart: a distance that is small beside W would be lost in their sum at low precision.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B T I"], distance: Float[Tensor, "B O I"] | None = None
    ) -> Float[Tensor, "B T O"]:
        """Apply to every token; without a distance this is the learned layer."""
        y = functional.linear(x, self.weight)
        if distance is None:
            return y
        return y + torch.bmm(x, distance.to(x.dtype).transpose(1, 2))

    def initial_distance(self, batch_size: int) -> Float[Tensor, "B O I"]:
        """Copies that equal the learned weights. Kept in float32 at least, since small steps add up in it."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.new_zeros(batch_size, *self.weight.shape, dtype=dtype)

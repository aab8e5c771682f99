"""A linear layer whose weights may differ from sequence to sequence: learned weights plus a distance from them.

Shapes: B batch, T tokens, I input width, O output width, E hidden width of an MLP, D model width.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Watched(NamedTuple):
    """A distance of a layer's weights, and a place in which to find what the layer read.

    moment: zeros. What the backward pass leaves there as their gradient is X^T X, the sum of x xᵀ over the tokens. In
        a tree of gradients these stand in the two places: the gradient of the weights, and X^T X.
    """

    distance: Float[Tensor, "B O I"]
    moment: Float[Tensor, "B I I"]


class MLPDistance(NamedTuple):
    """How far the weights of each sequence's copy of an MLP are from the learned ones.

    inner: of the layer (or the two stacked layers) that reads the model width. outer: of the layer back to it.
    Both are watched where the inner optimizer reads inputs, while the copy is differentiated.
    """

    inner: Float[Tensor, "B E D"] | Watched
    outer: Float[Tensor, "B D E"] | Watched


class FastLinear(nn.Linear):
    """y = x (W + distance)ᵀ, without bias. The distance is an activation: a tensor a sequence, not a parameter.

    Both products are kept apart: a distance that is small beside W would be lost in their sum at low precision.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B T I"], distance: Float[Tensor, "B O I"] | Watched | None = None
    ) -> Float[Tensor, "B T O"]:
        """Apply to every token; without a distance this is the learned layer."""
        y = functional.linear(x, self.weight)
        if distance is None:
            return y
        if isinstance(distance, Watched):
            y = _Watch.apply(y, x, distance.moment)  # type: ignore[no-untyped-call]
            distance = distance.distance
        return y + torch.bmm(x, distance.to(x.dtype).transpose(1, 2))

    def initial_distance(self, batch_size: int) -> Float[Tensor, "B O I"]:
        """Copies that equal the learned weights. Kept in float32 at least, since small steps add up in it."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.new_zeros(batch_size, *self.weight.shape, dtype=dtype)


class _Watch(torch.autograd.Function):
    """Gives y back; the second moment of x comes out of the backward pass as the gradient of `place`.

    So it is found wherever gradients are, with no other way out of the model: under recomputation, for each sequence
    alone, and differentiable itself. Only while the place requires a gradient: the pass of training goes by.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.place = place
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        if not ctx.place.requires_grad:
            return gradient, None, None
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(ctx.place.dtype)
            return gradient, None, wide.mT @ wide

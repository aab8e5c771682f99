"""Reading `memory` as it stands, for all tokens alike: what a segment recalls before it is written.

Shapes: B batch, T tokens, H heads, M memories that adapt, K head width, E hidden width of a memory.

Source: arXiv 2501.00663 eq. 15, y = M*(q): a forward pass without an update.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nested_lm.ops.memory.chunk import normalised_rows
from nested_lm.ops.memory.state import MemoryWeights


def recall(
    query: Float[Tensor, "B T H K"],
    start: MemoryWeights,
    distance: MemoryWeights,
    gain: Float[Tensor, "H M K"] | None,
) -> Float[Tensor, "B T H K"]:
    """M(q) of the last of the memories, without a write. Computed in the dtype of the weights or wider.

    Args:
        start: learned start of all memories.
        distance: of `memory` alone (M = 1) from its start, for each row.
        gain: of normalised memories; None for others.
    """
    dtype = torch.promote_types(query.dtype, start.inner.dtype)
    with torch.autocast(query.device.type, enabled=False):
        given = query.to(dtype).transpose(1, 2)  # (B, H, T, K)
        inner = start.inner[:, -1] + distance.inner[:, :, -1]
        outer = start.outer[:, -1] + distance.outer[:, :, -1]
        hidden = given @ inner.mT
        if not outer.shape[-1]:  # a linear memory
            return hidden.transpose(1, 2)
        branch = functional.silu(hidden) @ outer.mT
        if gain is not None:
            branch = gain[:, -1, None] * normalised_rows(branch)[0]
        return (given + branch).transpose(1, 2)

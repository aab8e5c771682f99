"""The loss of the next token. Shapes: B batch, T tokens, V vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

IGNORED_TARGET = -100


def token_losses(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Negative log-likelihood of each target in nats, in at least float32; 0 where the target is -100."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = functional.cross_entropy(
        logits.flatten(0, 1).to(dtype), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
    )
    return flat.view(targets.shape)

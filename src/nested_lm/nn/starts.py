"""Document starts: checked on the host, where they come from, so that no training step waits for the device.

Shapes: B batch, T tokens, S cached tokens.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def check_starts(
    resets: Bool[Tensor, "B T"] | None, *, position: int, tokens: int, alignment: int
) -> Bool[Tensor, "B T"] | None:
    """Document starts on the host; None when none starts that the state does not already mean.

    Args:
        resets: True at the first token of a document; on the host, or it is copied there once.
        position: tokens of the stream before this call. The first token of a stream always starts a document.
        tokens: of each row.
        alignment: documents start at multiples of this many tokens of the stream.

    Raises:
        ValueError: another shape or type; a document starts inside a chunk, whose writes it would share with the one
            before.
    """
    if resets is None:
        return None
    if resets.dtype != torch.bool or resets.ndim != 2 or resets.shape[1] != tokens:
        raise ValueError(
            f"document starts must be booleans of shape (B, {tokens}), one for each token, and are {resets.dtype} of "
            f"shape {tuple(resets.shape)}"
        )
    starts = resets.cpu()
    if position == 0:
        starts = starts.clone()
        starts[:, 0] = False
    if not starts.any():
        return None
    places = position + torch.arange(tokens)
    inside = starts & (places % alignment != 0)
    if inside.any():
        row, token = (int(index) for index in inside.nonzero()[0])
        raise ValueError(
            f"row {row} starts a document at token {token} of this call (token {int(places[token])} of the stream), "
            f"inside a chunk of {alignment} tokens; start documents at multiples of {alignment}"
        )
    return starts


def number_documents(
    cached: Int[Tensor, "B S"] | None, resets: Bool[Tensor, "B T"] | None, tokens: int
) -> Int[Tensor, "B T"] | None:
    """Number the documents of each row, going on from an attention cache.

    cached: numbers of the cached tokens; None when nothing attends, and then nothing is numbered.
    """
    if cached is None:
        return None
    last = cached[:, -1:] if cached.shape[1] else cached.new_zeros(cached.shape[0], 1)
    if resets is None:
        return last.expand(-1, tokens)
    return last + resets.long().cumsum(dim=1)

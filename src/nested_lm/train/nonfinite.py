"""Finds values that are not finite: in a loss, a gradient, a weight, a score."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nested_lm.errors import NumericsError
from nested_lm.train.strategies.base import Strategy


@dataclass(frozen=True)
class NonFinite:
    """Where the first value that is not finite was found.

    tensor: `loss`, or `gradient of <parameter>`.
    micro_batch, row, position: of the token whose loss it is, in the micro-batch of all ranks; None for gradients,
        which belong to all tokens.
    """

    tensor: str
    micro_batch: int | None = None
    row: int | None = None
    position: int | None = None

    def as_record(self) -> dict[str, Any]:
        """Fields for the metrics log."""
        return asdict(self)


def first_nonfinite_loss(losses: Tensor, *, micro_batch: int) -> NonFinite | None:
    """Find the first token, in reading order, whose loss (B, T) is not finite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if not len(bad):
        return None
    row, position = bad[0].tolist()
    return NonFinite("loss", micro_batch, row, position)


def first_nonfinite_gradient(parameters: Mapping[str, nn.Parameter], strategy: Strategy) -> NonFinite | None:
    """Find the first parameter whose gradient is not finite on some rank."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    mine = [not bool(torch.isfinite(strategy.own(gradient)).all()) for gradient in gradients.values()]
    for name, is_bad in zip(gradients, strategy.reduce(mine, "max"), strict=True):
        if is_bad:
            return NonFinite(f"gradient of {name}")
    return None


def check_weights(tensors: Mapping[str, Tensor], *, step: int, last_good: Path | None) -> None:
    """Refuse to save weights that are not finite, so that retention never drops the last good checkpoint.

    Raises:
        NumericsError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"step {step}: weight {name} is not finite, so no checkpoint was written; "
                f"last good checkpoint: {last_good or 'none yet'}. Lower the learning rate"
            )


def check_scores(scores: Mapping[str, float], *, step: int, last_good: Path | None) -> None:
    """Refuse to record an evaluation that is not finite.

    Raises:
        NumericsError: names the first such score.
    """
    for name, value in scores.items():
        if not math.isfinite(value):
            raise NumericsError(
                f"step {step}: {name} of the evaluation is not finite, though the training loss is; "
                f"last checkpoint: {last_good or 'none yet'}. Look for overflow on longer or unseen documents"
            )

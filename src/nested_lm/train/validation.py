"""Loss on a fixed set of held-out batches while a run trains."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nested_lm.config.run import RunConfig
from nested_lm.data.loader import IGNORED_TARGET, Batch, EvaluationBatch, evaluation_batches
from nested_lm.data.shards import TokenDataset
from nested_lm.data.token_bytes import bytes_per_token
from nested_lm.train.step import GradientComputer
from nested_lm.train.strategies.base import Strategy


class Validator:
    """Scores the same validation batches every time.

    Bits per byte divides by the bytes of exactly the tokens that were scored; the end of a document is scored
    but has no bytes of its own, so that documents of any length compare. Ranks share the batches: each scores every
    world-size-th one.

    batches: fixed, on the CPU.
    token_bytes: bytes that each token id stands for, 0 for the end of text.
    """

    def __init__(self, batches: Sequence[Batch | EvaluationBatch], token_bytes: np.ndarray) -> None:
        scored = [batch.targets[batch.targets != IGNORED_TARGET].numpy() for batch in batches]
        self._batches = list(batches)
        self.num_tokens = sum(len(targets) for targets in scored)
        self.num_bytes = int(sum(token_bytes[targets].sum() for targets in scored))

    def run(
        self, model: nn.Module, computer: GradientComputer, strategy: Strategy, *, is_stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Score all batches; None when asked to stop on the way.

        is_stopped: asked before each batch; says the same on every rank.

        Returns:
            `validation_loss` in nats per token and `validation_bpb` in bits per byte.
        """
        total = 0.0
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for first in range(0, len(self._batches), strategy.world_size):
                    if is_stopped():
                        return None
                    # Every rank must run the model equally often: one without a batch left runs the last one in vain.
                    mine = first + strategy.rank
                    losses = computer.losses(self._batches[min(mine, len(self._batches) - 1)])[0]
                    if mine < len(self._batches):
                        total += losses.sum(dtype=torch.float64).item()
        finally:
            model.train(was_training)
        total = strategy.reduce([total], "sum")[0]
        return {
            "validation_loss": total / self.num_tokens,
            "validation_bpb": total / math.log(2) / self.num_bytes,
        }


def open_validator(config: RunConfig) -> Validator:
    """Choose the validation batches of a run: about `evaluate_tokens`, spread evenly over the split.

    They depend on the data set and the configuration only, so that every resume scores the same.

    Raises:
        DataError: there is no validation text, or its bytes cannot be told from its tokens.
    """
    train = config.train
    dataset = TokenDataset.open(Path(config.data.output_dir), "validation")
    batches = evaluation_batches(
        dataset, train.context_length, train.batch_size, config.document_alignment, train.evaluate_tokens
    )
    return Validator(list(batches), bytes_per_token(dataset))

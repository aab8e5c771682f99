"""Held-out loss on every period after every step: what each update does to what was learned before."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from nested_lm.config.run import RunConfig
from nested_lm.data.chronology import ReadingGroup
from nested_lm.data.loader import IGNORED_TARGET, Batch
from nested_lm.data.packing import Pieces, Placed, fill, pack
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError
from nested_lm.train.hooks.base import Hook
from nested_lm.train.step import GradientComputer

FIELD = "probe/"
"""First part of the names of the fields in a step record: `probe/0` is the loss on the stream's first period."""


class PeriodProbe(Hook):
    """Scores a few fixed rows of each period, all in one batch.

    batch: the rows of all periods, period after period.
    periods: the period of each row, counted in the order of the stream.
    """

    def __init__(self, batch: Batch, periods: np.ndarray, model: nn.Module, scoring: GradientComputer) -> None:
        self._batch, self._periods, self._model, self._scoring = batch, periods, model, scoring

    def fields(self, *, is_logged: bool) -> dict[str, float]:
        """Nats per scored token of each period, in every record of a step."""
        del is_logged
        model = self._model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                losses = self._scoring.losses(self._batch)[0].double().cpu().numpy()
        finally:
            model.train(was_training)
        scored = (self._batch.targets != IGNORED_TARGET).numpy()
        return {
            f"{FIELD}{period}": float(losses[self._periods == period].sum() / scored[self._periods == period].sum())
            for period in range(int(self._periods[-1]) + 1)
        }


def open_probe(
    config: RunConfig, groups: list[ReadingGroup], model: nn.Module, scoring: GradientComputer
) -> PeriodProbe:
    """Choose the rows: pieces of the validation documents of each period, spread evenly over them.

    They depend on the data set and the configuration only, so that every resume scores the same.

    Raises:
        DataError: a period has no validation document.
    """
    train = config.train
    assert train.probe is not None
    dataset = TokenDataset.open(Path(config.data.output_dir), "validation")
    batches, periods = [], []
    for index, group in enumerate(groups):
        try:
            documents = group.documents(dataset, seed=config.seed)
        except DataError as error:
            raise DataError(
                f"train.probe scores held-out text of every period, and {group.label} has none: {error}"
            ) from error
        pieces = Pieces.of(dataset, np.array(documents), train.context_length)
        count = min(train.probe.sequences, pieces.count)
        numbers = (np.arange(count) * pieces.count) // count
        lengths = pieces.locate(numbers)[2]
        packed = pack(lengths, train.context_length, config.document_alignment)
        rows = [[Placed(int(numbers[place.piece]), place.column) for place in row] for row in packed]
        arrays = fill(dataset, pieces, rows)
        batches.append((arrays.inputs, arrays.targets, arrays.resets))
        periods += [index] * len(rows)
    columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*batches, strict=True))
    return PeriodProbe(Batch(*columns), np.array(periods), model, scoring)

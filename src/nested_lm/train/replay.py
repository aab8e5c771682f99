"""Replay: a share of the rows of a chronological stream comes from groups of periods that were read before."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from nested_lm.data.loader import Batch, PackedLoader
from nested_lm.errors import ConfigError, DataError


class Replay:
    """Hands out rows that were read in earlier stages, in the order in which they were read.

    The replayed rows of a micro-batch come from one earlier group, micro-batch after micro-batch from the next one in
    turn. A group's rows are taken from its first on; after the last one that its stage has read, from the first
    again, so that replay never shows text that is new.

    The number of replayed rows of micro-batch i of a stage is floor((i + 1) r s) - floor(i r s), with r rows a
    micro-batch and the share s: over a stage the share holds to a row, whatever s is.

    loaders: of every group but the last, from its start, for replay alone.
    rows: of a micro-batch of one rank.
    micro_batches: of one rank in a stage.
    own_rows: rows of one rank that a stage after the first one reads of its own text.

    Raises:
        ConfigError: the share leaves a stage no row of its own.
    """

    def __init__(
        self, loaders: Sequence[PackedLoader], *, share: float, rows: int, world_size: int, micro_batches: int
    ) -> None:
        self._loaders = list(loaders)
        self._starts = [loader.state_dict() for loader in loaders]
        self._taken = [0] * len(self._loaders)  # rows of one rank since the group's first
        self._share, self._rows, self._world_size = Fraction(str(share)), rows, world_size
        all_rows = micro_batches * rows
        replayed = int(all_rows * self._share)
        self.own_rows = all_rows - replayed
        self._read = [self.own_rows if group else all_rows for group in range(len(self._loaders))]
        if not self.own_rows:
            raise ConfigError(
                f"train.stream.replay {share} leaves none of the {all_rows} rows of a period for its own text; lower it"
            )

    def rows_of(self, index: int) -> tuple[int, int]:
        """New and replayed rows of micro-batch `index` of a stage."""
        old = int((index + 1) * self._rows * self._share) - int(index * self._rows * self._share)
        return self._rows - old, old

    def next(self, stage: int, index: int, rows: int) -> Batch:
        """This rank's replayed rows of micro-batch `index` of a stage, which is not the first one."""
        group = index % stage
        return joined([self._next_row(group) for _ in range(rows)])

    def _next_row(self, group: int) -> Batch:
        if self._taken[group] == self._read[group]:
            self._loaders[group].load_state_dict(self._starts[group])
            self._taken[group] = 0
        self._taken[group] += 1
        return self._loaders[group].next(1)

    def state_dict(self) -> dict[str, Any]:
        """Position: small and JSON-able."""
        return {
            "world_size": self._world_size,
            "taken": list(self._taken),
            "loaders": [loader.state_dict() for loader in self._loaders],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the rows that were handed out when the state was taken.

        Raises:
            DataError: the state belongs to another data set, seed, batch shape or number of processes.
        """
        if state["world_size"] != self._world_size:
            raise DataError(
                f"the saved position of the replayed rows is that of {state['world_size']} processes, this run has "
                f"{self._world_size}: which rows share a micro-batch depends on it; start as many processes as before"
            )
        for loader, saved in zip(self._loaders, state["loaders"], strict=True):
            loader.load_state_dict(saved)
        self._taken = [int(count) for count in state["taken"]]


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several."""
    return batches[0] if len(batches) == 1 else Batch(*(torch.cat(column) for column in zip(*batches, strict=True)))

"""Batches of packed documents: deterministic, resumable from a few integers, the same for any world size.

Shapes: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from nested_lm.data.cut import advice
from nested_lm.data.packing import IGNORED_TARGET, Pieces, Placed, fill, pack
from nested_lm.data.permutation import Permutation
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError

__all__ = [
    "IGNORED_TARGET",
    "Batch",
    "EvaluationBatch",
    "PackedLoader",
    "chosen_documents",
    "evaluation_batches",
    "period_plan",
]

_BLOCK_PIECES = 8192  # planned at once; part of the order, so changing it changes every run


class Batch(NamedTuple):
    """Rows of packed document pieces. targets: -100 where nothing is scored. resets: a piece starts here."""

    inputs: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    resets: Bool[Tensor, "B T"]


class EvaluationBatch(NamedTuple):
    """A `Batch` that says whose tokens it holds. documents: index into the split's documents, padding -1."""

    inputs: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    resets: Bool[Tensor, "B T"]
    documents: Int64[Tensor, "B T"]


class PackedLoader:
    """Endless batches of one split, epoch after epoch, each document piece once an epoch.

    The rows of an epoch are a function of (data, seed, epoch, context length, align, periods, part) and of nothing
    else. A global batch is `batch_size * world_size` rows in that order; rank k takes the k-th run of
    `batch_size` rows. A global batch may begin in one epoch and end in the next.

    batch_size: rows of one rank. align: every piece starts at a multiple of it. periods: take only documents
    of these chronological periods; None takes all, dated or not. part: take only this range of the documents, as
    shares of their tokens in an order drawn from the seed, so that loaders of other parts read other documents.

    Raises: DataError when no document is left.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        align: int,
        rank: int = 0,
        world_size: int = 1,
        periods: tuple[int, ...] | None = None,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        assert context_length >= 1
        assert batch_size >= 1
        assert align >= 1
        assert 0 <= rank < world_size
        self._dataset = dataset
        self._batch_size = batch_size
        self._align = align
        self._rank = rank
        self._world_size = world_size
        documents = chosen_documents(dataset, periods=periods, part=part, seed=seed)
        self._pieces = Pieces.of(dataset, documents, context_length)
        self._identity = {
            "data_hash": dataset.data_hash,
            "split": dataset.split,
            "seed": seed,
            "context_length": context_length,
            "align": align,
            "periods": None if periods is None else list(periods),
            **({} if part == (0.0, 1.0) else {"part": list(part)}),
        }
        self._seed = seed
        self._epoch = 0
        self._block = 0
        self._row = 0  # within the block
        self._plan: tuple[int, int, list[list[Placed]]] | None = None

    @property
    def epoch(self) -> int:
        """Epochs begun before the next row, counted from 0."""
        return self._epoch

    @property
    def epoch_tokens(self) -> int:
        """Scored tokens of one epoch."""
        return int(self._pieces.positions.sum())

    def next(self, batch_size: int | None = None) -> Batch:
        """This rank's rows of the next global batch. batch_size: rows of one rank; None: as always."""
        batch_size = batch_size or self._batch_size
        first = self._rank * batch_size
        mine: list[list[Placed]] = []
        for index in range(batch_size * self._world_size):
            row = self._next_row()
            if first <= index < first + batch_size:
                mine.append(row)
        arrays = fill(self._dataset, self._pieces, mine)
        return Batch(torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.targets), torch.from_numpy(arrays.resets))

    def state_dict(self) -> dict[str, Any]:
        """Position of the next global row, with the identity of the order it is a position in. JSON-able."""
        return {**self._identity, "epoch": self._epoch, "block": self._block, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position. Batch size and world size may differ from those of the run that saved it.

        Raises: DataError when the position belongs to another order: other data, seed, context length, align
        or periods.
        """
        for key, expected in self._identity.items():
            if state.get(key) != expected:
                raise DataError(
                    f"the saved data position belongs to another order of the data: {key} was "
                    f"{state.get(key)!r}, is {expected!r}\n"
                    "  Resume with the data and settings of the saved run, or start a new run."
                )
        self._epoch, self._block, self._row = (int(state[key]) for key in ("epoch", "block", "row"))

    def _next_row(self) -> list[Placed]:
        rows = self._rows()
        row = rows[self._row]
        self._row += 1
        if self._row == len(rows):
            self._row = 0
            self._block += 1
            if self._block * _BLOCK_PIECES >= self._pieces.count:
                self._block = 0
                self._epoch += 1
        return row

    def _rows(self) -> list[list[Placed]]:
        """Rows of the current block, planned when it is entered."""
        if self._plan is None or self._plan[:2] != (self._epoch, self._block):
            start = self._block * _BLOCK_PIECES
            places = np.arange(start, min(start + _BLOCK_PIECES, self._pieces.count))
            numbers = Permutation(self._pieces.count, self._seed, self._epoch)(places)
            rows = _packed(self._pieces, numbers, self._align)
            self._plan = (self._epoch, self._block, rows)
        return self._plan[2]


def evaluation_batches(
    dataset: TokenDataset,
    context_length: int,
    batch_size: int,
    align: int,
    max_tokens: int | None = None,
) -> Iterator[EvaluationBatch]:
    """All pieces of a split once, in a fixed order; the last batch may have fewer rows.

    max_tokens: score about this many tokens, on pieces spread evenly over the whole split, so that the subset
    is the same for every model and does not favour the first documents. None: all.

    Raises: DataError when the split has no documents.
    """
    pieces = Pieces.of(dataset, _chosen(dataset, None), context_length)
    numbers = np.arange(pieces.count)
    total = int(pieces.positions.sum())
    if max_tokens is not None and max_tokens < total:
        count = max(1, max_tokens * pieces.count // total)
        numbers = np.arange(count) * pieces.count // count
    rows = _packed(pieces, numbers, align)
    for start in range(0, len(rows), batch_size):
        arrays = fill(dataset, pieces, rows[start : start + batch_size])
        yield EvaluationBatch(*(torch.from_numpy(array) for array in arrays))


def period_plan(dataset: TokenDataset, periods: int) -> list[tuple[int, ...]]:
    """Cut the dated periods into `periods` runs of near-equal tokens, in the order of time.

    The sum of squared token counts is the least possible. Each run has documents; undated ones are in none.

    Raises: DataError when no document has a date, or fewer periods than that have documents.
    """
    tokens = np.zeros(len(dataset.periods), dtype=np.int64)
    for row in dataset.documents:
        if row.period is not None:
            tokens[row.period] += row.tokens
    count, filled = len(tokens), int((tokens > 0).sum())
    if filled < periods:
        raise DataError(_too_few_periods(dataset, filled, periods))
    before = np.concatenate([[0.0], np.cumsum(tokens, dtype=np.float64)])
    best = np.full((periods + 1, count + 1), np.inf)  # best[g, e]: first e periods in g runs
    cut = np.zeros((periods + 1, count + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for group in range(1, periods + 1):
        for end in range(group, count + 1):
            sums = before[end] - before[:end]
            costs = np.where(sums > 0, best[group - 1, :end] + sums**2, np.inf)
            cut[group, end] = costs.argmin()
            best[group, end] = costs[cut[group, end]]
    plan: list[tuple[int, ...]] = []
    end = count
    for group in range(periods, 0, -1):
        start = int(cut[group, end])
        plan.append(tuple(range(start, end)))
        end = start
    return plan[::-1]


def _too_few_periods(dataset: TokenDataset, filled: int, asked: int) -> str:
    """What is wrong with the dates of a data set, and what to do; `filled` periods have documents."""
    mixed = "or read it mixed (train.stream.kind=shuffled ~train.stream.periods)."
    if not filled:
        return (
            f"no document of {dataset.folder} ({dataset.split} split) has a date; a chronological stream reads period "
            "after period\n"
            f"  Build the data with dates (source.date_field), {mixed}"
        )
    found = f"{dataset.folder}: all dated documents of the {dataset.split} split lie in"
    if filled == 1:
        return (
            f"{found} one chronological period; a chronological stream needs at least 2\n"
            f"  Build the data with shorter segments (period_years), {mixed}"
        )
    return (
        f"{found} {filled} chronological periods, {asked} are asked for\n"
        f"  Lower train.stream.periods to at most {filled}, or build the data with shorter segments (period_years)."
    )


def _packed(pieces: Pieces, numbers: np.ndarray, align: int) -> list[list[Placed]]:
    """Pack these pieces; the rows name them by their number."""
    lengths = pieces.locate(numbers)[2]
    return [
        [Placed(int(numbers[placed.piece]), placed.column) for placed in row]
        for row in pack(lengths, pieces.context_length, align)
    ]


def _chosen(dataset: TokenDataset, periods: tuple[int, ...] | None) -> np.ndarray:
    """Indices of the documents of these periods."""
    chosen = [index for index, row in enumerate(dataset.documents) if periods is None or row.period in periods]
    if not chosen:
        labels = "" if periods is None else f" of the periods {list(periods)}"
        raise DataError(
            f"{dataset.folder}: the {dataset.split} split has no documents{labels}\n"
            "  " + (advice(dataset.all_documents, dataset.all_bytes) if periods is None else "Choose other periods.")
        )
    return np.array(chosen, dtype=np.int64)


def chosen_documents(
    dataset: TokenDataset, *, periods: tuple[int, ...] | None, part: tuple[float, float], seed: int
) -> np.ndarray:
    """Indices of the documents that a `PackedLoader` with these settings reads. Raises DataError when none is left."""
    return _part(dataset, _chosen(dataset, periods), part, seed)


def _part(dataset: TokenDataset, documents: np.ndarray, part: tuple[float, float], seed: int) -> np.ndarray:
    """Those of the documents whose middle token lies in the part, in an order drawn from the seed."""
    if part == (0.0, 1.0):
        return documents
    shuffled = documents[Permutation(len(documents), seed, 0, 1)(np.arange(len(documents)))]  # a key no epoch has
    tokens = np.array([dataset.documents[index].tokens + 1 for index in shuffled], dtype=np.float64)
    middle = (np.cumsum(tokens) - tokens / 2) / tokens.sum()
    chosen: np.ndarray = np.sort(shuffled[(part[0] <= middle) & (middle < part[1])])
    if not len(chosen):
        raise DataError(
            f"{dataset.folder}: the {dataset.split} split has too few documents for {part[1] - part[0]:.2%} of its "
            "tokens\n  Use fewer stages (train.curriculum) or periods (train.stream.periods), or more text."
        )
    return chosen

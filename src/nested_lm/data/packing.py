"""Cutting documents into pieces of the context length, and packing pieces into rows.

A document's stream is [start] + tokens + [end]; its inputs are stream[:-1] and its targets stream[1:], so a
document of n tokens has n + 1 positions, each scored once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nested_lm.data.shards import TokenDataset

IGNORED_TARGET = -100  # of a position that is not scored; the default `ignore_index` of torch


class Placed(NamedTuple):
    """Where one piece of a document lies in a row."""

    piece: int
    column: int


@dataclass(frozen=True)
class Pieces:
    """All pieces of the chosen documents, numbered document by document. Holds a few integers a document.

    documents: their indices in the data set. positions: scored positions of each. first: number of each
    document's first piece, and the total last.
    """

    context_length: int
    documents: np.ndarray
    positions: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, dataset: TokenDataset, documents: np.ndarray, context_length: int) -> "Pieces":
        """Cut these documents, by index."""
        lengths = np.array([row.tokens for row in dataset.documents], dtype=np.int64)
        positions = lengths[documents] + 1
        counts = -(-positions // context_length)
        return cls(context_length, documents, positions, np.concatenate([[0], np.cumsum(counts)]))

    @property
    def count(self) -> int:
        """Number of pieces."""
        return int(self.first[-1])

    def locate(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document index, first position and length of each of these pieces."""
        order = np.searchsorted(self.first, pieces, side="right") - 1
        start = (pieces - self.first[order]) * self.context_length
        return self.documents[order], start, np.minimum(self.positions[order] - start, self.context_length)


def pack(lengths: np.ndarray, context_length: int, align: int) -> list[list[Placed]]:
    """Put pieces into rows of `context_length`, each piece at a multiple of `align`.

    Best fit in the given order: a piece goes to the open row that it fills best, else it opens a row. Rows
    keep the order in which they were opened. `Placed.piece` is the place in `lengths`.
    """
    rows: list[list[Placed]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows
    rooms = 0  # bit r is set when a row with room r is open
    for piece, length in enumerate(lengths.tolist()):
        fitting = rooms >> length << length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = context_length, len(rows)
            rows.append([])
        column = context_length - room
        rows[row].append(Placed(piece, column))
        left = context_length - -(-(column + length) // align) * align
        if left > 0:
            open_rows.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


class RowArrays(NamedTuple):
    """Rows as arrays of shape (rows, context_length)."""

    inputs: np.ndarray
    targets: np.ndarray
    resets: np.ndarray
    documents: np.ndarray


def fill(dataset: TokenDataset, pieces: Pieces, rows: list[list[Placed]]) -> RowArrays:
    """Read the tokens of rows whose `Placed.piece` are numbers of `pieces`.

    Padding has input 0, target -100, document -1. The first column is always a reset.
    """
    shape = (len(rows), pieces.context_length)
    inputs = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED_TARGET, dtype=np.int64)
    resets = np.zeros(shape, dtype=bool)
    owners = np.full(shape, -1, dtype=np.int64)
    resets[:, 0] = True
    numbers = np.array([placed.piece for row in rows for placed in row], dtype=np.int64)
    located = zip(*(array.tolist() for array in pieces.locate(numbers)), strict=True)
    for row, placements in enumerate(rows):
        for placed in placements:
            document, start, length = next(located)
            total = dataset.documents[document].tokens
            # Stream positions start .. start + length, where position p > 0 is token p - 1 of the document.
            stream = np.empty(length + 1, dtype=np.int64)
            tokens = dataset.tokens(document, max(start - 1, 0), min(start + length, total))
            begin = 1 if start == 0 else 0
            stream[:begin] = dataset.boundary[0]
            stream[begin : begin + len(tokens)] = tokens
            stream[begin + len(tokens) :] = dataset.boundary[1]
            columns = slice(placed.column, placed.column + length)
            inputs[row, columns] = stream[:-1]
            targets[row, columns] = stream[1:]
            resets[row, placed.column] = True
            owners[row, columns] = document
    return RowArrays(inputs, targets, resets, owners)

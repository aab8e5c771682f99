"""Log-likelihoods of token sequences: what the sequences of a document have in common is read once, then forked.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.errors import NumericsError
from nested_lm.eval.niah.reading import reading_mode
from nested_lm.nn.generation import SEGMENT_TOKENS, segment_room
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import locate_nonfinite
from nested_lm.nn.state import StreamState

_CALL_TOKENS = 4096
_CALL_LOGITS = 1 << 26  # 256 MiB in float32


@dataclass(frozen=True)
class Scored:
    """A sequence of tokens, the first of which starts the document. first: index of the first scored token, >= 1."""

    tokens: Int[np.ndarray, "T"]
    first: int

    def __post_init__(self) -> None:
        assert 1 <= self.first < len(self.tokens), f"token {self.first} of {len(self.tokens)} cannot be the first"


Document = tuple[Scored, ...]
"""The sequences of one document. They differ in their ends, and share the state of what is the same."""


class Likelihood(NamedTuple):
    """Of the scored tokens of a sequence. greedy: each is the model's first choice after the ones before it."""

    nats: float
    greedy: bool


class Scorer(Protocol):
    """Anything that tells log-likelihoods of sequences. Documents know nothing of each other."""

    def score(self, documents: Sequence[Document]) -> list[list[Likelihood]]:
        """Negative log-likelihoods of every sequence of every document, in the order given."""
        ...


class Starts(Protocol):
    """The states that documents start from. `length(i)` tokens were read before document i, by index."""

    def length(self, document: int) -> int:
        """Tokens read so far; documents of one batch have the same number."""
        ...

    def states(self, documents: Sequence[int]) -> StreamState:
        """States of some documents of one length, a row for each."""
        ...


class Split(NamedTuple):
    """A document cut in what all of its sequences begin with and the rest of each. Last tokens are only predicted."""

    number: int
    stem: Int[np.ndarray, "T"]
    tails: tuple[Int[np.ndarray, "T"], ...]

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return len(self.stem) + sum(map(len, self.tails))


def split(number: int, document: Document) -> Split:
    """Cut a document at the first token in which the inputs of its sequences differ."""
    inputs = [sequence.tokens[:-1] for sequence in document]
    shortest = min(map(len, inputs))
    same = np.all([row[:shortest] == inputs[0][:shortest] for row in inputs], axis=0)
    length = shortest if same.all() else int(np.argmin(same))
    assert length >= 1, "the sequences of a document begin with one token"
    return Split(number, inputs[0][:length], tuple(row[length:] for row in inputs))


class _Wanted(NamedTuple):
    """Predictions to look up in one call: row and column of the logits, the token, and the sequence it counts for."""

    row: list[int]
    column: list[int]
    token: list[int]
    sequence: list[tuple[int, int]]


class ModelScorer:
    """Scores with a model, in batches of documents whose stems have one length, so that nothing is read twice.

    model: in evaluation mode. batch_rows: streams side by side. shared: False reads every sequence from the start, by
        itself: the slow way, which gives the same numbers.
    starts: where documents start; None: fresh states. on_tokens: is told how many tokens have been read.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_rows: int,
        shared: bool = True,
        starts: Starts | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.batch_rows, self.shared = model, batch_rows, shared
        self.starts, self.on_tokens = starts, on_tokens
        self.call_tokens = max(1, min(_CALL_TOKENS, _CALL_LOGITS // model.config.vocab_size))

    def score(self, documents: Sequence[Document]) -> list[list[Likelihood]]:
        """Score every document from its own start.

        Raises:
            NumericsError: a prediction is not finite.
        """
        units = list(documents)
        owners = [(number, 0) for number in range(len(units))]
        if not self.shared:
            owners = [(number, index) for number, document in enumerate(documents) for index in range(len(document))]
            units = [(documents[number][index],) for number, index in owners]
        nats = [np.zeros(len(document)) for document in documents]
        greedy = [np.ones(len(document), dtype=bool) for document in documents]
        splits = [split(number, unit) for number, unit in enumerate(units)]
        for batch in self._batches(splits, owners):
            for (unit, index), loss, hit in self._score_batch(batch, units, owners):
                number, offset = owners[unit]
                nats[number][offset + index] += loss
                greedy[number][offset + index] &= hit
        return [
            [Likelihood(float(loss), bool(hit)) for loss, hit in zip(losses, hits, strict=True)]
            for losses, hits in zip(nats, greedy, strict=True)
        ]

    def planned_tokens(self, documents: Sequence[Document]) -> int:
        """Tokens that `score` will read, those of the starts aside."""
        if not self.shared:
            return sum(len(sequence.tokens) - 1 for document in documents for sequence in document)
        return sum(split(0, document).tokens for document in documents)

    def _batches(self, splits: list[Split], owners: list[tuple[int, int]]) -> Iterator[list[Split]]:
        """Splits whose starts and stems have one length. Batches do not depend on the order of the documents."""

        def started(piece: Split) -> int:
            return 0 if self.starts is None else self.starts.length(owners[piece.number][0])

        def key(piece: Split) -> tuple[int, int, int, bytes]:
            return (
                started(piece),
                len(piece.stem),
                max(map(len, piece.tails)),
                b"".join(tokens.tobytes() for tokens in (piece.stem, *piece.tails)),
            )

        batch: list[Split] = []
        for piece in sorted(splits, key=key, reverse=True):
            call = min(len(piece.stem), SEGMENT_TOKENS)
            full = len(batch) == max(1, min(self.batch_rows, self.call_tokens // call))
            if batch and (full or len(piece.stem) != len(batch[0].stem) or started(piece) != started(batch[0])):
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    def _score_batch(
        self, batch: list[Split], units: Sequence[Document], owners: list[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], float, bool]]:
        """Loss of each scored token of a batch: (unit, sequence), nats, and whether the model would choose it."""
        with reading_mode(self.model):
            state = self.model.initial_state(len(batch))
            if self.starts is not None:
                state = self.starts.states([owners[piece.number][0] for piece in batch])
            stems = np.stack([piece.stem for piece in batch])
            first = min(sequence.first for piece in batch for sequence in units[piece.number]) - 1
            begin = 0
            while begin < stems.shape[1]:
                end = min(begin + segment_room(self.model, state.position), stems.shape[1])
                wanted = _wanted_in_stems(batch, units, begin, end)
                part = stems[:, begin:end]
                last_only = first >= end - 1
                state, found = self._read(part, state, wanted, last_only=last_only)
                yield from found
                begin = end
            for rows, tails, wanted in self._tail_calls(batch, units):
                forked = state.select(torch.tensor(rows))
                yield from self._read(tails, forked, wanted, last_only=False)[1]

    def _tail_calls(
        self, batch: list[Split], units: Sequence[Document]
    ) -> Iterator[tuple[list[int], Int[np.ndarray, "B T"], _Wanted]]:
        """Forks of a batch's states, longest tails first: the row each comes from, padded tails, what to predict."""
        forks = [
            (row, index, tail) for row, piece in enumerate(batch) for index, tail in enumerate(piece.tails) if len(tail)
        ]
        forks.sort(key=lambda fork: -len(fork[2]))  # stable: equal ones stay in the order of the batch
        begin = 0
        while begin < len(forks):
            longest = len(forks[begin][2])
            part = forks[begin : begin + max(1, min(self.batch_rows, self.call_tokens // longest))]
            begin += len(part)
            tails = np.zeros((len(part), longest), dtype=np.int64)
            wanted = _Wanted([], [], [], [])
            for place, (row, index, tail) in enumerate(part):
                tails[place, : len(tail)] = tail
                piece = batch[row]
                _want(wanted, place, units[piece.number][index], (piece.number, index), len(piece.stem), None)
            yield [row for row, _, _ in part], tails, wanted

    def _read(
        self, tokens: Int[np.ndarray, "B T"], state: StreamState, wanted: _Wanted, *, last_only: bool
    ) -> tuple[StreamState, list[tuple[tuple[int, int], float, bool]]]:
        """One call of the model, and the losses of the wanted predictions."""
        device = next(self.model.parameters()).device
        given = torch.from_numpy(np.ascontiguousarray(tokens)).to(device)
        output = self.model(given, state=state, predictions="last" if last_only else "all")
        if self.on_tokens is not None:
            self.on_tokens(tokens.size)
        if not wanted.row:
            return output.state, []
        column = torch.zeros(len(wanted.row), dtype=torch.long) if last_only else torch.tensor(wanted.column)
        logits = output.logits[torch.tensor(wanted.row, device=device), column.to(device)]
        losses, hits = _lookup(logits, torch.tensor(wanted.token, device=device))
        if not np.isfinite(losses).all():
            raise nonfinite(self.model, given, state)
        return output.state, list(zip(wanted.sequence, losses.tolist(), hits.tolist(), strict=True))


def _wanted_in_stems(batch: list[Split], units: Sequence[Document], begin: int, end: int) -> _Wanted:
    """Predictions that part `begin` to `end` of the stems makes. The last token of a stem predicts for each tail."""
    wanted = _Wanted([], [], [], [])
    for row, piece in enumerate(batch):
        for index, sequence in enumerate(units[piece.number]):
            _want(wanted, row, sequence, (piece.number, index), begin, end)
    return wanted


def _want(wanted: _Wanted, row: int, scored: Scored, sequence: tuple[int, int], begin: int, end: int | None) -> None:
    """Ask for the scored tokens that inputs `begin` to `end` (None: all the rest) of a sequence predict."""
    last = len(scored.tokens) - 1
    positions = range(max(begin, scored.first - 1), last if end is None else min(end, last))
    wanted.row.extend([row] * len(positions))
    wanted.column.extend(position - begin for position in positions)
    wanted.token.extend(int(scored.tokens[position + 1]) for position in positions)
    wanted.sequence.extend([sequence] * len(positions))


def _lookup(logits: Float[Tensor, "n V"], tokens: Int[Tensor, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each token, in float64, and whether it is the first choice."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = -logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    return losses.double().cpu().numpy(), (logits.argmax(dim=1) == tokens).cpu().numpy()


def nonfinite(model: LanguageModel, tokens: Tensor, state: StreamState) -> NumericsError:
    """The error for a call whose predictions are not finite, with the place where it arises."""
    place = locate_nonfinite(model, tokens, resets=None, state=state)
    return NumericsError(
        f"a score is not finite; first seen in {place or 'no part of the model when replayed: it is near overflow'}. "
        "Nothing was written. Evaluate an earlier checkpoint, or train with a lower rate; `nested-lm audit` says "
        "whether the memories of a checkpoint stay bounded"
    )

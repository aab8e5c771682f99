"""Log-likelihoods of token sequences: what sequences have in common is read once.

That holds within a document (the choices of a question) and between documents (questions about one passage). Where the
model reads branches, stems and what follows them are read in one call; else the state after the stems is forked.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.errors import NumericsError
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import locate_nonfinite
from nested_lm.nn.state import StreamState
from nested_lm.reading.generation import CALL_LOGITS, SEGMENT_TOKENS, reading_mode, segment_room

_CALL_TOKENS = 4096
_CALL_COST = 48  # tokens of padding that cost about as much as another call, where stems and tails are read in one
_PADDING = 2  # tails of one call are not padded to more than so many times their length


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


class Tail(NamedTuple):
    """What the model reads after a stem, and the sequences, by index, whose rests it begins with or is."""

    tokens: Int[np.ndarray, "T"]
    sequences: tuple[int, ...]


class Split(NamedTuple):
    """Sequences cut in what all of them begin with, the stem, and the rests, the tails.

    No tail begins another, and none is empty. There are none, or several: sequences that begin one another are all in
    the stem. Last tokens are only predicted.
    """

    number: int
    stem: Int[np.ndarray, "T"]
    tails: tuple[Tail, ...]

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return len(self.stem) + self.tail_tokens

    @property
    def tail_tokens(self) -> int:
        """Tokens of all tails."""
        return sum(len(tail.tokens) for tail in self.tails)

    @property
    def call_tokens(self) -> int:
        """Tokens of a call that reads the end of the stem with all tails behind it, at most."""
        return min(len(self.stem), SEGMENT_TOKENS) + self.tail_tokens


def split(number: int, document: Document) -> Split:
    """Cut sequences at the first token in which their inputs differ."""
    inputs = [sequence.tokens[:-1] for sequence in document]
    length = min(_agreement(inputs[0], row) for row in inputs)
    assert length >= 1, "sequences begin with one token"
    # In this order what begins with a rest comes right after it.
    order = sorted(range(len(inputs)), key=lambda index: _in_order(inputs[index]), reverse=True)
    tails: list[Tail] = []
    for index in order:
        rest = inputs[index][length:]
        if tails and np.array_equal(tails[-1].tokens[: len(rest)], rest):
            tails[-1] = tails[-1]._replace(sequences=(*tails[-1].sequences, index))
        elif len(rest):
            tails.append(Tail(rest, (index,)))
    if len(tails) == 1:  # what is one text needs no fork
        return Split(number, inputs[tails[0].sequences[0]], ())
    return Split(number, inputs[0][:length], tuple(tails))


def _in_order(tokens: Int[np.ndarray, "T"]) -> bytes:
    """What sorts as the tokens do, and is compared faster."""
    return tokens.astype(">u8").tobytes()


def _agreement(one: Int[np.ndarray, "T"], other: Int[np.ndarray, "U"]) -> int:
    """Tokens that both begin with."""
    shortest = min(len(one), len(other))
    same = one[:shortest] == other[:shortest]
    return shortest if same.all() else int(np.argmin(same))


class _Unit(NamedTuple):
    """Sequences that are read together, and what each is: document and index in it."""

    sequences: Document
    owners: tuple[tuple[int, int], ...]


def _each_alone(documents: Sequence[Document]) -> list[_Unit]:
    return [_Unit(found, tuple((n, index) for index in range(len(found)))) for n, found in enumerate(documents)]


def _gather(documents: Sequence[Document]) -> list[_Unit]:
    """Documents, those that begin alike joined where that saves half of the tokens of the one that joins.

    A smaller gain would be lost to tails of unequal length, which are padded where states are forked.
    """
    units: list[_Unit] = []
    for unit in sorted(_each_alone(documents), key=lambda unit: [_in_order(one.tokens) for one in unit.sequences]):
        first = unit.sequences[0].tokens
        # No more is saved than what they have in common, which for most is less than half of the shortest reading.
        if units and 2 * _agreement(units[-1].sequences[0].tokens, first) >= len(first) - 1:
            joined = _Unit(units[-1].sequences + unit.sequences, units[-1].owners + unit.owners)
            read, tokens, together = (split(0, found.sequences).tokens for found in (units[-1], unit, joined))
            if 2 * (read + tokens - together) >= tokens:
                units[-1] = joined
                continue
        units.append(unit)
    return units


class _Wanted(NamedTuple):
    """Predictions to look up in one call: row and column of the logits, the token, and the sequence it counts for."""

    row: list[int]
    column: list[int]
    token: list[int]
    sequence: list[tuple[int, int]]  # document and index


class ModelScorer:
    """Scores with a model, in batches of sequences whose stems have one length, so that nothing is read twice.

    model: in evaluation mode. batch_rows: streams side by side. shared: False reads every sequence from the start, by
        itself: the slow way, which gives the same numbers.
    starts: where documents start; None: fresh states, which documents that begin alike can share. on_tokens: is told
        how many tokens have been read; those that tails are padded with are none.
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
        self.call_tokens = max(1, min(_CALL_TOKENS, CALL_LOGITS // model.config.vocab_size))
        self.packs = model.reads_branches

    def score(self, documents: Sequence[Document]) -> list[list[Likelihood]]:
        """Score every document from its own start.

        Raises:
            NumericsError: a prediction is not finite.
        """
        self.packs = self.model.reads_branches
        units = self._units(documents)
        nats = [np.zeros(len(document)) for document in documents]
        greedy = [np.ones(len(document), dtype=bool) for document in documents]
        splits = [split(number, unit.sequences) for number, unit in enumerate(units)]
        for batch in self._batches(splits, units):
            for (number, index), loss, hit in self._score_batch(batch, units):
                nats[number][index] += loss
                greedy[number][index] &= hit
        return [
            [Likelihood(float(loss), bool(hit)) for loss, hit in zip(losses, hits, strict=True)]
            for losses, hits in zip(nats, greedy, strict=True)
        ]

    def planned_tokens(self, documents: Sequence[Document]) -> int:
        """Tokens that `score` will read, those of the starts aside."""
        return sum(split(0, unit.sequences).tokens for unit in self._units(documents))

    def _units(self, documents: Sequence[Document]) -> list[_Unit]:
        """What is read together."""
        if not self.shared:
            return [
                _Unit((sequence,), ((number, index),))
                for number, document in enumerate(documents)
                for index, sequence in enumerate(document)
            ]
        if self.starts is None:
            return _gather(documents)
        return _each_alone(documents)

    def _batches(self, splits: list[Split], units: Sequence[_Unit]) -> Iterator[list[Split]]:
        """Splits whose starts and stems have one length. Batches do not depend on the order of the documents."""

        def started(piece: Split) -> int:
            return 0 if self.starts is None else self.starts.length(units[piece.number].owners[0][0])

        def shape(piece: Split) -> tuple[int, int, bool]:
            """What the pieces of a batch have in common."""
            return started(piece), len(piece.stem), self._packs(piece)

        def key(piece: Split) -> tuple[tuple[int, int, bool], int, tuple[bytes, ...]]:
            tails = [tail.tokens for tail in piece.tails]
            length = sum(map(len, tails)) if self._packs(piece) else max(map(len, tails), default=0)
            return shape(piece), length, tuple(_in_order(tokens) for tokens in (piece.stem, *tails))

        for _, alike in itertools.groupby(sorted(splits, key=key, reverse=True), key=shape):
            batch: list[Split] = []
            rows = padding = 0
            for piece in alike:
                padding += batch[0].tokens - piece.tokens if batch and self._packs(piece) else 0
                if batch and (len(batch) == rows or padding > _CALL_COST):
                    yield batch
                    batch, padding = [], 0
                if not batch:
                    call = piece.call_tokens if self._packs(piece) else min(len(piece.stem), SEGMENT_TOKENS)
                    rows = max(1, min(self.batch_rows, self.call_tokens // call))
                batch.append(piece)
            yield batch

    def _packs(self, piece: Split) -> bool:
        """Whether a stem and its tails are read in one call."""
        return self.packs and bool(piece.tails) and piece.call_tokens <= self.call_tokens

    def _score_batch(self, batch: list[Split], units: Sequence[_Unit]) -> Iterator[tuple[tuple[int, int], float, bool]]:
        """Loss of each scored token of a batch: document and sequence, nats, and whether the model would choose it."""
        with reading_mode(self.model):
            stems = np.stack([piece.stem for piece in batch])
            packs = self._packs(batch[0])  # so do the others
            forks = not packs and any(piece.tails for piece in batch)
            rows = None
            if self.starts is not None:
                state = self.starts.states([units[piece.number].owners[0][0] for piece in batch])
            elif forks or stems.shape[1] > segment_room(self.model, 0):
                state = self.model.initial_state(len(batch))
            else:  # of one call, and fresh states are alike
                state, rows = self.model.initial_state(1), torch.zeros(len(batch), dtype=torch.long)
            begin = 0
            while begin < stems.shape[1]:
                end = min(begin + segment_room(self.model, state.position), stems.shape[1])
                wanted = _wanted_in_stems(batch, units, begin, end)
                part = stems[:, begin:end]
                if end == stems.shape[1] and packs:
                    part, branches = _packed(part, batch)
                    for row, piece in enumerate(batch):
                        begins = branches[row, : len(piece.tails)].tolist()
                        for tail, begin in zip(piece.tails, begins, strict=True):
                            _want_in_tail(wanted, row, units[piece.number], tail, len(piece.stem), at=begin)
                    yield from self._read(part, state, wanted, final=True, rows=rows, branches=branches)[1]
                    self._report(int(branches[:, -1].sum()))
                    return
                final = end == stems.shape[1] and not forks
                state, found = self._read(part, state, wanted, final=final, rows=rows)
                self._report(part.size)
                yield from found
                begin = end
            for part, tails, wanted in self._tail_calls(batch, units):
                rows = torch.tensor([row for row, _ in part])
                found = self._read(tails, state, wanted, rows=rows, final=True)[1]
                self._report(sum(len(tail.tokens) for _, tail in part))
                yield from found

    def _report(self, tokens: int) -> None:
        if self.on_tokens is not None:
            self.on_tokens(tokens)

    def _tail_calls(
        self, batch: list[Split], units: Sequence[_Unit]
    ) -> Iterator[tuple[list[tuple[int, Tail]], Int[np.ndarray, "B T"], _Wanted]]:
        """Forks of a batch's states, longest tails first: each one's row and tail, padded tails, what to predict."""
        forks = [(row, tail) for row, piece in enumerate(batch) for tail in piece.tails]
        forks.sort(key=lambda fork: -len(fork[1].tokens))  # stable: equal ones stay in the order of the batch
        begin = 0
        while begin < len(forks):
            longest = len(forks[begin][1].tokens)
            part = forks[begin : begin + max(1, min(self.batch_rows, self.call_tokens // longest))]
            part = [fork for fork in part if len(fork[1].tokens) >= longest // _PADDING]
            begin += len(part)
            part.sort(key=lambda fork: fork[0])  # rows of one stream side by side, whose state is then read once
            tails = np.zeros((len(part), longest), dtype=np.int64)
            wanted = _Wanted([], [], [], [])
            for place, (row, tail) in enumerate(part):
                tails[place, : len(tail.tokens)] = tail.tokens
                _want_in_tail(wanted, place, units[batch[row].number], tail, len(batch[row].stem), at=0)
            yield part, tails, wanted

    def _read(
        self,
        tokens: Int[np.ndarray, "B T"],
        state: StreamState,
        wanted: _Wanted,
        *,
        final: bool = False,
        rows: Tensor | None = None,
        branches: Int[np.ndarray, "B N"] | None = None,
    ) -> tuple[StreamState, list[tuple[tuple[int, int], float, bool]]]:
        """One call of the model, and the losses of the wanted predictions."""
        device = next(self.model.parameters()).device
        given = torch.from_numpy(np.ascontiguousarray(tokens)).to(device)
        places = torch.tensor([wanted.row, wanted.column], device=device).T.long()
        cuts = None if branches is None else torch.from_numpy(branches)
        output = self.model(given, state=state, places=places, final=final, rows=rows, branches=cuts)
        if not wanted.row:
            return output.state, []
        losses, hits = _lookup(output.logits[0], torch.tensor(wanted.token, device=device))
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            streams = torch.arange(len(given)) if rows is None else rows
            readings = {}
            for row, column in places[bad].tolist():  # branches that are read together spoil one another
                text = _alone(given[row], None if cuts is None else cuts[row], column)
                readings[row, tuple(text.tolist())] = text[None], state.select(streams[row : row + 1])
            raise nonfinite(self.model, *readings.values())
        return output.state, list(zip(wanted.sequence, losses.tolist(), hits.tolist(), strict=True))


def _packed(stems: Int[np.ndarray, "B S"], batch: list[Split]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B N"]]:
    """Stems with their tails behind them, padded, and where these begin and end for `LanguageModel.forward`."""
    sizes = np.zeros((len(batch), 1 + max(len(piece.tails) for piece in batch)), dtype=np.int64)
    sizes[:, 0] = stems.shape[1]
    for row, piece in enumerate(batch):
        sizes[row, 1 : 1 + len(piece.tails)] = [len(tail.tokens) for tail in piece.tails]
    branches = sizes.cumsum(axis=1)
    tokens = np.zeros((len(batch), branches[:, -1].max()), dtype=np.int64)
    for row, piece in enumerate(batch):
        tokens[row, : branches[row, -1]] = np.concatenate([stems[row], *(tail.tokens for tail in piece.tails)])
    return tokens, branches


def _alone(tokens: Int[Tensor, "T"], branches: Int[Tensor, "N"] | None, column: int) -> Tensor:
    """The stem of a row, and behind it the branch that a column is in. None: the row does not branch."""
    if branches is None:
        return tokens
    begins = [begin for begin in branches.tolist() if begin <= column]
    if not begins:
        return tokens[: branches[0]]
    return torch.cat([tokens[: branches[0]], tokens[begins[-1] : branches[branches > column].min()]])


def _want_in_tail(wanted: _Wanted, row: int, unit: _Unit, tail: Tail, stem: int, *, at: int) -> None:
    """Predictions that a tail makes, whose first token is in column `at` of a row. stem: tokens before it in a text."""
    for index in tail.sequences:
        _want(wanted, row, unit.sequences[index], unit.owners[index], stem, None, at=at)


def _wanted_in_stems(batch: list[Split], units: Sequence[_Unit], begin: int, end: int) -> _Wanted:
    """Predictions that part `begin` to `end` of the stems makes. The last token of a stem predicts for each tail."""
    wanted = _Wanted([], [], [], [])
    for row, piece in enumerate(batch):
        unit = units[piece.number]
        for sequence, owner in zip(unit.sequences, unit.owners, strict=True):
            _want(wanted, row, sequence, owner, begin, end)
    return wanted


def _want(
    wanted: _Wanted, row: int, scored: Scored, sequence: tuple[int, int], begin: int, end: int | None, *, at: int = 0
) -> None:
    """Ask for the scored tokens that inputs `begin` to `end` (None: all the rest) of a sequence predict.

    at: the column of the first of them.
    """
    last = len(scored.tokens) - 1
    positions = range(max(begin, scored.first - 1), last if end is None else min(end, last))
    wanted.row.extend([row] * len(positions))
    wanted.column.extend(position - begin + at for position in positions)
    wanted.token.extend(int(scored.tokens[position + 1]) for position in positions)
    wanted.sequence.extend([sequence] * len(positions))


def _lookup(logits: Float[Tensor, "n V"], tokens: Int[Tensor, "n"]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each token, in float64, and whether it is the first choice."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = -logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    return losses.double().cpu().numpy(), (logits.argmax(dim=1) == tokens).cpu().numpy()


def nonfinite(model: LanguageModel, *readings: tuple[Tensor, StreamState]) -> NumericsError:
    """The error for predictions that are not finite, with the place where that arises. readings: tokens and states."""
    found = (locate_nonfinite(model, tokens, resets=None, state=state) for tokens, state in readings)
    place = next((value for value in found if value is not None), None)
    return NumericsError(
        f"a score is not finite; first seen in {place or 'no part of the model when replayed: it is near overflow'}. "
        "Nothing was written. Evaluate an earlier checkpoint, or train with a lower rate; `nested-lm audit` says "
        "whether the memories of a checkpoint stay bounded"
    )

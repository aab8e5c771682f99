"""The one reader: scores token sequences that go on from some state, and reads once what they have in common.

Sequences of a document that begin alike (the choices of a question) make a tree: a stem, and the tails that follow it.
Documents that begin alike (questions about one passage) are joined into one tree. Where the model reads branches, the
end of a stem and all tails behind it are one call; else the state after the stem is forked. Trees without tails are
read side by side, and leave when they end.

Shapes: B rows of a batch, T tokens, N branches.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading import calls
from nested_lm.reading.calls import TokenScores, as_tokens, call, look_up, not_finite, reading_mode, segment_room

CALL_LOGITS = 1 << 26
"""Logits that one call of a batch may have, 256 MiB in float32."""

_CALL_TOKENS = 4096
_CALL_COST = 48  # tokens of padding that cost about as much as another call, where stems and tails are read in one
_PADDING = 2  # rows of one call are not padded to more than so many times their length


@dataclass(frozen=True)
class Scored:
    """A sequence of tokens. first: index of the first scored token, >= 1; the ones before are only read."""

    tokens: Int[np.ndarray, "T"]
    first: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.first < len(self.tokens), f"token {self.first} of {len(self.tokens)} cannot be the first"


Document = tuple[Scored, ...]
"""Sequences that go on from one state. What they begin with alike is read once."""


class Starts(Protocol):
    """The states that documents go on from, when they are not all the same."""

    def length(self, document: int) -> int:
        """Tokens read so far; documents of one batch have the same number."""
        ...

    def states(self, documents: Sequence[int]) -> StreamState:
        """States of some documents of one length, a row for each."""
        ...


class OwnStates(NamedTuple):
    """A row of a state for each document."""

    state: StreamState

    def length(self, document: int) -> int:  # noqa: ARG002  one for all
        """Tokens read so far."""
        return self.state.position

    def states(self, documents: Sequence[int]) -> StreamState:
        """The rows of some documents."""
        return self.state.select(torch.tensor(documents))


@dataclass(frozen=True)
class _Reading:
    """A sequence of a document, and the scores of its tokens as they become known."""

    document: int
    scored: Scored
    nats: np.ndarray = field(init=False)
    ranks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.scored.tokens) - self.scored.first
        object.__setattr__(self, "nats", np.zeros(count))
        object.__setattr__(self, "ranks", np.zeros(count, dtype=np.int64))

    @property
    def inputs(self) -> Int[np.ndarray, "T"]:
        """What the model reads: all tokens but the last, which is only predicted."""
        return self.scored.tokens[:-1]

    @property
    def order(self) -> bytes:
        """What sorts as the inputs do, and is compared faster."""
        return _in_order(self.inputs)


class Tail(NamedTuple):
    """What is read after a stem, and the sequences that go on with it or a part of it."""

    tokens: Int[np.ndarray, "T"]
    readings: tuple[_Reading, ...]


class Tree(NamedTuple):
    """Sequences cut in what all of them begin with, the stem, and the rests, the tails.

    No tail begins another, and none is empty. There are none, or several: sequences that begin one another are all in
    the stem.
    """

    stem: Int[np.ndarray, "T"]
    tails: tuple[Tail, ...]
    readings: tuple[_Reading, ...]

    @property
    def tail_tokens(self) -> int:
        """Tokens of all tails."""
        return sum(len(tail.tokens) for tail in self.tails)

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        return len(self.stem) + self.tail_tokens

    @property
    def call_tokens(self) -> int:
        """Tokens of a call that reads the end of the stem with all tails behind it, at most."""
        return min(len(self.stem), calls.SEGMENT_TOKENS) + self.tail_tokens


def grow(readings: Sequence[_Reading]) -> Tree:
    """Cut sequences at the first token in which their inputs differ."""
    length = min(_agreement(readings[0].inputs, reading.inputs) for reading in readings)
    assert length >= 1, "sequences begin with one token"
    tails: list[Tail] = []
    # In this order what begins with a rest comes right after it.
    for reading in sorted(readings, key=lambda reading: reading.order, reverse=True):
        rest = reading.inputs[length:]
        if tails and np.array_equal(tails[-1].tokens[: len(rest)], rest):
            tails[-1] = tails[-1]._replace(readings=(*tails[-1].readings, reading))
        elif len(rest):
            tails.append(Tail(rest, (reading,)))
    if len(tails) == 1:  # what is one text needs no fork
        return Tree(tails[0].readings[0].inputs, (), tuple(readings))
    return Tree(readings[0].inputs[:length], tuple(tails), tuple(readings))


def _in_order(tokens: Int[np.ndarray, "T"]) -> bytes:
    return tokens.astype(">u8").tobytes()


def _agreement(one: Int[np.ndarray, "T"], other: Int[np.ndarray, "U"]) -> int:
    """Tokens that both begin with."""
    shortest = min(len(one), len(other))
    same = one[:shortest] == other[:shortest]
    return shortest if same.all() else int(np.argmin(same))


def _join(trees: Sequence[Tree]) -> list[Tree]:
    """Join trees that begin alike where that saves half of the tokens of the one that joins.

    A smaller gain would be lost to tails of unequal length, which are padded where states are forked.
    """
    joined: list[Tree] = []
    for tree in sorted(trees, key=lambda tree: [reading.order for reading in tree.readings]):
        first = tree.readings[0].inputs
        # No more is saved than what they have in common, which for most is less than half of the shortest reading.
        if joined and 2 * _agreement(joined[-1].readings[0].inputs, first) >= len(first):
            both = grow(joined[-1].readings + tree.readings)
            if 2 * (joined[-1].tokens + tree.tokens - both.tokens) >= tree.tokens:
                joined[-1] = both
                continue
        joined.append(tree)
    return joined


class _Ask(NamedTuple):
    """Inputs `begin` to `end` of a sequence stand in a row from a column on: its scored tokens there are looked up."""

    row: int
    column: int
    reading: _Reading
    begin: int
    end: int

    @property
    def positions(self) -> range:
        """Inputs that predict a scored token."""
        scored = self.reading.scored
        return range(max(self.begin, scored.first - 1), min(self.end, len(scored.tokens) - 1))


class Reader:
    """Scores sequences with a model, in batches in which nothing is read twice.

    model: in evaluation mode. rows: streams side by side. shared: False reads every sequence from the start, by itself:
        the slow way, which gives the same numbers.
    on_tokens: is told how many tokens have been read; padding does not count.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int = 32,
        shared: bool = True,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.rows, self.shared = model, rows, shared
        self.call_tokens = max(1, min(_CALL_TOKENS, CALL_LOGITS // model.config.vocab_size))
        self._on_tokens = on_tokens
        self._branches = False

    def score(
        self, documents: Sequence[Document], *, starts: StreamState | Starts | None = None
    ) -> list[list[TokenScores]]:
        """Score the tokens of every sequence of every document. Documents know nothing of each other.

        Args:
            starts: where documents start: the state of one stream, which is not changed, or a state for each; None:
                fresh states.

        Returns:
            Nats and ranks of the scored tokens, in the order given.

        Raises:
            NumericsError: a prediction is not finite.
            OutOfRoomError: memory ended.
        """
        self._branches = self.model.reads_branches
        readings = [[_Reading(number, scored) for scored in document] for number, document in enumerate(documents)]
        for batch in self._batches(self._trees(readings, starts), starts):
            with reading_mode(self.model):
                self._read(batch, *self._start(batch, starts))
        return [[TokenScores(reading.nats, reading.ranks) for reading in document] for document in readings]

    def planned_tokens(self, documents: Sequence[Document], *, starts: StreamState | Starts | None = None) -> int:
        """Tokens that `score` will read."""
        readings = [[_Reading(number, scored) for scored in document] for number, document in enumerate(documents)]
        return sum(tree.tokens for tree in self._trees(readings, starts))

    def _trees(self, readings: Sequence[Sequence[_Reading]], starts: StreamState | Starts | None) -> list[Tree]:
        """What is read together."""
        if not self.shared:
            return [grow([reading]) for document in readings for reading in document]
        trees = [grow(document) for document in readings if document]
        return _join(trees) if starts is None or isinstance(starts, StreamState) else trees

    def _batches(self, trees: Sequence[Tree], starts: StreamState | Starts | None) -> Iterator[list[Tree]]:
        """Trees that are read side by side, longest first. Batches do not depend on the order of the documents."""

        def shape(tree: Tree) -> tuple[int, bool, int]:
            """What the trees of a batch have in common: tokens before them, and of those with tails the stem's."""
            own = starts is not None and not isinstance(starts, StreamState)
            started = starts.length(tree.readings[0].document) if own else 0  # type: ignore[union-attr]
            return started, self._packs(tree), len(tree.stem) if tree.tails else 0

        def key(tree: Tree) -> tuple[tuple[int, bool, int], int, int, tuple[bytes, ...]]:
            tails = [tail.tokens for tail in tree.tails]
            length = sum(map(len, tails)) if self._packs(tree) else max(map(len, tails), default=0)
            return shape(tree), len(tree.stem), length, tuple(_in_order(tokens) for tokens in (tree.stem, *tails))

        for _, alike in itertools.groupby(sorted(trees, key=key, reverse=True), key=shape):
            batch: list[Tree] = []
            padding = 0
            for tree in alike:
                padding += batch[0].tokens - tree.tokens if batch and self._packs(tree) else 0
                if batch and (len(batch) == self._room(batch[0]) or padding > _CALL_COST or _pads(batch[0], tree)):
                    yield batch
                    batch, padding = [], 0
                batch.append(tree)
            yield batch

    def _room(self, tree: Tree) -> int:
        """Rows of a batch whose longest tree this is."""
        tokens = tree.call_tokens if self._packs(tree) else min(len(tree.stem), calls.SEGMENT_TOKENS)
        return max(1, min(self.rows, self.call_tokens // tokens))

    def _packs(self, tree: Tree) -> bool:
        """Whether a stem and its tails are read in one call."""
        return self._branches and bool(tree.tails) and tree.call_tokens <= self.call_tokens

    def _start(self, batch: list[Tree], starts: StreamState | Starts | None) -> tuple[StreamState, Tensor | None]:
        """State that trees start from, and the row of it that each goes on from; None: its own."""
        if starts is None or isinstance(starts, StreamState):
            return starts or self.model.initial_state(1), torch.zeros(len(batch), dtype=torch.long)
        return starts.states([tree.readings[0].document for tree in batch]), None

    def _read(self, batch: list[Tree], state: StreamState, rows: Tensor | None, *, before: int = 0) -> None:
        """Read trees side by side. Their stems have one length, or they have no tails.

        rows: of the state, that each goes on from; None: its own. before: inputs of each sequence that were read.
        """
        packs = self._packs(batch[0])  # so do the others
        forks = bool(batch[0].tails) and not packs
        length, begin = max(len(tree.stem) for tree in batch), 0
        while begin < length:
            going = [row for row, tree in enumerate(batch) if len(tree.stem) > begin]
            if len(going) < len(batch):
                batch, state = [batch[row] for row in going], state.select(torch.tensor(going))
            fits = length - begin <= calls.SEGMENT_TOKENS
            end = length if fits else begin + segment_room(self.model, state.position)
            parts = [tree.stem[begin:end] for tree in batch]
            asks = [
                _Ask(row, 0, reading, before + begin, before + begin + len(part))
                for row, (tree, part) in enumerate(zip(batch, parts, strict=True))
                for reading in tree.readings
            ]
            final, branches = end == length and not forks, None
            if final and packs:
                sizes = [
                    [len(part), *(len(tail.tokens) for tail in tree.tails)]
                    for tree, part in zip(batch, parts, strict=True)
                ]
                branches = _side_by_side(sizes).cumsum(axis=1)
                asks += _asks_of_tails(batch, branches)
                parts = [
                    np.concatenate([part, *(tail.tokens for tail in tree.tails)])
                    for tree, part in zip(batch, parts, strict=True)
                ]
            state, rows = self._call(parts, state, asks, final=final, rows=rows, branches=branches), None
            begin = end
        if forks:
            self._read_tails(batch, state)

    def _read_tails(self, batch: list[Tree], state: StreamState) -> None:
        """Read tails as trees of their own, from forks of the states after their stems, longest first."""
        forks = [(row, Tree(tail.tokens, (), tail.readings)) for row, tree in enumerate(batch) for tail in tree.tails]
        forks.sort(key=lambda fork: -len(fork[1].stem))  # stable: equal ones stay in the order of the batch
        while forks:
            longest = forks[0][1]
            part = [fork for fork in forks[: self._room(longest)] if not _pads(longest, fork[1])]
            forks = forks[len(part) :]
            part.sort(key=lambda fork: fork[0])  # rows of one stream side by side, whose state is then read once
            rows = torch.tensor([row for row, _ in part])
            self._read([tree for _, tree in part], state, rows, before=len(batch[0].stem))

    def _call(
        self,
        texts: Sequence[Int[np.ndarray, "T"]],
        state: StreamState,
        asks: list[_Ask],
        *,
        final: bool,
        rows: Tensor | None,
        branches: Int[np.ndarray, "B N"] | None = None,
    ) -> StreamState:
        """One call of the model. Notes the scores that are asked for; returns the state."""
        given = as_tokens(self.model, _side_by_side(texts))
        asks = [ask for ask in asks if ask.positions]
        places = [(ask.row, at - ask.begin + ask.column) for ask in asks for at in ask.positions]
        where = as_tokens(self.model, np.array(places, dtype=np.int64).reshape(-1, 2))
        cuts = None if branches is None else torch.from_numpy(branches)
        output = call(self.model, given, where, state, final=final, rows=rows, branches=cuts)
        if self._on_tokens is not None:
            self._on_tokens(sum(map(len, texts)))
        if not places:
            return output.state
        following = [ask.reading.scored.tokens[ask.positions.start + 1 : ask.positions.stop + 1] for ask in asks]
        scores = look_up(output.logits[0], as_tokens(self.model, np.concatenate(following)))
        bad = np.flatnonzero(~np.isfinite(scores.nats))
        if len(bad):
            streams = torch.arange(len(given)) if rows is None else rows
            readings = {}
            for row, column in (places[index] for index in bad):  # branches that are read together spoil one another
                text = _alone(given[row], None if cuts is None else cuts[row], column)
                readings[row, tuple(text.tolist())] = text[None], state.select(streams[row : row + 1])
            raise not_finite(self.model, readings.values())
        begin = 0
        for ask in asks:
            first, end = ask.positions.start + 1 - ask.reading.scored.first, begin + len(ask.positions)
            ask.reading.nats[first : first + end - begin] = scores.nats[begin:end]
            ask.reading.ranks[first : first + end - begin] = scores.ranks[begin:end]
            begin = end
        return output.state


def _pads(longest: Tree, tree: Tree) -> bool:
    """Whether a tree would be padded too much beside a longer one."""
    last, own = (min(len(each.stem), calls.SEGMENT_TOKENS) for each in (longest, tree))
    return last > _PADDING * own


def _side_by_side(texts: Sequence[Sequence[int] | Int[np.ndarray, "T"]]) -> Int[np.ndarray, "B T"]:
    """Texts as rows, padded behind their ends."""
    tokens = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens


def _asks_of_tails(batch: list[Tree], branches: Int[np.ndarray, "B N"]) -> list[_Ask]:
    """What is to be looked up in the branches of packed rows."""
    return [
        _Ask(row, int(column), reading, len(tree.stem), len(tree.stem) + len(tail.tokens))
        for row, tree in enumerate(batch)
        for tail, column in zip(tree.tails, branches[row], strict=False)
        for reading in tail.readings
    ]


def _alone(tokens: Int[Tensor, "T"], branches: Int[Tensor, "N"] | None, column: int) -> Tensor:
    """The stem of a row, and behind it the branch that a column is in. None: the row does not branch."""
    if branches is None:
        return tokens
    begins = [begin for begin in branches.tolist() if begin <= column]
    if not begins:
        return tokens[: branches[0]]
    return torch.cat([tokens[: branches[0]], tokens[begins[-1] : branches[branches > column].min()]])

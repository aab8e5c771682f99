"""Loss by position in long books: does a model go on learning from what it reads?

Every book is read from its start with carried state, and once more with a fresh state every training context: what the
longer past saves is the difference.

Shapes: B books, T tokens.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator

from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.config.section import Count, Section
from nested_lm.data.corpora import CORPORA, read_documents
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError, DataError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.calls import OutOfRoomError, read, segment_room
from nested_lm.reading.held_out import position_edges
from nested_lm.reading.reader import Reader, Scored
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.options import Option, file_names, size
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task, from_report
from nested_lm_lab.tasks.needles.haystack import SHIPPED, read_texts
from nested_lm_lab.tasks.needles.metrics import BookPosition, BooksMetrics
from nested_lm_lab.tasks.needles.reading import MIB
from nested_lm_lab.tasks.needles.stops import may_go_further


class BooksSettings(Section):
    """Which books, and how much of each. count: of stretches of the shipped corpus, where there are no files."""

    files: Annotated[
        tuple[Path, ...],
        Option("Books; the shipped corpus in stretches by default.", metavar="[FILE]...", argument=True),
    ] = ()
    length: Annotated[int, Field(ge=2), Option("Tokens read of each book; 32k is 32,768.", read=size, shown="32k")] = (
        32768
    )
    count: Annotated[Count | None, Option("Stretches of the shipped corpus, 8 by default; not with files.")] = None
    batch_rows: Annotated[Count, Option("Books read side by side.")] = 8
    max_state_mib: Annotated[Count, Option("Stop where their states take more MiB.")] = 2048
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000

    @model_validator(mode="after")
    def _files_or_count(self) -> "BooksSettings":
        if self.files and self.count is not None:
            raise ConfigError("--count says how much of the shipped corpus is read; leave it out, or the files")
        return self

    @property
    def stretches(self) -> int:
        """How many stretches of the shipped corpus are read."""
        return self.count or 8


class BooksTask(Task[BooksSettings, BooksMetrics]):
    """Loss and perplexity by position in long books: with carried state, and with a fresh one every context."""

    name = "books"
    version = "1"
    Settings = BooksSettings
    Metrics = BooksMetrics

    def __init__(self, settings: BooksSettings) -> None:
        super().__init__(settings)
        self._tokens = np.zeros((0, 0), dtype=np.int64)

    @contextmanager
    def opened(self, subject: Subject) -> Iterator[None]:
        """Read the books.

        Raises:
            DataError: a book that cannot be read, or text that is too short.
        """
        given = self.settings
        self._tokens = open_books(subject.loaded.tokenizer, given.files, length=given.length, books=given.stretches)
        yield

    def record(self, subject: Subject) -> dict[str, Any]:  # noqa: ARG002
        """Names and digest of the books, and how much is read of them."""
        return {
            "books": file_names(self.settings.files) or [SHIPPED] * self.settings.stretches,
            "tokens_sha256": hashlib.sha256(self._tokens.tobytes()).hexdigest()[:16],
            "length": self.settings.length,
            "bootstrap_samples": self.settings.bootstrap_samples,
        }

    def measure(self, subject: Subject, progress: Progress) -> BooksMetrics:  # noqa: ARG002
        """Read all books.

        Raises:
            ConfigError: not even their first tokens fit into memory.
            NumericsError: a score is not finite.
        """
        given = self.settings
        try:
            return measure_books(
                subject.loaded,
                self._tokens,
                batch_rows=given.batch_rows,
                max_state_mib=given.max_state_mib,
                bootstrap=Bootstrap(samples=given.bootstrap_samples),
            )
        except OutOfRoomError as error:
            raise ConfigError(f"not even the first tokens of the books fit: {error}; lower --batch-rows") from error

    def may_go_further(self, old: BooksMetrics) -> bool:
        """A higher limit for states reads further."""
        return may_go_further(old, self.settings.max_state_mib)

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """Loss, and what the far past saves."""
        found = result.metrics
        assert isinstance(found, BooksMetrics)
        yield (
            f"  {found.carried.text()} nats a token, perplexity {found.perplexity.text(1)}; the past beyond a training "
            f"context saves {found.saved.text(4)}; {found.tokens_per_s:,.0f} tokens/s"
        )
        if found.stopped is not None:
            yield f"  {found.stopped}"

    @classmethod
    def tables(cls, campaign: Any, runs: Sequence[Any], name: str) -> list[Any]:
        """Loss by position."""
        found: list[Any] = from_report("needle_tables", "books")(campaign, runs, name)
        return found

    @classmethod
    def figures(cls) -> tuple[Any, ...]:
        """Loss over the position."""
        return (from_report("plots_needles", "book_positions"),)


def open_books(tokenizer: TextTokenizer, files: Sequence[Path], *, length: int, books: int) -> Int[np.ndarray, "B T"]:
    """The first `length` tokens of each file, or of stretches of the shipped corpus that follow each other.

    Raises:
        DataError: a file that cannot be read, or text that is too short.
    """
    if not files:
        needed, found = books * length, 0
        parts: list[np.ndarray] = []
        for document in read_documents(CORPORA[SHIPPED]):
            if found < needed:
                parts += tokenizer.encode_many([document.text])
                found += len(parts[-1])
        if found < needed:
            raise DataError(
                f"{books} books of {length:,} tokens: the shipped corpus has {found:,} tokens, and text is never "
                "repeated. Use shorter or fewer books, or name files of your own"
            )
        tokens = np.concatenate(parts)
        return tokens[: books * length].reshape(books, length)
    rows = []
    for path in files:
        text = "\n\n".join(document.text for document in read_texts([path]))
        (tokens,) = tokenizer.encode_many([text])
        if len(tokens) < length:
            raise DataError(f"{path} has {len(tokens):,} tokens, --length asks for {length:,}; name longer books")
        rows.append(tokens[:length])
    return np.stack(rows)


class _Read(NamedTuple):
    """Nats of each token, as far as memory went, and how it ended."""

    nats: Float[np.ndarray, "B T"]
    stopped: str | None


def measure_books(
    loaded: LoadedCheckpoint,
    books: Int[np.ndarray, "B T"],
    *,
    batch_rows: int,
    max_state_mib: int,
    bootstrap: Bootstrap,
) -> BooksMetrics:
    """Score books with carried and with fresh state.

    Args:
        batch_rows: books, and training contexts of the control, that are read side by side.
        max_state_mib: where reading stops when the states of the books read side by side have grown to this.

    Raises:
        OutOfRoomError: memory ended before the first segment.
        NumericsError: a score is not finite.
    """
    model, context = loaded.model, loaded.config.train.context_length
    start = loaded.tokenizer.start_of_text
    inputs = np.concatenate([np.full((len(books), 1), start), books[:, :-1]], axis=1)
    started = time.perf_counter()
    parts = [
        _read(model, inputs[at : at + batch_rows], books[at : at + batch_rows], max_state_mib * MIB)
        for at in range(0, len(books), batch_rows)
    ]
    reached = min(part.nats.shape[1] for part in parts)
    carried = np.concatenate([part.nats[:, :reached] for part in parts])
    fresh = _read_in_contexts(model, inputs[:, :reached], books[:, :reached], context, batch_rows)
    seconds = time.perf_counter() - started
    edges = [edge for edge in position_edges(reached) if edge < reached]
    over_books = _mean(carried, bootstrap)
    return BooksMetrics(
        kind="books",
        books=len(books),
        length=books.shape[1],
        reached=reached,
        stopped=next((part.stopped for part in parts if part.stopped is not None), None),
        max_state_mib=max_state_mib,
        constant_state=model.has_constant_state,
        carried=over_books,
        fresh=_mean(fresh, bootstrap),
        saved=_mean(fresh - carried, bootstrap),
        perplexity=_exponential(over_books),
        positions=tuple(
            BookPosition(
                first=first,
                last=last - 1,
                carried=_mean(carried[:, first:last], bootstrap),
                fresh=_mean(fresh[:, first:last], bootstrap),
                saved=_mean((fresh - carried)[:, first:last], bootstrap),
            )
            for first, last in zip(edges, [*edges[1:], reached], strict=True)
        ),
        tokens_per_s=2 * carried.size / seconds,
    )


def _read(
    model: LanguageModel, inputs: Int[np.ndarray, "B T"], targets: Int[np.ndarray, "B T"], max_state_bytes: int
) -> _Read:
    """Read books side by side, segment after segment, until they or memory end."""
    found: list[np.ndarray] = []
    state, begin = None, 0
    while begin < inputs.shape[1]:
        part = slice(begin, begin + segment_room(model, begin))
        try:
            after = read(model, inputs[:, part], state, targets=targets[:, part])
        except OutOfRoomError as error:
            if not found:
                raise
            return _Read(np.concatenate(found, axis=1), f"after {begin:,} tokens: {error}")
        found.append(after.nats)
        state, begin = after.state, begin + after.nats.shape[1]
        if (size := state.num_bytes()) > max_state_bytes:
            words = f"the states take {size / MIB:,.0f} MiB, the limit is {max_state_bytes / MIB:,.0f} MiB"
            return _Read(np.concatenate(found, axis=1), f"after {begin:,} tokens: {words}")
    return _Read(np.concatenate(found, axis=1), None)


def _read_in_contexts(
    model: LanguageModel,
    inputs: Int[np.ndarray, "B T"],
    targets: Int[np.ndarray, "B T"],
    context: int,
    batch_rows: int,
) -> Float[np.ndarray, "B T"]:
    """Read the same tokens with a fresh state every `context` tokens."""
    tokens = np.concatenate([inputs, targets[:, -1:]], axis=1)
    pieces = [
        (Scored(row[begin : begin + context + 1]),) for row in tokens for begin in range(0, inputs.shape[1], context)
    ]
    found = Reader(model, rows=batch_rows).score(pieces)
    return np.concatenate([scores.nats for (scores,) in found]).reshape(inputs.shape)


def _mean(values: Float[np.ndarray, "B T"], bootstrap: Bootstrap) -> Interval:
    return bootstrap.mean(values.mean(axis=1))


def _exponential(nats: Interval) -> Interval:
    low, high = (None if end is None else math.exp(end) for end in (nats.low, nats.high))
    return nats.model_copy(update={"value": math.exp(nats.value), "low": low, "high": high})

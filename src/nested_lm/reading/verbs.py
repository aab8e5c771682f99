"""What `nested-lm memorize` and `nested-lm score` do."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nested_lm.data.document import Document
from nested_lm.errors import CheckpointError, DataError
from nested_lm.reading.documents import check_files, read_documents
from nested_lm.reading.identity import ModelIdentity
from nested_lm.reading.memory_file import MemoryHeader, describe_bytes
from nested_lm.reading.trained import Reading, Score, TrainedModel
from nested_lm.storage.atomic import write_atomically

Mode = Literal["new", "continue", "overwrite"]
"""What `memorize` does with a memory file: refuse one that is there, go on from it, or replace it."""

MIB = 1 << 20
SCORES_VERSION = 1
"""Of the JSON file that `score` writes."""


@dataclass(frozen=True)
class Texts:
    """Files to read. text_field: of JSON lines and Parquet rows."""

    files: Sequence[str]
    text_field: str
    max_document_bytes: int


@dataclass(frozen=True)
class Memorized:
    """What reading some texts came to. seconds: of reading, without loading and writing."""

    header: MemoryHeader
    reading: Reading
    seconds: float
    file_bytes: int


@dataclass(frozen=True)
class DocumentScore:
    """One document, scored `fresh`, without a memory, and with it: `memory`."""

    id: str
    scores: dict[str, Score]


@dataclass(frozen=True)
class Scores:
    """Scored documents, and the memory they were scored with."""

    documents: list[DocumentScore]
    model: ModelIdentity
    memory: Path | None
    arms: tuple[str, ...] = field(default=("fresh",))

    def total(self, arm: str) -> Score:
        """All texts together."""
        found = [document.scores[arm] for document in self.documents]
        return Score(np.concatenate([score.nats for score in found]), sum(score.bytes for score in found))

    def as_document(self) -> dict[str, Any]:
        """Form for JSON."""
        return {
            "version": SCORES_VERSION,
            "model": {key: value for key, value in self.model.as_document().items() if key != "settings"},
            "memory": None if self.memory is None else str(self.memory),
            "bits_per_byte": {arm: self.total(arm).bits_per_byte for arm in self.arms},
            "documents": [
                {
                    "id": document.id,
                    "bytes": document.scores["fresh"].bytes,
                    "tokens": document.scores["fresh"].tokens,
                    "bits_per_byte": {arm: score.bits_per_byte for arm, score in document.scores.items()},
                    "token_nats": {arm: score.nats.tolist() for arm, score in document.scores.items()},
                }
                for document in self.documents
            ],
        }


def check_target(path: Path, mode: Mode) -> None:
    """Refuse to lose a memory, or to go on with one that is not there.

    Raises:
        CheckpointError: the file exists and `new` was asked for, or does not and `continue` was.
    """
    if mode == "new" and path.exists():
        raise CheckpointError(
            f"{path} exists; read on with --continue, start again with --overwrite, or name another file"
        )
    if mode == "continue" and not path.exists():
        raise CheckpointError(f"{path} is not there, so there is nothing to continue; leave --continue out")


def check_memorize(memory: Path, files: Sequence[str], mode: Mode) -> None:
    """Refuse before anything is loaded what `memorize` would refuse. Raises as `check_target` and `check_files`."""
    check_target(memory, mode)
    check_files(files)


def memorize(
    trained: TrainedModel,
    texts: Texts,
    memory: Path,
    *,
    mode: Mode,
    max_state_bytes: int,
) -> Memorized:
    """Read documents into a memory file. The old file stays until the new one is whole.

    Args:
        mode: what to do with a file that is there: refuse, go on from it, or replace it.
        max_state_bytes: a state that takes more is refused.

    Raises:
        CheckpointError: the file is there or is not, belongs to another model, or the state outgrows its limit.
        DataError: a text that cannot be used, or a full disk.
        NumericsError: a prediction is not finite.
    """
    check_memorize(memory, texts.files, mode)
    if mode == "continue":
        trained.load_memory(memory)
    started = time.perf_counter()
    reading = trained.read((document.text for document in _documents(texts)), max_state_bytes=max_state_bytes)
    seconds = time.perf_counter() - started
    if not reading.documents:
        raise _no_document(texts)
    return Memorized(trained.save_memory(memory), reading, seconds, memory.stat().st_size)


def score(trained: TrainedModel, texts: Texts, memory: Path | None, *, batch_size: int) -> Scores:
    """Score every document of some files without a memory and, if one is given, with it. The file is only read.

    Raises:
        CheckpointError: the memory belongs to another model, or is damaged.
        DataError: a text that cannot be used.
        NumericsError: a prediction is not finite.
    """
    check_files(texts.files)
    found = list(_documents(texts))
    if not found:
        raise _no_document(texts)
    contents = [document.text for document in found]
    if memory is not None:
        trained.load_memory(memory)  # refused before anything is scored
    arms = {"memory": trained.score_many(contents, rows=batch_size)} if memory is not None else {}
    trained.forget()
    arms = {"fresh": trained.score_many(contents, rows=batch_size), **arms}
    documents = [
        DocumentScore(document.id, {arm: scores[index] for arm, scores in arms.items()})
        for index, document in enumerate(found)
    ]
    return Scores(documents, trained.identify(), memory, tuple(arms))


def describe_memorized(done: Memorized, trained: TrainedModel, memory: Path) -> list[str]:
    """Say what was read, how fast and how well it was predicted, and what the memory takes."""
    reading = done.reading
    growth = "constant" if trained.model.has_constant_state else "grows with every token this model reads"
    return [
        f"read {reading.documents:,} documents, {reading.tokens:,} tokens, {reading.bytes:,} bytes: "
        f"{reading.bits_per_byte:.4f} bits per byte, {reading.tokens / done.seconds:,.0f} tokens/s",
        f"memory in {memory}: {done.header.position:,} tokens, state {describe_bytes(done.header.state_bytes)} "
        f"({growth}), file {describe_bytes(done.file_bytes)}",
    ]


def describe_scores(scores: Scores) -> list[str]:
    """A line a document and one for all: size, bits per byte and nats per token, without and with the memory."""

    def shown(score: Score) -> str:
        return f"{score.bits_per_byte:.4f} bits per byte ({score.nats_per_token:.4f} nats a token)"

    def row(name: str, of: dict[str, Score]) -> str:
        gain = f", with the memory {shown(of['memory'])}" if "memory" in of else ""
        return f"{name}: {of['fresh'].bytes:,} bytes, {of['fresh'].tokens:,} tokens, {shown(of['fresh'])}{gain}"

    lines = [row(document.id, document.scores) for document in scores.documents]
    return lines if len(lines) == 1 else [*lines, row("all", {arm: scores.total(arm) for arm in scores.arms})]


def _documents(texts: Texts) -> Iterator[Document]:
    return read_documents(texts.files, text_field=texts.text_field, max_document_bytes=texts.max_document_bytes)


def _no_document(texts: Texts) -> DataError:
    return DataError(f"{', '.join(texts.files)}: no document found; name files that hold text")


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as JSON: of every document the totals, and the nats of every token."""
    write_atomically(path, json.dumps(scores.as_document(), allow_nan=False, indent=1).encode())

"""What `nested-lm memorize` and `nested-lm score` do, and what `generate` needs to use a memory."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.errors import CheckpointError, DataError
from nested_lm.nn.state import StreamState
from nested_lm.reading.documents import check_files, read_documents
from nested_lm.reading.generation import Generation
from nested_lm.reading.identity import ModelIdentity, identify
from nested_lm.reading.memory_file import MemoryHeader, describe_bytes, load_memory, num_streams, save_memory
from nested_lm.reading.scoring import score_documents
from nested_lm.reading.stream import Boundary, StreamReader
from nested_lm.storage.atomic import write_atomically

Mode = Literal["new", "continue", "overwrite"]
"""What `memorize` does with a memory file: refuse one that is there, go on from it, or replace it."""

MIB = 1 << 20
BITS = 1.0 / math.log(2.0)
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
    documents: int
    tokens: int
    bytes: int
    nats: float
    seconds: float
    file_bytes: int


@dataclass(frozen=True)
class DocumentScore:
    """One document. nats: of each token and of the end token: `fresh` without a memory, `memory` with it."""

    id: str
    bytes: int
    nats: dict[str, np.ndarray]

    def bits_per_byte(self, arm: str) -> float:
        """Bits per byte of the text."""
        return float(self.nats[arm].sum()) * BITS / self.bytes


@dataclass(frozen=True)
class Scores:
    """Scored documents, and the memory they were scored with."""

    documents: list[DocumentScore]
    model: ModelIdentity
    memory: Path | None
    arms: tuple[str, ...] = field(default=("fresh",))

    def bits_per_byte(self, arm: str) -> float:
        """Bits per byte of all texts together."""
        nats = sum(float(document.nats[arm].sum()) for document in self.documents)
        return nats * BITS / sum(document.bytes for document in self.documents)

    def as_document(self) -> dict[str, Any]:
        """Form for JSON."""
        return {
            "version": SCORES_VERSION,
            "model": {key: value for key, value in self.model.as_document().items() if key != "settings"},
            "memory": None if self.memory is None else str(self.memory),
            "bits_per_byte": {arm: self.bits_per_byte(arm) for arm in self.arms},
            "documents": [
                {
                    "id": document.id,
                    "bytes": document.bytes,
                    "tokens": len(document.nats["fresh"]),
                    "bits_per_byte": {arm: document.bits_per_byte(arm) for arm in self.arms},
                    "token_nats": {arm: document.nats[arm].tolist() for arm in self.arms},
                }
                for document in self.documents
            ],
        }


def boundary(loaded: LoadedCheckpoint) -> Boundary:
    """Tokens around the documents of a checkpoint's tokenizer."""
    return Boundary(loaded.tokenizer.start_of_text, loaded.tokenizer.end_of_text)


def identity(loaded: LoadedCheckpoint) -> ModelIdentity:
    """Which model a checkpoint holds."""
    label = f"{loaded.config.name}, step {loaded.step}"
    return identify(loaded.model, tokenizer_hash=loaded.tokenizer.hash, label=label)


def open_memory(path: Path, loaded: LoadedCheckpoint, model: ModelIdentity | None = None) -> StreamState:
    """Read the memory of one stream.

    model: the checkpoint's identity, where it is known already.

    Raises:
        CheckpointError: as `load_memory`, or the file holds several streams.
    """
    state = load_memory(path, loaded.model, model or identity(loaded))
    if (count := num_streams(state)) != 1:
        raise CheckpointError(
            f"{path} holds {count} streams, this command uses one; take one in Python with `StreamState.select` and "
            "save it by itself"
        )
    return state


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
    loaded: LoadedCheckpoint,
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
    model = identity(loaded)
    state = open_memory(memory, loaded, model) if mode == "continue" else None
    reader = StreamReader(loaded.model, state, boundary=boundary(loaded), max_state_bytes=max_state_bytes)
    documents = size = 0
    seconds = 0.0
    for document in read_documents(
        texts.files, text_field=texts.text_field, max_document_bytes=texts.max_document_bytes
    ):
        documents += 1
        size += len(document.text.encode())
        tokens = loaded.tokenizer.encode_many([document.text])[0]
        started = time.perf_counter()
        reader.read(tokens)
        seconds += time.perf_counter() - started
    if not documents:
        raise _no_document(texts)
    started = time.perf_counter()
    state = reader.finish()
    seconds += time.perf_counter() - started
    header = save_memory(memory, state, model)
    return Memorized(header, documents, reader.tokens, size, reader.nats, seconds, memory.stat().st_size)


def score(loaded: LoadedCheckpoint, texts: Texts, memory: Path | None, *, batch_size: int) -> Scores:
    """Score every document of some files without a memory and, if one is given, with it. The file is only read.

    Raises:
        CheckpointError: the memory belongs to another model, or is damaged.
        DataError: a text that cannot be used.
        NumericsError: a prediction is not finite.
    """
    check_files(texts.files)
    model = identity(loaded)
    states: dict[str, StreamState | None] = {"fresh": None}
    if memory is not None:
        states["memory"] = open_memory(memory, loaded, model)
    found = list(read_documents(texts.files, text_field=texts.text_field, max_document_bytes=texts.max_document_bytes))
    if not found:
        raise _no_document(texts)
    tokens = loaded.tokenizer.encode_many([document.text for document in found])
    nats = {
        arm: score_documents(loaded.model, tokens, state=state, boundary=boundary(loaded), batch_size=batch_size)
        for arm, state in states.items()
    }
    documents = [
        DocumentScore(document.id, len(document.text.encode()), {arm: nats[arm][index] for arm in states})
        for index, document in enumerate(found)
    ]
    return Scores(documents, model, memory, tuple(states))


def describe_memorized(done: Memorized, loaded: LoadedCheckpoint, memory: Path) -> list[str]:
    """Say what was read, how fast and how well it was predicted, and what the memory takes."""
    bits, speed = done.nats * BITS / done.bytes, done.tokens / done.seconds
    growth = "constant" if loaded.model.has_constant_state else "grows with every token this model reads"
    return [
        f"read {done.documents:,} documents, {done.tokens:,} tokens, {done.bytes:,} bytes: "
        f"{bits:.4f} bits per byte, {speed:,.0f} tokens/s",
        f"memory in {memory}: {done.header.position:,} tokens, state {describe_bytes(done.header.state_bytes)} "
        f"({growth}), file {describe_bytes(done.file_bytes)}",
    ]


def describe_scores(scores: Scores) -> list[str]:
    """A line a document and one for all: size, bits per byte and nats per token, without and with the memory."""

    def shown(nats: np.ndarray, size: int) -> str:
        return f"{nats.sum() * BITS / size:.4f} bits per byte ({nats.mean():.4f} nats a token)"

    def row(name: str, size: int, nats: dict[str, np.ndarray]) -> str:
        gain = f", with the memory {shown(nats['memory'], size)}" if "memory" in nats else ""
        return f"{name}: {size:,} bytes, {len(nats['fresh']):,} tokens, {shown(nats['fresh'], size)}{gain}"

    lines = [row(document.id, document.bytes, document.nats) for document in scores.documents]
    if len(lines) > 1:
        total = {arm: np.concatenate([document.nats[arm] for document in scores.documents]) for arm in scores.arms}
        lines.append(row("all", sum(document.bytes for document in scores.documents), total))
    return lines


@torch.no_grad()
def update_memory(path: Path, loaded: LoadedCheckpoint, generation: Generation, *, stop: int) -> MemoryHeader:
    """Write the state after a prompt and the text generated from it; an end token is not part of the text.

    generation: of one stream.
    """
    state, last = generation.state, generation.tokens[:, -1:]
    if int(last) != stop:
        state = loaded.model(last, state=state).state
    return save_memory(path, state, identity(loaded))


def _no_document(texts: Texts) -> DataError:
    return DataError(f"{', '.join(texts.files)}: no document found; name files that hold text")


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as JSON: of every document the totals, and the nats of every token."""
    write_atomically(path, json.dumps(scores.as_document(), allow_nan=False, indent=1).encode())

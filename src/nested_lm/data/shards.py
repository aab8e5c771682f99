"""Reading a built data set: its documents and their tokens, with every file checked against the manifest."""

import errno
import functools
import hashlib
import json
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nested_lm.data.manifest import Manifest, ShardRecord, read_manifest
from nested_lm.data.split import SPLITS, Period, SplitName
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import DataError

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One line of `documents.jsonl`.

    period: index into the data set's periods, None when undated. bytes: UTF-8 bytes of the text. tokens:
    without start and end token. shard: index among the split's shards. offset: tokens before it in the shard.
    """

    id: str
    split: str
    date: str | None
    period: int | None
    bytes: int
    tokens: int
    shard: int
    offset: int
    sha256: str  # of the normalised text, see `content_hash`

    def to_json(self) -> str:
        """The line of `documents.jsonl`, without its line end."""
        return json.dumps(asdict(self), ensure_ascii=False)


_ROW = TypeAdapter(DocumentRow)


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of the tokens in a shard, little-endian: two bytes where the vocabulary allows it."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


def file_sha256(path: Path) -> str:
    """sha256 of a file. Within a process a file is read again only if its size or time of change differs.

    Raises: OSError when it cannot be read or is no regular file (reading a device or pipe may never end).
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class TokenDataset:
    """One split of a data set. Tokens stay on disk (memory map); the list of documents is in memory."""

    def __init__(self, folder: Path, split: SplitName, manifest: Manifest, documents: list[DocumentRow]) -> None:
        self.folder = folder
        self.split = split
        self.documents = documents
        self.periods = [Period(p.label, p.first_year, p.last_year) for p in manifest.periods]
        self.data_hash = manifest.data_hash
        self.all_documents = sum(record.documents for record in manifest.splits.values())
        self.all_bytes = sum(record.bytes for record in manifest.splits.values())
        self.tokenizer_hash = manifest.tokenizer.sha256
        self.vocab_size = manifest.tokenizer.vocab_size
        self.boundary = (manifest.tokenizer.start, manifest.tokenizer.end)  # tokens around every document
        self.num_tokens = sum(row.tokens for row in documents)
        dtype = token_dtype(self.vocab_size)
        self._shards = [
            np.memmap(folder / shard.file, dtype=dtype, mode="r") for shard in manifest.splits[split].shards
        ]

    @classmethod
    def open(cls, folder: Path, split: SplitName, *, verify: bool = True) -> "TokenDataset":
        """Open the `train`, `validation` or `test` split of the data set in `folder`.

        verify: compare the sha256 of every shard and of the tokenizer; sizes are compared in any case.

        Raises: DataError when there is no such data set or split, or a file is missing, cut short or changed.
        """
        assert split in SPLITS, split
        manifest = read_manifest(folder)
        name = manifest.name
        documents_path = folder / manifest.documents.file
        check_file(documents_path, manifest.documents.sha256, name)
        if verify:
            check_file(folder / manifest.tokenizer.file, manifest.tokenizer.sha256, name)
            _check_tokenizer(folder, manifest)
        for shard in manifest.splits[split].shards:
            check_shard(folder, shard, manifest.tokenizer.vocab_size, name, verify=verify)
        rows = _read_rows(documents_path, split)
        _check_rows(rows, manifest, split, documents_path)
        return cls(folder, split, manifest, rows)

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of one document as int64, without start and end token."""
        row = self.documents[index]
        stop = row.tokens if stop is None else stop
        assert 0 <= start <= stop <= row.tokens, (start, stop, row.tokens)
        return self._shards[row.shard][row.offset + start : row.offset + stop].astype(np.int64)


def _read_rows(path: Path, split: str) -> list[DocumentRow]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = _ROW.validate_json(line)
            except ValidationError as error:
                raise _contradiction(path, f"line {number}: {error.errors()[0]['msg']}") from error
            if row.split == split:
                rows.append(row)
    return rows


def _check_rows(rows: list[DocumentRow], manifest: Manifest, split: SplitName, path: Path) -> None:
    """Compare the documents of a split with its shards: each lies behind the one before, and all of them fill it."""
    record = manifest.splits[split]
    ends = dict.fromkeys(range(len(record.shards)), 0)
    for row in rows:
        if row.tokens < 0 or row.bytes < 0 or ends.get(row.shard) != row.offset:
            raise _contradiction(path, f"document {row.id!r} does not begin where the one before it ends")
        if row.period is not None and not 0 <= row.period < len(manifest.periods):
            raise _contradiction(path, f"document {row.id!r} is of period {row.period}, which there is not")
        ends[row.shard] += row.tokens
    for index, shard in enumerate(record.shards):
        if ends[index] != shard.tokens:
            raise _contradiction(
                path, f"the documents of {shard.file} have {ends[index]} tokens, the shard {shard.tokens}"
            )
    counted = (len(rows), sum(row.bytes for row in rows))
    if counted != (record.documents, record.bytes):
        stated = f"{record.documents} and {record.bytes}"
        raise _contradiction(
            path, f"it has {counted[0]} documents of {counted[1]} bytes in {split}, the manifest {stated}"
        )


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    record = manifest.tokenizer
    loaded = TextTokenizer.load(folder / record.file)
    found = (loaded.vocab_size, loaded.start_of_text, loaded.end_of_text)
    if found != (record.vocab_size, record.start, record.end):
        raise _contradiction(
            folder / record.file,
            f"it has {found[0]} tokens and documents between {found[1]} and {found[2]}, "
            f"the manifest {record.vocab_size} between {record.start} and {record.end}",
        )


def _contradiction(path: Path, found: str) -> DataError:
    return DataError(
        f"{path} and its manifest contradict each other: {found}\n"
        "  One of them was changed after `nested-lm data` wrote it. Delete the folder and build the data set again."
    )


def check_shard(folder: Path, shard: ShardRecord, vocab_size: int, name: str, *, verify: bool) -> None:
    """Compare a shard's size, and with `verify` its sha256, with its record. Raises DataError."""
    path = folder / shard.file
    expected = shard.tokens * token_dtype(vocab_size).itemsize
    found = path.stat().st_size if path.is_file() else None
    if found is None or found != expected:
        state = "is missing" if found is None else "does not match its manifest"
        size = "no file" if found is None else f"{found} bytes"
        raise _mismatch(path, state, f"expected {expected} bytes, found {size}", name)
    if verify:
        check_file(path, shard.sha256, name)


def check_file(path: Path, expected: str, name: str) -> None:
    """Compare a file's sha256 with the one its manifest gives. Raises DataError naming the file."""
    try:
        found = file_sha256(path)
    except FileNotFoundError as error:
        raise _mismatch(path, "is missing", f"expected sha256 {expected}, found no file", name) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise _mismatch(path, "does not match its manifest", f"expected sha256 {expected}, found {found}", name)


def _mismatch(path: Path, state: str, found: str, name: str) -> DataError:
    return DataError(
        f"{path} {state}\n"
        f"  {found}\n"
        "  The file was changed, cut short or removed after `nested-lm data` wrote it.\n"
        f"  Rerun `nested-lm data` with the preset of data set {name!r}: whole files are kept, "
        "this one is rebuilt."
    )

"""Streaming readers of `.txt`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst` and `.parquet` files.

Each yields `Document` or `BadDocument`; a file that is damaged as a whole raises DataError with its line.
Memory is bounded by one document, one decompression block or one Parquet batch.
"""

import datetime
import gzip
import io
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from nested_lm.config.data import FileSource
from nested_lm.data.document import BadDocument, Document, judge, parse_date
from nested_lm.errors import DataError, pip_install

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

Item = Document | BadDocument

_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 256
_ZSTD_WINDOW = 1 << 31  # of `zstd --long=31`, the most there is
_JSON_EXPANSION = 6  # a character of one byte can be spelt as the six of "\u0061"


def read_file(path: Path, name: str, source: FileSource) -> Iterator[Item]:
    """Documents of one file. `name` is its path below the source folder and starts every document's id."""
    try:
        if name.endswith(".txt"):
            yield _read_text(path, name, source)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, name, source)
        else:
            with _open_lines(path, name) as stream:
                yield from _read_json_lines(stream, path, name, source)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, name: str, source: FileSource) -> Item:
    limit = source.max_document_bytes
    size = path.stat().st_size
    if size > limit:
        return BadDocument(str(path), "too_large", f"{size} bytes, max_document_bytes is {limit}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadDocument(str(path), "not_utf8", f"byte {error.start} is {error.object[error.start]:#04x}")
    if source.date_field is not None:
        return BadDocument(str(path), "no_date", f"a text file has no field {source.date_field!r}")
    return judge(identity=name, text=text, date=None, position=str(path), max_bytes=limit)


def _open_lines(path: Path, name: str) -> IO[bytes]:
    if name.endswith((".gz", ".zst")) and path.stat().st_size == 0:
        raise _cut_short(path, 0, "it has no bytes; the least a compressed file has is a header")
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"), _BLOCK_BYTES)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), _BLOCK_BYTES)
    return path.open("rb", buffering=_BLOCK_BYTES)


def _read_json_lines(stream: IO[bytes], path: Path, name: str, source: FileSource) -> Iterator[Item]:
    limit = source.max_document_bytes * _JSON_EXPANSION + _BLOCK_BYTES
    number = 0
    while True:
        try:
            line = stream.readline(limit)
            overlong = len(line) == limit and not line.endswith(b"\n")
            while len(line) == limit and not line.endswith(b"\n"):
                line = stream.readline(limit)
        except EOFError as error:
            raise _cut_short(path, number, str(error)) from error
        except Exception as error:  # each decompressor has its own
            raise _unreadable(path, number, error) from error
        if not line and not overlong:
            return
        number += 1
        position = f"{path}:{number}"
        if overlong:
            yield BadDocument(position, "too_large", f"a line of more than {limit} bytes")
        elif line.strip():
            yield _parse_line(line, position, f"{name}:{number}", source)


def _parse_line(line: bytes, position: str, identity: str, source: FileSource) -> Item:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadDocument(position, "not_utf8", f"byte {error.start} is {error.object[error.start]:#04x}")
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits is a ValueError
        return BadDocument(position, "broken_json", str(error))
    if not isinstance(row, dict):
        return BadDocument(position, "broken_json", f"expected an object, found {type(row).__name__}")
    return _from_row(row, position, identity, source)


def _from_row(row: dict[str, Any], position: str, identity: str, source: FileSource) -> Item:
    if row.get(source.text_field) is None:
        fields = ", ".join(_SHOWN.repr(name) for name in sorted(row)[:8]) or "none"
        return BadDocument(position, "no_text", f"no field {source.text_field!r}; fields: {fields}")
    date = None
    if source.date_field is not None:
        value = row.get(source.date_field)
        if value is None:
            return BadDocument(position, "no_date", f"no field {source.date_field!r}")
        date = parse_date(value)
        if date is None:
            detail = f"{source.date_field} is {_SHOWN.repr(value)}, not a year or ISO date"
            return BadDocument(position, "bad_date", detail)
    return judge(
        identity=identity,
        text=row[source.text_field],
        date=date,
        position=position,
        max_bytes=source.max_document_bytes,
    )


def _read_parquet(path: Path, name: str, source: FileSource) -> Iterator[Item]:
    _optional("pyarrow", path)
    parquet = _optional("pyarrow.parquet", path)
    row_number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, source)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    row_number += 1
                    yield _from_arrow(batch, index, f"{path}:{row_number}", f"{name}:{row_number}", source)
    except DataError:
        raise
    except Exception as error:  # Arrow's own, and whatever lies beneath it
        raise _unreadable(path, row_number, error, unit="row") from error


def _columns(path: Path, names: list[str], source: FileSource) -> list[str]:
    """Columns to read. Raises DataError when one is missing, or there twice."""
    columns = [source.text_field] + ([source.date_field] if source.date_field is not None else [])
    for column in columns:
        if (count := names.count(column)) != 1:
            raise DataError(
                f"{path} has {'no column' if count == 0 else f'{count} columns'} {column!r}\n"
                f"  columns: {', '.join(_SHOWN.repr(name) for name in names[:20])}\n"
                "  Set source.text_field (and source.date_field) to columns that the file has once."
            )
    return columns


def _from_arrow(batch: Any, index: int, position: str, identity: str, source: FileSource) -> Item:
    row = {}
    for key in batch.schema.names:
        try:
            row[key] = _value(batch.column(key)[index])
        except UnicodeDecodeError as error:
            return BadDocument(position, "not_utf8", f"byte {error.start} is {error.object[error.start]:#04x}")
        except Exception as error:  # a time out of range or of an unknown zone, or what else Python cannot hold
            reason = "bad_date" if key == source.date_field else "not_text"
            return BadDocument(position, reason, f"column {key!r}: {_first_line(error)}")
    return _from_row(row, position, identity, source)


def _value(scalar: Any) -> Any:
    """A scalar of Arrow as Python has it; a time of any unit as its day, in its own zone."""
    per_second = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}.get(getattr(scalar.type, "unit", None))
    if per_second is None or not hasattr(scalar.type, "tz") or scalar.value is None:
        return scalar.as_py()
    moment = _EPOCH + datetime.timedelta(seconds=scalar.value // per_second)
    if scalar.type.tz is None:
        return moment.date()
    import pyarrow

    return moment.astimezone(pyarrow.lib.string_to_tzinfo(scalar.type.tz)).date()


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_SHOWN = reprlib.Repr()  # of what a file holds, in messages: short, and printable whatever it is
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:200]


def _cut_short(path: Path, after: int, found: str) -> DataError:
    return DataError(
        f"{path} is cut short after line {after}: {found}\n  Fetch it again, or move it out of the source folder."
    )


def _unreadable(path: Path, after: int, error: Exception, unit: str = "line") -> DataError:
    return DataError(
        f"{path} cannot be read after {unit} {after}: {_first_line(error)}\n"
        "  It is damaged, or of a kind that the reader does not know. Fetch it again, write it anew, or move it out of "
        "the source folder."
    )


def _optional(module: str, path: Path) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{path} cannot be read: the package {module.partition('.')[0]} is not installed\n"
            f"  Install it with: {pip_install('data')}"
        ) from error


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a `.zst` file of one or more frames; a frame that is cut short is an error.

    The reader of `zstandard` ends quietly at a truncated frame, which would drop documents unseen.
    """

    def __init__(self, path: Path) -> None:
        zstandard = _optional("zstandard", path)
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_BLOCK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output = memoryview(self._frame.decompress(self._input))
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
            else:
                self._input = b""
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

"""Texts that a user names on the command line: files of any kind the data readers know, or standard input."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nested_lm.config.data import FolderSource
from nested_lm.data.document import BadDocument, Document, judge
from nested_lm.data.readers import SUFFIXES, Item, read_file
from nested_lm.errors import DataError

STANDARD_INPUT = "-"


def check_files(files: Sequence[str]) -> None:
    """Refuse what cannot be read before anything is computed.

    Raises:
        DataError: a file that is missing, a folder, of a kind no reader knows, or standard input named twice.
    """
    if list(files).count(STANDARD_INPUT) > 1:
        raise DataError("`-` stands for standard input, which can be read once; name it once")
    for name in files:
        path = Path(name)
        if name == STANDARD_INPUT:
            continue
        if path.is_dir():
            raise DataError(f"{path} is a folder; name its files, as in {path}/*.txt")
        if not path.is_file():
            raise DataError(f"{path} is not there; name a file, or `-` for standard input")
        if not path.name.endswith(SUFFIXES):
            raise DataError(
                f"{path} cannot be read: its ending is none of {', '.join(SUFFIXES)}\n"
                f"  Rename it, or give its text on standard input: `... - < {path}`"
            )


def read_documents(
    files: Sequence[str], *, text_field: str, max_document_bytes: int, standard_input: BinaryIO | None = None
) -> Iterator[Document]:
    """Documents of files in the order given, one at a time.

    Args:
        files: paths; `-` for standard input, whose bytes are one text.
        text_field: name of the text in JSON lines and Parquet rows.
        max_document_bytes: longer texts are refused.
        standard_input: stands in for that of the process.

    Raises:
        DataError: the first document that cannot be used, with its file and line.
    """
    for name in files:
        if name == STANDARD_INPUT:
            stream = standard_input or sys.stdin.buffer
            items: Iterator[Item] = iter([_read_stream(stream, max_document_bytes)])
        else:
            source = FolderSource(
                kind="folder", path=name, text_field=text_field, max_document_bytes=max_document_bytes
            )
            items = read_file(Path(name), Path(name).name, source)
        for item in items:
            if isinstance(item, BadDocument):
                raise _refused(item)
            yield item


def _read_stream(stream: BinaryIO, limit: int) -> Item:
    content = stream.read(limit + 1)
    if len(content) > limit:
        return BadDocument("standard input", "too_large", f"more than {limit} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadDocument("standard input", "not_utf8", f"byte {error.start} is {error.object[error.start]:#04x}")
    return judge(identity=STANDARD_INPUT, text=text, date=None, position="standard input", max_bytes=limit)


def _refused(item: BadDocument) -> DataError:
    repair = {
        "too_large": "Split it, or raise --max-document-mib.",
        "no_text": "Name the field that holds the text with --text-field.",
    }
    return DataError(
        f"{item.position}: {item.reason.replace('_', ' ')}: {item.detail}\n"
        f"  {repair.get(item.reason, 'Mend or remove it.')} No memory was written."
    )

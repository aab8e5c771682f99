"""The configured source of texts: what files it has, a digest of all it reads, and a stream of documents."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from nested_lm.config.data import EmbeddedSource, FileSource, FolderSource, HubSource, Source
from nested_lm.data.corpora import CORPORA, read_documents
from nested_lm.data.document import BadDocument, Document
from nested_lm.data.hub import fetch
from nested_lm.data.readers import SUFFIXES, Item, read_file
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """A source that is ready to be read, any number of times, always in the same order.

    digest: changes when any byte that is read changes. ignored: files whose ending no reader knows.
    """

    description: str
    licence: str
    digest: str
    ignored: int
    on_bad_document: str
    read: Callable[[], Iterator[Item]]

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[tuple[int, Document]]:
        """Usable documents, each with its place in the source.

        skipped: gets the number of documents left out by reason, when the preset allows leaving any out.

        Raises: DataError for the first document that cannot be used, when the preset does not allow skipping.
        """
        for place, item in enumerate(self.read()):
            if isinstance(item, Document):
                yield place, item
            elif self.on_bad_document == "skip":
                if skipped is not None:
                    skipped[item.reason] += 1
            else:
                raise _refused(item)


def open_corpus(source: Source, digests: Path) -> Corpus:
    """Find the source's files and their digest.

    digests: file that remembers sizes, times and digests, so that unchanged files are not read again.

    Raises: DataError when the source is missing, cannot be fetched, or has no file that can be read.
    """
    if isinstance(source, EmbeddedSource):
        corpus = CORPORA[source.corpus]
        return Corpus(
            description=corpus.title,
            licence=corpus.licence,
            digest=corpus.sha256,
            ignored=0,
            on_bad_document="error",
            read=lambda: read_documents(corpus),
        )
    if isinstance(source, HubSource):
        files, ignored = fetch(source), 0
        described = f"{source.repository} at {source.revision}"
    else:
        files, ignored = _find(source)
        described = source.path
    return Corpus(
        description=f"{described} ({len(files)} files)",
        licence=source.licence,
        digest=_digest(files, digests),
        ignored=ignored,
        on_bad_document=source.on_bad_document,
        read=lambda: _read_all(files, source),
    )


def _find(source: FolderSource) -> tuple[dict[str, Path], int]:
    root = Path(source.path)
    known = ", ".join(SUFFIXES)
    if not root.exists():
        raise DataError(f"source.path {root} does not exist\n  Name a folder, or one file ({known}).")
    if root.is_file():
        if not root.name.endswith(SUFFIXES):
            raise DataError(f"source.path {root} cannot be read\n  Its ending is none of {known}.")
        return {root.name: root}, 0
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = {path.relative_to(root).as_posix(): path for path in paths if path.name.endswith(SUFFIXES)}
    if not files:
        raise DataError(
            f"source.path {root} holds no text: {len(paths)} files, none of them ending in {known}\n"
            "  Name another folder, or convert the files."
        )
    return dict(sorted(files.items())), len(paths) - len(files)


def _read_all(files: dict[str, Path], source: FileSource) -> Iterator[Item]:
    for name, path in files.items():
        yield from read_file(path, name, source)


def _digest(files: dict[str, Path], remembered: Path) -> str:
    try:
        before = json.loads(remembered.read_bytes())
    except (OSError, ValueError):
        before = {}
    now = {}
    total = hashlib.sha256()
    for name, path in files.items():
        try:
            status = path.stat()
            known = before.get(name)
            if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
                known = [status.st_size, status.st_mtime_ns, _file_digest(path)]
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        now[name] = known
        total.update(json.dumps([name, known[0], known[2]]).encode())
    if now != before and remembered.parent.is_dir():
        write_atomically(remembered, json.dumps(now).encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _refused(item: BadDocument) -> DataError:
    repair = {
        "too_large": "Raise source.max_document_bytes, split it, or",
        "no_text": "Set source.text_field, or",
    }
    return DataError(
        f"{item.position}: {item.reason.replace('_', ' ')}: {item.detail}\n"
        f"  {repair.get(item.reason, 'Mend or remove it, or')} set source.on_bad_document=skip to leave such "
        "documents out and count them."
    )

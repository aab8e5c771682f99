"""The configured source of texts: what files it has, a digest of all it reads, and a stream of documents."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from nested_lm.config.data import EmbeddedSource, FileSource, HubSource, Source
from nested_lm.data.corpora import CORPORA, read_documents
from nested_lm.data.cut import cut_long
from nested_lm.data.document import BadDocument, Document
from nested_lm.data.hub import fetch
from nested_lm.data.notes import sealed, unsealed
from nested_lm.data.readers import Item, read_file
from nested_lm.data.scan import Scan, scan
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """A source that is ready to be read, any number of times, always in the same order.

    digest: changes when any byte that is read changes. ignored: files whose ending no reader knows.
    hidden: files and folders whose name starts with a dot. unseen: what could not be looked into, by reason.
    """

    description: str
    licence: str
    digest: str
    ignored: int
    on_bad_document: str
    read: Callable[[], Iterator[Item]]
    hidden: int = 0
    unseen: Mapping[str, int] = field(default_factory=dict)

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
        found = Scan(fetch(source))
        described = f"{source.repository} at {source.revision}"
    else:
        found = scan(source)
        described = source.path
    return Corpus(
        description=f"{described} ({len(found.files)} files)",
        licence=source.licence,
        digest=_digest(found.files, digests),
        ignored=found.ignored,
        hidden=found.hidden,
        unseen=Counter(reason for _, reason, _ in found.unseen),
        on_bad_document=source.on_bad_document,
        read=lambda: _read_all(found.files, source),
    )


def _read_all(files: dict[str, Path], source: FileSource) -> Iterator[Item]:
    items = (item for name, path in files.items() for item in read_file(path, name, source))
    yield from items if source.cut_characters is None else cut_long(items, source.cut_characters)


def _digest(files: dict[str, Path], remembered: Path) -> str:
    try:
        before = unsealed(remembered.read_bytes())
    except (OSError, ValueError):  # not there yet, or changed: every file is read
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
        write_atomically(remembered, sealed(now))
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

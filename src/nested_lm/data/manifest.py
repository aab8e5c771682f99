"""What a built data set says about itself: `manifest.json`."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from nested_lm.config.section import Section
from nested_lm.data.split import SplitName
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically

MANIFEST = "manifest.json"
DOCUMENTS = "documents.jsonl"
TOKENIZER = "tokenizer.json"


class ShardRecord(Section):
    """One file of tokens; `file` is relative to the data set's folder."""

    file: str
    tokens: int
    sha256: str


class SplitRecord(Section):
    """One split: documents, tokens, UTF-8 bytes of their texts, and its shards in order."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[ShardRecord, ...]


class PeriodRecord(Section):
    """One chronological segment and how many documents and tokens each split has in it."""

    label: str
    first_year: int
    last_year: int
    documents: dict[SplitName, int]
    tokens: dict[SplitName, int]


class TokenizerRecord(Section):
    """The tokenizer every shard was written with, and the tokens that start and end every document."""

    file: str
    sha256: str
    vocab_size: int
    start: int = 0
    end: int = 0


class DocumentsRecord(Section):
    """The list of documents."""

    file: str
    sha256: str


class SourceRecord(Section):
    """Where the texts came from. digest: of every byte that was read."""

    description: str
    digest: str


class Manifest(Section):
    """The whole of `manifest.json`. Written last: a folder without one is not a finished data set."""

    schema_version: Literal[1]
    name: str
    licence: str
    source: SourceRecord
    created_from: str  # config_hash of the DataConfig
    recipe: dict[str, Any]  # the DataConfig without paths
    fingerprint: str  # of recipe, source and tokenizer file: what a rerun compares
    tokenizer: TokenizerRecord
    documents: DocumentsRecord
    splits: dict[SplitName, SplitRecord]
    periods: tuple[PeriodRecord, ...]
    duplicates_removed: int
    skipped: dict[str, int]  # documents left out, by reason

    @property
    def data_hash(self) -> str:
        """Identity of the tokens and their documents, wherever the folder lies: 16 hex digits."""
        splits = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        content = {"tokenizer": self.tokenizer.sha256, "documents": self.documents.sha256, "splits": splits}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a data set.

    Raises: DataError when there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no finished data set: {MANIFEST} is missing\n"
            "  Build it with `nested-lm data PRESET`; an unfinished build goes on where it stopped."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path} is damaged or of another version: {where}: {first['msg']}\n"
            f"  Delete {path} and rerun `nested-lm data` with its preset: finished shards are kept."
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last step of a build."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=False)
    write_atomically(folder / MANIFEST, (text + "\n").encode())

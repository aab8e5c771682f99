"""What a built data set says about itself: `manifest.json`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from nested_lm.config.data import DataConfig
from nested_lm.config.section import Count, Section
from nested_lm.data.split import SPLITS, SplitName
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.sealed import seal, unseal

MANIFEST = "manifest.json"
DOCUMENTS = "documents.jsonl"
TOKENIZER = "tokenizer.json"

FORMAT = 1  # of everything a build writes; part of the fingerprint
# Where things lie is no part of what a data set is: digests say what was read there.
_PLACES: Any = {"output_dir": True, "source": {"path"}, "tokenizer": {"path"}}
_INDENT = 2

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardRecord(Section):
    """One file of tokens; `file` is relative to the data set's folder."""

    file: str
    tokens: NonNegativeInt
    sha256: Digest


class SplitRecord(Section):
    """One split: documents, tokens, UTF-8 bytes of their texts, and its shards in order."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
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

    file: Literal["tokenizer.json"]
    sha256: Digest
    vocab_size: Count
    start: NonNegativeInt = 0
    end: NonNegativeInt = 0


class DocumentsRecord(Section):
    """The list of documents."""

    file: Literal["documents.jsonl"]
    sha256: Digest


class SourceRecord(Section):
    """Where the texts came from. digest: of every byte that was read."""

    description: str
    digest: str


class Manifest(Section):
    """The whole of `manifest.json` but its seal. Written last: a folder without one is not a finished data set.

    Version 1 had no seal; what such a manifest says is compared with the files, and `nested-lm data` seals it.
    """

    schema_version: Literal[1, 2]
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
    duplicates_removed: NonNegativeInt
    skipped: dict[str, int]  # documents left out, by reason

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        if wrong := next(self._contradictions(), None):
            raise ValueError(wrong)
        return self

    def _contradictions(self) -> Iterator[str]:
        if set(self.splits) != set(SPLITS):
            yield f"splits are {', '.join(self.splits)}, expected {', '.join(SPLITS)}"
        for name, split in self.splits.items():
            for index, shard in enumerate(split.shards):
                if shard.file != shard_file(name, index):
                    yield f"splits.{name}: shard {index} is {shard.file}, expected {shard_file(name, index)}"
            if (total := sum(shard.tokens for shard in split.shards)) != split.tokens:
                yield f"splits.{name} has {split.tokens} tokens, its shards {total}"
        if max(self.tokenizer.start, self.tokenizer.end) >= self.tokenizer.vocab_size:
            yield f"tokenizer: a document starts or ends with a token beyond the {self.tokenizer.vocab_size} there are"
        for period in self.periods:
            if period.last_year < period.first_year or not set(SPLITS) == set(period.documents) == set(period.tokens):
                yield f"period {period.label} ends before it begins, or lacks a split"
        if self.fingerprint != self._expected_fingerprint():
            yield "recipe, source and tokenizer are not those of the fingerprint"

    def _expected_fingerprint(self) -> str:
        spec = self.recipe.get("tokenizer")
        loaded = isinstance(spec, dict) and spec.get("kind") == "file"
        return fingerprint_of(self.recipe, self.source.digest, self.tokenizer.sha256 if loaded else None)

    @property
    def data_hash(self) -> str:
        """Identity of the tokens and their documents, wherever the folder lies: 16 hex digits."""
        splits = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        content = {"tokenizer": self.tokenizer.sha256, "documents": self.documents.sha256, "splits": splits}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shard_file(split: str, index: int) -> str:
    """Name of a shard below the data set's folder."""
    return f"shards/{split}-{index:05d}.bin"


def recipe_of(config: DataConfig) -> dict[str, Any]:
    """What a data set is made of: its configuration without the places of files."""
    return config.model_dump(mode="json", exclude=_PLACES)


def fingerprint_of(recipe: dict[str, Any], source: str, tokenizer: str | None) -> str:
    """Identity of a build. source: digest of the texts. tokenizer: sha256 of the file that was given, if any."""
    content = {"format": FORMAT, "recipe": recipe, "source": source, "tokenizer": tokenizer}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recipe_changes(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields of two recipes that differ, as `field old -> new`."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from recipe_changes(before, now, f"{path}{key}.")
        elif before != now:
            yield f"{path}{key} {before!r} -> {now!r}"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a data set.

    Raises: DataError when there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        content = b"" if path.is_char_device() or path.is_fifo() else path.read_bytes()  # those may never end
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no finished data set: {MANIFEST} is missing\n"
            "  Build it with `nested-lm data PRESET`; an unfinished build goes on where it stopped."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return Manifest.model_validate_json(json.dumps(_document(content)))
    except (ValueError, RecursionError) as error:
        found = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            found = f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"
        raise DataError(
            f"{path} is damaged or of another version: {found}\n"
            f"  Delete {path} and rerun `nested-lm data` with its preset: finished shards are kept."
        ) from error


def _document(content: bytes) -> Any:
    document, is_sealed = unseal(content)
    if is_sealed != (document.get("schema_version") != 1):
        raise ValueError("it was changed after it was written: its seal is missing, or its version wrong")
    return document


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, the last step of a build."""
    write_atomically(folder / MANIFEST, seal(manifest.model_dump(mode="json"), indent=_INDENT))

"""Text to token shards: inventory, tokenizer, shards, manifest. Safe to kill and run again at any moment."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_lm.config.data import DataConfig, LoadTokenizer
from nested_lm.config.load import config_hash
from nested_lm.data.cut import advice
from nested_lm.data.document import year_of
from nested_lm.data.inventory import Entry, Inventory, take_inventory
from nested_lm.data.manifest import (
    DOCUMENTS,
    MANIFEST,
    TOKENIZER,
    DocumentsRecord,
    Manifest,
    PeriodRecord,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    fingerprint_of,
    read_manifest,
    recipe_changes,
    recipe_of,
    write_manifest,
)
from nested_lm.data.notes import sealed, unsealed
from nested_lm.data.shard_writer import Marker, SplitWriter
from nested_lm.data.shards import DocumentRow, TokenDataset, file_sha256
from nested_lm.data.source import Corpus, open_corpus
from nested_lm.data.split import SPLITS, Period, SplitName, period_of
from nested_lm.data.tokenizer import TextTokenizer, train_tokenizer
from nested_lm.errors import DataError
from nested_lm.storage.atomic import remove_leftovers, write_atomically
from nested_lm.storage.lock import own_file

_BATCH_CHARACTERS = 1 << 22  # tokenised at once

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Build:
    """One build in its folder. `.build` in it holds what a rerun needs, sealed with the fingerprint."""

    config: DataConfig
    folder: Path
    corpus: Corpus
    recipe: dict[str, Any]
    fingerprint: str
    report: Report

    @property
    def work(self) -> Path:
        return self.folder / ".build"


def build(config: DataConfig, *, report: Report) -> Path:
    """Build the data set of `config` in its output folder, or finish or mend the one that is there.

    Finished shards of an earlier run with the same configuration and source are kept. A finished data set is
    checked, then left alone; damaged files in it are built again. An unfinished build of another
    configuration is started over. Every figure goes to the manifest and, as a line of text, to `report`.

    Returns: the folder.

    Raises: DataError for bad input, for a full disk, and when the folder holds a finished data set of another
    configuration or source, or files that are none of ours; InUseError when another process builds it.
    """
    folder = Path(config.output_dir)
    work = folder / ".build"
    corpus = open_corpus(config.source, work / "source.json")
    recipe = recipe_of(config)
    this = _Build(config, folder, corpus, recipe, _fingerprint(config, recipe, corpus), report)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_another(this, manifest)
        if _is_whole(this):
            if manifest.schema_version == 1:
                write_manifest(folder, manifest.model_copy(update={"schema_version": 2}))
                report(f"{folder}: {MANIFEST} of an earlier version was checked and sealed")
            report(f"{folder}: up to date")
            return folder
    with own_file(folder, activity="data"):
        _prepare(this)
        inventory = _inventory(this)
        tokenizer = _tokenizer(this, inventory)
        _finish(this, inventory, tokenizer, _write_shards(this, inventory, tokenizer))
    return folder


def _fingerprint(config: DataConfig, recipe: dict[str, Any], corpus: Corpus) -> str:
    tokenizer = None
    if isinstance(config.tokenizer, LoadTokenizer):
        tokenizer = TextTokenizer.load(Path(config.tokenizer.path)).hash
    return fingerprint_of(recipe, corpus.digest, tokenizer)


def _refuse_another(this: _Build, manifest: Manifest) -> None:
    """Runs refer to a finished data set by its hash, so it is never replaced without being told to."""
    if manifest.fingerprint == this.fingerprint:
        return
    changes = list(recipe_changes(manifest.recipe, this.recipe))
    if manifest.source.digest != this.corpus.digest:
        changes.append("the texts of the source changed")
    raise DataError(
        f"{this.folder} holds a finished data set of another configuration or source\n"
        f"  changed since: {'; '.join(changes) or 'the tokenizer file or the format of this version'}\n"
        "  Choose another output_dir, or delete that folder to build it anew."
    )


def require_recipe(config: DataConfig, manifest: Manifest) -> None:
    """Refuse to train on a data set that a preset describes falsely. Fields of later versions are not compared.

    Raises: DataError with the fields that differ.
    """
    stated = recipe_of(config)
    changes = list(recipe_changes(manifest.recipe, _within(stated, manifest.recipe)))
    if changes:
        raise DataError(
            f"{config.output_dir} holds a data set of another recipe than the preset's data section states\n"
            f"  there -> preset: {'; '.join(changes)}\n"
            "  Name the data preset that it was built with, or choose another data.output_dir and build that with "
            "`nested-lm data`."
        )


def _within(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The fields that `known` has as well."""
    return {
        key: _within(value, known[key]) if isinstance(value, dict) and isinstance(known[key], dict) else value
        for key, value in values.items()
        if key in known
    }


def _is_whole(this: _Build) -> bool:
    try:
        for split in SPLITS:
            TokenDataset.open(this.folder, split)
    except DataError as error:
        this.report(f"{str(error).splitlines()[0]}; mending it")
        return False
    return True


def _prepare(this: _Build) -> None:
    """Make the folder ours: go on with a build of the same fingerprint, start any other one over."""
    state = this.work / "state.json"
    folder = this.folder
    ours = {".build", "shards", TOKENIZER, DOCUMENTS, MANIFEST}
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output_dir {folder} is a file\n  Name a folder.")
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".tmp-")} if folder.exists() else set()
    if found and not state.exists() and not (folder / MANIFEST).exists():
        raise DataError(
            f"output_dir {folder} is not empty and holds no data set: {', '.join(sorted(found)[:5])}\n"
            "  Name a new or an empty folder."
        )
    if state.exists() and not (folder / MANIFEST).exists() and not _is_of(this, state):
        this.report(
            f"{folder}: the unfinished build was of another configuration, source or version, or its notes are "
            "damaged; starting over"
        )
        for name in sorted(ours & found):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for place in (folder, folder / "shards", this.work):
        remove_leftovers(place)
    write_atomically(state, sealed({}, key=this.fingerprint))


def _is_of(this: _Build, state: Path) -> bool:
    try:
        unsealed(state.read_bytes(), key=this.fingerprint)
    except (OSError, ValueError):
        return False
    return True


def _inventory(this: _Build) -> Inventory:
    path = this.work / "inventory.jsonl"
    inventory = None
    if path.exists():
        try:
            inventory = Inventory.load(path, key=this.fingerprint)
        except (OSError, ValueError) as error:
            this.report(f"{path} is damaged ({error}); the source is read again")
    if inventory is None:
        inventory = take_inventory(this.corpus, this.config)
        inventory.save(path, key=this.fingerprint)
    size = sum(entry.bytes for entry in inventory.entries)
    skipped = ", ".join(f"{count} {reason}" for reason, count in inventory.skipped.items()) or "none"
    this.report(
        f"{this.corpus.description}: {len(inventory.entries)} documents, {size:,} bytes; "
        f"{inventory.duplicates_removed} duplicates removed; skipped: {skipped}; "
        f"{this.corpus.ignored} files of other kinds and {this.corpus.hidden} hidden files and folders left out"
    )
    return inventory


def _tokenizer(this: _Build, inventory: Inventory) -> TextTokenizer:
    path, marker = this.folder / TOKENIZER, this.work / "tokenizer.json"
    if marker.exists() and path.exists():
        try:
            if unsealed(marker.read_bytes(), key=this.fingerprint)["sha256"] == file_sha256(path):
                return TextTokenizer.load(path)
        except (OSError, ValueError) as error:
            this.report(f"{marker} is damaged ({error}); the tokenizer is made again")
    if isinstance(this.config.tokenizer, LoadTokenizer):
        write_atomically(path, Path(this.config.tokenizer.path).read_bytes())
        tokenizer = TextTokenizer.load(path)
    else:
        entries = inventory.of_split("train")
        limit = this.config.tokenizer.max_bytes
        stride = 1 if limit is None else -(-sum(entry.bytes for entry in entries) // limit)
        wanted = {entry.place for entry in entries[::stride]}
        texts = (text for _, text in inventory.texts(this.corpus, wanted=wanted))
        tokenizer = train_tokenizer(texts, this.config.tokenizer.vocab_size, path)
    write_atomically(marker, sealed({"sha256": tokenizer.hash}, key=this.fingerprint))
    this.report(f"tokenizer: {tokenizer.vocab_size} tokens, sha256 {tokenizer.hash[:16]}")
    return tokenizer


@dataclass(frozen=True)
class _WrittenSplit:
    entries: list[Entry]
    writer: SplitWriter
    markers: list[Marker]


def _write_shards(this: _Build, inventory: Inventory, tokenizer: TextTokenizer) -> dict[SplitName, _WrittenSplit]:
    writers = {
        split: SplitWriter(
            this.folder,
            this.work,
            split,
            shard_tokens=this.config.shard_tokens,
            tokenizer=tokenizer,
            key=this.fingerprint,
            report=this.report,
        )
        for split in SPLITS
    }
    if kept := sum(writer.kept for writer in writers.values()):
        this.report(f"keeping {kept} finished shards")
    entries = {split: inventory.of_split(split) for split in SPLITS}
    ranks = {entry.place: rank for split in SPLITS for rank, entry in enumerate(entries[split])}
    wanted = {e.place for e in inventory.entries if writers[e.split].wants(ranks[e.place])}
    batch: list[tuple[Entry, str]] = []

    def tokenise_batch() -> None:
        names = [f"{this.corpus.description}: document {entry.id!r}: the tokenizer" for entry, _ in batch]
        encoded = tokenizer.encode_many([text for _, text in batch], names=names)
        for (entry, _), tokens in zip(batch, encoded, strict=True):
            writers[entry.split].add(ranks[entry.place], tokens)
        batch.clear()

    characters = 0
    for entry, text in inventory.texts(this.corpus, wanted=wanted):
        batch.append((entry, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            tokenise_batch()
            characters = 0
    if batch:
        tokenise_batch()
    return {
        split: _WrittenSplit(entries[split], writer, writer.finish(len(entries[split])))
        for split, writer in writers.items()
    }


def _finish(
    this: _Build, inventory: Inventory, tokenizer: TextTokenizer, written: dict[SplitName, _WrittenSplit]
) -> None:
    """Write the list of documents and, last, the manifest."""
    periods = inventory.periods(this.config.period_years)
    rows = {split: list(_rows(written[split], periods)) for split in SPLITS}
    documents = this.folder / DOCUMENTS
    write_atomically(documents, ((row.to_json() + "\n").encode() for split in SPLITS for row in rows[split]))
    manifest = Manifest(
        schema_version=2,
        name=this.config.name,
        licence=this.corpus.licence,
        source=SourceRecord(description=this.corpus.description, digest=this.corpus.digest),
        created_from=config_hash(this.config),
        recipe=this.recipe,
        fingerprint=this.fingerprint,
        tokenizer=TokenizerRecord(
            file=TOKENIZER,
            sha256=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            start=tokenizer.start_of_text,
            end=tokenizer.end_of_text,
        ),
        documents=DocumentsRecord(file=DOCUMENTS, sha256=file_sha256(documents)),
        splits={
            split: SplitRecord(
                documents=len(rows[split]),
                tokens=sum(row.tokens for row in rows[split]),
                bytes=sum(row.bytes for row in rows[split]),
                shards=tuple(written[split].writer.record(marker) for marker in written[split].markers),
            )
            for split in SPLITS
        },
        periods=tuple(_period_record(index, period, rows) for index, period in enumerate(periods)),
        duplicates_removed=inventory.duplicates_removed,
        skipped=inventory.skipped,
    )
    write_manifest(this.folder, manifest)
    for split, record in manifest.splits.items():
        ratio = f"{record.bytes / record.tokens:.3f}" if record.tokens else "no"
        this.report(f"{split}: {record.documents} documents, {record.tokens:,} tokens, {ratio} bytes per token")
    sizes = manifest.splits.values()
    if manifest.splits["validation"].documents == 0 and (total := sum(record.documents for record in sizes)):
        this.report(f"no validation documents. {advice(total, sum(record.bytes for record in sizes))}")
    for period in manifest.periods:
        counts = ", ".join(f"{split} {period.documents[split]}" for split in SPLITS)
        this.report(f"period {period.label}: {counts} documents")
    this.report(f"{this.folder}: finished, data hash {manifest.data_hash}")


def _rows(written: _WrittenSplit, periods: list[Period]) -> Iterator[DocumentRow]:
    for marker in written.markers:
        offset = 0
        for entry, tokens in zip(written.entries[marker.first : marker.end], marker.document_tokens, strict=True):
            yield DocumentRow(
                id=entry.id,
                split=entry.split,
                date=entry.date,
                period=None if entry.date is None else period_of(year_of(entry.date), periods),
                bytes=entry.bytes,
                tokens=tokens,
                shard=marker.shard,
                offset=offset,
                sha256=entry.sha256,
            )
            offset += tokens


def _period_record(index: int, period: Period, rows: dict[SplitName, list[DocumentRow]]) -> PeriodRecord:
    tokens = {split: [row.tokens for row in rows[split] if row.period == index] for split in SPLITS}
    return PeriodRecord(
        label=period.label,
        first_year=period.first_year,
        last_year=period.last_year,
        documents={split: len(tokens[split]) for split in SPLITS},
        tokens={split: sum(tokens[split]) for split in SPLITS},
    )

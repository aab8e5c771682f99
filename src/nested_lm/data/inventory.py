"""First pass over a source: which documents are kept, and in which split. Stored, so that it happens once."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nested_lm.config.data import DataConfig
from nested_lm.data.cut import advice
from nested_lm.data.dedup import ExactDuplicates, content_hash
from nested_lm.data.document import Document, year_of
from nested_lm.data.notes import sealed, unsealed
from nested_lm.data.source import Corpus
from nested_lm.data.split import SPLITS, Period, SplitName, assign_split, cut_periods
from nested_lm.errors import DataError
from nested_lm.storage.atomic import write_atomically


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept document. place: its number among all items of the source."""

    place: int
    id: str
    split: SplitName
    date: str | None
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Inventory:
    """Every kept document in the order of the source."""

    entries: list[Entry]
    duplicates_removed: int
    skipped: dict[str, int] = field(default_factory=dict)

    def of_split(self, split: str) -> list[Entry]:
        """Documents of one split, in the order of the source."""
        return [entry for entry in self.entries if entry.split == split]

    def periods(self, period_years: int) -> list[Period]:
        """Chronological periods from the first dated document of any split to the last."""
        return cut_periods((year_of(e.date) for e in self.entries if e.date is not None), period_years)

    def texts(self, corpus: Corpus, *, wanted: set[int]) -> Iterator[tuple[Entry, str]]:
        """Read the source again and yield the documents whose place is `wanted`.

        Raises: DataError when a text is not the one of the first pass.
        """
        by_place = {entry.place: entry for entry in self.entries if entry.place in wanted}
        left = len(by_place)
        if not left:
            return
        for place, document in corpus.documents():
            entry = by_place.get(place)
            if entry is None:
                continue
            if document.id != entry.id or content_hash(document.text) != entry.sha256:
                raise _changed(document)
            yield entry, document.text
            left -= 1
            if not left:
                return
        raise DataError(f"{corpus.description}: {left} documents went away while they were being read")

    def save(self, path: Path, *, key: str) -> None:
        """Write to a JSON-lines file, whose last line is a seal over all others and the key of the build."""
        write_atomically(path, self._lines(key))

    def _lines(self, key: str) -> Iterator[bytes]:
        digest = hashlib.sha256()
        head = {"duplicates_removed": self.duplicates_removed, "skipped": self.skipped}
        for row in itertools.chain([head], map(asdict, self.entries)):
            line = (json.dumps(row) + "\n").encode()
            digest.update(line)
            yield line
        yield sealed({"sha256": digest.hexdigest()}, key=key)

    @classmethod
    def load(cls, path: Path, *, key: str) -> "Inventory":
        """Read what `save` wrote. Raises ValueError when it was changed since, or belongs to another build."""
        head, entries, line = None, [], b""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for following in file:
                if line:
                    digest.update(line)
                    row = json.loads(line)
                    if head is None:
                        head = row
                    else:
                        entries.append(row)
                line = following
        if head is None or unsealed(line, key=key) != {"sha256": digest.hexdigest()}:
            raise ValueError("its seal does not fit")
        return cls([Entry(**row) for row in entries], **head)


def take_inventory(corpus: Corpus, config: DataConfig) -> Inventory:
    """Read the whole source once: leave out bad documents and duplicates, assign splits.

    Raises: DataError when a document is bad and may not be skipped, or a split with a share gets no document.
    """
    skipped: Counter[str] = Counter(corpus.unseen)
    duplicates = ExactDuplicates()
    entries = []
    for place, document in corpus.documents(skipped):
        content = content_hash(document.text)
        if config.deduplicate == "exact" and not duplicates.is_new(content):
            continue
        split = assign_split(content, config.split)
        size = len(document.text.encode())
        entries.append(Entry(place, document.id, split, document.date, size, content))
    inventory = Inventory(entries, duplicates.removed, dict(sorted(skipped.items())))
    _check_splits(inventory, corpus, config)
    return inventory


def _check_splits(inventory: Inventory, corpus: Corpus, config: DataConfig) -> None:
    count = len(inventory.entries)
    if not count:
        reasons = ", ".join(f"{number} {reason}" for reason, number in inventory.skipped.items()) or "it is empty"
        raise DataError(f"{corpus.description}: no document is left ({reasons})\n  Name a source with text.")
    for split in SPLITS:
        share = getattr(config.split, split)
        if share and not inventory.of_split(split):
            raise DataError(
                f"split.{split} is {share:g}, but none of the {count} documents of {corpus.description} fell "
                "into it\n"
                f"  Splits are drawn by document. {advice(count, sum(entry.bytes for entry in inventory.entries))}"
            )


def _changed(document: Document) -> DataError:
    return DataError(
        f"{document.position} changed while the data set was being built\n"
        "  Let nothing write to the source, then run the same command again."
    )

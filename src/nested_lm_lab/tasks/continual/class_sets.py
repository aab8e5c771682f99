"""Class-incremental data sets from local folders: CLINC150, Banking77, DBpedia14; checked by their content.

Files may be those of the authors (JSON, CSV; plain or gzip) or Parquet files of the hub. What is hashed is the content,
so that every form of the same data set has the same hash.
"""

import csv
import gzip
import hashlib
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_lm.errors import DataError

Rows = list[tuple[str, str]]
"""Text and class of each example."""

DBPEDIA = (
    "company",
    "educational institution",
    "artist",
    "athlete",
    "office holder",
    "mean of transportation",
    "building",
    "natural place",
    "village",
    "animal",
    "plant",
    "album",
    "film",
    "written work",
)
"""Names of DBpedia's classes 1 to 14 in the authors' order; a sample with a `meta.txt` has its own."""


@dataclass(frozen=True)
class ClassSet:
    """Texts with a class each.

    groups: the classes in the order of the data set, by domain where there are domains; the tasks of a stream.
    content_hash: sha256 of the rows of both splits, the first 16 hex digits.
    """

    name: str
    train: Rows
    test: Rows
    groups: tuple[tuple[str, ...], ...]
    content_hash: str


@dataclass(frozen=True)
class Recipe:
    """How one data set is read. known: hashes of copies that were checked by hand."""

    read: Callable[[Path], tuple[Rows, Rows]]
    groups: Callable[[Path, list[str]], tuple[tuple[str, ...], ...]]
    known: Mapping[str, str]


def read_class_set(name: str, folder: Path, *, accept_hash: str | None = None) -> ClassSet:
    """Read a data set from `folder/name`.

    Args:
        accept_hash: content hash of a copy that is not in the list of known ones.

    Raises:
        DataError: files are missing or damaged, or the content is neither known nor accepted.
    """
    if name not in SETS:
        raise DataError(f"unknown class set {name!r}; choices: {', '.join(SETS)}")
    recipe, place = SETS[name], folder / name
    if not place.is_dir():
        raise DataError(
            f"{place} is not a folder; put {name} there: the authors' files, or the Parquet files of the hub"
        )
    train, test = recipe.read(place)
    found = _content_hash(train, test)
    if found not in recipe.known and found != accept_hash:
        known = ", ".join(f"{value} ({what})" for value, what in recipe.known.items())
        raise DataError(
            f"{place}: the content has hash {found}, which is no known copy of {name}: {known}\n"
            f"  Get one of those, or accept this copy with --class-hash {found}: results of different copies are "
            "not comparable."
        )
    classes = sorted({label for _, label in train})
    odd = sorted({label for _, label in test} ^ set(classes))
    if odd:
        raise DataError(f"{place}: classes have examples in one split only: {', '.join(odd[:5])}")
    return ClassSet(name, train, test, recipe.groups(place, classes), found)


def shuffled_groups(groups: Sequence[Sequence[str]], *, seed: int) -> tuple[tuple[str, ...], ...]:
    """The same sizes, with the classes dealt out at random: an order without domains."""
    classes = [label for group in groups for label in group]
    random.Random(seed).shuffle(classes)
    dealt = iter(classes)
    return tuple(tuple(next(dealt) for _ in group) for group in groups)


def _content_hash(train: Rows, test: Rows) -> str:
    digest = hashlib.sha256()
    for split in (train, test):
        for row in sorted(split):  # forms differ in the order of rows
            digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _open(folder: Path, *names: str) -> Path | None:
    """First of these files that is there, plain or gzip."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; the file is damaged, get it again") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; the file is damaged, get it again") from error


def _csv(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(_text(path))))


def _parquet(folder: Path, split: str, text: str, label: str) -> Rows | None:
    """Rows of a split in the hub's Parquet files; None when there are none. Label numbers become names."""
    paths = sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(split))
    if not paths:
        return None
    from pyarrow import ArrowException, parquet

    rows: Rows = []
    try:
        for path in paths:
            table = parquet.read_table(path, columns=[text, label])
            about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
            for words, value in zip(table[text].to_pylist(), table[label].to_pylist(), strict=True):
                rows.append((words, names[value] if names and isinstance(value, int) else str(value)))
    except (ArrowException, OSError, KeyError, IndexError, ValueError) as error:
        raise DataError(f"{paths[0].parent}: the {split} files are no copy from the hub: {error}") from error
    return rows


def _read_clinc(folder: Path) -> tuple[Rows, Rows]:
    path = _open(folder, "data_full.json")
    if path is None:
        train, test = (_parquet(folder, split, "text", "intent") for split in ("train", "test"))
        if train is None or test is None:
            raise DataError(f"{folder} holds neither data_full.json[.gz] nor train and test Parquet files")
        return [row for row in train if row[1] != "oos"], [row for row in test if row[1] != "oos"]
    data = _json(path)
    try:
        return [(text, label) for text, label in data["train"]], [(text, label) for text, label in data["test"]]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} has no lists `train` and `test` of [text, intent]: {error!r}") from error


def _group_clinc(folder: Path, classes: list[str]) -> tuple[tuple[str, ...], ...]:
    path = folder / "domains.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: the tasks of clinc150 are its ten domains, listed in that file")
    groups = tuple(tuple(label.replace(" ", "_") for label in group) for group in _json(path).values())
    listed = sorted(label for group in groups for label in group)
    if listed != classes:
        odd = sorted(set(listed) ^ set(classes))
        raise DataError(f"{path} does not list the intents of the data: {', '.join(odd[:5])}")
    return groups


def _read_banking(folder: Path) -> tuple[Rows, Rows]:
    splits = []
    for split in ("train", "test"):
        path = _open(folder, f"{split}.csv")
        rows = _parquet(folder, split, "text", "label") if path is None else _banking_rows(path)
        if rows is None:
            raise DataError(f"{folder} holds neither {split}.csv[.gz] nor {split} Parquet files")
        splits.append(rows)
    return splits[0], splits[1]


def _banking_rows(path: Path) -> Rows:
    header, *rows = _csv(path)
    if header != ["text", "category"] or any(len(row) != 2 for row in rows):
        raise DataError(f"{path}: expected the columns text,category, found {','.join(header)}")
    return [(text, label) for text, label in rows]


def _group_banking(folder: Path, classes: list[str]) -> tuple[tuple[str, ...], ...]:
    path = folder / "categories.json"
    order = [str(label) for label in _json(path)] if path.is_file() else classes
    if sorted(order) != classes:
        raise DataError(f"{path} does not list the classes of the data")
    return _cut(order, 7)


def _read_dbpedia(folder: Path) -> tuple[Rows, Rows]:
    names = _dbpedia_names(folder)
    splits = []
    for split, files in (("train", ("train.csv", "val.csv")), ("test", ("test.csv",))):
        path = _open(folder, *files)
        if path is not None:
            rows = [(row[-1].strip(), row[0]) for row in _csv(path) if row]
            try:
                splits.append([(text, names[int(number) - 1]) for text, number in rows])
            except (ValueError, IndexError) as error:
                raise DataError(f"{path}: a class is no number from 1 to {len(names)}: {error}") from error
            continue
        found = _parquet(folder, split, "content", "label")
        if found is None:
            raise DataError(f"{folder} holds neither {files[0]}[.gz] nor {split} Parquet files")
        splits.append([(text.strip(), _spaced(label)) for text, label in found])
    return splits[0], splits[1]


def _dbpedia_names(folder: Path) -> Sequence[str]:
    path = folder / "meta.txt"
    if not path.is_file():
        return DBPEDIA
    lines = [line.split(":") for line in _text(path).splitlines() if line.strip()[:1].isdigit()]
    return [_spaced(parts[1].strip()) for parts in sorted(lines, key=lambda parts: int(parts[0]))]


def _spaced(name: str) -> str:
    """`NaturalPlace` to `natural place`."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


def _group_dbpedia(folder: Path, classes: list[str]) -> tuple[tuple[str, ...], ...]:
    del folder
    return _cut([name for name in DBPEDIA if name in classes], 7)


def _cut(classes: Sequence[str], parts: int) -> tuple[tuple[str, ...], ...]:
    size = len(classes) // parts
    if size * parts != len(classes):
        raise DataError(f"{len(classes)} classes cannot be cut into {parts} equal tasks")
    return tuple(tuple(classes[start : start + size]) for start in range(0, len(classes), size))


SETS: Mapping[str, Recipe] = {
    "clinc150": Recipe(
        _read_clinc, _group_clinc, {"c139c2693bd68258": "clinc/oos-eval, data_full.json, 15,000 + 4,500"}
    ),
    "banking77": Recipe(
        _read_banking, _group_banking, {"d38426686c9507d8": "PolyAI task-specific-datasets, 10,003 + 3,080"}
    ),
    "dbpedia14": Recipe(_read_dbpedia, _group_dbpedia, {"400717e00e68dd7e": "a sample of 5,000 + 5,000 abstracts"}),
}

"""The data folder: documents of the tasks as compressed JSON lines with the hub's field names, and their hashes."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nested_lm.config.section import Count, Section
from nested_lm.errors import DataError, pip_install
from nested_lm.storage.atomic import write_atomically
from nested_lm_lab.tasks.zeroshot.harness import require_harness
from nested_lm_lab.tasks.zeroshot.tasks import TASKS, ZeroShotTask

MANIFEST = "MANIFEST.json"
_SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet", ".json")
_PUBLISHED_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_AGAIN = "Make the folder again with `nested-lm eval zeroshot-data`."


class DataFile(Section):
    """One task's documents. source: where they were taken from."""

    file: str
    sha256: str
    documents: Count
    source: str
    licence: str


class DataManifest(Section):
    """What a data folder holds, by task."""

    version: int
    tasks: dict[str, DataFile]


def make_data_folder(
    output: Path, names: Sequence[str], *, source: Path | None, report: Callable[[str], None] = print
) -> Path:
    """Write documents of tasks from the hub, or from files on disk, into a folder. Tasks that are there stay.

    Args:
        names: of tasks.
        source: folder with a JSON-lines, JSON or Parquet file for each task, named as the task; None: the hub.

    Returns: the manifest.

    Raises:
        DataError: a file is missing, damaged or lacks fields, or the hub cannot be reached; that task's old file stays.
        ConfigError: HellaSwag as published needs the harness, which is missing or another release.
    """
    path = output / MANIFEST
    entries = dict(read_manifest(output).tasks) if path.exists() else {}
    for name in names:
        task = TASKS[name]
        rows, origin = _from_hub(task) if source is None else _from_files(task, source)
        documents = [_canonical(task, row, f"{origin}, document {index}") for index, row in enumerate(rows)]
        if not documents:
            raise DataError(f"{origin}: no document for task {name}")
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        content = gzip.compress(text.encode(), mtime=0)
        entry = DataFile(
            file=f"{name}.jsonl.gz",
            sha256=hashlib.sha256(content).hexdigest(),
            documents=len(documents),
            source=origin,
            licence=task.licence,
        )
        write_atomically(output / entry.file, content)
        entries[name] = entry
        manifest = DataManifest(version=1, tasks={key: entries[key] for key in TASKS if key in entries})
        write_atomically(path, (manifest.model_dump_json(indent=1) + "\n").encode())
        of = "" if len(documents) == task.documents else f" of the {task.documents:,} published"
        known = "" if digest_of_documents(task, documents) == task.known_copy else ", not a known copy"
        report(f"{name}: {len(documents):,} documents{of}{known}, licence {task.licence}")
    return path


def digest_of_documents(task: ZeroShotTask, documents: Iterable[Mapping[str, Any]]) -> str:
    """sha256 of the fields that a task uses, one line of canonical JSON a document, in order."""
    digest = hashlib.sha256()
    for document in documents:
        fields = {field: document.get(field) for field in task.fields}
        line = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def is_known_copy(task: ZeroShotTask, path: Path) -> bool:
    """Whether a file of a data folder holds the documents that this project was measured with.

    Raises:
        DataError: it cannot be read.
    """
    return digest_of_documents(task, _read(path)) == task.known_copy


def read_manifest(folder: Path) -> DataManifest:
    """Read the manifest of a data folder.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return DataManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{folder} is no data folder: {path.name} cannot be read ({error.strerror})\n  {_AGAIN}"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}\n  {_AGAIN}") from error


def verified_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Files of tasks in a data folder, each checked against its hash.

    Raises:
        DataError: a task is missing, or its file was changed.
    """
    manifest = read_manifest(folder)
    missing = [name for name in names if name not in manifest.tasks]
    if missing:
        raise DataError(
            f"{folder} holds no documents for {', '.join(missing)}; it has {', '.join(manifest.tasks) or 'none'}\n"
            f"  Add them with `nested-lm eval zeroshot-data {folder} --tasks {','.join(missing)}`, or name other tasks."
        )
    found = {}
    for name in names:
        entry = manifest.tasks[name]
        path = folder / entry.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}\n  {_AGAIN}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry.sha256:
            raise DataError(
                f"{path} does not match its manifest\n"
                f"  expected sha256 {entry.sha256}, found {digest}\n"
                f"  The file was changed after it was written. {_AGAIN}"
            )
        found[name] = path
    return found


def _from_hub(task: ZeroShotTask) -> tuple[Iterator[dict[str, Any]], str]:
    """Documents of a task as the hub has them."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"the hub is read with `datasets`, which is missing; {pip_install('eval')}") from None
    origin = f"hub {task.dataset}" + (f" {task.subset}" if task.subset else "") + f" {task.split}"
    try:
        loaded = datasets.load_dataset(task.dataset, task.subset, split=task.split)
    except Exception as error:  # whatever the hub or the network gave `datasets`
        raise DataError(
            f"{origin} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            "  Try again with a network, or take files that are there: --from FOLDER."
        ) from error
    return iter(loaded), origin


def _from_files(task: ZeroShotTask, folder: Path) -> tuple[Iterator[dict[str, Any]], str]:
    """Documents of a task from a file that bears its name."""
    names = [f"{stem}{suffix}" for stem in (task.name, *task.other_stems) for suffix in _SUFFIXES]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder} has no file for task {task.name}; looked for {', '.join(names)}")
    return _read(path), path.name


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file.

    Raises:
        DataError: it cannot be read to its end, or holds something else than rows.
    """
    try:
        for index, row in enumerate(_parse(path)):
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, document {index}: found {_describe(row)}; a document is an object with its fields by name"
                )
            yield row
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}\n  See that it may be read and is of the format its name ends in; "
            "fetch it again where it is cut short or damaged."
        ) from error


def _parse(path: Path) -> Iterator[Any]:
    """What a file holds a row, whatever that is."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise DataError(
                f"{path}: found {_describe(found)} instead of a list of documents\n"
                "  Write [{...}, {...}], or one document a line into a .jsonl file."
            )
        yield from found
    else:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(repr, value)) or 'none'}"
    return f"{type(value).__name__} {value!r:.60}"


def _canonical(task: ZeroShotTask, row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a document that its task uses. HellaSwag's are what the harness makes of the published ones.

    Raises:
        DataError: a field is missing.
        ConfigError: HellaSwag as published needs the harness, which is missing or another release.
    """
    if task.name == "hellaswag" and "gold" in row:
        row = row | {"label": str(row["gold"])}
    is_published = task.name == "hellaswag" and "ctx_a" in row
    missing = [field for field in (_PUBLISHED_HELLASWAG if is_published else task.fields) if field not in row]
    if missing:
        raise DataError(f"{where} of task {task.name} has no field {missing[0]!r}; fields: {', '.join(row)}")
    if is_published:
        row = _hellaswag(row)
    return {field: row[field] for field in task.fields}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    """Query, choices and label, made of the published fields."""
    clean = _hellaswag_cleaning()
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    return {
        "query": clean(row["activity_label"] + ": " + context),
        "choices": [clean(ending) for ending in row["endings"]],
        "label": str(row["label"]),
    }


@cache
def _hellaswag_cleaning() -> Callable[[str], str]:
    """The harness's cleaning of texts. Kept, because to ask for the release takes longer than to clean a document.

    Raises:
        ConfigError: the harness is missing or another release.
    """
    require_harness()
    from lm_eval.tasks.hellaswag.utils import preprocess

    return preprocess

"""Checkpoints: written aside and renamed, verified by digest before anything is read, never overwritten.

A checkpoint is a folder `step-00000120` with safetensors and JSON files (no pickle anywhere) and
`manifest.json`, written last, which holds the size and xxh3_128 digest of every other file. A folder without
a valid manifest is not a checkpoint. Which one is newest is computed, so no pointer can be wrong.

Whoever writes below a run folder owns it (`storage.lock`). Whatever the operating system or a parser says while a
file of a checkpoint is read is damage of that file: a `CheckpointError` that names it.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nested_lm.config.load import parse_run
from nested_lm.config.run import RunConfig
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import CheckpointError
from nested_lm.nn.model import LanguageModel
from nested_lm.storage.disk import Disk
from nested_lm.storage.records import Identity, Manifest, Position

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
IDENTITY = "run.json"
FOLDER_PREFIX = "step-"
TEMPORARY_PREFIX = ".tmp-"
_STALE = re.compile(rf"\{TEMPORARY_PREFIX}(damaged|(old-)?{FOLDER_PREFIX}\d{{8,}})-[0-9a-f]{{8}}")
_RESERVE_BYTES = 1 << 20  # free space that must remain beside the tensors: JSON files and the manifest


_disk = Disk()


def folder_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"{FOLDER_PREFIX}{step:08d}"


def write_checkpoint(
    folder: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    extra_files: Mapping[str, Path],
    config_hash: str,
    milestone: str | None = None,
) -> None:
    """Write a checkpoint so that it is either whole or not there.

    A valid checkpoint already at `folder` is left alone; a damaged one is replaced.

    Args:
        folder: `<root>/step-00000120`; its parent is created.
        tensors: file stem -> name -> tensor, on any device; each becomes `<stem>.safetensors`.
        documents: file name -> JSON-able content.
        extra_files: file name -> file to copy.
        config_hash: of the run, recorded in the manifest.
        milestone: name of a border this checkpoint marks; milestones are never pruned.

    Raises:
        CheckpointError: no space, or the disk refuses; what was written is removed, older ones are kept.
    """
    if is_valid(folder):
        return
    aside = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{uuid.uuid4().hex[:8]}"
    with _disk_errors(folder, aside):
        _disk.make_folder(aside)
        _check_space(folder, tensors, extra_files)
        for stem, content in tensors.items():
            _disk.write_tensors(aside / f"{stem}.safetensors", _contiguous(content))
        for name, document in documents.items():
            _disk.write_bytes(aside / name, json.dumps(document, allow_nan=False, indent=1).encode())
        for name, source in extra_files.items():
            _disk.write_bytes(aside / name, source.read_bytes())
        files = sorted(aside.iterdir())
        for path in files:
            _disk.sync(path)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "config_hash": config_hash,
            "milestone": milestone,
            "files": {path.name: {"bytes": path.stat().st_size, "xxh3_128": _digest(path)} for path in files},
        }
        _disk.write_bytes(aside / MANIFEST, _sealed(manifest))
        _disk.sync(aside / MANIFEST)
        _disk.sync(aside)
        if os.path.lexists(folder):  # damaged, or it would have been left alone
            damaged = folder.parent / f"{TEMPORARY_PREFIX}damaged-{uuid.uuid4().hex[:8]}"
            _disk.rename(folder, damaged)
            _disk.rename(aside, folder)
            _disk.remove_folder(damaged)
        else:
            _disk.rename(aside, folder)
        _disk.sync(folder.parent)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest.

    Raises:
        CheckpointError: names the file that is missing, cut short, changed or unreadable.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        with _reading(file):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; {_advice(path)}")
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"{file} has {size:,} bytes, its manifest says {expected['bytes']:,}; {_advice(path)}"
                )
            if (found := _digest(file)) != expected["xxh3_128"]:
                raise CheckpointError(
                    f"{file} was changed after it was written: xxh3_128 is {found}, its manifest says "
                    f"{expected['xxh3_128']}; {_advice(path)}"
                )
    return manifest


def is_valid(path: Path) -> bool:
    """Whether the folder is a whole, unchanged checkpoint."""
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, valid or not. Other names are none of ours.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    names = (re.fullmatch(rf"{FOLDER_PREFIX}(\d{{8,}})", path.name) for path in _entries(root) if path.is_dir())
    found = sorted((int(match[1]), match[0]) for match in names if match)
    return [root / name for _, name in found]


def newest_checkpoint(root: Path, *, report: Callable[[str], None] | None = None) -> Path | None:
    """Find the newest valid checkpoint below `root`; None when there is none.

    report: told, in a sentence each, of newer ones that are damaged and skipped.
    """
    for path in reversed(list_checkpoints(root)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if report is not None:
                report(f"skipped damaged checkpoint: {error}")
            continue
        return path
    return None


def find_checkpoint(source: Path, *, report: Callable[[str], None] | None = None) -> Path:
    """Find the checkpoint that a checkpoint folder is or a run folder has newest.

    report: told of newer ones that are damaged and skipped.

    Raises:
        CheckpointError: `source` is neither.
    """
    if os.path.lexists(source / MANIFEST):
        return source
    newest = newest_checkpoint(source / "checkpoints", report=report)
    if newest is None:
        raise CheckpointError(
            f"{source} is neither a checkpoint nor a run folder with a valid one below checkpoints/; "
            "train the run first: `nested-lm train`"
        )
    return newest


def remove_stale(root: Path) -> list[str]:
    """Remove what writes that were cut off left behind; return the names of the removed folders.

    Only the owner of the run folder may call this: what another process is writing looks the same.

    Raises:
        CheckpointError: one cannot be removed.
    """
    stale = sorted(path for path in _entries(root) if _STALE.fullmatch(path.name))
    for path in stale:
        try:
            _disk.remove_folder(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} is left of a write that was cut off and cannot be removed: {error.strerror or error}; "
                "delete it"
            ) from error
    return [path.name for path in stale]


def prune_checkpoints(root: Path, *, keep: int) -> list[str]:
    """Delete all but the `keep` newest whole checkpoints; return the deleted names.

    Milestones are never deleted and do not count. Nor do damaged ones, which are left for a person to look at. Those
    that are kept are verified before anything is deleted.

    Raises:
        CheckpointError: one cannot be deleted.
    """
    kept, old = 0, []
    for path in reversed(list_checkpoints(root)):
        try:
            manifest = _read_manifest(path) if kept >= keep else verify_checkpoint(path)
        except CheckpointError:
            continue
        if manifest["milestone"] is not None:
            continue
        kept += 1
        if kept > keep:
            old.append(path)
    for path in reversed(old):
        # Renamed first: a deletion that is cut off leaves a stale folder, not a damaged checkpoint.
        aside = root / f"{TEMPORARY_PREFIX}old-{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            _disk.rename(path, aside)
            _disk.remove_folder(aside)
        except OSError as error:
            raise CheckpointError(f"{path} is not kept and cannot be deleted: {error.strerror or error}") from error
    return [path.name for path in reversed(old)]


def read_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """Read `<stem>.safetensors` of a verified checkpoint to the CPU.

    Raises:
        CheckpointError: the manifest does not list the file, or it is none.
    """
    file = _listed(path, f"{stem}.safetensors")
    with _reading(file), safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (not a mapping)


def read_document(path: Path, name: str) -> Any:
    """Read a JSON file of a verified checkpoint.

    Raises:
        CheckpointError: the manifest does not list the file, or it is not JSON.
    """
    file = _listed(path, name)
    with _reading(file):
        return json.loads(file.read_bytes())


def read_identity(path: Path) -> dict[str, Any]:
    """Read the `run.json` of a checkpoint.

    Raises:
        CheckpointError: it is not what a run writes.
    """
    with _reading(path / IDENTITY):
        return Identity.check(read_document(path, IDENTITY))


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Copy weights into a model whose parameters have exactly these names and shapes.

    Raises:
        CheckpointError: any name is missing, unknown or of another shape; the model is not changed.
    """
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    reshaped = [
        f"{name}: {tuple(tensors[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(tensors))
        if tensors[name].shape != expected[name].shape
    ]
    if missing or unknown or reshaped:
        raise CheckpointError(
            f"{where} belongs to another model\n"
            f"  missing from the checkpoint: {_some(missing)}\n"
            f"  unknown to the model: {_some(unknown)}\n"
            f"  of another shape: {_some(reshaped)}\n"
            "  Use the configuration stored beside it (config.json), or another run folder."
        )
    model.load_state_dict(dict(tensors), strict=True)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model as it was at some step, with what it came from."""

    model: LanguageModel
    config: RunConfig
    tokenizer: TextTokenizer
    identity: dict[str, Any]  # run.json
    step: int
    tokens: int
    milestone: str | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def load_model(path: Path, *, device: torch.device | str, tokenizer_hash: str | None = None) -> LoadedCheckpoint:
    """Verify a checkpoint and load its model in evaluation mode.

    Args:
        path: checkpoint folder.
        device: where the model is put.
        tokenizer_hash: of the data set in use, when there is one.

    Raises:
        CheckpointError: damaged, of another model, or made with another tokenizer than `tokenizer_hash`.
    """
    manifest = verify_checkpoint(path)
    identity = read_identity(path)
    check_tokenizer(path, identity, tokenizer_hash or identity["tokenizer_hash"])
    config = parse_run(read_document(path, "config.json"), str(path / "config.json"))
    tokenizer = TextTokenizer.load(_listed(path, "tokenizer.json"))
    check_tokenizer(path, identity, tokenizer.hash)
    model = LanguageModel(config.model, seed=None)
    load_weights(model, read_tensors(path, "model"), where=path)
    with _reading(path / "train_state.json"):
        position = Position.model_validate(read_document(path, "train_state.json"))
    return LoadedCheckpoint(
        model=model.to(device).eval(),
        config=config,
        tokenizer=tokenizer,
        identity=identity,
        step=position.step,
        tokens=position.tokens,
        milestone=manifest["milestone"],
    )


def check_tokenizer(path: Path, identity: Mapping[str, Any], tokenizer_hash: str) -> None:
    """Refuse a checkpoint whose token ids mean something else.

    Raises:
        CheckpointError: the run's tokenizer is not the one in use.
    """
    if identity["tokenizer_hash"] != tokenizer_hash:
        raise CheckpointError(
            f"{path} was trained with tokenizer {identity['tokenizer_hash'][:16]}, the one in use is "
            f"{tokenizer_hash[:16]}; use the data set it was trained on, or train anew"
        )


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing when it is not there."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror or error}; make it readable") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Call whatever goes wrong while a file is read damage of that file."""
    try:
        yield
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "content"
        raise CheckpointError(f"{file} has no usable {where}: {found['msg']}; {_advice(file.parent)}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}; {_advice(file.parent)}") from error
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deeply; {_advice(file.parent)}") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {_advice(file.parent)}") from error


def _listed(path: Path, name: str) -> Path:
    """A file of a checkpoint that its manifest answers for."""
    if name not in _read_manifest(path)["files"]:
        raise CheckpointError(f"{path / name} is not listed in {MANIFEST}, so nothing is known of it; {_advice(path)}")
    return path / name


def _check_space(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], extra_files: Mapping[str, Path]) -> None:
    """Refuse before writing when the disk cannot hold the checkpoint."""
    size = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())
    size += sum(path.stat().st_size for path in extra_files.values())
    needed, free = size + _RESERVE_BYTES, _disk.free_bytes(folder.parent)
    if free < needed:
        raise CheckpointError(
            f"{folder} needs {needed:,} bytes, {free:,} are free; "
            "free some space or lower train.checkpoints.keep, then run again with --resume auto"
        )


@contextmanager
def _disk_errors(folder: Path, aside: Path) -> Iterator[None]:
    """Turn a failed write into a CheckpointError and leave nothing half-written behind."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise CheckpointError(
            f"{folder} could not be written: {error}; older checkpoints are kept. "
            "Free some space or mend the disk, then run again with --resume auto"
        ) from error


def _contiguous(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prepare tensors for safetensors, which refuses views."""
    return {name: tensor.detach().contiguous() for name, tensor in content.items()}


def _digest(path: Path) -> str:
    """xxh3_128 of a file, read in pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Bytes of a manifest with its own digest inside: reading compares every byte."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    return json.dumps({**manifest, "manifest_xxh3_128": digest}, indent=1, sort_keys=True).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest and check it against its own digest."""
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file} is missing: {path} is not a finished checkpoint; {_advice(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}; {_advice(path)}") from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); {_advice(path)}") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version of nested-lm that wrote it"
        )
    if not isinstance(manifest, dict) or content != _sealed(
        {key: value for key, value in manifest.items() if key != "manifest_xxh3_128"}
    ):
        raise CheckpointError(f"{file} was changed after it was written; {_advice(path)}")
    with _reading(file):
        Manifest.model_validate(manifest)
    return manifest


def _advice(path: Path) -> str:
    """Say what a user can do about a damaged checkpoint."""
    return f"delete {path.name} to use the one before it, or copy it again from where it came"


def _some(names: list[str], limit: int = 5) -> str:
    """List a few names, and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

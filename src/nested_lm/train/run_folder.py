"""The run folder: identity, resolved configuration, and whether a run may go on in it."""

import contextlib
import platform
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml
from pydantic import ValidationError

from nested_lm.checkpoint import IDENTITY
from nested_lm.config.architecture import flat
from nested_lm.config.load import dump_resolved, identifying, parse_run, training_hash
from nested_lm.config.mixers import SelfModifying
from nested_lm.config.run import RunConfig
from nested_lm.data.manifest import read_manifest
from nested_lm.data.pipeline import require_recipe
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.storage.atomic import remove_leftovers, write_atomically
from nested_lm.storage.commit import current_commit
from nested_lm.storage.records import Identity
from nested_lm.storage.sealed import seal, unseal

RESOLVED = "config.resolved.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_RESOLVED_DIGEST = "config_resolved_xxh3_128"
_FREE = ("eval.", "train.logging.")  # fields that a run may go on with other values of
_RESTORE = "restore it, or choose another output_dir"
_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers")


def open_run_folder(
    config: RunConfig,
    dataset: TokenDataset,
    *,
    resume: Literal["auto", "never"],
    device: str,
    parameters: int,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Create the folder of a run, or check that the run in it is this one; return its identity.

    The caller owns the folder (`storage.lock`), and has checked whatever may refuse the run.

    start: where the weights of a run come from that does not begin with drawn ones; recorded in a new identity.

    Raises:
        ConfigError: the folder holds a run of another configuration, or any run when `resume` is `never`.
        CheckpointError: the data set or tokenizer changed since the run began.
    """
    folder = Path(config.output_dir)
    identity_file = folder / IDENTITY
    if not identity_file.exists():
        return _create(config, dataset, device=device, parameters=parameters, start=start)
    identity = read_run_identity(folder)
    remove_leftovers(folder)
    differences = _differences(folder, config) if identity["config_hash"] != training_hash(config) else []
    if differences:  # none: an earlier version, which lacked a field or hashed more of them
        advice = "Choose another output_dir, or start with the stored configuration."
        if any(line.startswith("train.budget_tokens:") for line in differences):
            advice = (
                "A schedule ends with its budget, so a run has one. To train its weights further, choose another "
                f"output_dir and --init-from {folder}."
            )
        raise ConfigError(
            f"{folder} holds a run of another configuration; these fields differ (there -> now):\n"
            + "\n".join(f"  {line}" for line in differences)
            + f"\n  {advice}"
        )
    if resume == "never":
        raise ConfigError(
            f"{folder} already holds run {identity['run_id']}; use --resume auto to continue it, "
            "or choose another output_dir"
        )
    for field, found in (("data_hash", dataset.data_hash), ("tokenizer_hash", dataset.tokenizer_hash)):
        if identity[field] != found:
            raise CheckpointError(
                f"{folder} was begun with {field} {identity[field][:16]}, the data set in {dataset.folder} "
                f"has {found[:16]}; restore that data set, or choose another output_dir"
            )
    return identity


def new_identity(
    config: RunConfig, *, data_hash: str | None, tokenizer_hash: str, device: str, parameters: int
) -> dict[str, Any]:
    """Make the identity of a run that begins now. data_hash: None for a model that saw no data set of ours."""
    return {
        "run_id": f"{config.name}-{uuid.uuid4().hex[:8]}",
        "name": config.name,
        "config_hash": training_hash(config),
        "data_hash": data_hash,
        "tokenizer_hash": tokenizer_hash,
        "commit": current_commit(),
        "seed": config.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "nested-lm": version("nested-lm"),
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
            **_compiler(config, device),
        },
        "device": device,
        "parameters": parameters,
    }


def _compiler(config: RunConfig, device: str) -> dict[str, str]:
    """Version of the C compiler where memories may run in C, which rounds otherwise than torch."""
    memory = getattr(config.model.mixer, "memory", config.model.mixer)
    if device != "cpu" or not isinstance(memory, SelfModifying) or memory.backend == "torch":
        return {}
    return {"c_compiler": cpu_library.compiler_version()} if cpu_library.reason_missing() is None else {}


def _create(
    config: RunConfig, dataset: TokenDataset, *, device: str, parameters: int, start: dict[str, Any] | None
) -> dict[str, Any]:
    """Write configuration and identity of a new run; the identity comes last and makes the folder a run."""
    folder = Path(config.output_dir)
    require_recipe(config.data, read_manifest(dataset.folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        dump_resolved(config, folder / RESOLVED)
        identity = new_identity(
            config,
            data_hash=dataset.data_hash,
            tokenizer_hash=dataset.tokenizer_hash,
            device=device,
            parameters=parameters,
        )
        if start is not None:
            identity["initialised_from"] = start
        write_run_identity(folder, identity)
    except OSError as error:
        raise ConfigError(
            f"output_dir {folder} cannot be written: {error}; choose a folder this user may write to"
        ) from error
    return identity


def write_run_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write `run.json`, sealed; the seal covers `config.resolved.yaml` as well, which must be there.

    Raises:
        DataError: it cannot be written.
    """
    resolved = xxhash.xxh3_128_hexdigest((folder / RESOLVED).read_bytes())
    write_atomically(folder / IDENTITY, seal({**identity, _RESOLVED_DIGEST: resolved}, indent=2))


def read_run_identity(folder: Path) -> dict[str, Any]:
    """Read the `run.json` of a run folder.

    Raises:
        ConfigError: it is not what a run writes, or was changed since; or `config.resolved.yaml` was.
    """
    path = folder / IDENTITY
    try:
        document, _ = unseal(path.read_bytes())
        resolved = document.pop(_RESOLVED_DIGEST, None)
        identity = Identity.check(document)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}; {_RESTORE}") from error
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, found['loc']))}: {found['msg']}; {_RESTORE}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not what a run wrote: {error}; {_RESTORE}") from None
    if resolved is not None and resolved != xxhash.xxh3_128_hexdigest(_read_resolved(folder)):
        raise ConfigError(f"{folder / RESOLVED} was changed after it was written; {_RESTORE}")
    return identity


def _read_resolved(folder: Path) -> bytes:
    try:
        return (folder / RESOLVED).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{folder / RESOLVED} cannot be read: {error.strerror or error}; {_RESTORE}") from error


def _differences(folder: Path, config: RunConfig) -> list[str]:
    """List the fields of the training that differ from the stored configuration, as `path: there -> now`.

    Fields that an earlier version did not have count as their default, which is what it did.
    """
    content = _read_resolved(folder)
    if not content:
        return [f"{RESOLVED} is missing, so the fields cannot be compared"]
    stored = folder / RESOLVED
    try:
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{stored} is not YAML: {error}; {_RESTORE}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{stored} does not hold a configuration but {type(values).__name__}; {_RESTORE}")
    with contextlib.suppress(ConfigError):  # what this version does not understand is compared as it was written
        values = parse_run(values, str(stored)).model_dump(mode="json")
    there, now = flat(identifying(values)), flat(identifying(config.model_dump(mode="json")))
    absent = "(absent)"
    return [
        f"{path}: {there.get(path, absent)} -> {now.get(path, absent)}"
        for path in sorted(set(there) | set(now))
        if there.get(path, absent) != now.get(path, absent) and not path.startswith(_FREE)
    ]

"""Where metrics go: `metrics.jsonl` always, W&B and TensorBoard on request."""

import contextlib
import errno
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from nested_lm.config.train import Logging
from nested_lm.errors import ConfigError, DataError, pip_install
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.sealed import seal, unseal_lines

Record = Mapping[str, Any]

WANDB_LINK = "wandb.json"
"""Holds the address of the run's curves, for reports."""

_TENSORBOARD = ("torch.utils.tensorboard", "tensorboard", "train.logging.tensorboard")  # module, extra, setting
_WANDB = ("wandb", "wandb", "train.logging.wandb_project")
_FREE_SPACE = "free some space or mend the disk, then run again with --resume auto"


class Sink(Protocol):
    """Takes records: JSON-able mappings with `event` and `step`."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Finish; nothing may be written afterwards."""
        ...


class MetricsLog:
    """The truth about a run: one sealed JSON object a line, appended and handed to the operating system at once.

    Opening it for a run that continues at `resume_step` cuts every record after that step, and a last line
    that was cut off by a kill, so that each step appears exactly once.

    While the disk refuses, records wait in memory, and the next write tries again. `sync` raises then, so no
    checkpoint is written that relies on a record that is not there.

    waiting: records that the disk refused. trouble: why, in words; empty when none wait.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        self.waiting: list[bytes] = []
        self.trouble = ""
        kept = [record for record in read_records(path) if record["step"] <= resume_step]
        write_atomically(path, b"".join(map(seal, kept)))
        self.evaluated_steps = {record["step"] for record in kept if record["event"] == "eval"}
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size  # of the whole lines

    def write(self, record: Record) -> None:
        """Append one record, and those that wait before it."""
        self.waiting.append(seal(record))
        self._flush()

    def sync(self) -> None:
        """Make what was written survive a power cut; done before a checkpoint that relies on it.

        Raises:
            DataError: records wait that the disk refused.
        """
        self._flush()
        if not self.waiting:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self.trouble = f"{error.strerror or error}"
        if self.trouble:
            raise DataError(
                f"{self.path} cannot be written: {self.trouble}; {len(self.waiting)} records wait in memory. "
                f"{_FREE_SPACE}"
            )

    def close(self) -> None:
        """Close the file. Records that still wait are lost, which `trouble` told before."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        """Write what waits; a line that was written in part is cut off again."""
        self.trouble = ""
        while self.waiting:
            line = self.waiting[0]
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")
            except OSError as error:
                self.trouble = f"{error.strerror or error}"
                with contextlib.suppress(OSError):  # not a file that can be cut, such as a device
                    os.ftruncate(self._file.fileno(), self._size)
                return
            self._size += len(line)
            del self.waiting[0]


class _Event(BaseModel):
    """What every record says."""

    model_config = ConfigDict(extra="allow", strict=True)

    event: str
    step: NonNegativeInt


class _Measured(_Event):
    """What a step or an evaluation says: nothing but numbers; null where one was not finite."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, float | None]

    tokens: NonNegativeInt


class _Step(_Measured):
    loss: float


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that was cut off is left out.

    A file of an earlier version has no seals; then every field is checked, but not every bit.

    Raises:
        DataError: the file cannot be read, or a line before the last is not a record: it was edited or damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; make it readable, or restore it") from error
    records = []
    for line in unseal_lines(content):
        why = line.error
        if why is None:
            try:
                _schema(line.document).model_validate(line.document)
            except ValidationError as error:
                found = error.errors()[0]
                why = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
        if why is not None:
            raise DataError(
                f"{path}:{line.number} is not a metrics record: {line.text!r}: {why}. Each line is a JSON object with "
                "`event` and `step`. Restore the file, or move it away to go on without its history"
            )
        records.append(line.document)
    return records


def _schema(record: Record) -> type[_Event]:
    """What a record of this event must say."""
    event = record.get("event")
    return _Step if event == "step" else _Measured if event == "eval" else _Event


class TensorBoardSink:
    """Scalars of step and evaluation records, below `<run>/tensorboard`."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        board = _require(*_TENSORBOARD)
        self._writer = board.SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, record: Record) -> None:
        """Send the numbers of a step or an evaluation."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Scalars and configuration in Weights & Biases; offline when no key is set.

    The run id is the run's own, so that a resumed run goes on in the same place. The configuration is the
    redacted one; command line, code and environment are not sent.
    """

    def __init__(self, folder: Path, *, project: str, identity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        wandb = _require(*_WANDB)
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key(wandb) else "offline")
        self._run = wandb.init(
            project=project,
            id=identity["run_id"],
            name=identity["name"],
            resume="allow",
            dir=str(folder),
            mode=mode,
            config={**config, "identity": dict(identity)},
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True),
        )
        if self._run.url is not None:  # offline runs have none
            write_atomically(folder / WANDB_LINK, json.dumps({"url": self._run.url}).encode() + b"\n")

    def write(self, record: Record) -> None:
        """Send the numbers of a step or an evaluation."""
        if numbers := _numbers(record):
            prefix = "" if record["event"] == "step" else f"{record['event']}/"
            self._run.log({f"{prefix}{name}": value for name, value in numbers.items()}, step=record["step"])

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def open_sinks(
    config: Logging,
    folder: Path,
    *,
    resume_step: int,
    identity: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> list[Sink]:
    """Open the sinks that the configuration asks for beside the metrics log.

    Raises:
        ConfigError: a package is not installed; names the extra that brings it.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(TensorBoardSink(folder, resume_step=resume_step))
    if config.wandb_project is not None:
        sinks.append(WandbSink(folder, project=config.wandb_project, identity=identity, config=resolved))
    return sinks


def check_sinks(config: Logging) -> None:
    """Import what the sinks of a configuration need; makes nothing.

    Raises:
        ConfigError: a package is not installed; names the extra that brings it.
    """
    if config.tensorboard:
        _require(*_TENSORBOARD)
    if config.wandb_project is not None:
        _require(*_WANDB)


def _numbers(record: Record) -> dict[str, float]:
    """Numbers of a step or evaluation record; nothing of other events."""
    if record["event"] not in ("step", "eval"):
        return {}
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _has_wandb_key(wandb: Any) -> bool:
    """Whether W&B would find a key, in the environment or in the netrc file."""
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def _require(module: str, extra: str, setting: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{setting} is set, but {error.name or module} is not installed; "
            f"run `{pip_install(extra)}`, or unset {setting}"
        ) from error

"""Where metrics go: `metrics.jsonl` always, W&B and TensorBoard on request."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nested_lm.config.train import Logging
from nested_lm.errors import ConfigError, DataError, pip_install
from nested_lm.storage.atomic import write_atomically

Record = Mapping[str, Any]

WANDB_LINK = "wandb.json"
"""Holds the address of the run's curves, for reports."""

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
    """The truth about a run: one JSON object a line, appended and flushed.

    Opening it for a run that continues at `resume_step` cuts every record after that step, and a last line
    that was cut off by a kill, so that each step appears exactly once.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        kept = [record for record in read_records(path) if record["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self.evaluated_steps = {record["step"] for record in kept if record["event"] == "eval"}
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append one record and hand it to the operating system.

        Raises:
            DataError: the disk refuses.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}; {_FREE_SPACE}") from error
        if written != len(line):
            raise DataError(f"{self.path}: only {written} of {len(line)} bytes were written; {_FREE_SPACE}")

    def sync(self) -> None:
        """Make what was written survive a power cut; done before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that was cut off is left out.

    Raises:
        DataError: a line before the last is not a record, so the file was edited or damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines):
            break  # what follows the last newline was never finished
        try:
            record = json.loads(line)
            known = {"event", "step"} <= set(record)
        except (ValueError, TypeError):
            known = False
        if not known:
            raise DataError(
                f"{path}:{number} is not a metrics record: {line[:80]!r}; each line must be a JSON object "
                "with `event` and `step`. Restore the file, or move it away to go on without its history"
            )
        records.append(record)
    return records


class TensorBoardSink:
    """Scalars of step and evaluation records, below `<run>/tensorboard`."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        board = _require("torch.utils.tensorboard", extra="tensorboard", setting="train.logging.tensorboard")
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
        wandb = _require("wandb", extra="wandb", setting="train.logging.wandb_project")
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


def _require(module: str, *, extra: str, setting: str) -> Any:
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

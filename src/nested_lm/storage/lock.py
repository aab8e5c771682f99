"""One owner of a folder or a file: a kernel lock, and who holds it.

The lock is that of `filelock` on a descriptor of ours (`flock` on Unix). The kernel drops it with the last process
that holds it, so neither a killed process nor a reboot leaves a stale lock. It works over NFS where the mount has
locks. The lock file says who holds the lock; its content decides nothing.
"""

import contextlib
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from filelock import lock_descriptor

from nested_lm.errors import ConfigError, InUseError

_PATIENCE_S = 0.5  # a holder names itself right after it took the lock


class Process(NamedTuple):
    """A process of one machine. started: clock ticks after boot (Linux), None where that is unknown.

    Process ids are used again; with the time of its start an id means one process.
    """

    pid: int
    started: int | None

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has the id now."""
        return cls(pid, _start_time(pid))

    def is_alive(self) -> bool:
        """Whether this very process runs."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # somebody else's, which runs
            pass
        return self.started is None or _start_time(self.pid) == self.started


class Holder(NamedTuple):
    """What a lock file says of who holds the lock.

    activity: what the process does, such as `train`. since: ISO 8601 in UTC. steps: processes that share the lock.
    """

    host: str
    process: Process
    activity: str
    since: str
    steps: dict[str, Process]

    def __str__(self) -> str:
        return f"process {self.process.pid} on machine {self.host} (`{self.activity}`, since {self.since})"


class OwnerLock:
    """Owns a folder or a file while entered. Make one with `own_folder` or `own_file`.

    Entering creates the folder of the lock file. Leaving removes the lock file and the folders that are empty again.

    Args:
        path: lock file.
        target: what it stands for, for messages.
        activity: what the owner does, for whoever finds it held.

    Raises (on entering):
        InUseError: another process owns the target. Nothing was touched.
        ConfigError: the lock file cannot be made, or its file system has no locks.
    """

    def __init__(self, path: Path, *, target: Path, activity: str) -> None:
        self.path, self.target = path, target
        self.descriptor = -1
        self.own = Holder(socket.gethostname(), Process.of(os.getpid()), activity, _now(), {})
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._acquire()
            self.write()
        except OSError as error:
            self._leave()
            raise self.unusable(error) from error
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # removed by somebody; the lock itself goes with the descriptor
            if self._is_current():
                self.path.unlink()
        self._leave()

    def write(self) -> None:
        """Say in the lock file who holds it. Raises OSError."""
        holder = self.own
        content = json.dumps(
            holder._asdict()
            | {"process": holder.process._asdict()}
            | {"steps": {step: process._asdict() for step, process in holder.steps.items()}}
        ).encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def holder(self) -> Holder | None:
        """Who holds the lock; None where the file does not say it."""
        try:
            found: Any = json.loads(os.pread(self.descriptor, 2**20, 0))
            steps = {str(step): _process(process) for step, process in found["steps"].items()}
            since, activity = str(found["since"]), str(found["activity"])
            return Holder(str(found["host"]), _process(found["process"]), activity, since, steps)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def try_lock(self) -> bool:
        """Take the lock if nobody has it. Raises OSError where the file system has no locks."""
        return lock_descriptor(self.descriptor, blocking=False)

    def unusable(self, error: OSError) -> Exception:
        """The error for a lock file that cannot be used."""
        return ConfigError(
            f"{self.target} cannot be written: its lock file {self.path.name} cannot be used: "
            f"{error.strerror or error}\n"
            "  Choose a folder that this user may write to, on a file system that has locks and free space."
        )

    def refuse(self, holder: Holder | None) -> None:
        """Raise for a lock that somebody else holds."""
        if holder is None:
            who, stop = "a process that did not say which", f"`fuser {self.path}` names it."
        else:
            who = str(holder)
            there = "" if holder.host == self.own.host else f" on {holder.host}"
            stop = f"Wait for it, or stop it with `kill {holder.process.pid}`{there}, and start again."
        raise InUseError(f"{self.target} is in use by {who}\n  Two writers would overwrite each other. {stop}")

    def contend(self) -> None:
        """Called with the descriptor open and the lock held by somebody else; returns to try again, or raises."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (holder := self.holder()) and time.monotonic() < deadline:
            if self.try_lock():
                return
            time.sleep(0.02)
        self.refuse(holder)

    def _acquire(self) -> None:
        """Open and lock the file that has the name, not one that an owner has just removed."""
        while True:
            self._make_folder()
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                self.descriptor = os.open(self.path, flags, 0o644)
            except FileNotFoundError:  # an owner that leaves has just removed the folder
                continue
            if not self.try_lock():
                self.contend()
            if self._is_current():
                return
            os.close(self.descriptor)
            self.descriptor = -1

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))  # noqa: PTH116  (both are stats)
        except FileNotFoundError:
            return False

    def _make_folder(self) -> None:
        folder = self.path.parent
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = self._made or missing

    def _leave(self) -> None:
        """Close the descriptor, which drops the lock, and remove the folders that were made for nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is in use
                folder.rmdir()
        self._made = []


def own_folder(folder: Path, *, activity: str) -> OwnerLock:
    """The lock of a folder: `<folder>/lock`."""
    return OwnerLock(folder / "lock", target=folder, activity=activity)


def own_file(path: Path, *, activity: str) -> OwnerLock:
    """The lock of one file: `.lock-<name>` beside it."""
    return OwnerLock(path.with_name(f".lock-{path.name}"), target=path, activity=activity)


def _process(fields: Any) -> Process:
    pid, started = fields["pid"], fields["started"]
    if type(pid) is not int or pid <= 0 or not (started is None or type(started) is int):
        raise ValueError(f"no process: {fields}")
    return Process(pid, started)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _start_time(pid: int) -> int | None:
    """When a process started, by /proc; None where there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22; the name before it may hold anything

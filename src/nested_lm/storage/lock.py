"""One campaign a folder: a kernel lock that the running step shares, so that an orphan is noticed."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from nested_lm.errors import CampaignError


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
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's, which runs
            pass
        return self.started is None or _start_time(self.pid) == self.started


class _Holder(NamedTuple):
    """What the lock file says of who holds it."""

    host: str
    campaign: Process
    steps: dict[str, Process]


class CampaignLock:
    """Holds a campaign folder while entered.

    The lock is `flock` on `<folder>/lock`: the kernel drops it with the last process that holds it, so a
    killed campaign leaves no stale lock. The running step inherits it (`descriptor`): when the campaign was
    killed and its step lives on, the next start on the same machine asks that step to stop (SIGTERM: training saves)
    and waits. Processes of another machine, which share the folder, are named and never signalled.

    orphan_timeout_s: how long to wait for such a step.

    Raises CampaignError when another campaign or a step of one holds the folder, or the file cannot be written.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None], orphan_timeout_s: float = 120.0) -> None:
        self.path = folder / "lock"
        self._say = say
        self._orphan_timeout_s = orphan_timeout_s
        self.descriptor = -1
        self._own = _Holder(socket.gethostname(), Process.of(os.getpid()), {})

    def __enter__(self) -> "CampaignLock":
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unusable("opened", error) from error
        try:
            if not self._try():
                self._wait_for_orphan()
            self._write()
        except BaseException:
            os.close(self.descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def note_step(self, step: str, pid: int) -> None:
        """Record a step that runs now, for whoever finds the lock held. Raises CampaignError: it cannot be written."""
        self._own.steps[step] = Process.of(pid)
        self._write()

    def forget_step(self, step: str) -> None:
        """Record that a step has ended. Raises as `note_step`."""
        del self._own.steps[step]
        self._write()

    def _try(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._unusable("locked", error) from error
        return True

    def _write(self) -> None:
        steps = {step: process._asdict() for step, process in self._own.steps.items()}
        holder = self._own._asdict() | {"campaign": self._own.campaign._asdict(), "steps": steps}
        content = json.dumps(holder).encode()
        try:
            os.pwrite(self.descriptor, content, 0)
            os.ftruncate(self.descriptor, len(content))
        except OSError as error:
            raise self._unusable("written", error) from error

    def _unusable(self, what: str, error: OSError) -> CampaignError:
        return CampaignError(
            f"{self.path} cannot be {what}: {error.strerror or error}\n"
            "  A campaign needs it, so that no other one writes to its folder. Free some space, make it writable, or "
            "take an output_dir on a file system with locks, and start again: finished steps are kept."
        )

    def _holder(self) -> _Holder | None:
        """Who holds the lock; None where the file does not say it, as one of an earlier version."""
        try:
            found: Any = json.loads(os.pread(self.descriptor, 2**20, 0))
            steps = {str(step): Process(**process) for step, process in found["steps"].items()}
            return _Holder(str(found["host"]), Process(**found["campaign"]), steps)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def _wait_for_orphan(self) -> None:
        holder = self._holder()
        if holder is not None:
            self._refuse_another(holder)
        if holder is None or not holder.steps:
            raise CampaignError(
                f"{self.path.parent} is in use by a process that did not say which\n"
                "  Another campaign is just starting, or its step outlived it. Try again in a moment; "
                f"`fuser {self.path}` names it."
            )
        for step, process in holder.steps.items():
            if process.is_alive():
                self._say(
                    f"step {step} (process {process.pid}) outlived its killed campaign; asking it to save and stop"
                )
                self._ask_to_stop(process)
        deadline = time.monotonic() + self._orphan_timeout_s
        while not self._try():
            if time.monotonic() > deadline:
                alive = ", ".join(_named(step, process) for step, process in holder.steps.items() if process.is_alive())
                raise CampaignError(
                    f"{self.path.parent}: of a killed campaign still runs {alive or 'a process it started'}\n"
                    f"  It was asked to stop {self._orphan_timeout_s:.0f} s ago. Stop it with `kill -9` and start "
                    "again: it continues from its last checkpoint."
                )
            time.sleep(0.05)

    def _refuse_another(self, holder: _Holder) -> None:
        """Refuse a campaign that runs, and whatever runs on another machine, where ids mean other processes."""
        number = holder.campaign.pid
        if holder.host != self._own.host:
            steps = ", ".join(_named(step, process) for step, process in holder.steps.items())
            raise CampaignError(
                f"{self.path.parent} is in use on machine {holder.host} (this is {self._own.host}): process {number} "
                f"runs this campaign there{f', with {steps}' if steps else ''}\n"
                "  Two campaigns in one folder would overwrite each other. Wait for it, or stop it there with "
                f"`kill {number}`, its steps as well if it was killed, and start again: it continues."
            )
        if holder.campaign.is_alive():
            raise CampaignError(
                f"{self.path.parent} is in use: process {number} runs this campaign\n"
                "  Two campaigns in one folder would overwrite each other. Wait for it, or stop it with "
                f"`kill {number}` and start again: it continues."
            )

    def _ask_to_stop(self, process: Process) -> None:
        try:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        except PermissionError as error:
            raise CampaignError(
                f"{self.path.parent}: process {process.pid} of a killed campaign runs on and belongs to another user\n"
                f"  Ask them to stop it with `kill {process.pid}`, and start again: it continues."
            ) from error


def _named(step: str, process: Process) -> str:
    return f"{step} (process {process.pid})"


def _start_time(pid: int) -> int | None:
    """When a process started, by /proc; None where there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22; the name before it may hold anything

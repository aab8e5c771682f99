"""One campaign a folder: the lock is shared with the running steps, so that an orphan of a killed one is noticed."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nested_lm.errors import CampaignError
from nested_lm.storage.lock import Holder, OwnerLock, Process


class CampaignLock(OwnerLock):
    """Holds a campaign folder while entered.

    The running step inherits the lock (`descriptor`): when the campaign was killed and its step lives on, the next
    start on the same machine asks that step to stop (SIGTERM: training saves) and waits. Processes of another
    machine, which share the folder, are named and never signalled.

    orphan_timeout_s: how long to wait for such a step.

    Raises CampaignError when another campaign or a step of one holds the folder, or the file cannot be written.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None], orphan_timeout_s: float = 120.0) -> None:
        super().__init__(folder / "lock", target=folder, activity="campaign")
        self._say = say
        self._orphan_timeout_s = orphan_timeout_s

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()  # the file stays: a step that inherited the lock may still hold it

    def note_step(self, step: str, pid: int) -> None:
        """Record a step that runs now, for whoever finds the lock held. Raises CampaignError: it cannot be written."""
        self.own.steps[step] = Process.of(pid)
        self._write_again()

    def forget_step(self, step: str) -> None:
        """Record that a step has ended. Raises as `note_step`."""
        del self.own.steps[step]
        self._write_again()

    def unusable(self, error: OSError) -> Exception:
        """The error for a lock file that cannot be used."""
        return CampaignError(
            f"{self.path} cannot be used: {error.strerror or error}\n"
            "  A campaign needs it, so that no other one writes to its folder. Free some space, make it writable, or "
            "take an output_dir on a file system with locks, and start again: finished steps are kept."
        )

    def refuse(self, holder: Holder | None) -> None:
        """Refuse another campaign; ask what a killed one left behind to stop."""
        if holder is None:
            raise CampaignError(
                f"{self.target} is in use by a process that did not say which\n"
                "  Another campaign is just starting, or its step outlived it. Try again in a moment; "
                f"`fuser {self.path}` names it."
            )
        number, there = holder.process.pid, "" if holder.host == self.own.host else f" on {holder.host}"
        if there or holder.process.is_alive():
            steps = ", ".join(_named(step, process) for step, process in holder.steps.items())
            raise CampaignError(
                f"{self.target} is in use by {holder}{f', with steps {steps}' if steps else ''}\n"
                f"  Two campaigns in one folder would overwrite each other. Wait for it, or stop it with "
                f"`kill {number}`{there}, its steps as well if it was killed, and start again: it continues."
            )
        self._wait_for_orphans(holder)

    def _write_again(self) -> None:
        try:
            self.write()
        except OSError as error:
            raise self.unusable(error) from error

    def _wait_for_orphans(self, holder: Holder) -> None:
        for step, process in holder.steps.items():
            if process.is_alive():
                self._say(
                    f"step {step} (process {process.pid}) outlived its killed campaign; asking it to save and stop"
                )
                self._ask_to_stop(process)
        deadline = time.monotonic() + self._orphan_timeout_s
        while not self.try_lock():
            if time.monotonic() > deadline:
                alive = ", ".join(_named(step, process) for step, process in holder.steps.items() if process.is_alive())
                raise CampaignError(
                    f"{self.target}: of a killed campaign still runs {alive or 'a process it started'}\n"
                    f"  It was asked to stop {self._orphan_timeout_s:.0f} s ago. Stop it with `kill -9` and start "
                    "again: it continues from its last checkpoint."
                )
            time.sleep(0.05)

    def _ask_to_stop(self, process: Process) -> None:
        try:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        except PermissionError as error:
            raise CampaignError(
                f"{self.target}: process {process.pid} of a killed campaign runs on and belongs to another user\n"
                f"  Ask them to stop it with `kill {process.pid}`, and start again: it continues."
            ) from error


def _named(step: str, process: Process) -> str:
    return f"{step} (process {process.pid})"

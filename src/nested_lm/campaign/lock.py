"""One campaign a folder: a kernel lock that the running step shares, so that an orphan is noticed."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from nested_lm.errors import CampaignError


class CampaignLock:
    """Holds a campaign folder while entered.

    The lock is `flock` on `<folder>/lock`: the kernel drops it with the last process that holds it, so a
    killed campaign leaves no stale lock. The running step inherits it (`descriptor`): when the campaign was
    killed and its step lives on, the next start asks that step to stop (SIGTERM: training saves) and waits.

    orphan_timeout_s: how long to wait for such a step.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None], orphan_timeout_s: float = 120.0) -> None:
        self.path = folder / "lock"
        self._say = say
        self._orphan_timeout_s = orphan_timeout_s
        self.descriptor = -1

    def __enter__(self) -> "CampaignLock":
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not self._try():
                self._wait_for_orphan()
            self._write({"campaign_pid": os.getpid(), "step": None, "step_pid": None})
        except BaseException:
            os.close(self.descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def note_step(self, step: str, pid: int) -> None:
        """Record which step runs now, for whoever finds the lock held."""
        self._write({"campaign_pid": os.getpid(), "step": step, "step_pid": pid})

    def _try(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _write(self, holder: dict[str, object]) -> None:
        content = json.dumps(holder).encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def _holder(self) -> dict[str, object]:
        try:
            found = json.loads(os.pread(self.descriptor, 4096, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _wait_for_orphan(self) -> None:
        holder = self._holder()
        campaign, step, step_pid = (holder.get(key) for key in ("campaign_pid", "step", "step_pid"))
        if isinstance(campaign, int) and _is_alive(campaign):
            raise CampaignError(
                f"{self.path.parent} is in use: process {campaign} runs this campaign\n"
                "  Two campaigns in one folder would overwrite each other. Wait for it, or stop it with "
                f"`kill {campaign}` and start again: it continues."
            )
        if not isinstance(step_pid, int):
            raise CampaignError(
                f"{self.path.parent} is in use by a process that did not say which\n"
                "  Another campaign is just starting, or its step outlived it. Try again in a moment."
            )
        self._say(f"step {step} (process {step_pid}) outlived its killed campaign; asking it to save and stop")
        deadline = time.monotonic() + self._orphan_timeout_s
        if _is_alive(step_pid):
            os.kill(step_pid, signal.SIGTERM)
        while not self._try():
            if time.monotonic() > deadline:
                raise CampaignError(
                    f"{self.path.parent}: step {step} (process {step_pid}) of a killed campaign still runs\n"
                    f"  It was asked to stop {self._orphan_timeout_s:.0f} s ago. Stop it with "
                    f"`kill -9 {step_pid}` and start again: it continues from its last checkpoint."
                )
            time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

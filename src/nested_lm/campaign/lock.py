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
        self._steps: dict[str, int] = {}

    def __enter__(self) -> "CampaignLock":
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
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
        """Record a step that runs now, for whoever finds the lock held."""
        self._steps[step] = pid
        self._write()

    def forget_step(self, step: str) -> None:
        """Record that a step has ended."""
        del self._steps[step]
        self._write()

    def _try(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _write(self) -> None:
        content = json.dumps({"campaign_pid": os.getpid(), "steps": self._steps}).encode()
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def _holder(self) -> dict[str, object]:
        try:
            found = json.loads(os.pread(self.descriptor, 65536, 0))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _wait_for_orphan(self) -> None:
        holder = self._holder()
        campaign, steps = holder.get("campaign_pid"), holder.get("steps")
        if isinstance(campaign, int) and _is_alive(campaign):
            raise CampaignError(
                f"{self.path.parent} is in use: process {campaign} runs this campaign\n"
                "  Two campaigns in one folder would overwrite each other. Wait for it, or stop it with "
                f"`kill {campaign}` and start again: it continues."
            )
        if not isinstance(steps, dict) or not steps:
            raise CampaignError(
                f"{self.path.parent} is in use by a process that did not say which\n"
                "  Another campaign is just starting, or its step outlived it. Try again in a moment."
            )
        for step, pid in steps.items():
            self._say(f"step {step} (process {pid}) outlived its killed campaign; asking it to save and stop")
            if _is_alive(pid):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + self._orphan_timeout_s
        while not self._try():
            if time.monotonic() > deadline:
                alive = ", ".join(f"{step} (process {pid})" for step, pid in steps.items() if _is_alive(pid))
                raise CampaignError(
                    f"{self.path.parent}: of a killed campaign still runs {alive or 'a process it started'}\n"
                    f"  It was asked to stop {self._orphan_timeout_s:.0f} s ago. Stop it with `kill -9` and start "
                    "again: it continues from its last checkpoint."
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

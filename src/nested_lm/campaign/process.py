"""Runs one step as a child process: signals reach it once, its output is live and, off a terminal, logged."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NamedTuple

from nested_lm.errors import CampaignError

_ECHO_S = 0.5  # `timeout` and service managers signal a process and its group: the echo is not a second wish


class Outcome(NamedTuple):
    """How a child ended. exit_code is negative when a signal killed it."""

    exit_code: int
    seconds: float


class SignalRelay:
    """While entered, passes SIGINT, SIGTERM and SIGHUP on to the running child; the second one kills it.

    The child lives in its own process group, so Ctrl-C in a terminal reaches it exactly once: through here.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._child: subprocess.Popen[bytes] | None = None
        self._previous: dict[signal.Signals, object] = {}
        self.received: signal.Signals | None = None
        self._received_at = 0.0

    def __enter__(self) -> "SignalRelay":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.received is not None:  # the echo must not meet the default handler and end us without a word
            time.sleep(max(0.0, self._received_at + _ECHO_S - time.monotonic()))
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def attach(self, child: subprocess.Popen[bytes] | None) -> None:
        """Name the child that gets the signals. One that came while it was being started is passed on now."""
        self._child = child
        if child is not None and self.received is not None:
            child.send_signal(self.received)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.received is not None
        if again and now - self._received_at < _ECHO_S:
            return
        self.received, self._received_at = signal.Signals(number), now
        if self._child is None:
            return
        # send_signal polls first, so a child that has ended meanwhile is not signalled
        self._child.send_signal(signal.SIGKILL if again else self.received)
        self._say("stopping at once" if again else "asked the running step to stop; once more stops it at once")


def run_child(
    command: Sequence[str],
    *,
    relay: SignalRelay,
    log: Path,
    inherit: int,
    started: Callable[[int], None],
) -> Outcome:
    """Run a command to its end.

    On a terminal the child inherits it, so progress bars work; otherwise its output goes to our standard
    output as it comes and into `log`, which is appended to.

    Args:
        command: program and arguments.
        relay: entered; passes signals on.
        log: file for the output when standard output is not a terminal.
        inherit: file descriptor that the child keeps open (the campaign's lock).
        started: called with the child's process id.

    Raises:
        CampaignError: the program cannot be started.
    """
    terminal = sys.stdout.isatty()
    begin = time.monotonic()
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if terminal else subprocess.PIPE,
            stderr=None if terminal else subprocess.STDOUT,
            pass_fds=(inherit,),
            process_group=0,
        )
    except OSError as error:
        raise CampaignError(f"cannot start {command[0]}: {error.strerror or error}") from error
    started(child.pid)
    relay.attach(child)
    try:
        if child.stdout is not None:
            copier = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
            copier.start()
            exit_code = child.wait()
            copier.join(timeout=5.0)  # a grandchild may hold the pipe open after the child has ended
        else:
            exit_code = child.wait()
    finally:
        relay.attach(None)
    return Outcome(exit_code, time.monotonic() - begin)


def _copy(source: IO[bytes], log: Path) -> None:
    """Copy a pipe to standard output and to the end of a file, as it comes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, source:
        while block := os.read(source.fileno(), 65536):
            file.write(block)
            file.flush()
            sys.stdout.write(block.decode("utf-8", errors="replace"))
            sys.stdout.flush()

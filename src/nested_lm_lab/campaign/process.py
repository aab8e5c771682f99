"""Runs a step as a child process: signals reach it once, its output is live and, off a terminal, logged."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NamedTuple, Protocol

from nested_lm.errors import CampaignError

LOST = 255
"""Exit code in the ledger of a step of a cluster that ended without saying how."""

SAVE_S = 600.0
"""A training asked to stop finishes its step and writes a checkpoint."""

_TIED = (
    "import ctypes, os, sys; "
    "parent = int(sys.argv[2]) or os.getppid(); "
    "ctypes.CDLL(None).prctl(1, int(sys.argv[1])); "  # PR_SET_PDEATHSIG; it outlives exec
    "os.getppid() == parent or sys.exit(1); "  # the parent was gone before that
    "os.execvp(sys.argv[3], sys.argv[3:])"
)

_KEPT = 2**20  # bytes of a step's output that wait for a full disk

_ECHO_S = 0.5  # `timeout` and service managers signal a process and its group: the echo is not a second wish


class Outcome(NamedTuple):
    """How a step ended. exit_code is negative when a signal killed it."""

    exit_code: int
    seconds: float


class Running(Protocol):
    """A step that was started."""

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""

    def stop(self, number: signal.Signals) -> None:
        """Pass a signal on."""


class SignalRelay:
    """While entered, passes SIGINT, SIGTERM and SIGHUP on to the running steps; the second one kills them.

    Children live in their own process groups, so Ctrl-C in a terminal reaches each exactly once: through here.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._running: list[Running] = []
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

    def attach(self, running: Running) -> None:
        """Name a step that gets the signals. One that came while it was being started is passed on now."""
        self._running.append(running)
        if self.received is not None:
            running.stop(self.received)

    def detach(self, running: Running) -> None:
        """Forget a step that has ended."""
        self._running.remove(running)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.received is not None
        if again and now - self._received_at < _ECHO_S:
            return
        self.received, self._received_at = signal.Signals(number), now
        if not self._running:
            return
        for running in self._running:
            running.stop(signal.SIGKILL if again else self.received)
        self._say("stopping at once" if again else "asked what runs to stop; once more stops it at once")


class Child:
    """A child process.

    On a terminal it inherits it when it has it for itself (`terminal`), so progress bars work; otherwise its output
    goes to our standard output as it comes and into `log`, which is appended to.

    Args:
        command: program and arguments.
        log: file for the output.
        inherit: file descriptor that the child keeps open (the campaign's lock).
        terminal: let it write to our terminal, if we have one.
        environment: variables to set besides ours.

    Raises:
        CampaignError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        inherit: int,
        terminal: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        shared = terminal and sys.stdout.isatty()
        self._begin = time.monotonic()
        self._sent: set[signal.Signals] = set()
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=None if shared else subprocess.PIPE,
                stderr=None if shared else subprocess.STDOUT,
                pass_fds=(inherit,),
                process_group=0,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            raise CampaignError(f"cannot start {command[0]}: {error.strerror or error}") from error
        self._copier: threading.Thread | None = None
        if self._child.stdout is not None:
            self._copier = threading.Thread(target=_copy, args=(self._child.stdout, log), daemon=True)
            self._copier.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def poll(self) -> Outcome | None:
        """How it ended, its output copied; None while it runs."""
        exit_code = self._child.poll()
        if exit_code is None:
            return None
        if self._copier is not None:
            self._copier.join(timeout=5.0)  # a grandchild may hold the pipe open after the child has ended
        return Outcome(exit_code, time.monotonic() - self._begin)

    def stop(self, number: signal.Signals) -> None:
        """Send it a signal, each once: a training takes the same signal again as the wish to end without saving.

        It polls first, so a child that has ended meanwhile is not signalled.
        """
        if number not in self._sent:
            self._sent.add(number)
            self._child.send_signal(number)


def wait_for(child: subprocess.Popen[bytes], *, timeout_s: float | None = None) -> int | None:
    """Exit code of a child; None when it still runs after the time. Polls: a signal handler may wait for it as well."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while (code := child.poll()) is None:
        if deadline is not None and time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    return code


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask a child to save and stop; kill it when it does not within `SAVE_S`, or when the wait is interrupted."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        ended = wait_for(child, timeout_s=SAVE_S) is not None
    except BaseException:
        child.kill()
        raise
    if not ended:
        child.kill()


def end_all(started: Collection[Running], *, patience_s: float = SAVE_S) -> None:
    """Ask what runs to save and stop, and wait for it; kill what does not within the time."""
    running = [each for each in started if each.poll() is None]
    for each in running:
        each.stop(signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    is_killed = False
    while running := [each for each in running if each.poll() is None]:
        if not is_killed and time.monotonic() > deadline:
            is_killed = True
            for each in running:
                each.stop(signal.SIGKILL)
        time.sleep(0.05)


def tied(command: Sequence[str], *, number: signal.Signals, parent: int | None) -> tuple[str, ...]:
    """The command line, made so that the kernel sends the command a signal when its parent dies (Linux alone).

    parent: process id; None: whoever starts the command.
    """
    if sys.platform != "linux":
        return tuple(command)
    return (sys.executable, "-S", "-c", _TIED, str(int(number)), str(parent or 0), *command)


def _copy(source: IO[bytes], log: Path) -> None:
    """Copy a pipe to standard output and to the end of a file, as it comes.

    The pipe is emptied whatever happens, or its writer would wait for ever. What the disk refuses waits for the next
    piece, the last `_KEPT` bytes of it.
    """
    waiting = b""
    with source:
        while block := os.read(source.fileno(), 65536):
            waiting = _append(log, waiting + block)[-_KEPT:]
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or a full disk there as well
                sys.stdout.write(block.decode("utf-8", errors="replace"))
                sys.stdout.flush()
        _append(log, waiting)


def _append(log: Path, content: bytes) -> bytes:
    """Append to a file; return what is still to be written, which is all of it when the disk refuses."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as file:
            return content[file.write(content) :] if content else b""
    except OSError:
        return content

"""Stop requests: SIGTERM and Ctrl-C ask the run to save and exit; a second one ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that turns the first SIGTERM or SIGINT into a flag.

    The loop polls `name` between steps and between validation batches. A second signal restores the default
    behaviour and is delivered again, so that a run that hangs can still be ended. Outside the main thread
    Python allows no handlers; there the flag is only set through `set`.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # "SIGTERM" or "SIGINT" once asked to stop
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for watched in _WATCHED:
                self._previous[watched] = signal.signal(watched, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for watched, handler in self._previous.items():
            signal.signal(watched, handler)
        self._previous.clear()

    def set(self, name: str) -> None:
        """Ask the run to stop as if the named signal had arrived."""
        self.name = name

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the first signal; let the second one act as if nobody had listened."""
        if self.name is None:
            self.set(signal.Signals(number).name)
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.kill(os.getpid(), number)

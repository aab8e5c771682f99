"""Lines that say how far a long measurement is, and how long it will take."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_EVERY_S = 15.0


class Progress:
    """Counts tokens and reports now and then.

    total: tokens there will be. report: is told a line. clock: seconds, for tests.
    """

    def __init__(
        self, total: int, report: Callable[[str], None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.total, self.report, self.clock = total, report, clock
        self.done = 0
        self.label = ""
        self.started = self.reported = clock()

    def add(self, tokens: int) -> None:
        """Note tokens that are done."""
        self.done += tokens
        now = self.clock()
        if now - self.reported >= _EVERY_S:
            self.reported = now
            share = self.done / max(self.total, self.done)
            seconds = now - self.started
            left = seconds / share - seconds
            self.report(
                f"{self.label}: {share:.0%} of {self.total:,} tokens, {self.done / seconds:,.0f} tokens/s, "
                f"{_minutes(left)} left"
            )


class LengthProgress:
    """Progress over tasks and lengths. What will not be read, because a state grew too large, is taken off the total.

    planned: tokens of each task and length.
    """

    def __init__(self, planned: Mapping[tuple[str, int], int], progress: Progress) -> None:
        self.planned, self.progress = dict(planned), progress
        progress.total += sum(planned.values())

    @contextmanager
    def at(self, task: str, length: int) -> Iterator[None]:
        """Read one length of a task; afterwards it counts as much as was read of it."""
        progress = self.progress
        progress.label, before = f"{task} at {length:,} tokens", progress.done
        yield
        progress.total += progress.done - before - self.planned.pop((task, length), 0)

    def stop(self, length: int) -> None:
        """Take this length and longer ones off: a state that is too large in one task is so in the others."""
        for key in [key for key in self.planned if key[1] >= length]:
            self.progress.total -= self.planned.pop(key)


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"

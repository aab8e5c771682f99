"""Lines that say how far a long measurement is, and how long it will take."""

import time
from collections.abc import Callable

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
            share = min(self.done / self.total, 1.0)
            seconds = now - self.started
            left = seconds / share - seconds
            self.report(
                f"{self.label}: {share:.0%} of {self.total:,} tokens, {self.done / seconds:,.0f} tokens/s, "
                f"{_minutes(left)} left"
            )


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"

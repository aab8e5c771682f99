"""Sends what happens in a run to the metrics log, the sinks and the console."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nested_lm.train.console import TrainConsole
from nested_lm.train.metrics import MetricsLog, Sink
from nested_lm.train.state import Progress


@dataclass(frozen=True)
class Outlets:
    """Where records go; only rank 0 of a run has any."""

    log: MetricsLog
    sinks: Sequence[Sink]
    console: TrainConsole


class Recorder:
    """Adds step and tokens to each event and passes it on; the log comes first, because it is the truth.

    outlets: None on ranks that record nothing. evaluated: steps whose evaluation the log holds.
    """

    def __init__(self, outlets: Outlets | None, *, evaluated: Iterable[int]) -> None:
        self._outlets, self._evaluated = outlets, set(evaluated)
        self._sinks = [] if outlets is None else list(outlets.sinks)

    def event(self, name: str, progress: Progress, fields: Mapping[str, Any], *, note: str | None = None) -> None:
        """Record an event; `note` is what a person is told about it."""
        if name == "eval":
            self._evaluated.add(progress.step)
        if self._outlets is None:
            return
        record = {"event": name, "step": progress.step, "tokens": progress.tokens, **fields}
        self._write(record)
        if name == "step":
            self._outlets.console.step(record)
        if note is not None:
            self._outlets.console.note(note)

    def _write(self, record: Mapping[str, Any]) -> None:
        """Write to the log and the sinks. What the disk refuses is said once, and waits or, in a sink, is missing."""
        assert self._outlets is not None
        log, told = self._outlets.log, self._outlets.log.trouble
        log.write(record)
        if log.trouble and not told:
            self._outlets.console.note(f"{log.path} cannot be written: {log.trouble}; records wait in memory")
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except OSError as error:
                self._sinks.remove(sink)
                self._outlets.console.note(f"{type(sink).__name__} gets no more records: {error.strerror or error}")

    def was_evaluated(self, step: int) -> bool:
        """Whether the log holds an evaluation of this step."""
        return step in self._evaluated

    def note(self, text: str) -> None:
        """Tell a person."""
        if self._outlets is not None:
            self._outlets.console.note(text)

    def sync(self) -> None:
        """Make the log durable, before a checkpoint that relies on it."""
        if self._outlets is not None:
            self._outlets.log.sync()

    def close(self) -> None:
        """Close log, sinks and console."""
        if self._outlets is None:
            return
        self._outlets.console.close()
        self._outlets.log.close()
        for sink in self._sinks:
            sink.close()

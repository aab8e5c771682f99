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

    def event(self, name: str, progress: Progress, fields: Mapping[str, Any], *, note: str | None = None) -> None:
        """Record an event; `note` is what a person is told about it."""
        if name == "eval":
            self._evaluated.add(progress.step)
        if self._outlets is None:
            return
        record = {"event": name, "step": progress.step, "tokens": progress.tokens, **fields}
        self._outlets.log.write(record)
        for sink in self._outlets.sinks:
            sink.write(record)
        if name == "step":
            self._outlets.console.step(record)
        if note is not None:
            self._outlets.console.note(note)

    def was_evaluated(self, step: int) -> bool:
        """Whether the log holds an evaluation of this step."""
        return step in self._evaluated

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
        for sink in self._outlets.sinks:
            sink.close()

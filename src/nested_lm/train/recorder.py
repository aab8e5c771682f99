"""Sends what happens in a run to the metrics log, the sinks and the console."""

from collections.abc import Mapping, Sequence
from typing import Any

from nested_lm.train.console import TrainConsole
from nested_lm.train.metrics import MetricsLog, Sink
from nested_lm.train.state import Progress


class Recorder:
    """Adds step and tokens to each event and passes it on; the log comes first, because it is the truth."""

    def __init__(self, log: MetricsLog, sinks: Sequence[Sink], console: TrainConsole) -> None:
        self._log, self._sinks, self._console = log, sinks, console

    def event(self, name: str, progress: Progress, fields: Mapping[str, Any], *, note: str | None = None) -> None:
        """Record an event; `note` is what a person is told about it."""
        record = {"event": name, "step": progress.step, "tokens": progress.tokens, **fields}
        self._log.write(record)
        for sink in self._sinks:
            sink.write(record)
        if name == "step":
            self._console.step(record)
        if note is not None:
            self._console.note(note)

    def was_evaluated(self, step: int) -> bool:
        """Whether the log holds an evaluation of this step."""
        return step in self._log.evaluated_steps

    def sync(self) -> None:
        """Make the log durable, before a checkpoint that relies on it."""
        self._log.sync()

    def close(self) -> None:
        """Close log, sinks and console."""
        self._console.close()
        self._log.close()
        for sink in self._sinks:
            sink.close()

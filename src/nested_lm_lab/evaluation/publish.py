"""The one way from a model to a result file."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nested_lm.errors import NumericsError
from nested_lm.storage.commit import current_commit
from nested_lm.storage.lock import own_file
from nested_lm_lab.evaluation.identity import device_name
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.results import labelled, stored_result, write_result
from nested_lm_lab.evaluation.schema import SCHEMA_VERSION, Metrics, ResultFile
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task


def publish(task: Task[Any, Any], subject: Subject, *, label: str | None = None, output: Path | None = None) -> Path:
    """Measure a task, write its result file and report the scores.

    A result of the same checkpoint, settings and task version is kept, unless it ended early where this task would go
    on. A file in the run's own results is replaced by a newer one; elsewhere, another run's is not.

    Args:
        label: sets the result apart from another of the same run and kind, such as `long`.
        output: the file; None: where the task puts it.

    Raises:
        ConfigError: a label that is none, settings that the model cannot have, or a file of another run.
        InUseError: another process measures this result.
        NumericsError: a number is not finite; nothing is written.
    """
    name = labelled(task.name, label)
    path = output or task.place(subject, name)
    with own_file(path, activity=f"eval {name}"):
        return _publish(task, subject, name, path)


def _publish(task: Task[Any, Any], subject: Subject, name: str, path: Path) -> Path:
    started = time.perf_counter()
    with task.opened(subject):
        fields: dict[str, Any] = {
            "task": name,
            "task_version": task.version,
            "identity": subject.identity,
            "settings": task.record(subject),
            "checkpoint": task.mark(subject),
        }
        old = stored_result(path, fields, subject.report, replace=path.parent == subject.results)
        if old is not None and not task.may_go_further(old.metrics):
            subject.report(f"{name}: kept, {path} is of this checkpoint and these settings already")
            _show(task, old, subject)
            return path
        if old is not None:
            subject.report(f"measured again: {path} ended early, and will be replaced")
        progress = Progress(0, subject.report)
        progress.label = name
        metrics = _finite(lambda: task.measure(subject, progress), f"{name} on {subject.path}")
    result = ResultFile(
        schema_version=SCHEMA_VERSION,
        device=device_name(subject.device),
        scored_commit=current_commit(),
        metrics=metrics,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_seconds=time.perf_counter() - started,
        **fields,
    )
    write_result(path, result)
    _show(task, result, subject)
    seconds = result.wall_seconds
    pace = f", {progress.done:,} tokens, {progress.done / seconds:,.0f} tokens/s" if progress.done else ""
    subject.report(f"{name}: {seconds:.1f} s{pace}, {path}")
    return path


def _show(task: Task[Any, Any], result: ResultFile, subject: Subject) -> None:
    for line in task.lines(result):
        subject.report(line)


def _finite(measure: Callable[[], Metrics], what: str) -> Metrics:
    """Run a measurement; a number that is not finite, which the schema refuses, is an error of ours to explain."""
    try:
        return measure()
    except NumericsError as error:
        raise NumericsError(f"{what}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] != "finite_number":
            raise
        where = ".".join(map(str, first["loc"]))
        raise NumericsError(
            f"{what}: {where} is not finite, so nothing was written; evaluate an earlier checkpoint"
        ) from error

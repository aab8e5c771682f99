"""`nested-lm eval continual`: tasks of continual learning on runs and checkpoints, one result file a task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.publish import publish
from nested_lm_lab.evaluation.registry import continual_words, find_task
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task
from nested_lm_lab.tasks.continual.settings import ContinualSettings
from nested_lm_lab.tasks.continual.tasks import ContinualTask


def evaluate_continual(
    sources: Sequence[Path],
    settings: ContinualSettings,
    *,
    output_dir: Path | None = None,
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Measure tasks on each source and return the paths of the result files.

    Where the settings name no tasks, those are measured that the source and the settings allow, and it is said which
    are left out and why.

    Args:
        sources: run folders or checkpoints.
        output_dir: where result files go; None: the run's results.

    Raises:
        ConfigError: a task that lacks a setting or does not fit the run.
        DataError: a data set without dates or with too few periods, or a class set that is missing or changed.
        CheckpointError: a checkpoint that is damaged or does not fit its data.
        NumericsError: a number is not finite; that task writes nothing.
    """
    if output_dir is not None and len(sources) > 1:
        raise ConfigError("one folder cannot hold the results of several runs; leave --output-dir out")
    written = []
    for source in sources:
        subject = Subject.open(source, device=device, results=output_dir, report=report)
        subject.place("")  # refuse at once where no result could go
        chosen = _tasks(settings.of_run(subject.settings), subject)
        written += [publish(task, subject) for task in chosen]
    return written


def _tasks(settings: ContinualSettings, subject: Subject) -> list[Task[Any, Any]]:
    """The tasks that are named; without names, all that can be measured, and why the others cannot is reported."""
    known = continual_words()
    if settings.tasks is not None:
        return [find_task(known[word].kind)(settings) for word in settings.tasks]
    chosen: list[Task[Any, Any]] = []
    for word, entry in known.items():
        task = find_task(entry.kind)(settings)
        assert isinstance(task, ContinualTask)
        reason = task.missing(subject)
        if reason is None:
            chosen.append(task)
        else:
            subject.report(f"{word}: left out, {reason}")
    return chosen

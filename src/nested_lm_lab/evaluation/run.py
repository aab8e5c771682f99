"""`nested-lm eval RUN`: the tasks of a run's settings on its newest checkpoint, one result file each."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.train import Chronological
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.publish import publish
from nested_lm_lab.evaluation.registry import resolve, tasks_of_run
from nested_lm_lab.evaluation.subject import Subject


def evaluate_run(
    run_dir: Path,
    tasks: tuple[str, ...] | None = None,
    *,
    settings: EvalConfig | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Run evaluations on the newest checkpoint of a run and return the paths of their result files.

    A result of the same checkpoint, configuration and task version is kept.

    Args:
        run_dir: run folder.
        tasks: names; None: all that the settings ask for.
        settings: what to measure; None: the section `eval` that the run was trained with.
        device: where; None: a GPU when there is one, unless the run was configured for the CPU.
        report: told the scores.

    Raises:
        ConfigError: a task that does not exist or that the run's configuration leaves out.
        CheckpointError: no valid checkpoint, or one of other data.
        NumericsError: a score is not finite; that task writes nothing.
    """
    known = {entry.kind: entry.place for entry in tasks_of_run()}
    unknown = [name for name in tasks or () if name not in known]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; choices: {', '.join(known)}")
    chosen_device = None if device is None else torch.device(device)
    subject = Subject.open(run_dir, device=chosen_device, settings=settings, report=report)
    in_order = isinstance(subject.config.train.stream, Chronological)
    asked = subject.settings.tasks(chronological=in_order)
    for name in tasks or ():
        if name not in asked:
            missing = f"eval.{name} is null" if name != "continual" else "train.stream is not chronological"
            raise ConfigError(
                f"task {name!r} is not part of run {subject.config.name!r}: {missing}; its tasks: "
                f"{', '.join(asked) or 'none'}"
            )
    return [publish(resolve(known[name]).of_run(subject.settings), subject) for name in tasks or asked]

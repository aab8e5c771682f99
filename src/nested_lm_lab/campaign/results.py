"""Which results the evaluations of a campaign leave, and in which files of their run's folder."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nested_lm.config.campaign import EvalStep
from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.run import RunConfig
from nested_lm.config.train import Chronological
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.registry import CONTINUAL, continual_words, own_verbs
from nested_lm_lab.evaluation.results import labelled


class Results(NamedTuple):
    """names: of the results, as a report knows them. files: patterns below the run's folder, one for each."""

    names: tuple[str, ...]
    files: tuple[str, ...]


def results_of_run(settings: EvalConfig, run: RunConfig) -> Results:
    """What `nested-lm eval RUN` leaves: one result for each task that is set, and the matrix of a chronological run."""
    return _in_results(settings.tasks(chronological=isinstance(run.train.stream, Chronological)))


def results_of_suite(step: EvalStep, folder: Path) -> Results:
    """What a suite leaves, by its options. folder: of the run.

    Raises ConfigError when the options do not say it, or say a place where the report does not look.
    """
    allowed = folder / "results"
    if step.suite == CONTINUAL:
        place = option_of(step, "output-dir")
        if place is not None and Path(place).resolve() != allowed.resolve():
            raise _elsewhere(step, "output-dir", str(allowed))
        return _in_results(_continual_names(step))
    suites = [entry.kind for entry in own_verbs()]
    if step.suite not in suites:
        raise ConfigError(
            f"step {step.id!r}: unknown suite {step.suite!r}; choices: run, {', '.join(suites)}, {CONTINUAL}"
        )
    name = labelled(step.suite, option_of(step, "label"))
    output = option_of(step, "output")
    if output is None:
        return _in_results((name,))
    if Path(output).suffix != ".json" or Path(output).parent.resolve() != allowed.resolve():
        raise _elsewhere(step, "output", f"a .json file directly in {allowed}")
    return Results((name,), (f"results/{glob.escape(Path(output).name)}",))


def option_of(step: EvalStep, name: str) -> str | None:
    """Value of a command line option of a suite; the last one counts, as on the command line."""
    found = [option.partition("=")[2] for option in step.options if option.startswith(f"--{name}=")]
    return found[-1] if found else None


def _in_results(names: Sequence[str]) -> Results:
    return Results(tuple(names), tuple(f"results/{name}.json" for name in names))


def _continual_names(step: EvalStep) -> tuple[str, ...]:
    tasks = [task.strip() for task in (option_of(step, "tasks") or "").split(",") if task.strip()]
    if not tasks:
        raise ConfigError(
            f"step {step.id!r}: suite continual without --tasks measures what it finds possible, so the campaign "
            "cannot know which results are to be there\n  Name the tasks, such as --tasks=facts,languages."
        )
    known = continual_words()
    for task in tasks:
        if task not in known:
            raise ConfigError(f"step {step.id!r}: unknown task {task!r}; choices: {', '.join(known)}")
    return tuple(dict.fromkeys(known[task].kind for task in tasks))


def _elsewhere(step: EvalStep, option: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"step {step.id!r}: --{option}={option_of(step, option)} is a place where the report does not look\n"
        f"  Allowed is {allowed}; leave --{option} out for the usual place."
    )

"""Run the tasks of continual learning on runs and checkpoints: one result file a task, nothing half-written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nested_lm.checkpoint import find_checkpoint
from nested_lm.config.train import Chronological
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.identity import mark_checkpoint
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.schema import Metrics
from nested_lm_lab.tasks.continual import chronological, class_incremental, facts, languages, over_periods, over_steps
from nested_lm_lab.tasks.continual.borders import mark_borders
from nested_lm_lab.tasks.continual.class_sets import read_class_set
from nested_lm_lab.tasks.continual.settings import ContinualSettings
from nested_lm_lab.tasks.continual.subject import Subject

TASKS = ("stream", "regret", "carried", "lesion", "events", "retention", "classes", "facts", "languages")
"""Names on the command line. `stream` writes continual.json; the others a file named as their metrics' kind."""

_DEPENDS: dict[str, tuple[str, ...]] = {
    "regret": ("bootstrap_samples", "pieces_per_document"),
    "carried": ("bootstrap_samples",),
    "lesion": ("bootstrap_samples", "pieces_per_document", "set_back_to", "permutations", "seed"),
    "events": ("permutations", "seed", "reading_documents"),
    "retention": (),
    "classes": ("seed", "bootstrap_samples", "shots", "random_orders", "tests_per_class"),
    "facts": ("seed", "bootstrap_samples", "entities", "attributes", "epochs", "changed_share", "mentions"),
    "languages": ("seed", "bootstrap_samples", "vocabulary", "lesson_sentences", "test_sentences"),
}
"""Settings that a task's numbers depend on."""


class _OnTheRun(NamedTuple):
    """A task that looks at the run itself. reads_borders: its numbers come from all border checkpoints."""

    version: str
    reads_borders: bool
    measure: Callable[[Subject, ContinualSettings, Progress], Metrics]


_ON_THE_RUN = {
    "carried": _OnTheRun(over_periods.CARRIED_VERSION, True, over_periods.measure_carried),
    "lesion": _OnTheRun(over_periods.LESION_VERSION, True, over_periods.measure_lesions),
    "events": _OnTheRun(over_steps.EVENTS_VERSION, False, over_steps.measure_events),
    "retention": _OnTheRun(over_steps.RETENTION_VERSION, False, over_steps.measure_retention),
}


def evaluate_continual(
    sources: Sequence[Path],
    *,
    tasks: Sequence[str] | None,
    settings: ContinualSettings,
    oracle: Path | None,
    class_data: Path | None,
    output_dir: Path | None,
    device: torch.device,
    report: Callable[[str], None],
) -> list[Path]:
    """Measure tasks on each source and return the paths of the result files.

    Args:
        sources: run folders or checkpoints.
        tasks: names; None takes those that the source and the options allow, and says which are left out and why.
        oracle: run that read the same text mixed, for regret.
        class_data: folder with the class-incremental data sets.
        output_dir: where result files go; None: the run's results.

    Raises:
        ConfigError: a task that does not exist, lacks an option or does not fit the run.
        DataError: a data set without dates or with too few periods, or a class set that is missing or changed.
        CheckpointError: a checkpoint that is damaged or does not fit its data.
        NumericsError: a number is not finite; that task writes nothing.
    """
    unknown = [name for name in tasks or () if name not in TASKS]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; choices: {', '.join(TASKS)}")
    if output_dir is not None and len(sources) > 1:
        raise ConfigError("one folder cannot hold the results of several runs; leave --output-dir out")
    written = []
    for source in sources:
        subject = Subject.open(source, device=device, results=output_dir, report=report)
        chosen = list(tasks) if tasks is not None else _possible(subject, oracle, class_data, report)
        ours = settings.of_run(subject.config.eval)
        for name in chosen:
            written.append(_run(subject, name, ours, oracle=oracle, class_data=class_data))
    return written


def _possible(
    subject: Subject, oracle: Path | None, class_data: Path | None, report: Callable[[str], None]
) -> list[str]:
    """Tasks that can be measured, saying of the others why not."""
    train, model = subject.config.train, subject.config.model
    in_order = isinstance(train.stream, Chronological) and subject.run_dir is not None
    stream = None if in_order else "no run folder of a chronological run"
    reasons = {
        "stream": stream,
        "regret": stream or (None if oracle else "no --oracle"),
        "carried": stream or (None if subject.loaded.model.has_constant_state else "the state grows with the text"),
        "lesion": stream or (None if model.channel.periods else "no levels"),
        "events": None
        if (in_order and train.probe) or any(writes is not None for writes in model.channel.writes)
        else "no train.probe, and no level writes in context",
        "retention": stream or (None if train.probe and model.channel.periods else "no train.probe, or no levels"),
        "classes": None if class_data else "no --class-data",
        "facts": None,
        "languages": None,
    }
    for name, reason in reasons.items():
        if reason is not None:
            report(f"{name}: left out, {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def _run(
    subject: Subject, name: str, settings: ContinualSettings, *, oracle: Path | None, class_data: Path | None
) -> Path:
    """Measure one task and write its result."""
    if name == "stream":
        return _stream(subject, settings)
    model, tokenizer = subject.loaded.model, subject.loaded.tokenizer
    depends: dict[str, Any] = settings.model_dump(mode="json", include=set(_DEPENDS[name]))
    if name == "regret":
        if oracle is None:
            raise ConfigError(
                "the task `regret` compares with a run that read the same text mixed; name it with --oracle"
            )
        depends |= {"order": subject.stream.order, "periods": subject.stream.periods}
        return subject.publish(
            "regret",
            version=over_periods.REGRET_VERSION,
            settings=depends | {"oracle": mark_checkpoint(find_checkpoint(oracle, report=subject.report)).digest},
            mark=mark_borders(subject.borders()),
            measure=lambda progress: over_periods.measure_regret(subject, settings, oracle, progress),
        )
    if name in ("carried", "lesion"):
        depends |= {"order": subject.stream.order, "periods": subject.stream.periods}
    if name in _ON_THE_RUN:
        on_the_run = _ON_THE_RUN[name]
        return subject.publish(
            name,
            version=on_the_run.version,
            settings=depends,
            mark=mark_borders(subject.borders()) if on_the_run.reads_borders else subject.mark,
            measure=lambda progress: on_the_run.measure(subject, settings, progress),
        )
    if name == "classes":
        if class_data is None:
            raise ConfigError("the task `classes` needs its data sets; name their folder with --class-data")
        sets = [read_class_set(each, class_data, accept_hash=settings.class_hash) for each in settings.class_sets]
        return subject.publish(
            "class_incremental",
            version=class_incremental.VERSION,
            settings=depends | {"data": {data.name: data.content_hash for data in sets}},
            mark=subject.mark,
            measure=lambda progress: class_incremental.measure(model, tokenizer, sets, settings, progress),
        )
    if name == "facts":
        return subject.publish(
            "changing_facts",
            version=facts.VERSION,
            settings=depends,
            mark=subject.mark,
            measure=lambda progress: facts.measure(model, tokenizer, settings, progress),
        )
    return subject.publish(
        "invented_languages",
        version=languages.VERSION,
        settings=depends | {"sacrebleu": languages.require_chrf().__version__},
        mark=subject.mark,
        measure=lambda progress: languages.measure(model, tokenizer, settings, progress),
    )


def _stream(subject: Subject, settings: ContinualSettings) -> Path:
    """The loss matrix of the run: the result that `nested-lm eval RUN` writes, unless the settings differ."""
    samples = subject.config.eval.bootstrap_samples
    chosen = settings.model_copy(update={"bootstrap_samples": samples})
    return subject.publish(
        "continual",
        version=chronological.TASK_VERSION,
        settings=subject.config.eval.continual.model_dump(mode="json")
        | {
            "pieces_per_document": settings.pieces_per_document,
            "periods": subject.stream.periods,
            "order": subject.stream.order,
            "bootstrap_samples": samples,
        },
        mark=mark_borders(subject.borders()),
        measure=lambda progress: over_periods.measure_matrix(subject, chosen, progress),
    )

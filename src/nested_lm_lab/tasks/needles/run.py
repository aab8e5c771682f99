"""Needle curves of one checkpoint: all tasks and lengths, one result file."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.errors import ConfigError, NumericsError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.identity import UNKNOWN_DATA, identify, mark_checkpoint, result_of
from nested_lm_lab.evaluation.progress import LengthProgress
from nested_lm_lab.evaluation.results import labelled, stored_result, write_result
from nested_lm_lab.tasks.needles.measure import Batching, Suite, measure_length
from nested_lm_lab.tasks.needles.metrics import BabilongMetrics, LongTextMetrics, NeedleLength, NeedleTask, NiahMetrics
from nested_lm_lab.tasks.needles.reading import MIB, OutOfRoomError, Reader
from nested_lm_lab.tasks.needles.settings import NiahSettings
from nested_lm_lab.tasks.needles.stops import first_stop, may_go_further, why_stopped
from nested_lm_lab.tasks.needles.suites import ruler_suites
from nested_lm_lab.tasks.needles.summary import effective_lengths, effective_words, summarise
from nested_lm_lab.tasks.needles.tasks import VERSION


@dataclass(frozen=True)
class Plan:
    """What is measured. task: name of the result, its kind or `KIND_LABEL`. settings: what two results must share to be
    compared.
    """

    kind: Literal["niah", "babilong"]
    task: str
    version: str
    suites: tuple[Suite, ...]
    lengths: tuple[int, ...]
    batching: Batching
    max_state_mib: int
    bootstrap_samples: int
    settings: Mapping[str, Any]


def plan_niah(loaded: LoadedCheckpoint, settings: NiahSettings, *, label: str | None = None) -> Plan:
    """The plan of needle curves. label: sets a result apart from another of the same run, such as `long`.

    Raises:
        ConfigError: settings that do not go together, or a label that is none.
        DataError: a book cannot be read.
    """
    suites = ruler_suites(loaded.tokenizer, settings)
    return Plan(
        kind="niah",
        task=labelled("niah", label),
        version=VERSION,
        suites=suites,
        lengths=settings.lengths,
        batching=Batching(settings.samples, settings.batch_rows),
        max_state_mib=settings.max_state_mib,
        bootstrap_samples=settings.bootstrap_samples,
        settings=settings.of_result({suite.name: suite.haystack for suite in suites}),
    )


def default_output(source: Path, checkpoint: Path, task: str) -> Path:
    """Where a result goes: the run's results folder, or a folder of its own there for a checkpoint named by itself.

    Raises:
        ConfigError: the checkpoint lies in no run folder.
    """
    if source != checkpoint:
        return source / "results" / f"{task}.json"
    if checkpoint.parent.name != "checkpoints":
        raise ConfigError(f"{checkpoint} lies in no run folder; say with --output where the result goes")
    return checkpoint.parent.parent / "results" / checkpoint.name / f"{task}.json"


def evaluate_plan(
    loaded: LoadedCheckpoint, checkpoint: Path, plan: Plan, *, output: Path, report: Callable[[str], None]
) -> Path:
    """Measure needles and write the result file.

    Raises:
        ConfigError: the output holds a result of another run.
        DataError: a length without room, or a haystack that is too short: before anything is read.
        NumericsError: a score is not finite; nothing is written.
    """
    measurement = Measurement(
        plan.task, plan.version, plan.settings, plan.max_state_mib, lambda: _measure(loaded, plan, report)
    )
    return measure_once(loaded, checkpoint, measurement, output=output, report=report)


@dataclass(frozen=True)
class Measurement:
    """What goes into one result file. task: its name. settings: what two results must share to be compared.

    max_state_mib: limit for states; no part of the settings, since it changes no number, but ends what is measured.
    """

    task: str
    version: str
    settings: Mapping[str, Any]
    max_state_mib: int
    measure: Callable[[], LongTextMetrics]


def measure_once(
    loaded: LoadedCheckpoint,
    checkpoint: Path,
    measurement: Measurement,
    *,
    output: Path,
    report: Callable[[str], None],
) -> Path:
    """Measure and write a result file; a result of the same checkpoint, settings and task version is kept, unless it
    stopped at a lower limit for states.

    Raises:
        ConfigError: the file there holds a result of another run.
        NumericsError: a score is not finite; nothing is written.
    """
    started = time.perf_counter()
    fields: dict[str, Any] = {
        "task": measurement.task,
        "task_version": measurement.version,
        "identity": identify(loaded, data_hash=lambda: UNKNOWN_DATA),
        "settings": dict(measurement.settings),
        "checkpoint": mark_checkpoint(checkpoint),
    }
    old = stored_result(output, fields, report)
    if old is not None:
        assert isinstance(old.metrics, LongTextMetrics)
        if not may_go_further(old.metrics, measurement.max_state_mib):
            report(f"kept: {output} is of this checkpoint and these settings already")
            return output
        report(
            f"measured again: {output} stopped at a lower limit than {measurement.max_state_mib:,} MiB, or an unknown "
            "one, and will be replaced"
        )
    try:
        metrics = measurement.measure()
    except NumericsError as error:
        raise NumericsError(f"{measurement.task} on {checkpoint}: {error}") from error
    result = result_of(metrics, fields, device=loaded.device, started=started)
    write_result(output, result)
    report(f"{measurement.task}: {result.wall_seconds:.1f} s, {output}")
    return output


def _require_samples(plan: Plan) -> None:
    """Refuse at once what cannot be made: room ends at the shortest length, the haystack at the longest."""
    for suite in plan.suites:
        for length in {plan.lengths[0], plan.lengths[-1]}:
            for number in range(plan.batching.samples):
                suite.make(length, number)


def _measure(loaded: LoadedCheckpoint, plan: Plan, report: Callable[[str], None]) -> NiahMetrics | BabilongMetrics:
    _require_samples(plan)
    unwritten = int(loaded.model.has_fast_weights)  # a row more of each sample
    rows = {suite.name: (suite.rows + unwritten) * plan.batching.samples for suite in plan.suites}
    progress = LengthProgress({(name, length): rows[name] * length for name in rows for length in plan.lengths}, report)
    reader = Reader(loaded.model, plan.max_state_mib * MIB, progress.add)
    bootstrap = Bootstrap(samples=plan.bootstrap_samples)
    tasks = []
    for suite in plan.suites:
        lengths: list[NeedleLength] = []
        for length in plan.lengths:
            with progress.at(suite.name, length):
                lengths.append(_length(reader, loaded, suite, length, plan, bootstrap, lengths))
            if lengths[-1].stopped is not None:
                progress.stop(length)
            report(_line(suite.name, lengths[-1]))
        tasks.append(
            NeedleTask(
                task=suite.name,
                upstream=suite.upstream,
                haystack=suite.haystack,
                lengths=tuple(lengths),
                effective=effective_lengths(lengths),
            )
        )
        report(_effective_line(tasks[-1]))
    scores = [entry.scores for made in tasks for entry in made.lengths if entry.scores is not None]
    seconds = sum(score.seconds for score in scores)
    kinds = {"niah": NiahMetrics, "babilong": BabilongMetrics}
    return kinds[plan.kind](
        kind=plan.kind,
        constant_state=loaded.model.has_constant_state,
        max_state_mib=plan.max_state_mib,
        tasks=tuple(tasks),
        tokens_per_s=sum(score.tokens for score in scores) / seconds if seconds else 0.0,
        tokens_read_per_s=sum(score.tokens_read for score in scores) / seconds if seconds else 0.0,
    )


def _length(
    reader: Reader,
    loaded: LoadedCheckpoint,
    suite: Suite,
    length: int,
    plan: Plan,
    bootstrap: Bootstrap,
    shorter: Sequence[NeedleLength],
) -> NeedleLength:
    """Scores of one length, or what keeps it from being read."""
    ended = first_stop(shorter)
    if ended is not None:
        return NeedleLength(length=length, scores=None, stopped=f"not tried: {why_stopped(ended, plan.max_state_mib)}")
    try:
        measured = measure_length(reader, loaded.tokenizer, suite, length, plan.batching)
    except OutOfRoomError as error:
        return NeedleLength(length=length, scores=None, stopped=str(error))
    return NeedleLength(length=length, scores=summarise(measured, bootstrap), stopped=None)


def _effective_line(task: NeedleTask) -> str:
    """The effective lengths of a task, for the terminal."""
    found = (f"{effective_words(task, entry)} (match at least {entry.threshold:g})" for entry in task.effective)
    return f"{task.task}: effective length {', '.join(found)}"


def _line(task: str, entry: NeedleLength) -> str:
    """One line about a length, for the terminal."""
    where = f"{task} at {entry.length:,} tokens"
    if entry.scores is None:
        return f"{where}: {entry.stopped}"
    scores, control = entry.scores, entry.scores.controls.no_needle
    match = scores.score.match
    assert match is not None
    assert control.match is not None
    return (
        f"{where}: match {match.value:.3f} [{match.low:.3f}, {match.high:.3f}], without needle "
        f"{control.match.value:.3f}; {scores.score.nats.value:.2f} nats, needle saves {scores.worth.value:+.3f}; "
        f"{scores.tokens / max(scores.seconds, 1e-9):,.0f} tokens/s"
    )

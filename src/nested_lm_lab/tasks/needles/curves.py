"""Needle curves of one checkpoint: all tasks and lengths."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.reading.calls import OutOfRoomError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.progress import LengthProgress, Progress
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.needles.measure import Batching, measure_length
from nested_lm_lab.tasks.needles.metrics import BabilongMetrics, NeedleLength, NeedleTask, NiahMetrics
from nested_lm_lab.tasks.needles.reading import MIB, Reader
from nested_lm_lab.tasks.needles.settings import LongTextSettings
from nested_lm_lab.tasks.needles.stops import first_stop, why_stopped
from nested_lm_lab.tasks.needles.suite import Suite
from nested_lm_lab.tasks.needles.summary import effective_lengths, effective_line, length_line, summarise

M = TypeVar("M", NiahMetrics, BabilongMetrics)


def measure_curves(
    kind: type[M], name: str, subject: Subject, suites: Sequence[Suite], settings: LongTextSettings, progress: Progress
) -> M:
    """Measure suites at all lengths.

    kind: class of the metrics. name: of the task.

    Raises:
        DataError: a length without room, or a haystack that is too short: before anything is read.
        NumericsError: a score is not finite.
    """
    _require_samples(suites, settings)
    model = subject.loaded.model
    unwritten = int(model.has_fast_weights)  # a row more of each sample
    rows = {suite.name: (suite.rows + unwritten) * settings.samples for suite in suites}
    lengths = LengthProgress(
        {(name, length): rows[name] * length for name in rows for length in settings.lengths}, progress
    )
    reader = Reader(model, settings.max_state_mib * MIB, progress.add)
    tasks = tuple(_task(reader, subject.loaded.tokenizer, suite, settings, lengths, subject.report) for suite in suites)
    scores = [entry.scores for task in tasks for entry in task.lengths if entry.scores is not None]
    seconds = sum(score.seconds for score in scores)
    return kind(
        kind=name,
        constant_state=model.has_constant_state,
        max_state_mib=settings.max_state_mib,
        tasks=tasks,
        tokens_per_s=sum(score.tokens for score in scores) / seconds if seconds else 0.0,
        tokens_read_per_s=sum(score.tokens_read for score in scores) / seconds if seconds else 0.0,
    )


def _require_samples(suites: Sequence[Suite], settings: LongTextSettings) -> None:
    """Refuse at once what cannot be made: room ends at the shortest length, the haystack at the longest."""
    for suite in suites:
        for length in {settings.lengths[0], settings.lengths[-1]}:
            for number in range(settings.samples):
                suite.make(length, number)


def _task(
    reader: Reader,
    tokenizer: TextTokenizer,
    suite: Suite,
    settings: LongTextSettings,
    progress: LengthProgress,
    report: Callable[[str], None],
) -> NeedleTask:
    found: list[NeedleLength] = []
    for length in settings.lengths:
        with progress.at(suite.name, length):
            found.append(_length(reader, tokenizer, suite, length, settings, found))
        if found[-1].stopped is not None:
            progress.stop(length)
        report(length_line(suite.name, found[-1]))
    task = NeedleTask(
        task=suite.name,
        upstream=suite.upstream,
        haystack=suite.haystack,
        lengths=tuple(found),
        effective=effective_lengths(found),
    )
    report(effective_line(task))
    return task


def _length(
    reader: Reader,
    tokenizer: TextTokenizer,
    suite: Suite,
    length: int,
    settings: LongTextSettings,
    shorter: Sequence[NeedleLength],
) -> NeedleLength:
    """Scores of one length, or what keeps it from being read."""
    ended = first_stop(shorter)
    if ended is not None:
        why = why_stopped(ended, settings.max_state_mib)
        return NeedleLength(length=length, scores=None, stopped=f"not tried: {why}")
    try:
        measured = measure_length(reader, tokenizer, suite, length, Batching(settings.samples, settings.batch_rows))
    except OutOfRoomError as error:
        return NeedleLength(length=length, scores=None, stopped=str(error))
    scores = summarise(measured, Bootstrap(samples=settings.bootstrap_samples))
    return NeedleLength(length=length, scores=scores, stopped=None)

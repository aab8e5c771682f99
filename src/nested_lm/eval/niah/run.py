"""Needle curves of one checkpoint: all tasks and lengths, one result file."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.commit import current_commit
from nested_lm.errors import ConfigError, NumericsError, ReportError
from nested_lm.eval.bootstrap import Bootstrap
from nested_lm.eval.identity import device_name, identify, mark_checkpoint
from nested_lm.eval.niah.haystack import Books, Haystack, Needles, Noise
from nested_lm.eval.niah.lists import make_list_sample
from nested_lm.eval.niah.measure import Grid, measure_length, rows_of_a_sample
from nested_lm.eval.niah.metrics import NeedleLength, NeedleTask, NiahMetrics
from nested_lm.eval.niah.progress import Progress
from nested_lm.eval.niah.prompts import make_sample
from nested_lm.eval.niah.reading import MIB, OutOfRoomError, Reader
from nested_lm.eval.niah.settings import NiahSettings
from nested_lm.eval.niah.summary import effective_lengths, summarise
from nested_lm.eval.niah.tasks import TASKS, VERSION, Task
from nested_lm.eval.results import load_result, write_result
from nested_lm.eval.schema import SCHEMA_VERSION, ResultFile

UNKNOWN_DATA = "none"
"""Stands for the data of a converted model, which was trained on none of ours."""


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


def evaluate_niah(
    loaded: LoadedCheckpoint,
    checkpoint: Path,
    settings: NiahSettings,
    *,
    output: Path,
    report: Callable[[str], None],
) -> Path:
    """Measure and write the result file; a result of the same checkpoint, settings and task version is kept.

    Raises:
        ConfigError: settings that do not go together.
        DataError: a length without room, or a haystack that is too short: before anything is read.
        NumericsError: a score is not finite; nothing is written.
    """
    haystacks = open_haystacks(loaded, settings)
    grid = Grid(settings.depths, settings.samples, settings.seed, settings.batch_rows, settings.max_new_tokens)
    for name in settings.tasks:
        _try_lengths(loaded, TASKS[name], haystacks[name], settings, grid)
    started = time.perf_counter()
    fields = {
        "task_version": VERSION,
        "identity": identify(loaded, data_hash=lambda: UNKNOWN_DATA),
        "settings": settings.of_result({name: None if h is None else h.identity for name, h in haystacks.items()}),
        "checkpoint": mark_checkpoint(checkpoint),
    }
    if _is_current(output, fields, report):
        return output
    try:
        metrics = _measure(loaded, settings, grid, haystacks, report)
    except NumericsError as error:
        raise NumericsError(f"niah on {checkpoint}: {error}") from error
    result = ResultFile(
        schema_version=SCHEMA_VERSION,
        task="niah",
        device=device_name(loaded.device),
        scored_commit=current_commit(),
        metrics=metrics,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_seconds=time.perf_counter() - started,
        **fields,
    )
    write_result(output, result)
    report(f"niah: {result.wall_seconds:.1f} s, {output}")
    return output


def open_haystacks(loaded: LoadedCheckpoint, settings: NiahSettings) -> dict[str, Haystack | None]:
    """The haystack of each task.

    Raises:
        ConfigError: a haystack is asked for that a task cannot have, or books that no task reads.
        DataError: a book cannot be read.
    """
    tokenizer = loaded.tokenizer
    kinds = {}
    for name in settings.tasks:
        task = TASKS[name]
        kinds[name] = task.haystack if settings.haystack is None else settings.haystack
        if settings.haystack is not None and (
            task.haystack is None or (task.shape == "variables" and settings.haystack == "needle")
        ):
            raise ConfigError(
                f"--haystack {settings.haystack}: task {name} cannot have it; leave --haystack out, or name other tasks"
            )
    if settings.books and "books" not in kinds.values():
        raise ConfigError("--books: no task reads them; name one that does with --tasks, or add --haystack books")
    books = Books.open(tokenizer, settings.files) if "books" in kinds.values() else None
    made: dict[str, Haystack | None] = {}
    for name, kind in kinds.items():
        task = TASKS[name]
        choices = {None: None, "noise": Noise(tokenizer), "books": books}
        made[name] = Needles(tokenizer, task.keys, task.values) if kind == "needle" else choices[kind]
    return made


def _try_lengths(
    loaded: LoadedCheckpoint, task: Task, haystack: Haystack | None, settings: NiahSettings, grid: Grid
) -> None:
    """Make a sample of the shortest and of the longest length, so that what cannot be made is refused at once."""
    for length in {settings.lengths[0], settings.lengths[-1]}:
        if haystack is None:
            make_list_sample(task, loaded.tokenizer, length=length, seed=grid.seed, number=0)
        else:
            make_sample(task, loaded.tokenizer, haystack, length=length, depths=grid.depths, seed=grid.seed, number=0)


def _is_current(path: Path, fields: Mapping[str, object], report: Callable[[str], None]) -> bool:
    if not path.exists():
        return False
    try:
        old = load_result(path)
    except ReportError as error:
        report(f"measured again: {error}")
        return False
    other = [name for name, value in fields.items() if getattr(old, name) != value]
    if other:
        report(f"measured again: {path} is of another {' and '.join(other).replace('_', ' ')}, and will be replaced")
        return False
    report(f"niah: kept, {path} is of this checkpoint and these settings already")
    return True


def _measure(
    loaded: LoadedCheckpoint,
    settings: NiahSettings,
    grid: Grid,
    haystacks: Mapping[str, Haystack | None],
    report: Callable[[str], None],
) -> NiahMetrics:
    rows = sum(rows_of_a_sample(TASKS[name], grid) for name in settings.tasks) * settings.samples
    progress = Progress(rows * sum(settings.lengths), report)
    reader = Reader(loaded.model, settings.max_state_mib * MIB, progress.add)
    bootstrap = Bootstrap(samples=settings.bootstrap_samples)
    tasks = []
    for name in settings.tasks:
        task = TASKS[name]
        lengths: list[NeedleLength] = []
        for length in settings.lengths:
            progress.label = f"{name} at {length:,} tokens"
            lengths.append(_length(reader, loaded, task, haystacks[name], length, grid, bootstrap, lengths))
            report(_line(name, lengths[-1]))
        haystack = haystacks[name]
        tasks.append(
            NeedleTask(
                task=name,
                upstream=task.ruler,
                haystack=None if haystack is None else haystack.identity,
                lengths=tuple(lengths),
                effective=effective_lengths(lengths),
            )
        )
    scores = [entry.scores for made in tasks for entry in made.lengths if entry.scores is not None]
    seconds = sum(score.seconds for score in scores)
    return NiahMetrics(
        kind="niah",
        constant_state=loaded.model.has_constant_state,
        max_state_mib=settings.max_state_mib,
        tasks=tuple(tasks),
        tokens_per_s=sum(score.tokens for score in scores) / seconds if seconds else 0.0,
        tokens_read_per_s=sum(score.tokens_read for score in scores) / seconds if seconds else 0.0,
    )


def _length(
    reader: Reader,
    loaded: LoadedCheckpoint,
    task: Task,
    haystack: Haystack | None,
    length: int,
    grid: Grid,
    bootstrap: Bootstrap,
    shorter: list[NeedleLength],
) -> NeedleLength:
    """Scores of one length, or the statement that memory ended."""
    ended = next((entry for entry in shorter if entry.stopped is not None), None)
    if ended is not None:
        return NeedleLength(length=length, scores=None, stopped=f"not tried: memory ended at {ended.length:,} tokens")
    try:
        measured = measure_length(reader, loaded.tokenizer, task, haystack, length, grid)
    except OutOfRoomError as error:
        return NeedleLength(length=length, scores=None, stopped=str(error))
    return NeedleLength(length=length, scores=summarise(measured, bootstrap), stopped=None)


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

"""Zero-shot tasks on one checkpoint: plain and with memorised texts, with floors beside."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nested_lm import __version__
from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import DataError
from nested_lm.storage.commit import current_commit
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task, from_report
from nested_lm_lab.tasks.zeroshot.bigram import BigramScorer, count_bigrams
from nested_lm_lab.tasks.zeroshot.data_folder import is_known_copy, read_manifest, verified_files
from nested_lm_lab.tasks.zeroshot.harness import build_requests, open_tasks
from nested_lm_lab.tasks.zeroshot.memorize import MemorizedStarts, check_memorize
from nested_lm_lab.tasks.zeroshot.metrics import Arm, Code, TaskData, TaskScores, ZeroShotMetrics
from nested_lm_lab.tasks.zeroshot.sequences import ModelScorer, Scorer
from nested_lm_lab.tasks.zeroshot.settings import Memorize, ZeroShotSettings
from nested_lm_lab.tasks.zeroshot.summary import (
    Answered,
    average_accuracy,
    floors_of,
    group_requests,
    hash_documents,
    intervals,
    paired_gain,
    standard_errors,
)
from nested_lm_lab.tasks.zeroshot.table import table_lines
from nested_lm_lab.tasks.zeroshot.tasks import HARNESS_VERSION, TASKS, VERSION

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task as HarnessTask

    from nested_lm_lab.tasks.zeroshot.language_model import Requests, RollingRequests

PLAIN = "plain"


@dataclass
class _Questions:
    """One task and its documents."""

    task: "HarnessTask"
    by_document: "list[list[Instance]]"
    data: TaskData

    @property
    def is_rolling(self) -> bool:
        """Whether whole texts are scored: there is no question after the text."""
        return self.task.OUTPUT_TYPE == "loglikelihood_rolling"


@dataclass
class _Asked(_Questions):
    """One task with its requests as sequences of tokens."""

    requests: "Requests | RollingRequests"

    def answered(self, scorer: Scorer) -> Answered:
        """Score all documents."""
        answers = self.requests.answers(scorer.score(self.requests.documents))
        if self.is_rolling:
            return Answered(self.task, self.by_document, answers)
        given = dict(zip(map(id, self.task.instances), answers, strict=True))
        ordered = [given[id(request)] for requests in self.by_document for request in requests]
        return Answered(self.task, self.by_document, ordered)


class ZeroShotSuite(Task[ZeroShotSettings, ZeroShotMetrics]):
    """PIQA, HellaSwag, ARC and others through lm-eval's own task files, beside their floors and the papers' rows."""

    name = "zeroshot"
    version = VERSION
    Settings = ZeroShotSettings
    Metrics = ZeroShotMetrics
    own_settings = ("memorize",)  # arms that only one result has stand beside the others

    def __init__(self, settings: ZeroShotSettings) -> None:
        super().__init__(settings)
        self._questions: dict[str, _Questions] = {}

    def place(self, subject: Subject, name: str) -> Path:
        """Zero-shot scores of all runs lie together: `eval/zeroshot_RUN[_LABEL].json`."""
        label = name.removeprefix(self.name)
        return Path("eval") / f"{self.name}_{subject.identity.name}{label}.json"

    @contextmanager
    def opened(self, subject: Subject) -> Iterator[None]:
        """Open the harness and its documents.

        Raises:
            ConfigError: settings that the model cannot have, or no harness.
            DataError: changed task files or data.
        """
        for memorize in self.settings.memorize:
            check_memorize(subject.loaded.model, memorize)
        folder = self.settings.data_dir
        files = None if folder is None else verified_files(folder, self.settings.tasks)
        with open_tasks(self.settings.tasks, files) as tasks:
            self._questions = _ask(tasks, self.settings, folder, files)
            yield

    def record(self, subject: Subject) -> dict[str, Any]:
        """The settings, and what was asked."""
        return _result_settings(subject.loaded, self.settings, self._questions)

    def measure(self, subject: Subject, progress: Progress) -> ZeroShotMetrics:
        """Score all tasks.

        Raises:
            DataError: no training text for the bigram floor.
            CheckpointError: the data set for the bigram floor has another tokenizer.
            NumericsError: a score is not finite.
        """
        bigram = _count_bigrams(subject.loaded, self.settings)  # what is missing there is found out first
        asked = _encode(self._questions, subject.loaded, self.settings)
        return _measure(subject.loaded, self.settings, asked, bigram, progress)

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """The table."""
        yield from table_lines(result)

    @classmethod
    def tables(cls, campaign: Any, runs: Sequence[Any], name: str) -> list[Any]:
        """The same table, of all runs."""
        found: list[Any] = from_report("zeroshot_tables", "zero_shot")(campaign, runs, name)
        return found


class _Bigram(NamedTuple):
    """The bigram of the training text, and the tokens it was counted on."""

    scorer: BigramScorer
    tokens: int


def _count_bigrams(loaded: LoadedCheckpoint, settings: ZeroShotSettings) -> _Bigram | None:
    """Count the bigrams of the run's training text; None where that floor is left out.

    Raises:
        CheckpointError: the data set has another tokenizer.
        DataError: there is no such data set.
    """
    if settings.bigram_tokens is None:
        return None
    folder = Path(loaded.config.data.output_dir)
    try:
        training = TokenDataset.open(folder, "train")
    except DataError as error:
        raise DataError(
            f"{error}\n  The bigram floor is counted on the run's training text there: run from the folder that "
            f"{folder} is below, or leave this floor out with --no-bigram."
        ) from error
    counts, counted = count_bigrams(training, tokenizer_hash=loaded.tokenizer.hash, max_tokens=settings.bigram_tokens)
    return _Bigram(BigramScorer(counts), counted)


def max_length(loaded: LoadedCheckpoint, settings: ZeroShotSettings) -> int:
    """Tokens read of a document at the most."""
    return settings.max_length or loaded.config.train.context_length


def _ask(
    tasks: "dict[str, HarnessTask]", settings: ZeroShotSettings, data_dir: Path | None, files: Mapping[str, Path] | None
) -> dict[str, _Questions]:
    """Build the requests of every task. files: of the data folder, verified; None: the hub."""
    manifest = None if data_dir is None else read_manifest(data_dir)
    found = {}
    for name, task in tasks.items():
        build_requests(task, settings.limit)
        by_document = group_requests(task)
        known = TASKS[name]
        data = TaskData(
            task_version=str(task.VERSION),
            task_files=known.sha256,
            source=f"hub {known.dataset}" if manifest is None else f"data folder, from {manifest.tasks[name].source}",
            file=None if manifest is None else manifest.tasks[name].sha256,
            split=known.split,
            documents=hash_documents(task, by_document),
            published=known.documents,
            licence=known.licence,
            known_copy=None if files is None else is_known_copy(known, files[name]),
        )
        found[name] = _Questions(task, by_document, data)
    return found


def _encode(
    questions: Mapping[str, _Questions], loaded: LoadedCheckpoint, settings: ZeroShotSettings
) -> dict[str, _Asked]:
    """Turn the requests of every task into tokens."""
    from nested_lm_lab.tasks.zeroshot.language_model import HarnessModel

    # Turns requests into tokens; what scores them is chosen arm by arm.
    encoder = HarnessModel(
        loaded.tokenizer, ModelScorer(loaded.model, batch_rows=1), max_length=max_length(loaded, settings)
    )
    return {
        name: _Asked(
            entry.task,
            entry.by_document,
            entry.data,
            (encoder.rolling_requests if entry.is_rolling else encoder.requests)(entry.task.instances),
        )
        for name, entry in questions.items()
    }


def _result_settings(
    loaded: LoadedCheckpoint, settings: ZeroShotSettings, questions: Mapping[str, _Questions]
) -> dict[str, Any]:
    """What two results must share to be compared: limits of the machine are not part of it."""
    fields = settings.model_dump(mode="json", exclude={"batch_rows", "data_dir"})
    return fields | {
        "max_length": max_length(loaded, settings),
        "harness": HARNESS_VERSION,
        "start_token": True,
        "task_files": {name: entry.data.task_files for name, entry in questions.items()},
        "documents": {name: entry.data.documents for name, entry in questions.items()},
    }


def _measure(
    loaded: LoadedCheckpoint,
    settings: ZeroShotSettings,
    asked: dict[str, _Asked],
    bigram: _Bigram | None,
    progress: Progress,
) -> ZeroShotMetrics:
    bootstrap = Bootstrap(samples=settings.bootstrap_samples)
    floors = {
        name: floors_of(
            entry.task, entry.by_document, None if bigram is None else entry.answered(bigram.scorer).aggregate()
        )
        for name, entry in asked.items()
    }
    variants: list[Memorize | None] = [None, *settings.memorize]
    progress.total += _planned(loaded, settings, asked, variants)
    arms: list[Arm] = []
    for variant in variants:
        plain = {entry.task: entry for entry in arms[0].tasks} if arms else {}
        arms.append(_arm(loaded, settings, asked, variant, plain, bootstrap, progress))
    return ZeroShotMetrics(
        kind="zeroshot",
        code=Code(version=__version__, commit=current_commit(), harness=HARNESS_VERSION),
        data={name: entry.data for name, entry in asked.items()},
        floors=floors,
        bigram_tokens=None if bigram is None else bigram.tokens,
        arms=tuple(arms),
    )


def _scorer(
    loaded: LoadedCheckpoint,
    settings: ZeroShotSettings,
    entry: _Asked,
    variant: Memorize | None,
    on_tokens: Callable[[int], None] | None,
) -> tuple[ModelScorer, int]:
    """Scorer of a task under a variant, and the tokens it will read."""
    documents = entry.requests.documents
    starts = None
    tokens = 0
    if variant is not None:
        boundary = loaded.tokenizer.start_of_text, loaded.tokenizer.end_of_text
        starts = MemorizedStarts(loaded.model, documents, variant, boundary, on_tokens)
        tokens = sum(map(starts.length, range(len(documents))))
    scorer = ModelScorer(loaded.model, batch_rows=settings.batch_rows, starts=starts, on_tokens=on_tokens)
    return scorer, tokens + scorer.planned_tokens(documents)


def _planned(
    loaded: LoadedCheckpoint, settings: ZeroShotSettings, asked: dict[str, _Asked], variants: Sequence[Memorize | None]
) -> int:
    """Tokens that all arms will read."""
    return sum(
        _scorer(loaded, settings, entry, variant, None)[1]
        for variant in variants
        for entry in asked.values()
        if variant is None or not entry.is_rolling
    )


def _arm(
    loaded: LoadedCheckpoint,
    settings: ZeroShotSettings,
    asked: dict[str, _Asked],
    variant: Memorize | None,
    plain: dict[str, TaskScores],
    bootstrap: Bootstrap,
    progress: Progress,
) -> Arm:
    """All tasks under one way of reading."""
    name = PLAIN if variant is None else variant.name
    scores = []
    for task, entry in asked.items():
        if variant is not None and entry.is_rolling:
            continue
        progress.label = f"{name}, {task}"
        scorer, tokens_read = _scorer(loaded, settings, entry, variant, progress.add)
        started = time.perf_counter()
        answered = entry.answered(scorer)
        seconds = time.perf_counter() - started
        found, values = answered.aggregate(), answered.values()
        scores.append(
            TaskScores(
                task=task,
                printed=TASKS[task].printed,
                documents=len(entry.by_document),
                cut=entry.requests.cut,
                metrics=intervals(values, found, bootstrap),
                standard_errors=standard_errors(values, list(found)),
                gain=None if variant is None else paired_gain(task, plain[task], values, bootstrap),
                tokens_read=tokens_read,
                tokens=ModelScorer(loaded.model, batch_rows=1, shared=False).planned_tokens(entry.requests.documents),
                seconds=seconds,
                values=values,
            )
        )
        last = scores[-1]
        first = last.metrics[last.printed[0]]
        progress.report(
            f"{name}, {task}: {last.printed[0]} {first.value:.4g}, {last.documents:,} documents, {seconds:.1f} s, "
            f"{tokens_read / seconds:,.0f} tokens/s"
        )
    seconds = sum(entry.seconds for entry in scores)
    return Arm(
        name=name,
        memorize=variant,
        tasks=tuple(scores),
        average=average_accuracy(scores, bootstrap),
        tokens_per_s=sum(entry.tokens_read for entry in scores) / seconds,
        seconds=seconds,
    )

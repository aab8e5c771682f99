"""Needle curves after RULER."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.task import Task, from_report
from nested_lm_lab.tasks.needles.metrics import NiahMetrics
from nested_lm_lab.tasks.needles.settings import NiahSettings
from nested_lm_lab.tasks.needles.stops import may_go_further
from nested_lm_lab.tasks.needles.summary import curve_lines
from nested_lm_lab.tasks.needles.tasks import GIVEN_AWAY, VERSION

if TYPE_CHECKING:
    from nested_lm_lab.evaluation.progress import Progress
    from nested_lm_lab.evaluation.subject import Subject
    from nested_lm_lab.tasks.needles.suite import Suite


class NiahTask(Task[NiahSettings, NiahMetrics]):
    """Needle curves: RULER's tasks at exact lengths and depths, with controls. Lengths may go up to 512k and beyond."""

    name = "niah"
    version = VERSION
    Settings = NiahSettings
    Metrics = NiahMetrics

    def __init__(self, settings: NiahSettings) -> None:
        super().__init__(settings)
        self._suites: tuple[Suite, ...] = ()

    @contextmanager
    def opened(self, subject: "Subject") -> Iterator[None]:
        """Read the haystacks.

        Raises:
            ConfigError: settings that do not go together.
            DataError: a book cannot be read, or the model was trained on the words that are hidden.
        """
        from nested_lm.data.facts import refuse_shared_words
        from nested_lm_lab.tasks.needles.suites import ruler_suites
        from nested_lm_lab.tasks.needles.words import ADJECTIVES, NOUNS

        facts = subject.loaded.config.train.facts
        if facts is not None:
            refuse_shared_words(facts, (*ADJECTIVES, *NOUNS), source="the needle suite")
        self._suites = ruler_suites(subject.loaded.tokenizer, self.settings)
        yield

    def record(self, subject: "Subject") -> dict[str, Any]:  # noqa: ARG002
        """The settings, and the identity of each haystack."""
        return self.settings.of_result({suite.name: suite.haystack for suite in self._suites})

    def measure(self, subject: "Subject", progress: "Progress") -> NiahMetrics:
        """Measure all tasks and lengths.

        Raises:
            DataError: a length without room, or a haystack that is too short: before anything is read.
        """
        from nested_lm_lab.tasks.needles.curves import measure_curves

        return measure_curves(NiahMetrics, self.name, subject, self._suites, self.settings, progress)

    def may_go_further(self, old: NiahMetrics) -> bool:
        """A higher limit for states reads longer texts."""
        return may_go_further(old, self.settings.max_state_mib)

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """The share found at each length, and the effective lengths."""
        assert isinstance(result.metrics, NiahMetrics)
        yield from curve_lines(result.metrics.tasks)

    @classmethod
    def tables(cls, campaign: Any, runs: Sequence[Any], name: str) -> list[Any]:
        """Every score beside its controls."""
        found: list[Any] = from_report("needle_tables", "needles")(campaign, runs, name)
        return found

    @classmethod
    def current(cls, result: ResultFile) -> tuple[ResultFile | None, str | None]:
        """Results of version 1 count, those of the tasks that it gave away do not."""
        metrics = result.metrics
        assert isinstance(metrics, NiahMetrics)
        tasks = tuple(task for task in metrics.tasks if task.task not in GIVEN_AWAY)
        withdrawn = [task.task for task in metrics.tasks if task.task in GIVEN_AWAY]
        if result.task_version != "1" or not withdrawn:
            return result, None
        note = (
            f"{result.identity.name}: {', '.join(withdrawn)} of {result.task} are withdrawn. They were measured by "
            f"version 1 of the task, which gave the asked needle away; run `nested-lm eval niah` again for version "
            f"{VERSION}."
        )
        if not tasks:
            return None, note
        return result.model_copy(update={"metrics": metrics.model_copy(update={"tasks": tasks})}), note

    @classmethod
    def figures(cls) -> tuple[Any, ...]:
        """Heat maps of length against depth, and what is left over the distance."""
        names = ("needle_matches", "needle_worth", "needle_distance")
        return tuple(from_report("plots_needles", name) for name in names)

"""A task: one object that says what is measured, measures it, and shows what was found."""

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from nested_lm.config.section import Section
from nested_lm_lab.evaluation.interval import intervals_of
from nested_lm_lab.evaluation.schema import Metrics, ResultFile

if TYPE_CHECKING:
    from nested_lm_lab.evaluation.progress import Progress
    from nested_lm_lab.evaluation.schema import CheckpointMark
    from nested_lm_lab.evaluation.subject import Subject

S = TypeVar("S", bound=Section)
M = TypeVar("M", bound=Metrics)

_MOST_LINES = 12


class Task(ABC, Generic[S, M]):
    """What is measured on a checkpoint. A task is made of its settings and may be used on one subject after another.

    name: kind of its results. version: of everything that its numbers depend on; results of different versions share
    no table. Settings: what the command line sets; its fields with an `Option` are the options of the task's verb.
    Metrics: what a result holds. own_settings: recorded settings that a row of a table has for itself. on_the_page:
    a report has a section of its own for the task, and needs no tables from it.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    Settings: ClassVar[type[Section]]
    Metrics: ClassVar[type[Metrics]]
    own_settings: ClassVar[tuple[str, ...]] = ()
    on_the_page: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def place(self, subject: "Subject", name: str) -> Path:
        """Where a result called `name` goes unless the user names a file."""
        return subject.place(name)

    @contextlib.contextmanager
    def opened(self, subject: "Subject") -> Iterator[None]:  # noqa: ARG002
        """Hold open what recording and measuring need. What cannot be measured is refused here, before it is read."""
        yield

    def mark(self, subject: "Subject") -> "CheckpointMark":
        """Which checkpoint, or checkpoints, the numbers come from."""
        return subject.mark

    def record(self, subject: "Subject") -> dict[str, Any]:  # noqa: ARG002
        """Settings as the result file keeps them: all that the numbers depend on, and nothing else."""
        return self.settings.model_dump(mode="json")

    @abstractmethod
    def measure(self, subject: "Subject", progress: "Progress") -> M:
        """Measure. progress: told the tokens that will be read, and those that were."""

    def may_go_further(self, old: M) -> bool:  # noqa: ARG002
        """Whether a result that is there already, with equal settings, ended early where this task would go on."""
        return False

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """The scores with their intervals, for the terminal."""
        for words, interval in islice(intervals_of(result.metrics), _MOST_LINES):
            yield f"  {words} {interval.text()}"

    @classmethod
    def tables(cls, campaign: Any, runs: Sequence[Any], name: str) -> list[Any]:
        """Tables of a report. name: of the results, among those of each run. By default, all intervals."""
        found: list[Any] = from_report("kinds", "intervals")(campaign, runs, name)
        return found

    @classmethod
    def figures(cls) -> tuple[Any, ...]:
        """Functions that draw a figure of a campaign, for its report. By default there are none."""
        return ()

    @classmethod
    def current(cls, result: ResultFile) -> tuple[ResultFile | None, str | None]:
        """What of a result still counts, and what is to be said about it.

        A result of an older version keeps counting unless a task says otherwise.
        """
        return result, None


def from_report(module: str, name: str) -> Any:
    """A function of the report, which stands above the tasks and is imported when it is needed."""
    return getattr(importlib.import_module(f"nested_lm_lab.report.{module}"), name)

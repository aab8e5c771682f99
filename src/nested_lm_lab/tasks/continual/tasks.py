"""The tasks of continual learning: of a run's stream of periods, of the steps of a run, and of reading."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.train import Chronological
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.schema import CheckpointMark, ResultFile
from nested_lm_lab.evaluation.task import M, Task, from_report
from nested_lm_lab.tasks.continual.schema import (
    CarriedMetrics,
    ClassIncrementalMetrics,
    ContinualMetrics,
    EventMetrics,
    FactsMetrics,
    LanguagesMetrics,
    LesionMetrics,
    RegretMetrics,
    RetentionMetrics,
)
from nested_lm_lab.tasks.continual.settings import ContinualSettings

if TYPE_CHECKING:
    from nested_lm_lab.evaluation.progress import Progress
    from nested_lm_lab.evaluation.subject import Subject

_NO_STREAM = "no run folder of a chronological run"


class ContinualTask(Task[ContinualSettings, M]):
    """A task of continual learning.

    depends: settings that its numbers depend on. reads_borders: its numbers come from all border checkpoints of the
    run. tables_by: function of the report that shows it.
    """

    Settings = ContinualSettings
    depends: ClassVar[tuple[str, ...]] = ()
    reads_borders: ClassVar[bool] = False
    tables_by: ClassVar[str]

    def missing(self, subject: "Subject") -> str | None:  # noqa: ARG002
        """Why the subject or the settings do not allow the task; None where they do."""
        return None

    def mark(self, subject: "Subject") -> CheckpointMark:
        """The checkpoint, or all border checkpoints."""
        from nested_lm_lab.evaluation.borders import mark_borders

        return mark_borders(subject.borders()) if self.reads_borders else subject.mark

    def record(self, subject: "Subject") -> dict[str, Any]:
        """Settings that the numbers depend on; where they come from the run's periods, these too."""
        found = self.settings.model_dump(mode="json", include=set(self.depends))
        if self.reads_borders:
            found |= {"order": subject.stream.order, "periods": subject.stream.periods}
        return found

    @classmethod
    def tables(cls, campaign: Any, runs: Sequence[Any], name: str) -> list[Any]:
        """Those of the report's module of continual learning."""
        found: list[Any] = from_report("continual_tables", cls.tables_by)(campaign, runs, name)
        return found


def no_stream(subject: "Subject") -> str | None:
    """Why there are no periods to compare; None where there are."""
    in_order = isinstance(subject.config.train.stream, Chronological) and subject.run_dir is not None
    return None if in_order else _NO_STREAM


class Stream(ContinualTask[ContinualMetrics]):
    """The loss matrix of a chronological run: every border checkpoint on every segment."""

    name, version, Metrics = "continual", "1", ContinualMetrics
    depends = ("pieces_per_document", "bootstrap_samples")
    reads_borders = True
    on_the_page = True

    @classmethod
    def of_run(cls, settings: EvalConfig) -> "Stream":
        """The task as the section `eval` asks for it."""
        return cls(
            ContinualSettings(
                pieces_per_document=settings.continual.pieces_per_document,
                batch_size=settings.batch_size,
                bootstrap_samples=settings.bootstrap_samples,
            )
        )

    def missing(self, subject: "Subject") -> str | None:
        """It needs the border checkpoints."""
        return no_stream(subject)

    def record(self, subject: "Subject") -> dict[str, Any]:
        """The same whether the run's section `eval` asks for it or `eval continual` does."""
        return super().record(subject) | {"bootstrap_samples": subject.settings.bootstrap_samples}

    def measure(self, subject: "Subject", progress: "Progress") -> ContinualMetrics:
        """Score all borders."""
        from nested_lm_lab.tasks.continual import over_periods

        samples = subject.settings.bootstrap_samples
        chosen = self.settings.model_copy(update={"bootstrap_samples": samples})
        return over_periods.measure_matrix(subject, chosen, progress)

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """What is left at the end, and what was lost."""
        found = result.metrics
        assert isinstance(found, ContinualMetrics)
        yield f"  bits per byte over all segments at the end {found.accuracy.text()}"
        yield f"  backward transfer {found.backward_transfer.text()}, forward transfer {found.forward_transfer.text()}"


class Regret(ContinualTask[RegretMetrics]):
    """Loss above a run that read the same text mixed."""

    name, version, Metrics = "regret", "1", RegretMetrics
    depends = ("bootstrap_samples", "pieces_per_document")
    reads_borders = True
    tables_by = "regret"
    own_settings = ("oracle",)  # every arm has an oracle of its own kind

    def missing(self, subject: "Subject") -> str | None:
        """It needs borders, and a run to compare with."""
        return no_stream(subject) or (None if self.settings.oracle else "no --oracle")

    def record(self, subject: "Subject") -> dict[str, Any]:
        """The oracle's digest too."""
        from nested_lm.checkpoint import find_checkpoint
        from nested_lm_lab.evaluation.identity import mark_checkpoint

        if self.settings.oracle is None:
            raise ConfigError(
                "the task `regret` compares with a run that read the same text mixed; name it with --oracle"
            )
        oracle = mark_checkpoint(find_checkpoint(self.settings.oracle, report=subject.report))
        return super().record(subject) | {"oracle": oracle.digest}

    def measure(self, subject: "Subject", progress: "Progress") -> RegretMetrics:
        """Score the borders and the oracle."""
        from nested_lm_lab.tasks.continual import over_periods

        assert self.settings.oracle is not None
        return over_periods.measure_regret(subject, self.settings, self.settings.oracle, progress)


class Carried(ContinualTask[CarriedMetrics]):
    """The matrix with whole documents read in one stream each."""

    name, version, Metrics = "carried", "1", CarriedMetrics
    depends = ("bootstrap_samples",)
    reads_borders = True
    tables_by = "carried"

    def missing(self, subject: "Subject") -> str | None:
        """It needs borders, and a state that does not grow."""
        constant = subject.loaded.model.has_constant_state
        return no_stream(subject) or (None if constant else "the state grows with the text")

    def measure(self, subject: "Subject", progress: "Progress") -> CarriedMetrics:
        """Score all borders."""
        from nested_lm_lab.tasks.continual import over_periods

        return over_periods.measure_carried(subject, self.settings, progress)


class Lesion(ContinualTask[LesionMetrics]):
    """Which period gets worse when one level goes back to earlier weights."""

    name, version, Metrics = "lesion", "1", LesionMetrics
    depends = ("bootstrap_samples", "pieces_per_document", "set_back_to", "permutations", "seed")
    reads_borders = True
    tables_by = "lesions"

    def missing(self, subject: "Subject") -> str | None:
        """It needs borders and levels."""
        return no_stream(subject) or (None if subject.config.model.channel.periods else "no levels")

    def measure(self, subject: "Subject", progress: "Progress") -> LesionMetrics:
        """Set one level back after the other."""
        from nested_lm_lab.tasks.continual import over_periods

        return over_periods.measure_lesions(subject, self.settings, progress)


class Events(ContinualTask[EventMetrics]):
    """What a tick of a level does."""

    name, version, Metrics = "events", "1", EventMetrics
    depends = ("permutations", "seed", "reading_documents")
    tables_by = "events"

    def missing(self, subject: "Subject") -> str | None:
        """It needs a probe of training, or levels that write while reading."""
        if no_stream(subject) is None and subject.config.train.probe:
            return None
        if any(writes is not None for writes in subject.config.model.channel.writes):
            return None
        return "no train.probe, and no level writes in context"

    def measure(self, subject: "Subject", progress: "Progress") -> EventMetrics:
        """Compare ticks with like places without one."""
        from nested_lm_lab.tasks.continual import over_steps

        return over_steps.measure_events(subject, self.settings, progress)


class Retention(ContinualTask[RetentionMetrics]):
    """Forgetting curves fitted with the levels' clocks, and without."""

    name, version, Metrics = "retention", "1", RetentionMetrics
    tables_by = "retention"

    def missing(self, subject: "Subject") -> str | None:
        """It needs a probe of training, and levels."""
        probed = subject.config.train.probe and subject.config.model.channel.periods
        return no_stream(subject) or (None if probed else "no train.probe, or no levels")

    def measure(self, subject: "Subject", progress: "Progress") -> RetentionMetrics:
        """Fit the curves."""
        from nested_lm_lab.tasks.continual import over_steps

        return over_steps.measure_retention(subject, self.settings, progress)


class Classes(ContinualTask[ClassIncrementalMetrics]):
    """Classes that come task after task, learned by reading."""

    name, version, Metrics = "class_incremental", "1", ClassIncrementalMetrics
    depends = ("seed", "bootstrap_samples", "shots", "random_orders", "tests_per_class")
    tables_by = "classes"

    def missing(self, subject: "Subject") -> str | None:  # noqa: ARG002
        """It needs its data sets."""
        return None if self.settings.class_data else "no --class-data"

    def _sets(self) -> list[Any]:
        from nested_lm_lab.tasks.continual.class_sets import read_class_set

        given = self.settings
        if given.class_data is None:
            raise ConfigError("the task `classes` needs its data sets; name their folder with --class-data")
        return [read_class_set(each, given.class_data, accept_hash=given.class_hash) for each in given.class_sets]

    def record(self, subject: "Subject") -> dict[str, Any]:
        """The hashes of the data sets too."""
        return super().record(subject) | {"data": {data.name: data.content_hash for data in self._sets()}}

    def measure(self, subject: "Subject", progress: "Progress") -> ClassIncrementalMetrics:
        """Read every stream."""
        from nested_lm_lab.tasks.continual import class_incremental

        loaded = subject.loaded
        return class_incremental.measure(loaded.model, loaded.tokenizer, self._sets(), self.settings, progress)


class Facts(ContinualTask[FactsMetrics]):
    """Facts that change: new, unchanged, stale."""

    name, version, Metrics = "changing_facts", "1", FactsMetrics
    depends = ("seed", "bootstrap_samples", "entities", "attributes", "epochs", "changed_share", "mentions")
    tables_by = "facts"

    def measure(self, subject: "Subject", progress: "Progress") -> FactsMetrics:
        """Tell the world and ask for it."""
        from nested_lm_lab.tasks.continual import facts

        return facts.measure(subject.loaded.model, subject.loaded.tokenizer, self.settings, progress)


class Languages(ContinualTask[LanguagesMetrics]):
    """Two invented languages, learned one after the other."""

    name, version, Metrics = "invented_languages", "1", LanguagesMetrics
    depends = ("seed", "bootstrap_samples", "vocabulary", "lesson_sentences", "test_sentences")
    tables_by = "languages"

    def record(self, subject: "Subject") -> dict[str, Any]:
        """The scorer's release too."""
        from nested_lm_lab.tasks.continual.languages import require_chrf

        return super().record(subject) | {"sacrebleu": require_chrf().__version__}

    def measure(self, subject: "Subject", progress: "Progress") -> LanguagesMetrics:
        """Teach and ask."""
        from nested_lm_lab.tasks.continual import languages

        return languages.measure(subject.loaded.model, subject.loaded.tokenizer, self.settings, progress)

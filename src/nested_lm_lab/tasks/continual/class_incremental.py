"""Classes that come task after task, learned by reading: examples go into a stream, questions are asked of its forks.

An example is the document "Text: ... Label: NAME". A question is the same up to "Label:", and the classes seen so far
are its answers, scored by the likelihood of their names a token.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.tasks.continual.bag_of_words import NearestClassMean
from nested_lm_lab.tasks.continual.choices import choice_tokens, read_stream, score_choices
from nested_lm_lab.tasks.continual.class_sets import ClassSet, Rows, shuffled_groups
from nested_lm_lab.tasks.continual.matrix import (
    final_score,
    incremental_score,
    score_backward_transfer,
    score_forgetting,
    score_plasticity,
)
from nested_lm_lab.tasks.continual.schema import ClassIncrementalMetrics, ClassStream, IncrementalScores
from nested_lm_lab.tasks.continual.settings import ContinualSettings

VERSION = "1"


@dataclass(frozen=True)
class Task:
    """The classes that come together, their examples in the order they are read, and their tests."""

    classes: tuple[str, ...]
    examples: Rows
    tests: Rows


def make_tasks(
    data: ClassSet,
    groups: Sequence[Sequence[str]],
    *,
    shots: int | None,
    tests_per_class: int | None,
    seed: int,
) -> list[Task]:
    """Cut a data set into tasks. The same seed draws the same examples and tests whatever the order of the tasks."""
    train, test = _by_class(data.train), _by_class(data.test)
    tasks = []
    for group in groups:
        examples = [row for label in group for row in _drawn(train[label], shots, f"{seed}/shots/{label}")]
        random.Random(f"{seed}/order/{'/'.join(group)}").shuffle(examples)
        tests = [
            row for label in group for row in _drawn(test.get(label, []), tests_per_class, f"{seed}/tests/{label}")
        ]
        tasks.append(Task(tuple(group), examples, tests))
    return tasks


def _by_class(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row[1], []).append(row)
    return found


def _drawn(rows: Rows, count: int | None, key: str) -> Rows:
    return list(rows) if count is None or count >= len(rows) else random.Random(key).sample(rows, count)


def readable(label: str) -> str:
    """Class name as the model reads it."""
    return label.replace("_", " ").rstrip("?")


class Learner:
    """A model that learns classes by reading; forks of its stream answer."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, settings: ContinualSettings, progress: Progress
    ) -> None:
        self._model, self._tokenizer, self._settings, self._progress = model, tokenizer, settings, progress
        self.state: StreamState | None = None

    def learn(self, examples: Rows) -> None:
        """Read examples."""
        self.state = read_stream(
            self._model,
            self.state,
            self._documents(examples),
            start=self._tokenizer.start_of_text,
            max_state_mib=self._settings.max_state_mib,
            progress=self._progress,
        )

    def classify(self, texts: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Class of each text, of the given ones. Nothing is written."""
        nats = score_choices(
            self._model,
            self.state,
            *self._questions(texts, classes),
            batch_size=self._settings.batch_size,
            progress=self._progress,
        )
        return [classes[index] for index in nats.argmin(axis=1)]

    def _documents(self, examples: Rows) -> list[np.ndarray]:
        return [self._tokenizer.encode(f"Text: {text}\nLabel: {readable(label)}") for text, label in examples]

    def _questions(self, texts: Sequence[str], classes: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What is read before each label, and the labels."""
        encode, start = self._tokenizer.encode, self._tokenizer.start_of_text
        contexts = [np.concatenate([[start], encode(f"Text: {text}\nLabel:")]) for text in texts]
        end = [self._tokenizer.end_of_text]
        return contexts, [np.concatenate([encode(f" {readable(label)}"), end]) for label in classes]


class Planner(Learner):
    """Reads nothing, and adds what a learner would read to the total of the progress."""

    def learn(self, examples: Rows) -> None:
        """Count examples."""
        self._progress.total += sum(len(document) + 1 for document in self._documents(examples))

    def classify(self, texts: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Count questions; the answers mean nothing."""
        self._progress.total += choice_tokens(*self._questions(texts, classes))
        return [classes[0]] * len(texts)


class Floor:
    """The nearest class mean as a learner."""

    def __init__(self) -> None:
        self._means = NearestClassMean()

    def learn(self, examples: Rows) -> None:
        """Add examples to their classes."""
        for text, label in examples:
            self._means.learn(text, label)

    def classify(self, texts: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Class of each text; the classes are those that were learned."""
        del classes
        return self._means.classify(texts)


def run_stream(learner: Learner | Floor, tasks: Sequence[Task]) -> list[np.ndarray]:
    """Learn task after task; whether each test of task s was right after task t, (tests, tasks) a task, NaN before."""
    right = [np.full((len(task.tests), len(tasks)), np.nan) for task in tasks]
    seen: list[str] = []
    for t, task in enumerate(tasks):
        learner.learn(task.examples)
        seen += task.classes
        for s in range(t + 1):
            right[s][:, t] = _right(learner, tasks[s], seen)
    return right


def _right(learner: Learner | Floor, task: Task, classes: Sequence[str]) -> np.ndarray:
    found = learner.classify([text for text, _ in task.tests], classes)
    return np.array([a == label for a, (_, label) in zip(found, task.tests, strict=True)], dtype=np.float64)


def summarise(right: Sequence[np.ndarray], bootstrap: Bootstrap) -> IncrementalScores:
    """Metrics of a stream with intervals; tests are resampled within their task, all rows on the same draw."""
    value, drawn, tests = _matrices(right, bootstrap)

    def interval(metric: Callable[[np.ndarray], np.ndarray]) -> Interval:
        return bootstrap.percentile(float(metric(value)), metric(drawn), tests)

    return IncrementalScores(
        matrix=tuple(tuple(float(value[t, s]) for s in range(t + 1)) for t in range(len(right))),
        accuracy=interval(final_score),
        incremental=interval(incremental_score),
        backward_transfer=interval(score_backward_transfer),
        forgetting=interval(score_forgetting),
        plasticity=interval(score_plasticity),
    )


def _matrices(right: Sequence[np.ndarray], bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray, int]:
    """R[t][s], the same of resampled tests, and the number of tests."""
    value = np.stack([column.mean(axis=0) for column in right], axis=1)  # (t, s)
    drawn = []
    for s, column in enumerate(right):
        known = np.nan_to_num(column)  # what is above the diagonal is not read by any metric
        top, bottom = Bootstrap(bootstrap.samples, bootstrap.seed + s).resample(known, np.ones(len(known)))
        drawn.append(top / bottom[:, None])
    return value, np.stack(drawn, axis=2), sum(len(column) for column in right)


def _mean_of_tasks(values: Sequence[np.ndarray], bootstrap: Bootstrap) -> Interval:
    """Mean over tasks of the mean over a task's tests, as ACC is."""
    value, drawn, tests = _matrices([column[:, None] for column in values], bootstrap)
    return bootstrap.percentile(float(final_score(value)), final_score(drawn), tests)


@dataclass(frozen=True)
class Stream:
    """One data set with a number of examples a class (None: all) and an order of its classes, cut into tasks.

    order: seed of a random order; None is the data set's own.
    """

    data: ClassSet
    shots: int | None
    order: int | None
    tasks: list[Task]
    mixed: Rows  # all examples, in the order in which they are read together

    @classmethod
    def of(cls, data: ClassSet, settings: ContinualSettings, *, shots: int | None, order: int | None) -> "Stream":
        """Draw examples, tests and orders."""
        groups = data.groups if order is None else shuffled_groups(data.groups, seed=order)
        tasks = make_tasks(data, groups, shots=shots, tests_per_class=settings.tests_per_class, seed=settings.seed)
        mixed = [row for task in tasks for row in task.examples]
        random.Random(f"{settings.seed}/joint").shuffle(mixed)
        return cls(data, shots, order, tasks, mixed)

    @property
    def order_name(self) -> str:
        """How results call the order."""
        return "given" if self.order is None else f"random {self.order}"


def answer_all(make: Callable[[], Learner], stream: Stream) -> tuple[Learner, tuple[list[np.ndarray], ...]]:
    """Learn task after task, everything mixed, and nothing, with a new learner each.

    Returns: the first learner, and what was right: of each task after each task, then at the end of the other two.
    """
    learner, joint, unread = make(), make(), make()
    right = run_stream(learner, stream.tasks)
    classes = [label for task in stream.tasks for label in task.classes]
    joint.learn(stream.mixed)
    others = ([_right(other, task, classes) for task in stream.tasks] for other in (joint, unread))
    return learner, (right, *others)


def measure_stream(stream: Stream, make: Callable[[], Learner], settings: ContinualSettings) -> ClassStream:
    """Run one stream through the model and through the floor."""
    tasks, bootstrap = stream.tasks, Bootstrap(settings.bootstrap_samples)
    started = time.perf_counter()
    learner, (right, joint, unread) = answer_all(make, stream)
    assert learner.state is not None
    floor = run_stream(Floor(), tasks)
    above = [ours[:, -1] - floors[:, -1] for ours, floors in zip(right, floor, strict=True)]
    return ClassStream(
        data=stream.data.name,
        content_hash=stream.data.content_hash,
        order=stream.order_name,
        shots=stream.shots,
        tasks=tuple(task.classes for task in tasks),
        tests=sum(len(task.tests) for task in tasks),
        model=summarise(right, bootstrap),
        floor=summarise(floor, bootstrap),
        above_floor=_mean_of_tasks(above, bootstrap),
        joint=_mean_of_tasks(joint, bootstrap),
        unread=_mean_of_tasks(unread, bootstrap),
        chance=1 / sum(len(task.classes) for task in tasks),
        tokens_read=learner.state.position,
        state_bytes=learner.state.num_bytes(),
        seconds=time.perf_counter() - started,
    )


def measure(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    sets: Sequence[ClassSet],
    settings: ContinualSettings,
    progress: Progress,
) -> ClassIncrementalMetrics:
    """Every data set with every number of shots, in its own order and in random ones."""
    streams = [
        Stream.of(data, settings, shots=shots, order=order)
        for data in sets
        for shots in settings.shots
        for order in (None, *range(1, settings.random_orders + 1))
    ]
    for stream in streams:
        answer_all(lambda: Planner(model, tokenizer, settings, progress), stream)
    found = []
    for stream in streams:
        shots = "all" if stream.shots is None else stream.shots
        progress.label = f"{stream.data.name}, {shots} a class, {stream.order_name} order"
        found.append(measure_stream(stream, lambda: Learner(model, tokenizer, settings, progress), settings))
    return ClassIncrementalMetrics(kind="class_incremental", streams=tuple(found))

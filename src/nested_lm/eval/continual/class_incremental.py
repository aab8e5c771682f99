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
from nested_lm.eval.bootstrap import Bootstrap
from nested_lm.eval.continual.bag_of_words import NearestClassMean
from nested_lm.eval.continual.choices import read_stream, score_choices
from nested_lm.eval.continual.class_sets import ClassSet, Rows, shuffled_groups
from nested_lm.eval.continual.matrix import (
    final_score,
    incremental_score,
    score_backward_transfer,
    score_forgetting,
    score_plasticity,
)
from nested_lm.eval.continual.schema import ClassIncrementalMetrics, ClassStream, IncrementalScores
from nested_lm.eval.continual.settings import ContinualSettings
from nested_lm.eval.interval import Interval
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState

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

    def __init__(self, model: LanguageModel, tokenizer: TextTokenizer, settings: ContinualSettings) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self.state: StreamState | None = None

    def learn(self, examples: Rows) -> None:
        """Read examples."""
        documents = [self._tokenizer.encode(f"Text: {text}\nLabel: {readable(label)}") for text, label in examples]
        self.state = read_stream(
            self._model,
            self.state,
            documents,
            start=self._tokenizer.start_of_text,
            max_state_mib=self._settings.max_state_mib,
        )

    def classify(self, texts: Sequence[str], classes: Sequence[str]) -> list[str]:
        """Class of each text, of the given ones. Nothing is written."""
        encode, start = self._tokenizer.encode, self._tokenizer.start_of_text
        contexts = [np.concatenate([[start], encode(f"Text: {text}\nLabel:")]) for text in texts]
        end = [self._tokenizer.end_of_text]
        answers = [np.concatenate([encode(f" {readable(label)}"), end]) for label in classes]
        nats = score_choices(self._model, self.state, contexts, answers, batch_size=self._settings.batch_size)
        return [classes[index] for index in nats.argmin(axis=1)]


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


def measure_stream(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    data: ClassSet,
    settings: ContinualSettings,
    *,
    shots: int | None,
    order: int | None,
) -> ClassStream:
    """Run one stream through the model and through the floor.

    order: seed of a random order of the classes; None takes the data set's own.
    """
    groups = data.groups if order is None else shuffled_groups(data.groups, seed=order)
    tasks = make_tasks(data, groups, shots=shots, tests_per_class=settings.tests_per_class, seed=settings.seed)
    bootstrap = Bootstrap(settings.bootstrap_samples)
    started = time.perf_counter()
    learner = Learner(model, tokenizer, settings)
    right = run_stream(learner, tasks)
    assert learner.state is not None
    classes = [label for task in tasks for label in task.classes]
    mixed = [row for task in tasks for row in task.examples]
    random.Random(f"{settings.seed}/joint").shuffle(mixed)
    joint, unread = Learner(model, tokenizer, settings), Learner(model, tokenizer, settings)
    joint.learn(mixed)
    floor = run_stream(Floor(), tasks)
    above = [ours[:, -1] - floors[:, -1] for ours, floors in zip(right, floor, strict=True)]
    return ClassStream(
        data=data.name,
        content_hash=data.content_hash,
        order="given" if order is None else f"random {order}",
        shots=shots,
        tasks=tuple(task.classes for task in tasks),
        tests=sum(len(task.tests) for task in tasks),
        model=summarise(right, bootstrap),
        floor=summarise(floor, bootstrap),
        above_floor=_mean_of_tasks(above, bootstrap),
        joint=_mean_of_tasks([_right(joint, task, classes) for task in tasks], bootstrap),
        unread=_mean_of_tasks([_right(unread, task, classes) for task in tasks], bootstrap),
        chance=1 / len(classes),
        tokens_read=learner.state.position,
        state_bytes=learner.state.num_bytes(),
        seconds=time.perf_counter() - started,
    )


def measure(
    model: LanguageModel, tokenizer: TextTokenizer, sets: Sequence[ClassSet], settings: ContinualSettings
) -> ClassIncrementalMetrics:
    """Every data set with every number of shots, in its own order and in random ones."""
    orders = (None, *range(1, settings.random_orders + 1))
    return ClassIncrementalMetrics(
        kind="class_incremental",
        streams=tuple(
            measure_stream(model, tokenizer, data, settings, shots=shots, order=order)
            for data in sets
            for shots in settings.shots
            for order in orders
        ),
    )

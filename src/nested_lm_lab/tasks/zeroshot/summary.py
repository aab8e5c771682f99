"""From answers to scores: the harness's metrics of every document, their means, intervals and floors."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from nested_lm.errors import DataError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.tasks.zeroshot.metrics import Floors, TaskScores
from nested_lm_lab.tasks.zeroshot.tasks import AVERAGED, TASKS, printed_accuracy

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

LN2 = math.log(2.0)


class Answered:
    """What one task came to: the harness's metrics of every document. `by_metric`: in the order of the documents."""

    def __init__(self, task: "Task", by_document: Sequence[list["Instance"]], answers: Sequence[Any]) -> None:
        """Ask the task what the answers are worth. answers: one for each request, in the order of the requests."""
        self.task = task
        given = iter(answers)
        self.by_metric: dict[str, list[Any]] = {}
        for requests in by_document:
            found = task.process_results(requests[0].doc, [next(given) for _ in requests])
            for metric, value in found.items():
                self.by_metric.setdefault(metric, []).append(value)

    def aggregate(self) -> dict[str, float]:
        """All metrics of the task, by the harness's own aggregation."""
        rules = self.task.aggregation()
        return {metric: float(rules[metric](values)) for metric, values in self.by_metric.items()}

    def values(self) -> dict[str, tuple[float, ...]]:
        """What is kept of each document."""
        kept: dict[str, tuple[float, ...]] = {}
        for metric, values in self.by_metric.items():
            if metric == "perplexity":
                kept["nats"] = tuple(-float(value) for value in values)
            elif metric in ("word_perplexity", "bits_per_byte"):
                kept["nats"] = tuple(-float(value) for value, _ in values)
                kept["words" if metric == "word_perplexity" else "bytes"] = tuple(float(size) for _, size in values)
            elif metric != "byte_perplexity":
                kept[metric] = tuple(float(value) for value in values)
        return kept


def group_requests(task: "Task") -> list[list["Instance"]]:
    """Requests of each document, documents in order.

    Raises:
        DataError: the task has none.
    """
    by_document: dict[int, list[Instance]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    if not by_document:
        raise DataError(f"task {task.task_name} has no documents")
    return [sorted(by_document[number], key=lambda request: request.idx) for number in sorted(by_document)]


def hash_documents(task: "Task", by_document: Sequence[list["Instance"]]) -> str:
    """xxh3_128 of all prompts, choices and targets in order."""
    digest = xxhash.xxh3_128()
    for requests in by_document:
        content = [[list(request.args) for request in requests], task.doc_to_target(requests[0].doc)]
        digest.update(json.dumps(content, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def intervals(
    values: dict[str, tuple[float, ...]], found: dict[str, float], bootstrap: Bootstrap
) -> dict[str, Interval]:
    """Interval of every metric, resampling documents. found: the harness's aggregates, which are the values."""
    columns = {name: np.array(column) for name, column in values.items()}
    made = {}
    for metric, value in found.items():
        if metric in ("acc", "acc_norm"):
            interval = bootstrap.mean(columns[metric])
        elif metric == "perplexity":
            interval = _mapped(bootstrap.mean(columns["nats"]), math.exp)
        elif metric == "bits_per_byte":
            interval = bootstrap.ratio(columns["nats"], columns["bytes"], scale=1 / LN2)
        else:
            sizes = columns["words" if metric == "word_perplexity" else "bytes"]
            interval = _mapped(bootstrap.ratio(columns["nats"], sizes), math.exp)
        assert math.isclose(interval.value, value, rel_tol=1e-9), f"{metric}: {interval.value} against {value}"
        made[metric] = interval
    return made


def _mapped(interval: Interval, function: Any) -> Interval:
    """An interval through a growing function."""
    ends = (None if end is None else function(end) for end in (interval.low, interval.high))
    return Interval(
        value=function(interval.value), low=next(ends), high=next(ends), n=interval.n, method=interval.method
    )


def standard_errors(values: dict[str, tuple[float, ...]], metrics: Sequence[str]) -> dict[str, float | None]:
    """Standard error of each metric that is a mean, by the harness's formula: sample deviation over sqrt(n)."""
    made: dict[str, float | None] = {}
    for metric in metrics:
        column = values.get(metric)
        made[metric] = None
        if column is not None and len(column) > 1:
            made[metric] = float(np.std(column, ddof=1) / math.sqrt(len(column)))
    return made


def floors_of(task: "Task", by_document: Sequence[list["Instance"]], bigram: dict[str, float] | None) -> Floors:
    """Floors that need no model: guessing, and the best constant answer."""
    targets: list[Any] = []
    chances = []
    for requests in by_document:
        document = requests[0].doc
        if requests[0].request_type == "loglikelihood_rolling":
            return Floors(chance=None, constant=None, bigram=bigram)
        targets.append(_gold(task, document))
        chances.append(1 / len(requests) if len(requests) > 1 else 0.0)
    most = Counter(targets).most_common(1)[0][1]
    return Floors(chance=float(np.mean(chances)), constant=most / len(targets), bigram=bigram)


def _gold(task: "Task", document: Any) -> Any:
    """Place of the right choice, or the right word."""
    found = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(found, str):
        return task.doc_to_choice(document).index(found)
    return found


def paired_gain(name: str, plain: TaskScores, values: dict[str, tuple[float, ...]], bootstrap: Bootstrap) -> Interval:
    """What `values` are better than the plain score by, paired by document: in nats a document for perplexities."""
    metric = TASKS[name].printed[0]
    if metric in ("acc", "acc_norm"):
        a, b = values[metric], plain.values[metric]
    else:
        a, b = plain.values["nats"], values["nats"]
    return bootstrap.paired(np.array(a), np.array(b), np.ones(len(a)))


def average_accuracy(scores: Sequence[TaskScores], bootstrap: Bootstrap) -> Interval | None:
    """Mean of the accuracies that the papers average; null unless all of them were measured.

    Tasks are resampled apart from each other; the variance of their mean is the sum of theirs.
    """
    by_name = {entry.task: entry for entry in scores}
    if not set(AVERAGED) <= by_name.keys():
        return None
    draws, values, documents = [], [], 0
    for name in AVERAGED:
        metric = printed_accuracy(TASKS[name])
        assert metric is not None
        column = np.array(by_name[name].values[metric])
        own = Bootstrap(bootstrap.samples, seed=bootstrap.seed + 1 + AVERAGED.index(name))
        (sums,) = own.resample(column)
        draws.append(sums / len(column))
        values.append(column.mean())
        documents += len(column)
    return bootstrap.percentile(float(np.mean(values)), np.mean(draws, axis=0), documents)

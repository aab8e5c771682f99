"""Two results on the same documents: differences paired by document."""

from dataclasses import dataclass

import numpy as np

from nested_lm.errors import ReportError
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.results import shared_settings
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.tasks.zeroshot.metrics import TaskScores, ZeroShotMetrics
from nested_lm_lab.tasks.zeroshot.tasks import TASKS

_TEXT_SIZES = {"word_perplexity": "words", "bits_per_byte": "bytes"}


@dataclass(frozen=True)
class Difference:
    """First minus second. In nats (a document, word or byte) where the metric is a perplexity or bits per byte."""

    arm: str
    task: str
    metric: str
    interval: Interval

    @property
    def is_real(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.interval.low, self.interval.high
        return low is not None and high is not None and not low <= 0 <= high


def compare(first: ResultFile, second: ResultFile) -> list[Difference]:
    """Differences of all printed metrics of all arms that both have, by name of the arm, paired by document.

    Raises:
        ReportError: one of them is no zero-shot result, or they did not answer the same questions the same way.
    """
    a, b = first.metrics, second.metrics
    if not isinstance(a, ZeroShotMetrics) or not isinstance(b, ZeroShotMetrics):
        raise ReportError(f"results of tasks {first.task!r} and {second.task!r}: only zero-shot results compare here")
    _require_equal("task_version", first.task_version, second.task_version)
    _require_equal("settings", shared_settings(first), shared_settings(second))
    bootstrap = Bootstrap(samples=first.settings["bootstrap_samples"])  # type: ignore[arg-type]
    found = []
    others_arms = {arm.name: arm for arm in b.arms}
    for arm in a.arms:
        if (other := others_arms.get(arm.name)) is None:
            continue
        for scores, others in zip(arm.tasks, other.tasks, strict=True):
            found += [
                Difference(arm.name, scores.task, metric, _difference(scores, others, metric, bootstrap))
                for metric in TASKS[scores.task].printed
            ]
    return found


def comparison_lines(first: ResultFile, second: ResultFile) -> list[str]:
    """Differences as lines for the terminal. Raises as `compare`."""
    names = [f"{result.identity.name} seed {result.identity.seed}" for result in (first, second)]
    lines = [f"{names[0]} minus {names[1]}; accuracies in points, others in nats; 95 %, paired by document"]
    for entry in compare(first, second):
        scale = 100 if entry.metric in ("acc", "acc_norm") else 1
        interval = entry.interval
        low, high = ((end or 0.0) * scale for end in (interval.low, interval.high))
        verdict = "real" if entry.is_real else "not told apart"
        lines.append(
            f"{entry.arm:<12} {entry.task:<16} {entry.metric:<16} {scale * interval.value:+9.3f} "
            f"[{low:+.3f}, {high:+.3f}]  {verdict}"
        )
    for name, one, two in ((names[0], first, second), (names[1], second, first)):
        if lone := [arm for arm in _arms(one) if arm not in _arms(two)]:
            lines.append(f"only {name} has {'; '.join(lone)}: nothing to compare with")
    lines.append(
        "one seed a run: these intervals are of the documents; for claims about models train three seeds or more"
    )
    return lines


def _arms(result: ResultFile) -> list[str]:
    assert isinstance(result.metrics, ZeroShotMetrics)
    return [arm.name for arm in result.metrics.arms]


def _difference(a: TaskScores, b: TaskScores, metric: str, bootstrap: Bootstrap) -> Interval:
    column = metric if metric in a.values else "nats"
    size = a.values[_TEXT_SIZES[metric]] if metric in _TEXT_SIZES else (1.0,) * a.documents
    return bootstrap.paired(np.array(a.values[column]), np.array(b.values[column]), np.array(size))


def _require_equal(field: str, a: object, b: object) -> None:
    if a == b:
        return
    if isinstance(a, dict) and isinstance(b, dict):
        other = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        lines = "\n".join(f"  {field}.{key}: {a.get(key)!r} against {b.get(key)!r}" for key in other)
    else:
        lines = f"  {field}: {a!r} against {b!r}"
    raise ReportError(
        f"these results were not measured the same way\n{lines}\n"
        "  Evaluate both checkpoints with the same tasks, documents and options."
    )

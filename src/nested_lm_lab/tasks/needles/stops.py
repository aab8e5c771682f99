"""Why a length has no scores: a setting ended it, or memory did. Read from results of every age."""

from collections.abc import Sequence

from nested_lm_lab.tasks.needles.metrics import BooksMetrics, LongTextMetrics, NeedleLength

LIMIT_WORDS = "the limit is"
"""Every message about states beyond `--max-state-mib` has these words, and no other does."""


def first_stop(lengths: Sequence[NeedleLength]) -> NeedleLength | None:
    """The shortest length without scores; lengths ascend."""
    return next((entry for entry in lengths if entry.stopped is not None), None)


def why_stopped(first: NeedleLength, max_state_mib: int) -> str:
    """What ended a task at its first length without scores, and where."""
    return f"{describe_stop(first, max_state_mib)} at {first.length:,} tokens"


def explain_stop(entry: NeedleLength, lengths: Sequence[NeedleLength], max_state_mib: int) -> str:
    """Why a length has no scores. lengths: all of its task."""
    first = first_stop(lengths)
    assert first is not None
    words = why_stopped(first, max_state_mib)
    return words if entry.length == first.length else f"not tried: {words}"


def describe_stop(first: NeedleLength, max_state_mib: int) -> str:
    """What ended a task at its first length without scores, without the place."""
    assert first.stopped is not None
    limited = LIMIT_WORDS in first.stopped
    return f"the limit of {max_state_mib:,} MiB (--max-state-mib) was reached" if limited else "memory ended"


def may_go_further(metrics: LongTextMetrics, max_state_mib: int) -> bool:
    """Whether a result stopped below `max_state_mib`, so that measuring again may reach more. A limit that the result
    does not tell counts as below.
    """
    if isinstance(metrics, BooksMetrics):
        stopped = metrics.stopped is not None
    else:
        stopped = any(first_stop(task.lengths) is not None for task in metrics.tasks)
    return stopped and (metrics.max_state_mib is None or metrics.max_state_mib < max_state_mib)

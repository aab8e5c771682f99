"""Checkpoints that are kept: the borders of the stream."""

from nested_lm.train.hooks.base import Hook
from nested_lm.train.stream import TrainingStream


class Milestones(Hook):
    """Marks the borders between periods, and between the context lengths of a curriculum."""

    def __init__(self, stream: TrainingStream) -> None:
        self._stream = stream

    def milestone(self, step: int) -> str | None:
        """`period-0` before the first period, `context-2048` after that stage."""
        return self._stream.milestone(step)

"""Counts the steps that were skipped because a value is not finite, and ends a run that skips too many in a row."""

from typing import Any, ClassVar

from nested_lm.errors import NumericsError
from nested_lm.train.hooks.base import Hook, Skipped


class NonFiniteWatch(Hook):
    """Counts skipped steps. limit: as many in a row are let pass."""

    name: ClassVar[str] = "watch"

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def after_update(self, step: int) -> None:
        """All values of the step were finite."""
        del step
        self.in_a_row = 0

    def after_skip(self, skipped: Skipped) -> None:
        """Count it. The model is asked where the value arises once, when the run is given up.

        Raises:
            NumericsError: more than `limit` in a row.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            where = skipped.explain()
            raise NumericsError(
                f"step {skipped.step}: {skipped.found.tensor} is not finite, and {self.in_a_row} steps in a row were "
                f"not (train.max_nonfinite_steps allows {self.limit}); "
                f"{f'first seen in {where}' if where else 'every value of the forward pass is finite'}; "
                f"last good checkpoint: {skipped.last_good or 'none yet'}. "
                "Lower the learning rate or train.clip_norm, or look at the batches named in metrics.jsonl"
            )

    def summary(self) -> dict[str, Any]:
        """How many were skipped."""
        return {"nonfinite_steps": self.total}

    def state_dict(self) -> dict[str, Any]:
        """Counts so far."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]

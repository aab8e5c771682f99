"""The moments of a training step that a part of the run may hang on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nested_lm.train.nonfinite import NonFinite


class Skipped(NamedTuple):
    """A step that was not taken because a value is not finite.

    last_good: newest checkpoint. explain: says where in the model such a value first arises; slow.
    """

    step: int
    found: NonFinite
    last_good: Path | None
    explain: Callable[[], str | None]


class Hook:
    """Does nothing at any moment; a hook overrides those it needs. Every rank calls them in one order.

    name: of its state in a checkpoint: a member of `train_state.json`, a file `<name>.safetensors`.
    """

    name: ClassVar[str] = ""

    def after_backward(self) -> None:
        """Gradients of all micro-batches are there, unclipped, and their norm not yet known. May add to them."""

    def before_update(self, step: int) -> None:
        """The optimizer is about to take a step."""

    def after_update(self, step: int) -> None:
        """The optimizer has taken a step."""

    def after_skip(self, skipped: Skipped) -> None:
        """A step was recorded and not taken. May raise NumericsError to end the run."""

    def fields(self, *, is_logged: bool) -> dict[str, float]:
        """Fields for the record of a step that was taken. is_logged: the step ends a logging interval."""
        del is_logged
        return {}

    def after_step(self, step: int) -> None:
        """A step was taken or skipped, and recorded; nothing is saved or evaluated yet."""

    def milestone(self, step: int) -> str | None:
        """Name of the border that the checkpoint after this step marks: it is written and never pruned."""
        del step
        return None

    def summary(self) -> dict[str, Any]:
        """Fields for the record of the end."""
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """State for JSON; None: a hook without."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        raise NotImplementedError(f"{type(self).__name__} has a state and cannot load it")

    def state_tensors(self) -> dict[str, Tensor]:
        """State in tensors; empty: no file is written."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state_tensors` returned. Raises ValueError for tensors of another run."""
        raise NotImplementedError(f"{type(self).__name__} has tensors and cannot load them")

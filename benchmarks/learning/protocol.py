"""What the suite asks of a task, and what tasks share."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

IGNORED = -100
"""Target of a position that is not scored."""

Measures = dict[str, float]
"""Name of a measure, with `@` and the length where it is taken at one, and its value."""


@dataclass
class Progress:
    """Where a training is. share: of its steps that are over. solved: nothing is left to learn, it may end."""

    share: float = 0.0
    stage: int = 0
    accuracy: float = 0.0  # running mean over the batches of this stage
    solved: bool = False

    def passes(self, accuracy: float, limit: float) -> bool:
        """Whether the running mean, with a batch of this accuracy, has reached the limit."""
        self.accuracy += 0.05 * (accuracy - self.accuracy)
        return self.accuracy >= limit

    def next_stage(self, stages: int) -> None:
        """Go on to the next of so many stages, or stay at the last one."""
        self.stage, self.accuracy = min(self.stage + 1, stages - 1), 0.0


class Task(Protocol):
    """A task: how to build a model for it, what it is trained on and what is measured.

    steps, rate: of the optimizer. rates: the best of these is taken, by the training loss; None: `rate` alone.
    arms: which take part; None is all architectures. shown: measures that the page has.
    unit: of the measures. A share lies between 0 and 1; the others are errors, and lower is better.
    differences: measures that are differences of two, and so of either sign.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def steps(self) -> int: ...  # noqa: D102

    @property
    def rate(self) -> float: ...  # noqa: D102

    @property
    def rates(self) -> tuple[float, ...] | None: ...  # noqa: D102

    @property
    def shown(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def arms(self) -> tuple[str, ...] | None: ...  # noqa: D102

    @property
    def unit(self) -> Literal["share", "squared error", "nats"]: ...  # noqa: D102

    @property
    def differences(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def about(self) -> str:
        """What is asked, for the page of results."""
        ...

    def configuration(self, arm: str) -> Any:
        """Return the model's configuration (a pydantic section)."""
        ...

    def build(self, arm: str, seed: int) -> nn.Module:
        """Build and initialise a model. The same seed gives the same one."""
        ...

    def loss(self, model: nn.Module, generator: torch.Generator, progress: Progress) -> Tensor:
        """Return the loss on a fresh batch. A ramp gated by accuracy keeps its stage in `progress`."""
        ...

    def measure(self, model: nn.Module, rows: int) -> Measures:
        """Test on `rows` sequences a length, the same for every arm and seed."""
        ...

    def references(self, rows: int) -> dict[str, Measures]:
        """What needs no model scores on the same tests: guessing, or a solution in closed form."""
        ...

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Everything a result depends on besides the model's configuration, the seed and the code."""
        ...


@dataclass(frozen=True)
class Training:
    """The one recipe: AdamW, linear warm-up and half a cosine, clipped gradients, float32, one thread."""

    batch: int = 64
    warmup_steps: int = 20
    floor: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0


RECIPE = Training()


def share_of_right(answers: Tensor, targets: Tensor) -> Measures:
    """Accuracy of tokens, of the last scored position of every row, and of rows that are right throughout.

    answers, targets: (B, T); positions whose target is IGNORED do not count.
    """
    scored = targets != IGNORED
    right = (answers == targets) & scored
    last = targets.shape[1] - 1 - scored.flip(1).long().argmax(1)  # (B,)
    return {
        "tokens": (right.sum() / scored.sum()).item(),
        "last": right.gather(1, last[:, None]).float().mean().item(),
        "strings": (right | ~scored).all(1).float().mean().item(),
    }

"""Tasks over points instead of tokens: linear regression in context, and classes that come task after task.

Every position is either a fact, a point with its answer, or a question, a point without.

Shapes: B batch, T positions, K width of a point, A width of an answer, N points, S tasks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.learning.arms import configuration
from benchmarks.learning.protocol import IGNORED, RECIPE, Measures, Progress
from nested_lm.config.model import ModelConfig
from nested_lm.nn.layers import StepContext
from nested_lm.nn.model import LanguageModel
from nested_lm_lab.tasks.continual.matrix import (
    final_score,
    score_backward_transfer,
    score_forgetting,
    score_plasticity,
)


class Facts(NamedTuple):
    """A batch of streams. answers are zero at questions; asks is 1 at questions and 0 at facts."""

    points: Tensor  # (B, T, K)
    answers: Tensor  # (B, T, A)
    asks: Tensor  # (B, T)


class PointModel(nn.Module):
    """The blocks, embedding and head of a language model; what enters is the sum of point, answer and question mark.

    config: its `vocab_size` is the width of an answer, whose embedding is linear.
    """

    def __init__(self, config: ModelConfig, *, point_width: int) -> None:
        super().__init__()
        self.body = LanguageModel(config)
        self.project = nn.Linear(point_width + 1, config.width, bias=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter."""
        self.body.initialise(seed)
        drawn = torch.randn(self.project.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.project.weight.copy_(drawn / self.project.in_features**0.5)

    def forward(self, facts: Facts, *, writes: bool = True) -> Tensor:
        """Answer at every position (B, T, A). writes: whether fast weights are written; attention has none."""
        x = self.project(torch.cat([facts.points, facts.asks[..., None]], dim=-1))
        x = x + facts.answers @ self.body.embedding.weight
        context = StepContext(0, None, None, frozen=not writes)
        state = self.body.initial_state(x.shape[0])
        for block, layer in zip(self.body.blocks, state.layers, strict=True):
            x, _, _ = block(x, context, layer, {})
        return functional.linear(self.body.norm(x), self.body.head.weight)


@dataclass(frozen=True)
class PointTask:
    """What the tasks of this file share; `benchmarks/learning/protocol.py` says what the methods do."""

    name: str
    about: str
    point_width: int
    answer_width: int
    steps: int
    rate: float = 3e-3

    arms: ClassVar[None] = None
    rates: ClassVar[None] = None

    def configuration(self, arm: str) -> ModelConfig:
        """Return the configuration of the blocks."""
        return configuration(arm, self.answer_width)

    def build(self, arm: str, seed: int) -> PointModel:
        """Build the blocks with their linear input."""
        model = PointModel(self.configuration(arm), point_width=self.point_width)
        model.initialise(seed)
        return model

    def _recipe(self, steps: int, rows: int) -> list[Any]:
        return [self.name, self.point_width, self.rate, steps, RECIPE.batch, rows, RECIPE.warmup_steps]


@dataclass(frozen=True)
class Regression(PointTask):
    """y = w x without noise, w drawn for every row: each point is asked for first and then told.

    points: of one row. reported: points whose squared error is measured, counted from 1.
    """

    points: int = 24
    reported: tuple[int, ...] = (1, 4, 8, 12, 16, 24)

    unit: ClassVar[Literal["squared error"]] = "squared error"
    shown: ClassVar[tuple[str, ...]] = ("error@24",)
    differences: ClassVar[tuple[str, ...]] = ()

    def make(self, batch: int, generator: torch.Generator) -> tuple[Facts, Tensor, Tensor]:
        """Return the streams, T = 2N, and the points (B, N, K) and values (B, N) in them. Values have variance 1."""
        x = torch.randn(batch, self.points, self.point_width, generator=generator)
        w = torch.randn(batch, self.point_width, 1, generator=generator) / self.point_width**0.5
        y = (x @ w)[..., 0]
        asks = torch.tensor([1.0, 0.0]).repeat(batch, self.points)
        answers = torch.stack([torch.zeros_like(y), y], dim=2).flatten(1)[..., None]
        return Facts(x.repeat_interleave(2, dim=1), answers, asks), x, y

    def loss(self, model: PointModel, generator: torch.Generator, progress: Progress) -> Tensor:
        """Mean squared error of all questions."""
        del progress
        facts, _, y = self.make(RECIPE.batch, generator)
        return (model(facts)[:, ::2, 0] - y).square().mean()

    def measure(self, model: PointModel, rows: int) -> Measures:
        """Mean squared error of the reported points, 4 test sets as large as those of tokens."""
        facts, _, y = self._test(rows)
        return self._errors(model(facts)[:, ::2, 0], y)

    def references(self, rows: int) -> dict[str, Measures]:
        """Answering 0, and least squares of minimum norm on the points told before."""
        _, x, y = self._test(rows)
        solved = torch.zeros_like(y)
        for n in range(1, self.points):
            found = torch.linalg.pinv(x[:, :n].double()) @ y[:, :n, None].double()
            solved[:, n] = (x[:, n, None].double() @ found)[:, 0, 0].float()
        return {"answering 0": self._errors(torch.zeros_like(y), y), "least squares": self._errors(solved, y)}

    def _test(self, rows: int) -> tuple[Facts, Tensor, Tensor]:
        return self.make(4 * rows, torch.Generator().manual_seed(self.points))

    def _errors(self, answers: Tensor, y: Tensor) -> Measures:
        errors = (answers - y).square().mean(0)
        return {f"error@{n}": errors[n - 1].item() for n in self.reported}

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Points and steps."""
        return [*self._recipe(steps, rows), self.points, self.reported]


@dataclass(frozen=True)
class Increments(PointTask):
    """Gaussian classes come a few at a time, once; after each group, one question for every class seen so far.

    Means and the order of the classes are drawn for every row: nothing about them can be learned but from the stream.

    groups, group_size: of classes. shots: facts of a class. noise: standard deviation around means of variance 1.
    """

    groups: int = 5
    group_size: int = 2
    shots: int = 4
    noise: float = 0.5

    unit: ClassVar[Literal["share"]] = "share"
    shown: ClassVar[tuple[str, ...]] = ("accuracy", "forgetting")
    differences: ClassVar[tuple[str, ...]] = ("forgetting",)

    def make(self, batch: int, generator: torch.Generator) -> "Stream":
        """Draw streams of T = groups * group_size * shots facts and their questions."""
        classes = self.groups * self.group_size
        order = torch.rand(batch, classes, generator=generator).argsort(1)  # class that comes at each place
        places, asks = self._layout(batch, generator)
        label = order.gather(1, places)  # (B, T)
        means = torch.randn(batch, classes, self.point_width, generator=generator)
        noise = torch.randn(batch, label.shape[1], self.point_width, generator=generator) * self.noise
        points = means.gather(1, label[..., None].expand(-1, -1, self.point_width)) + noise
        answers = functional.one_hot(label, classes) * (1 - asks[..., None])
        targets = torch.where(asks.bool(), label, IGNORED)
        return Stream(Facts(points, answers.float(), asks.float()), targets, places // self.group_size)

    def _layout(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Place of the class in its row's order, and 1 where it is asked for, at every position (B, T)."""
        places, asks = [], []
        for group in range(self.groups):
            seen = torch.arange((group + 1) * self.group_size)
            for part, mark in ((seen[-self.group_size :].repeat(self.shots), 0), (seen, 1)):
                shuffled = torch.rand(batch, len(part), generator=generator).argsort(1)
                places.append(part[shuffled])
                asks.append(torch.full_like(shuffled, mark))
        return torch.cat(places, dim=1), torch.cat(asks, dim=1)

    def loss(self, model: PointModel, generator: torch.Generator, progress: Progress) -> Tensor:
        """Cross-entropy of all questions."""
        del progress
        stream = self.make(RECIPE.batch, generator)
        logits = model(stream.facts)
        return functional.cross_entropy(logits.flatten(0, 1), stream.targets.flatten(), ignore_index=IGNORED)

    def measure(self, model: PointModel, rows: int) -> Measures:
        """Continual scores with the memory, and the final accuracy when no fast weight is written."""
        stream = self._test(rows)
        found = self.scores(stream, model(stream.facts).argmax(-1))
        if model.body.has_fast_weights:
            unwritten = self.scores(stream, model(stream.facts, writes=False).argmax(-1))
            found["accuracy without writes"] = unwritten["accuracy"]
        return found

    def references(self, rows: int) -> dict[str, Measures]:
        """Guessing a class that was seen, and the nearest mean of the points told so far."""
        stream = self._test(rows)
        guessed = np.array([[1 / (self.group_size * (row + 1))] * self.groups for row in range(self.groups)])
        nearest = self.scores(stream, nearest_mean(stream.facts))
        return {"guessing": _continual(guessed), "nearest mean": nearest}

    def _test(self, rows: int) -> "Stream":
        return self.make(4 * rows, torch.Generator().manual_seed(self.groups))

    def scores(self, stream: "Stream", answers: Tensor) -> Measures:
        """What the answers (B, T) amount to over the stream."""
        return _continual(self.matrix(stream, answers))

    def matrix(self, stream: "Stream", answers: Tensor) -> np.ndarray:
        """Accuracy on each group of classes (column) after each group (row), (S, S); 0 above the diagonal."""
        scores = np.zeros((self.groups, self.groups))
        begin = 0
        for row in range(self.groups):
            middle = begin + self.group_size * self.shots
            end = middle + self.group_size * (row + 1)
            right = answers[:, middle:end] == stream.targets[:, middle:end]
            for column in range(row + 1):
                scores[row, column] = right[stream.group[:, middle:end] == column].double().mean()
            begin = end
        return scores

    def recipe(self, steps: int, rows: int) -> list[Any]:
        """Classes and steps."""
        return [*self._recipe(steps, rows), self.groups, self.group_size, self.shots, self.noise]


class Stream(NamedTuple):
    """Streams of classes: the right class at questions (IGNORED at facts), and the group of every position's class."""

    facts: Facts
    targets: Tensor  # (B, T)
    group: Tensor  # (B, T)


def _continual(matrix: np.ndarray) -> Measures:
    """Final accuracy over all groups, that of a group when it is new, what was forgotten of it, backward transfer."""
    return {
        "accuracy": float(final_score(matrix)),
        "when new": float(score_plasticity(matrix)),
        "forgetting": float(score_forgetting(matrix)),
        "backward transfer": float(score_backward_transfer(matrix)),
    }


def nearest_mean(facts: Facts) -> Tensor:
    """Class whose told points so far have the nearest mean, at every position (B, T)."""
    counts = facts.answers.cumsum(1)  # (B, T, A)
    sums = torch.einsum("bta,btk->btak", facts.answers, facts.points).cumsum(1)
    means = sums / counts.clamp_min(1)[..., None]
    distances = (facts.points[:, :, None] - means).square().sum(-1)  # (B, T, A)
    return distances.masked_fill(counts == 0, torch.inf).argmin(-1)


POINT_TASKS = (
    Regression(
        "regression",
        "Linear regression in context, 8 dimensions: squared error at the n-th point, before it is told. Values have "
        "variance 1.",
        8,
        1,
        1000,
    ),
    Increments(
        "increments",
        "Ten Gaussian classes in 16 dimensions come two at a time, four points of each, once; the classes are new in "
        "every stream. `accuracy` is over all ten at the end.",
        16,
        10,
        600,
    ),
)

"""Elastic weight consolidation: a penalty that holds what earlier periods depend on in place."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from nested_lm.config.train import ElasticWeights
from nested_lm.data.loader import IGNORED_TARGET, Batch
from nested_lm.errors import NumericsError
from nested_lm.train.hooks.base import Hook
from nested_lm.train.step import GradientComputer
from nested_lm.train.stream import TrainingStream

Logits = Callable[[Batch], Tensor]
"""Forward pass of the model over a batch: logits (B, T, V) with a graph."""


class ElasticPenalty:
    """The penalty strength / 2 x sum of F (weight - anchor)^2 and its gradient.

    F is the sum over the borders passed so far of each period's diagonal Fisher information a token; the anchor is
    the weights at the last border. Both are state. Before the first border there is no penalty.

    parameters: of the model, by name.

    Source: arXiv 1805.06370 eq. 9 with gamma = 1. Deviation: F is a mean over tokens, not over examples.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: ElasticWeights) -> None:
        self.settings = settings
        self.parameters = dict(parameters)
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient, strength F (weight - anchor), to every parameter's `.grad`."""
        for name, fisher in self._fisher.items():
            parameter = self.parameters[name]
            pull = self.settings.strength * fisher * (parameter.detach() - self._anchor[name])
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    @torch.no_grad()
    def value(self) -> float:
        """The penalty in nats a token."""
        terms = [
            (fisher * (self.parameters[name].detach() - self._anchor[name]).square()).sum(dtype=torch.float64)
            for name, fisher in sorted(self._fisher.items())  # one order, also after a resume: sums round
        ]
        return 0.5 * self.settings.strength * float(sum(terms))

    def consolidate(self, fisher: Mapping[str, Tensor]) -> None:
        """Pass a border: add a period's Fisher information, and hold on to the weights as they are now."""
        for name, found in fisher.items():
            self._fisher[name] = self._fisher[name] + found if name in self._fisher else found
            self._anchor[name] = self.parameters[name].detach().clone()

    def state_tensors(self) -> dict[str, Tensor]:
        """Name all state: `fisher/<parameter>` and `anchor/<parameter>` (not copied)."""
        return {
            f"{kind}/{name}": tensor
            for kind, tensors in (("fisher", self._fisher), ("anchor", self._anchor))
            for name, tensor in tensors.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_tensors` returned.

        Raises:
            ValueError: a name or shape that is not a parameter's.
        """
        found: dict[str, dict[str, Tensor]] = {"fisher": {}, "anchor": {}}
        for full_name, tensor in tensors.items():
            kind, _, name = full_name.partition("/")
            if kind not in found or name not in self.parameters or tensor.shape != self.parameters[name].shape:
                raise ValueError(f"{full_name!r} of shape {tuple(tensor.shape)} belongs to no parameter of this model")
            found[kind][name] = tensor.to(self.parameters[name].device, copy=True)
        self._fisher, self._anchor = found["fisher"], found["anchor"]


class Elastic(Hook):
    """Adds the penalty to every step, and passes a border of the stream after the last step of each period."""

    name: ClassVar[str] = "elastic"

    def __init__(
        self, penalty: ElasticPenalty, stream: TrainingStream, scoring: GradientComputer, *, seed: int
    ) -> None:
        self._penalty, self._stream, self._scoring, self._seed = penalty, stream, scoring, seed

    def after_backward(self) -> None:
        """Add the penalty's gradient; the norm that is clipped includes it, the loss does not."""
        self._penalty.add_gradient()

    def fields(self, *, is_logged: bool) -> dict[str, float]:
        """The penalty, in nats a token."""
        return {"ewc_penalty": self._penalty.value()} if is_logged else {}

    def after_step(self, step: int) -> None:
        """At a border, note what the period that is over depends on; nothing follows the last one."""
        group = self._stream.passed_group(step)
        if group is None or step == self._stream.total_steps:
            return
        rows = self._stream.first_rows(group, self._penalty.settings.sequences)
        self._penalty.consolidate(
            diagonal_fisher(self._penalty.parameters, self._scoring.logits, rows, seed=self._seed + step)
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """None before the first border."""
        return self._penalty.state_tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state_tensors` returned."""
        self._penalty.load_state_tensors(tensors)


def diagonal_fisher(
    parameters: Mapping[str, nn.Parameter], logits: Logits, rows: Batch, *, seed: int
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information of one token's prediction.

    Targets are drawn from the model's own predictions. Given the text, draws at two positions are independent and
    each score has mean zero, so that the square of a row's summed gradient has the sum over its tokens as its mean.
    Gradients in `.grad` are lost.

    Args:
        parameters: by name; those that no row's loss depends on get 0.
        logits: forward pass; called with one row at a time.
        rows: real text; only positions that are scored in training count.
        seed: of the drawn targets. No global generator moves.

    Raises:
        NumericsError: a value is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    tokens = 0
    for index in range(rows.inputs.shape[0]):
        row = Batch(*(column[index : index + 1] for column in rows))
        scored = row.targets[0] != IGNORED_TARGET
        predicted = logits(row)[0][scored.to(next(iter(parameters.values())).device)].float().log_softmax(dim=-1)
        drawn = torch.multinomial(predicted.detach().exp().cpu(), 1, generator=generator).to(predicted.device)
        for parameter in parameters.values():
            parameter.grad = None
        predicted.gather(1, drawn).sum().backward()
        tokens += int(scored.sum())
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name] += parameter.grad.float().square()
            parameter.grad = None
    for name, square in squares.items():
        square /= tokens
        if not bool(torch.isfinite(square).all()):
            raise NumericsError(
                f"the Fisher information of {name} at a period's border is not finite, so train.ewc cannot hold it; "
                "the gradients overflow: lower the learning rate"
            )
    return squares

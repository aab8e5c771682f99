"""How far each group of parameters moves in an update, relative to its size: per role, level and memory."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.train.hooks.base import Hook

Part = tuple[str, int | None]
"""A parameter's name, and for stacked memory starts the index of the memory along dimension 1."""


class UpdateNorms(Hook):
    """Measures norm(update) / norm(weights) of every group once per logging interval.

    A group's weights are copied only at the step that is measured: the last one within the interval at which
    the group's level is due. A level that is not due within an interval is absent from its record. Values
    wait for the record in `pending`, which is the state.

    memories: names of the memories whose starts are stacked in the parameters of role `memory`.
    whole: collects the norm of a tensor that is cut over ranks.
    """

    name: ClassVar[str] = "update_norms"

    def __init__(
        self,
        optimizer: ClockedOptimizer,
        *,
        every_steps: int,
        step_tokens: int,
        total_steps: int,
        memories: tuple[str, ...] = (),
        whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.pending: dict[str, float] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._whole = whole
        self._parameters = optimizer.parameters
        self._every, self._total = every_steps, total_steps
        self._parts: dict[str, list[Part]] = {}
        self._period_steps: dict[str, int] = {}
        for group in optimizer.groups:
            period = 1 if group.level is None else optimizer.clock.periods[group.level] // step_tokens
            for label, parts in _split(group.label, group.names, optimizer.parameters, memories).items():
                self._parts[label] = parts
                self._period_steps[label] = period

    def due(self, step: int) -> list[str]:
        """Labels of the groups that are measured at this step."""
        logged = min(-(-step // self._every) * self._every, self._total)
        return [label for label, period in self._period_steps.items() if logged // period * period == step]

    def before_update(self, step: int) -> None:
        """Copy the weights of the groups that are measured."""
        self._before = {label: [tensor.detach().clone() for tensor in self._tensors(label)] for label in self.due(step)}

    def after_update(self, step: int) -> None:
        """Compare with the copies."""
        del step
        for label, old in self._before.items():
            new = self._tensors(label)
            change = self._norm([a.detach() - b for a, b in zip(new, old, strict=True)])
            size = self._norm(old)
            self.pending[label] = (change / size if size else change).item()
        self._before = {}

    def fields(self, *, is_logged: bool) -> dict[str, float]:
        """What was measured within the interval; forgets it."""
        if not is_logged:
            return {}
        found = {f"update_norm/{label}": value for label, value in sorted(self.pending.items())}
        self.pending = {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What waits for its record."""
        return dict(self.pending)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue within an interval."""
        self.pending = dict(state)

    def _tensors(self, label: str) -> list[Tensor]:
        """Parameters, or slices of them, that a label stands for."""
        return [
            self._parameters[name] if memory is None else self._parameters[name][:, memory]
            for name, memory in self._parts[label]
        ]

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        """Norm over all tensors together."""
        return torch.stack([self._whole(torch.linalg.vector_norm(tensor)) for tensor in tensors]).norm()


def _split(
    label: str, names: tuple[str, ...], parameters: Mapping[str, nn.Parameter], memories: tuple[str, ...]
) -> dict[str, list[Part]]:
    """Split the starts of the memories by memory; other groups stay whole."""
    if label != "memory":
        return {label: [(name, None) for name in names]}
    assert all(parameters[name].shape[1] == len(memories) for name in names)
    return {f"memory/{memory}": [(name, index) for name in names] for index, memory in enumerate(memories)}

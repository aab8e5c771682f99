"""Starts of nested levels: what a fast level goes back to when the next slower one updates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from nested_lm.optim.groups import ParameterGroup

_WEIGHTS = "weights"  # first part of the names of the starts themselves


class Stepper(Protocol):
    """The optimizer that steps the starts, each group on its own clock."""

    parameters: dict[str, nn.Parameter]
    groups: tuple[ParameterGroup, ...]

    def is_due(self, group: ParameterGroup, tokens_seen: int) -> bool:
        """Whether the group is stepped once `tokens_seen` tokens have passed."""
        ...

    def step(self, tokens_seen: int, multiplier: float) -> None:
        """Step every group that is due."""
        ...

    def state_numel(self, step_tokens: int) -> int:
        """Count the entries of its state."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Name all state."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from named state."""
        ...


def groups_of_starts(groups: tuple[ParameterGroup, ...], num_levels: int) -> tuple[ParameterGroup, ...]:
    """Groups of the levels that have a start, each moved to the level on whose clock its start is stepped."""
    return tuple(
        replace(group, level=group.level + 1)
        for group in groups
        if group.level is not None and group.level + 1 < num_levels
    )


def copy_of_starts(
    parameters: Mapping[str, nn.Parameter], groups: tuple[ParameterGroup, ...]
) -> dict[str, nn.Parameter]:
    """Starts equal to the weights as they are now."""
    return {name: nn.Parameter(parameters[name].detach().clone()) for group in groups for name in group.names}


class NestedStarts:
    """Learns where each level starts, and sets the level back to it.

    A weight of a level that is not the slowest is its start plus what the level has learned since. The start is
    stepped on the clock of the next slower level, on the sum of all gradients of that period, by the same optimizer
    with moments of its own. The weight is stepped on its level's own clock and, at each step of the start, set to
    the start, its moments forgotten.

    Gradients are those at the weights as they were, passed straight through to the start (first-order).

    Source: arXiv 2512.24695 eq. 72, which leaves open how the start is learned. Weight decay acts on the weight as
    a whole.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], stepper: Stepper) -> None:
        self._weights, self._stepper = weights, stepper

    def take_gradients(self) -> None:
        """Copy the weights' gradients, before they are used up."""
        for name, start in self._stepper.parameters.items():
            gradient = self._weights[name].grad
            start.grad = None if gradient is None else gradient.clone()

    @torch.no_grad()
    def step(self, tokens_seen: int, multiplier: float) -> tuple[str, ...]:
        """Step the starts that are due and set their weights back to them; names them."""
        self._stepper.step(tokens_seen, multiplier)
        names = [
            name for group in self._stepper.groups if self._stepper.is_due(group, tokens_seen) for name in group.names
        ]
        for name in names:
            self._weights[name].copy_(self._stepper.parameters[name])
        return tuple(names)

    def state_numel(self, step_tokens: int) -> int:
        """Count the entries of the starts, their gradients and the state of their optimizer."""
        own = sum(start.numel() for start in self._stepper.parameters.values())
        return 2 * own + self._stepper.state_numel(step_tokens)

    def state_tensors(self) -> dict[str, Tensor]:
        """Name the starts and the state of their optimizer (not copied)."""
        starts = {f"{_WEIGHTS}/{name}": start.detach() for name, start in self._stepper.parameters.items()}
        return starts | self._stepper.state_tensors()

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_tensors` returned.

        Raises:
            ValueError: a start that is missing or of another shape, or a name that belongs to none.
        """
        rest = dict(tensors)
        for name, start in self._stepper.parameters.items():
            found = rest.pop(f"{_WEIGHTS}/{name}", None)
            if found is None or found.shape != start.shape:
                there = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(start.shape)}"
                raise ValueError(f"the start of {name}, which nested levels go back to, {there} in this state")
            start.copy_(found)
        self._stepper.load_state_tensors(rest)

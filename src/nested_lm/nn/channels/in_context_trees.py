"""Operations on the trees of the in-context clock: steps of a level's inner optimizer, and choosing rows of a batch.

Shapes: B batch.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from nested_lm.nn.fast_linear import MLPDistance, Watched
from nested_lm.nn.state import iterate_tensors, map_tensors
from nested_lm.ops.update_rules.base import Layer, UpdateRule

Tree = TypeVar("Tree")

Rule = UpdateRule[Any]
"""Inner optimizer of a level."""

Rows = bool | Bool[Tensor, " B"]
"""Rows of a batch: all of them, none, or those marked. The first two need no tensor operation."""


def from_host(marked: list[bool], device: torch.device) -> Rows:
    """Rows from a list that the host holds."""
    if all(marked) or not any(marked):
        return marked[0]
    return torch.tensor(marked, device=device)


def choose(rows: Rows, new: Tree, old: Tree) -> Tree:
    """Take the given rows of every tensor from one tree and the others from another of the same form."""
    if isinstance(rows, bool):
        return new if rows else old
    others = iter(iterate_tensors(old))

    def pick(tensor: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (tensor.ndim - 1)), tensor, next(others))

    return map_tensors(new, pick)


def add_trees(one: Tree, other: Tree) -> Tree:
    """Add two trees of the same form, tensor by tensor."""
    others = iter(iterate_tensors(other))
    return map_tensors(one, lambda tensor: tensor + next(others))


def initial_trees(rule: Rule, distances: tuple[MLPDistance, ...]) -> tuple[Any, ...]:
    """State before the first step, for every weight of a level: (inner, outer) a layer."""
    return tuple((rule.initial_state(layer.inner), rule.initial_state(layer.outer)) for layer in distances)


def watched(distances: tuple[MLPDistance, ...], places: list[Tensor]) -> tuple[MLPDistance, ...]:
    """Watch every layer; the places in which to find what it read are added to the list and take no memory."""

    def watch(distance: Tensor) -> Watched:
        places.append(distance.new_zeros(()).expand(_moment_shape(distance)).requires_grad_())
        return Watched(distance, places[-1])

    return tuple(MLPDistance(*map(watch, layer)) for layer in distances)


def initial_pending(rule: Rule, distances: tuple[MLPDistance, ...]) -> tuple[MLPDistance, ...]:
    """What a level that waits for its write has collected at first: nothing. distances: zeros."""
    if not rule.reads_inputs:
        return distances

    def nothing(distance: Tensor) -> Watched:
        return Watched(distance, distance.new_zeros(_moment_shape(distance)))

    return tuple(MLPDistance(*map(nothing, layer)) for layer in distances)


def _moment_shape(distance: Tensor) -> tuple[int, int, int]:
    batch, _, inputs = distance.shape
    return batch, inputs, inputs


def step_trees(
    rule: Rule,
    rate: float,
    distances: tuple[MLPDistance, ...],
    gradients: tuple[MLPDistance, ...],
    states: tuple[Any, ...],
    learned: Sequence[tuple[Tensor, Tensor]],
) -> tuple[tuple[MLPDistance, ...], tuple[Any, ...]]:
    """Step every weight of a level. learned: what the distances are from, for rules that read inputs."""
    moved, kept = [], []
    for index, (distance, gradient, state) in enumerate(zip(distances, gradients, states, strict=True)):
        pairs = []
        for part, (weights, slope, before) in enumerate(zip(distance, gradient, state, strict=True)):
            layer = None
            if isinstance(slope, Watched):
                slope, layer = slope.distance, Layer(slope.moment, learned[index][part])
            pairs.append(rule.update(weights, slope, before, rate=rate, layer=layer))
        moved.append(MLPDistance(*(new for new, _ in pairs)))
        kept.append(tuple(after for _, after in pairs))
    return tuple(moved), tuple(kept)

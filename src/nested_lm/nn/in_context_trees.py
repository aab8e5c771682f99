"""Operations on the trees of the in-context clock: steps of a level's inner optimizer, and choosing rows of a batch.

Shapes: B batch.
"""

from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from nested_lm.nn.fast_linear import MLPDistance
from nested_lm.nn.state import iterate_tensors, map_tensors
from nested_lm.ops.update_rule import UpdateRule

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


def step_trees(
    rule: Rule,
    rate: float,
    distances: tuple[MLPDistance, ...],
    gradients: tuple[MLPDistance, ...],
    states: tuple[Any, ...],
) -> tuple[tuple[MLPDistance, ...], tuple[Any, ...]]:
    """Step every weight of a level."""
    moved, kept = [], []
    for distance, gradient, (inner, outer) in zip(distances, gradients, states, strict=True):
        new_inner, inner = rule.update(distance.inner, gradient.inner, inner, rate=rate)
        new_outer, outer = rule.update(distance.outer, gradient.outer, outer, rate=rate)
        moved.append(MLPDistance(new_inner, new_outer))
        kept.append((inner, outer))
    return tuple(moved), tuple(kept)

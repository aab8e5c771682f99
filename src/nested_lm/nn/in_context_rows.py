"""Choosing rows of state trees: some rows of a batch write or start again while the others go on.

Shapes: B batch.
"""

from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from nested_lm.nn.state import iterate_tensors, map_tensors

Tree = TypeVar("Tree")

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

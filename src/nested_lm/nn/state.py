"""The state of a stream: everything a model remembers between two calls, as an explicit typed tree.

Fast weights are activations. They live here, one copy a sequence, never in an `nn.Parameter`; a model that is
handed a state returns a new one and leaves the old one as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")


def map_tensors(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """Apply a function to every tensor of a tree of (named) tuples, keeping its types."""
    if isinstance(tree, Tensor):
        return function(tree)  # type: ignore[return-value]
    if isinstance(tree, tuple):
        mapped = [map_tensors(item, function) for item in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)  # type: ignore[return-value]
    return tree


def iterate_tensors(tree: Any) -> list[Tensor]:
    """List the tensors of a tree, depth first."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple):
        return [tensor for item in tree for tensor in iterate_tensors(item)]
    return []


@dataclass(frozen=True)
class StreamState:
    """What a model carries from one call to the next, for a batch of streams.

    layers: one entry a block: fast weights and convolution tails, or keys and values of attention.
    position: tokens read since the streams began; the same for every row.
    packed: some row has begun a new document since position 0, so attention must mask older documents.
    """

    layers: tuple[Any, ...]
    position: int
    packed: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> "StreamState":
        """Apply a function to every tensor."""
        return replace(self, layers=map_tensors(self.layers, function))

    def detach(self) -> "StreamState":
        """Cut the graph: no gradient flows into earlier calls."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> "StreamState":
        """Move to a device."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "StreamState":
        """Take rows by index, in order and with repeats: fork one stream into several, or reorder a batch."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def num_bytes(self) -> int:
        """Memory the state holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in iterate_tensors(self.layers))

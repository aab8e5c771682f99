"""The state of a stream: everything a model remembers between two calls, as an explicit typed tree.

Fast weights are activations. They live here, one copy a sequence, never in an `nn.Parameter`; a model that is
handed a state returns a new one and leaves the old one as it was.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from nested_lm.config.architecture import settings_difference
from nested_lm.config.load import config_hash
from nested_lm.config.section import Section
from nested_lm.ops.memory.state import take_rows

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
    model: configuration of the model or layer that reads the streams; no other may go on with them.
    in_context: fast copies of the levels that are written while the model reads, a tree like `layers`; None without.
    frozen: fast weights are read and no longer written. Convolution tails and attention caches go on.
    """

    layers: tuple[Any, ...]
    position: int
    packed: bool
    model: Section
    in_context: Any = None
    frozen: bool = False

    @property
    def num_streams(self) -> int:
        """Streams of the batch."""
        return iterate_tensors(self.layers)[0].shape[0]

    def check_rows(self, rows: Tensor | None, count: int) -> None:
        """Refuse a state whose streams are not those of the tokens: memories would read what belongs to others.

        rows: the stream that each row of tokens goes on from; None: its own. count: rows of tokens.

        Raises:
            ValueError: with both numbers.
        """
        found, what = (
            (self.num_streams, "streams of the state") if rows is None else (rows.numel(), "entries of `rows`")
        )
        if found != count or (rows is not None and rows.dim() != 1):
            raise ValueError(
                f"{count} rows of tokens and {found} {what}; give each row of tokens a stream, such as with rows=, "
                "state.select(rows) or model.initial_state(batch_size)"
            )

    def check_model(self, config: Section) -> None:
        """Refuse the state of another model or layer.

        Configurations are compared, without `backend`. Weights are not: training changes them while streams go on.
        Memory files compare them (`streaming.identity`).

        Raises:
            ValueError: with the hashes of both, and the settings in which they differ.
        """
        if self.model == config or config_hash(self.model) == config_hash(config):
            return
        there, here = (model.model_dump(mode="json") for model in (self.model, config))
        raise ValueError(
            f"a state of a model with configuration {config_hash(self.model)} was given to one with "
            f"{config_hash(config)}: {settings_difference(there, here)}\n"
            "  Go on with the model that made it, or read the stream again with this one."
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "StreamState":
        """Apply a function to every tensor."""
        layers, in_context = map_tensors((self.layers, self.in_context), function)
        return replace(self, layers=layers, in_context=in_context)

    def detach(self) -> "StreamState":
        """Cut the graph: no gradient flows into earlier calls."""
        return self.map(Tensor.detach)

    def freeze(self) -> "StreamState":
        """Stop all writes of fast weights from here on: what is read later leaves no trace in them. For good."""
        return replace(self, frozen=True)

    def to(self, device: torch.device | str) -> "StreamState":
        """Move to a device."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "StreamState":
        """Take rows by index, in order and with repeats: fork one stream into several, or reorder a batch.

        Rows of one stream are views of it, and stay that when they are taken again: nothing is copied, and no state may
        be written in place. Changing type or device, and `clone`, make copies of them.

        Raises:
            IndexError: a row that is not there.
        """
        return self.map(lambda tensor: take_rows(tensor, rows))

    def num_bytes(self) -> int:
        """Memory of all streams, each counted by itself, also where forks share what they have read."""
        tensors = iterate_tensors((self.layers, self.in_context))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ModelOutput(NamedTuple):
    """Result of one call of a model: predictions, the stream's new state, and scalar statistics (detached)."""

    logits: Float[Tensor, "B T V"]
    state: StreamState
    stats: dict[str, Tensor]

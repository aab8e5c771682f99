"""Finding the first value that is not finite: which layer, which part or memory of it, which row and token.

Shapes: B batch, T tokens, M memories of a head.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState, iterate_tensors


class NonFiniteValue(NamedTuple):
    """Where the first value that is not finite was made.

    layer: index of the block; None for the embedding, the final norm and the head.
    part: module below it (`mixer`, `channel`, `embedding`), or the parameter itself.
    memories: those whose fast weights are not finite after the token; empty where the part writes none.
    levels: those written in context whose fast copy, or what waits to be written to it, is not finite.
    row, token: in the batch that was replayed; None for a parameter, which belongs to all tokens.
    stream_position: of the token since the stream began.
    """

    layer: int | None
    part: str
    memories: tuple[str, ...] = ()
    row: int | None = None
    token: int | None = None
    stream_position: int | None = None
    levels: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = self.part if self.layer is None else f"layer {self.layer}, {self.part}"
        if self.memories:
            place += f", memory {', '.join(self.memories)}"
        if self.levels:
            place += f", in-context level {', '.join(map(str, self.levels))}"
        if self.row is None:
            return place
        return f"{place}, row {self.row}, token {self.token} (token {self.stream_position} of the stream)"


@torch.no_grad()
def locate_nonfinite(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    resets: Bool[Tensor, "B T"] | None = None,
    state: StreamState | None = None,
) -> NonFiniteValue | None:
    """Replay a batch in ever smaller parts and name the first value of the forward pass that is not finite.

    A stream that overflows spoils the whole chunk it is in, and everything later. So parts between two borders are
    read in turn with the state carried along, then the tokens of the first bad part one by one, which is slow. Call it
    under the autocast of the pass that failed.

    Args:
        tokens, resets, state: of that pass, as given to the model.

    Returns:
        None when the replay is finite: what failed was the backward pass, or rounding that the replay does not repeat.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return NonFiniteValue(None, f"parameter {name}")
    if state is None:
        state = model.initial_state(tokens.shape[0])
    came_in = first_nonfinite(state)
    if came_in is not None:
        return NonFiniteValue(None, f"the state before the first token, {came_in}")
    step = model.config.alignment
    begins = sorted({0, *range(-state.position % step, tokens.shape[1], step)})
    for begin, end in zip(begins, [*begins[1:], tokens.shape[1]], strict=True):
        found, after = _read(model, tokens, resets, state, begin, end)
        if found is None:
            state = after
            continue
        single = state
        for t in range(begin, end):
            by_token, single = _read(model, tokens, resets, single, t, t + 1)
            if by_token is not None:
                return by_token
        return found  # only the products over a whole part overflow
    return None


def _read(
    model: LanguageModel,
    tokens: Tensor,
    resets: Tensor | None,
    state: StreamState,
    begin: int,
    end: int,
) -> tuple[NonFiniteValue | None, StreamState]:
    """Read some tokens; report the first module whose output is not finite."""
    bad: list[tuple[int | None, str, Tensor]] = []

    def watch(layer: int | None, part: str) -> Any:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            spoiled = ~torch.isfinite(values).all(dim=-1)  # (B, T)
            if not bad and bool(spoiled.any()):
                bad.append((layer, part, spoiled))

        return hook

    handles = [module.register_forward_hook(watch(layer, part)) for layer, part, module in _parts(model)]
    try:
        given = None if resets is None else resets[:, begin:end]
        output = model(tokens[:, begin:end], resets=given, state=state)
    finally:
        for handle in handles:
            handle.remove()
    if not bad:
        spoiled = ~torch.isfinite(output.logits).all(dim=-1)
        unwritten = _spoiled_state(output.state)
        if bool(spoiled.any()):
            bad.append((None, "head", spoiled))
        elif unwritten is not None:  # a write that nothing has read yet
            layer, row = unwritten
            last = torch.zeros_like(spoiled)
            last[row, -1] = True
            bad.append((layer, "mixer", last))
        elif (found := _spoiled_row(output.state.in_context)) is not None:
            last = torch.zeros_like(spoiled)
            last[found, -1] = True
            bad.append((None, "write", last))
        else:
            return None, output.state
    layer, part, spoiled = bad[0]
    column = int(spoiled.any(dim=0).nonzero()[0])
    row = int(spoiled[:, column].nonzero()[0])
    # An in-context write reads its segment once more, with the call's first token.
    column = min(column, end - begin - 1)
    memories = _spoiled_memories(model, output.state, layer, row) if part == "mixer" and layer is not None else ()
    levels = _spoiled_levels(model, output.state, row) if part in ("channel", "write") else ()
    return NonFiniteValue(layer, part, memories, row, begin + column, state.position + column, levels), output.state


def _parts(model: LanguageModel) -> Iterator[tuple[int | None, str, nn.Module]]:
    """Modules to watch, with their layer and name, in the order they run."""
    yield None, "embedding", model.embedding
    for layer, block in enumerate(model.blocks):
        yield layer, "norm", block.norm
        yield layer, "mixer", block.mixer
        yield layer, "channel", block.channel
    yield None, "final norm", model.norm


def _spoiled_state(state: StreamState) -> tuple[int, int] | None:
    """Layer and row of the first layer state that is not finite."""
    for layer, own in enumerate(state.layers):
        row = _spoiled_row(own)
        if row is not None:
            return layer, row
    return None


def _spoiled_row(tree: Any) -> int | None:
    """First row of the first tensor of a tree that is not finite."""
    for _, tensor in _named(tree, ""):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return int((~torch.isfinite(tensor)).flatten(1).any(dim=1).nonzero()[0])
    return None


def _spoiled_levels(model: LanguageModel, state: StreamState, row: int) -> tuple[int, ...]:
    """Levels written in context whose copy, waiting gradients or rule are not finite in a row."""
    if state.in_context is None or model.writer is None:
        return ()
    return tuple(
        written.level
        for written, own in zip(model.writer.levels, state.in_context.levels, strict=True)
        if any(t.is_floating_point() and not bool(torch.isfinite(t[row]).all()) for t in iterate_tensors(own))
    )


def first_nonfinite(state: StreamState) -> str | None:
    """Path of the first tensor of a state that is not finite."""
    for path, tensor in named_state(state):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return path
    return None


def _spoiled_memories(model: LanguageModel, state: StreamState, layer: int, row: int) -> tuple[str, ...]:
    """Names of the memories of a row whose fast weights are not finite; of the state's tensors where they have none."""
    names = model.blocks[layer].mixer.memories
    found: list[str] = []
    for path, tensor in _named(state.layers[layer], ""):
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor[row]).all()):
            continue
        if names and tensor.ndim == 5 and tensor.shape[2] == len(names):  # (B, H, M, ., .)
            spoiled = (~torch.isfinite(tensor[row])).movedim(1, 0).flatten(1).any(dim=1)
            found += [name for name, is_bad in zip(names, spoiled.tolist(), strict=True) if is_bad]
        else:
            found.append(path)
    return tuple(dict.fromkeys(found))


def named_state(state: StreamState) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a stream's state with their path, such as `layer 0, memory.current.inner`."""
    for layer, own in enumerate(state.layers):
        yield from ((f"layer {layer}, {path}", tensor) for path, tensor in _named(own, ""))
    yield from ((f"in-context levels, {path}", tensor) for path, tensor in _named(state.in_context, ""))


def _named(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path or "state", tree
    elif isinstance(tree, tuple):
        fields = getattr(tree, "_fields", range(len(tree)))
        for field, child in zip(fields, tree, strict=True):
            yield from _named(child, f"{path}.{field}" if path else str(field))

"""What every reading is made of: calls of the model with carried state, and what a prediction was worth.

Shapes: B rows of a batch, T tokens, V vocabulary, n predictions.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.errors import CheckpointError, NumericsError
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import locate_nonfinite
from nested_lm.nn.state import ModelOutput, StreamState
from nested_lm.reading.memory_file import describe_bytes

SEGMENT_TOKENS = 512
"""Long texts are read in calls of about this many tokens: faster per token than fewer, and more take more memory."""


class OutOfRoomError(CheckpointError):
    """The states of some streams take more memory than there is, or than is allowed. Says how much."""


class TokenScores(NamedTuple):
    """What predictions were worth. ranks: of the tokens that came, among all; 1 is the model's first choice.

    Ties count against the model: equal logits for all tokens must not pass for knowing the answer.
    """

    nats: Float[np.ndarray, "n"]
    ranks: Int[np.ndarray, "n"]

    @property
    def total(self) -> float:
        """Nats of all tokens together."""
        return float(self.nats.sum())

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would have given these tokens."""
        return bool((self.ranks == 1).all())


class Read(NamedTuple):
    """After some tokens. logits: of the token that comes next. nats: of each target; empty without targets."""

    logits: Float[Tensor, "B V"]
    nats: Float[np.ndarray, "B T"]
    state: StreamState


@contextlib.contextmanager
def reading_mode(model: LanguageModel) -> Iterator[None]:
    """No gradients; inference mode, a fifth faster for single tokens, where the model needs none of its own."""
    with torch.no_grad() if model.config.writes_in_context else torch.inference_mode():
        yield


def segment_room(model: LanguageModel, position: int) -> int:
    """Tokens that the next call of a long stream reads, so that calls end on borders of the model's chunks.

    position: of the stream. Where calls end makes no difference but to speed and rounding.
    """
    length = math.ceil(SEGMENT_TOKENS / model.config.alignment) * model.config.alignment
    return length - position % length


@torch.no_grad()
def read(
    model: LanguageModel,
    tokens: Int[Tensor | np.ndarray, "B T"],
    state: StreamState | None = None,
    *,
    targets: Int[Tensor | np.ndarray, "B T"] | None = None,
    max_state_bytes: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Read:
    """Read tokens in segments with carried state, keeping no more than one segment's activations.

    Args:
        tokens: at least one a row.
        state: where the streams stand, a row for each; None for new streams. It is not changed.
        targets: the token to predict after each token.
        max_state_bytes: a state that takes more is refused.
        on_tokens: is told how many tokens have been read.

    Raises:
        NumericsError: predictions are not finite; named are layer, memory and token.
        OutOfRoomError: the state has outgrown its limit, or memory ended.
    """
    given = as_tokens(model, tokens)
    wanted = None if targets is None else as_tokens(model, targets)
    state = model.initial_state(len(given)) if state is None else state
    nats = np.zeros((len(given), 0 if wanted is None else given.shape[1]))
    begin, logits = 0, None
    while begin < given.shape[1]:
        part = given[:, begin : begin + segment_room(model, state.position)]
        end = begin + part.shape[1]
        before = state
        output = call(model, part, _ends(part) if wanted is None else None, before)
        logits, state = output.logits.view(len(part), -1, output.logits.shape[-1])[:, -1], output.state
        if wanted is not None:
            scores = look_up(output.logits.flatten(0, 1), wanted[:, begin:end].flatten())
            nats[:, begin:end] = scores.nats.reshape(part.shape)
        if not (bool(torch.isfinite(logits).all()) and np.isfinite(nats[:, begin:end]).all()):
            raise not_finite(model, [(part, before)])
        check_room(model, state, max_state_bytes)
        if on_tokens is not None:
            on_tokens(part.numel())
        begin = end
    assert logits is not None, "there is a token to read"
    return Read(logits, nats, state)


def call(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    places: Int[Tensor, "n 2"] | None,
    state: StreamState,
    *,
    final: bool = False,
    rows: Int[Tensor, " B"] | None = None,
    branches: Int[Tensor, "B N"] | None = None,
) -> ModelOutput:
    """One call of `LanguageModel.predict`. Raises OutOfRoomError however memory ends."""
    with memory_watch():
        return model.predict(tokens, places, state=state, final=final, rows=rows, branches=branches)


def as_tokens(model: LanguageModel, tokens: Int[Tensor | np.ndarray, "..."]) -> Int[Tensor, "..."]:
    """Token ids on the model's device."""
    return torch.as_tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)


def _ends(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B 2"]:
    """Places of the last token of each row."""
    rows = torch.arange(len(tokens), device=tokens.device)
    return torch.stack([rows, torch.full_like(rows, tokens.shape[1] - 1)], dim=1)


def look_up(logits: Float[Tensor, "n V"], tokens: Int[Tensor, "n"]) -> TokenScores:
    """What predictions were worth, in at least float32, for the tokens that came."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = -logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    ranks = (logits >= logits.gather(1, tokens[:, None])).sum(dim=1)
    return TokenScores(nats.double().cpu().numpy(), ranks.cpu().numpy())


def not_finite(model: LanguageModel, readings: Iterable[tuple[Int[Tensor, "B T"], StreamState]]) -> NumericsError:
    """The error for predictions that are not finite, with the layer, the memory and the token.

    readings: tokens and states of the calls that may have made them; they are replayed until one does again.
    """
    position, place = 0, None
    for tokens, state in readings:
        position, place = state.position, locate_nonfinite(model, tokens, state=state)
        if place is not None:
            break
    return NumericsError(
        f"predictions are not finite after {position:,} tokens of the stream; first seen in "
        f"{place or 'no part of the model when the call was replayed in parts, so it is near overflow'}\n"
        "  Nothing was drawn, scored or written. The checkpoint has diverged, or what was read drove a memory out of "
        "range: use an earlier checkpoint, or start without the memory; `nested-lm audit` says whether the memories "
        "of a checkpoint stay bounded."
    )


def check_room(model: LanguageModel, state: StreamState, limit: int | None) -> None:
    """Refuse a state that has outgrown its limit, in bytes.

    Raises:
        OutOfRoomError: with both sizes.
    """
    if limit is None or (size := state.num_bytes()) <= limit:
        return
    repair = (
        "Its size does not depend on how much is read: raise the limit."
        if model.has_constant_state
        else "This model keeps keys and values of every token, so its memory grows with what it reads. Read less, "
        "raise the limit, or use a model with constant state, such as Hope."
    )
    raise OutOfRoomError(
        f"the state takes {describe_bytes(size)} after {state.position:,} tokens, the limit is "
        f"{describe_bytes(limit)} (--max-state-mib); nothing was written\n  {repair}"
    )


@contextlib.contextmanager
def memory_watch() -> Iterator[None]:
    """Turn any way in which memory ends into `OutOfRoomError`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfRoomError(f"memory ended ({_first_line(error)})") from error
    except RuntimeError as error:  # how torch says it on the CPU
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise OutOfRoomError(f"memory ended ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""Sampling text from a model, one token at a time with carried state.

Shapes: B batch, T tokens, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.nonfinite import predictions_error
from nested_lm.nn.state import StreamState

SEGMENT_TOKENS = 512
"""Long texts are read in calls of about this many tokens: faster per token than fewer, and more take more memory."""

CALL_LOGITS = 1 << 26
"""Logits that one call of a batch may have, 256 MiB in float32."""


@contextlib.contextmanager
def reading_mode(model: LanguageModel) -> Iterator[None]:
    """No gradients; inference mode where the model needs none of its own."""
    with torch.no_grad() if model.config.writes_in_context else torch.inference_mode():
        yield


class Generation(NamedTuple):
    """Sampled tokens. state: after the prompt and all of them but the last, which no call has read yet."""

    tokens: Int[Tensor, "B N"]
    state: StreamState


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    generator: torch.Generator,
    stop: int | None = None,
    state: StreamState | None = None,
) -> Generation:
    """Continue each row by `max_new_tokens` sampled tokens. Memory is constant for models with constant state.

    Args:
        tokens: prompt; at least one token a row.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: smallest set of tokens whose probabilities sum to at least this is kept; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        generator: source of randomness, on the CPU, so that a seed means the same text on every device.
        stop: end early once every row has drawn this token; rows that drew it before go on meanwhile.
        state: where the streams stand before the prompt, a row for each; None for new streams. It is not changed.

    Raises:
        ValueError: an empty prompt or an option out of range.
        NumericsError: predictions are not finite; named are layer, memory and token.
    """
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the end-of-text token")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k}: allowed are temperature >= 0, "
            "0 < top_p <= 1, top_k >= 0"
        )

    def draw(logits: Tensor) -> Tensor:
        probabilities = next_token_probabilities(logits, temperature=temperature, top_p=top_p, top_k=top_k)
        return torch.multinomial(probabilities.cpu(), 1, generator=generator).to(tokens.device)

    if model.config.writes_in_context:  # needs gradients of its own, which inference mode forbids
        return _sample(model, tokens, state, max_new_tokens, stop, draw)
    with torch.inference_mode():  # a fifth faster than no_grad: nothing is noted of views and versions
        generation = _sample(model, tokens, state, max_new_tokens, stop, draw)
    return Generation(generation.tokens.clone(), generation.state.map(Tensor.clone))  # ordinary tensors again


def _sample(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    state: StreamState | None,
    max_new_tokens: int,
    stop: int | None,
    draw: Callable[[Tensor], Tensor],
) -> Generation:
    """Read the prompt, then draw and read tokens in turn. draw: logits (B, V) to tokens (B, 1), both on the device."""
    logits, state = read_prompt(model, tokens, state=state)
    chosen: list[Tensor] = []
    stopped = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    while len(chosen) < max_new_tokens and (stop is None or not bool(stopped.all())):
        if chosen:
            output = model(chosen[-1], state=state)
            logits = require_finite(output.logits[:, -1], model, chosen[-1], state)
            state = output.state
        chosen.append(draw(logits))
        if stop is not None:
            stopped |= chosen[-1][:, 0] == stop
    return Generation(torch.cat(chosen, dim=1) if chosen else tokens[:, :0], state)


def read_prompt(
    model: LanguageModel, tokens: Int[Tensor, "B T"], *, state: StreamState | None
) -> tuple[Float[Tensor, "B V"], StreamState]:
    """Read tokens in segments, keeping no more than one segment's activations.

    Returns: the logits after the last token, and the state.

    Raises:
        NumericsError: predictions are not finite; named are layer, memory and token.
    """
    begin, logits = 0, None
    while begin < tokens.shape[1]:
        end = begin + segment_room(model, 0 if state is None else state.position)
        output = model(tokens[:, begin:end], state=state, predictions="last")
        logits = require_finite(output.logits[:, -1], model, tokens[:, begin:end], state)
        state, begin = output.state, end
    assert logits is not None, "a prompt has tokens"
    assert state is not None
    return logits, state


def require_finite(
    logits: Float[Tensor, "B V"], model: LanguageModel, tokens: Int[Tensor, "B T"], state: StreamState | None
) -> Float[Tensor, "B V"]:
    """Return the logits of a call, which nothing may be drawn from unless all are finite.

    tokens, state: as given to the call.

    Raises:
        NumericsError: some are not; the call is replayed to name the place.
    """
    if bool(torch.isfinite(logits).all()):
        return logits
    raise predictions_error(
        model,
        tokens,
        state,
        consequence="No token was drawn. The checkpoint has diverged, or the stream drove a memory out of range: use "
        "an earlier checkpoint, or start without the memory.",
    )


def segment_room(model: LanguageModel, position: int) -> int:
    """Tokens that the next call of a long stream reads, so that calls end on borders of the model's chunks.

    position: of the stream. Where calls end makes no difference but to speed and rounding.
    """
    length = math.ceil(SEGMENT_TOKENS / model.config.alignment) * model.config.alignment
    return length - position % length


def next_token_probabilities(
    logits: Float[Tensor, "B V"], *, temperature: float, top_p: float, top_k: int
) -> Float[Tensor, "B V"]:
    """Probabilities after temperature, then top-k, then nucleus filtering; float32, each row sums to 1."""
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    ordered, order = (logits / temperature).sort(dim=1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities  # mass of strictly likelier tokens
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(1, order, probabilities)

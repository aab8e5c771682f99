"""Sampling text from a model, one token at a time with carried state.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.calls import read, reading_mode


class Generation(NamedTuple):
    """Sampled tokens. lengths: how many of them each row had when it ended; N for a row that did not end.

    state: after the prompt and all tokens but the last, which no call has read yet.
    """

    tokens: Int[Tensor, "B N"]
    lengths: list[int]
    state: StreamState


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    settled: Callable[[int, Sequence[int]], bool] | None = None,
    state: StreamState | None = None,
) -> Generation:
    """Continue each row by `max_new_tokens` sampled tokens. Memory is constant for models with constant state.

    Args:
        tokens: prompt; at least one token a row.
        temperature: divides the logits; 0 takes the most likely token, and needs no generator.
        top_p: smallest set of tokens whose probabilities sum to at least this is kept; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        generator: source of randomness, on the CPU, so that a seed means the same text on every device.
        stop, settled: end early once every row has drawn this token, or is settled, which is asked of the row and its
            new tokens; rows that have ended before go on meanwhile.
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
    lengths: dict[int, int] = {}  # of the rows that have ended
    chosen: list[list[int]] = [[] for _ in tokens]
    with reading_mode(model):
        found = read(model, tokens, state)
        for step in range(max_new_tokens):
            probabilities = next_token_probabilities(
                found.logits, temperature=temperature, top_p=top_p, top_k=top_k
            ).cpu()
            drawn = probabilities.argmax(1, keepdim=True)
            if temperature:
                drawn = torch.multinomial(probabilities, 1, generator=generator)
            for row, (token, ids) in enumerate(zip(drawn[:, 0].tolist(), chosen, strict=True)):
                ids.append(token)
                if row not in lengths and (token == stop or (settled is not None and settled(row, ids))):
                    lengths[row] = len(ids)
            if step == max_new_tokens - 1 or len(lengths) == len(chosen):
                break
            found = read(model, drawn, found.state)
    new = torch.tensor(chosen, dtype=torch.long, device=tokens.device).view(len(chosen), -1)
    state = found.state.map(Tensor.clone)  # ordinary tensors, which later passes may go on from
    return Generation(new, [lengths.get(row, new.shape[1]) for row in range(len(chosen))], state)


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

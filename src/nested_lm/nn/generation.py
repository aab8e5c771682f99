"""Sampling text from a model, one token at a time with carried state.

Shapes: B batch, T tokens, V vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.nn.model import LanguageModel


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
) -> Int[Tensor, "B N"]:
    """Continue each row by `max_new_tokens` sampled tokens. Memory is constant for models with constant state.

    Args:
        tokens: prompt; at least one token a row.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: smallest set of tokens whose probabilities sum to at least this is kept; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        generator: source of randomness, on the CPU, so that a seed means the same text on every device.

    Raises:
        ValueError: an empty prompt or an option out of range.
    """
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the end-of-text token")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k}: allowed are temperature >= 0, "
            "0 < top_p <= 1, top_k >= 0"
        )
    logits, state, _ = model(tokens)
    chosen = []
    for step in range(max_new_tokens):
        probabilities = next_token_probabilities(logits[:, -1], temperature=temperature, top_p=top_p, top_k=top_k)
        token = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(tokens.device)  # (B, 1)
        chosen.append(token)
        if step + 1 < max_new_tokens:
            logits, state, _ = model(token, state=state)
    return torch.cat(chosen, dim=1) if chosen else tokens[:, :0]


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

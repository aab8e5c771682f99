"""Continuing prompts until a stop string, as the harness asks for it.

Shapes: B prompts of one length, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.generation import next_token_probabilities, read_prompt, reading_mode

_DEFAULT_TOKENS = 256
_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class Continuation:
    """A prompt's tokens and how to go on. temperature 0: always the most likely token."""

    prompt: Int[np.ndarray, "T"]
    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, prompt: np.ndarray, settings: Mapping[str, Any]) -> "Continuation":
        """Read the keyword arguments of a request.

        Raises:
            ConfigError: one that is not known here.
        """
        unknown = sorted(set(settings) - _KNOWN)
        if unknown:
            raise ConfigError(f"generation setting {unknown[0]!r} is not known; allowed: {', '.join(sorted(_KNOWN))}")
        until = settings.get("until") or ()
        is_sampled = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
        return cls(
            prompt,
            (until,) if isinstance(until, str) else tuple(until),
            int(settings.get("max_gen_toks", settings.get("max_new_tokens", _DEFAULT_TOKENS))),
            float(settings.get("temperature", 1.0)) if is_sampled else 0.0,
            float(settings.get("top_p", 1.0)),
            int(settings.get("top_k", 0)),
        )

    @property
    def settings(self) -> tuple[int, tuple[str, ...], int, float, float, int]:
        """What prompts of one batch have in common, their length first."""
        return len(self.prompt), self.until, self.max_tokens, self.temperature, self.top_p, self.top_k


def continue_prompts(
    model: LanguageModel, tokenizer: TextTokenizer, asked: Sequence[Continuation], *, batch_rows: int, seed: int = 0
) -> list[str]:
    """Text after each prompt, up to its first stop string or the end of the document, neither included.

    batch_rows: prompts side by side. seed: of sampled tokens; every batch draws anew.
    """
    texts = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda index: (asked[index].settings, asked[index].prompt.tobytes()))
    while order:
        first = asked[order[0]].settings
        rows = [index for index in order[:batch_rows] if asked[index].settings == first]
        order = order[len(rows) :]
        with reading_mode(model):
            generator = torch.Generator().manual_seed(seed)
            found = _continue(model, tokenizer, [asked[index] for index in rows], generator)
        for index, text in zip(rows, found, strict=True):
            texts[index] = text
    return texts


def _continue(
    model: LanguageModel, tokenizer: TextTokenizer, batch: list[Continuation], generator: torch.Generator
) -> list[str]:
    settings = batch[0]
    device = next(model.parameters()).device
    logits, state = read_prompt(model, torch.from_numpy(np.stack([row.prompt for row in batch])).to(device), state=None)
    tokens: list[list[int]] = [[] for _ in batch]
    texts: list[str | None] = [None] * len(batch)
    for step in range(settings.max_tokens):
        drawn = _draw(logits, settings, generator)
        for row, token in enumerate(drawn[:, 0].tolist()):
            if texts[row] is None:
                if token == tokenizer.end_of_text:
                    texts[row] = tokenizer.decode(tokens[row])
                else:
                    tokens[row].append(token)
                    texts[row] = _stopped(tokenizer.decode(tokens[row]), settings.until)
        if step + 1 == settings.max_tokens or None not in texts:
            break
        output = model(drawn.to(device), state=state)
        logits, state = output.logits[:, -1], output.state
    return [tokenizer.decode(row) if text is None else text for row, text in zip(tokens, texts, strict=True)]


def _draw(logits: Tensor, settings: Continuation, generator: torch.Generator) -> Int[Tensor, "B 1"]:
    if settings.temperature == 0:
        return logits.argmax(dim=1, keepdim=True).cpu()
    probabilities = next_token_probabilities(
        logits, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k
    )
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)


def _stopped(text: str, until: tuple[str, ...]) -> str | None:
    """The text before its first stop string; None while there is none."""
    ends = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else None

"""Continuing prompts until a stop string, as the harness asks for it.

Shapes: B prompts of one length, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.calls import as_tokens
from nested_lm.reading.generation import generate

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
        found = _continue(model, tokenizer, [asked[index] for index in rows], seed)
        for index, text in zip(rows, found, strict=True):
            texts[index] = text
    return texts


def _continue(model: LanguageModel, tokenizer: TextTokenizer, batch: Sequence[Continuation], seed: int) -> list[str]:
    """Texts after prompts of one length and one way to go on."""
    settings = batch[0]

    def written(row: int, ids: Sequence[int]) -> str:
        return tokenizer.decode_after(batch[row].prompt[1:], ids)

    found = generate(
        model,
        as_tokens(model, np.stack([row.prompt for row in batch])),
        max_new_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        generator=torch.Generator().manual_seed(seed),
        stop=tokenizer.end_of_text,
        settled=lambda row, ids: _is_stopped(written(row, ids), settings.until),
    )
    rows = zip(found.tokens.tolist(), found.lengths, strict=True)
    return [_before_stop(written(row, ids[:length]), settings.until) for row, (ids, length) in enumerate(rows)]


def _is_stopped(text: str, until: tuple[str, ...]) -> bool:
    return any(stop and stop in text for stop in until)


def _before_stop(text: str, until: tuple[str, ...]) -> str:
    """The text before its first stop string; all of it where there is none."""
    return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]

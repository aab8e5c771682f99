"""Text that a model writes after given prompts, for the report."""

import time

import torch

from nested_lm.config.evaluation import Sampling
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import NumericsError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.generation import generate
from nested_lm_lab.evaluation.schema import SamplingMetrics, TextSample

TASK_VERSION = "1"


def evaluate(model: LanguageModel, tokenizer: TextTokenizer, config: Sampling) -> SamplingMetrics:
    """Continue every prompt from the start of a document; prompt i is drawn with seed i."""
    device = next(model.parameters()).device
    samples = []
    started = time.perf_counter()
    for seed, prompt in enumerate(config.prompts):
        ids = [tokenizer.start_of_text, *tokenizer.encode(prompt)]
        _require_finite(model, torch.tensor([ids], device=device), prompt)
        drawn = (
            generate(
                model,
                torch.tensor([ids], device=device),
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                generator=torch.Generator().manual_seed(seed),
            )
            .tokens[0]
            .tolist()
        )
        ended = tokenizer.end_of_text in drawn
        kept = drawn[: drawn.index(tokenizer.end_of_text)] if ended else drawn
        samples.append(TextSample(prompt=prompt, text=tokenizer.decode(kept), tokens=len(kept), ended=ended, seed=seed))
    seconds = time.perf_counter() - started
    return SamplingMetrics(
        kind="sampling",
        samples=tuple(samples),
        tokens_per_s=len(samples) * config.max_new_tokens / seconds,
    )


@torch.no_grad()
def _require_finite(model: LanguageModel, tokens: torch.Tensor, prompt: str) -> None:
    """Drawing from probabilities that are not finite fails deep inside torch; say what is wrong instead."""
    if not bool(torch.isfinite(model(tokens).logits).all()):
        raise NumericsError(
            f"the model's predictions after {prompt!r} are not finite; the checkpoint has diverged. "
            "Evaluate an earlier one."
        )

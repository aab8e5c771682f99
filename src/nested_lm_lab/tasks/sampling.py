"""Text that a model writes after given prompts, for the report."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from nested_lm.config.evaluation import EvalConfig, Sampling
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.generation import generate
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task
from nested_lm_lab.tasks.schema import SamplingMetrics, TextSample


class SamplingTask(Task[Sampling, SamplingMetrics]):
    """Text that a model writes."""

    name = "sampling"
    version = "1"
    Settings = Sampling
    Metrics = SamplingMetrics
    on_the_page = True

    @classmethod
    def of_run(cls, settings: EvalConfig) -> "SamplingTask":
        """The task as the section `eval` asks for it."""
        assert settings.sampling is not None
        return cls(settings.sampling)

    def record(self, subject: Subject) -> dict[str, Any]:
        """The settings; older results also hold how often documents are drawn."""
        return super().record(subject) | {"bootstrap_samples": subject.settings.bootstrap_samples}

    def measure(self, subject: Subject, progress: Progress) -> SamplingMetrics:  # noqa: ARG002
        """Write the samples."""
        return evaluate(subject.loaded.model, subject.loaded.tokenizer, self.settings)

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """The first sample's beginning: there is no score."""
        assert isinstance(result.metrics, SamplingMetrics)
        first = result.metrics.samples[0]
        yield f"  {(first.prompt + first.text)[:80]!r} ..."


def evaluate(model: LanguageModel, tokenizer: TextTokenizer, config: Sampling) -> SamplingMetrics:
    """Continue every prompt from the start of a document; prompt i is drawn with seed i."""
    device = next(model.parameters()).device
    samples = []
    started = time.perf_counter()
    for seed, prompt in enumerate(config.prompts):
        ids = [tokenizer.start_of_text, *tokenizer.encode(prompt)]
        found = generate(
            model,
            torch.tensor([ids], device=device),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            generator=torch.Generator().manual_seed(seed),
            stop=tokenizer.end_of_text,
        )
        drawn = found.tokens[0].tolist()
        ended = drawn[-1] == tokenizer.end_of_text
        text, count = tokenizer.decode_after(ids[1:], drawn), len(drawn) - ended
        samples.append(TextSample(prompt=prompt, text=text, tokens=count, ended=ended, seed=seed))
    seconds = time.perf_counter() - started
    return SamplingMetrics(
        kind="sampling",
        samples=tuple(samples),
        tokens_per_s=sum(sample.tokens + sample.ended for sample in samples) / seconds,
    )

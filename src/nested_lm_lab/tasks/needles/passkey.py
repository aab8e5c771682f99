"""Passkey probe: is a key that was read long ago still known at the end of the document?

Every sample is scored twice: as it is, and with the key's sentence taken out. What the sentence saves in nats
is what the model remembers; small models that never print all five digits still show it.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from nested_lm.config.evaluation import EvalConfig, Passkey
from nested_lm.data.synthetic import passkey_document
from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.reader import Reader, Scored
from nested_lm_lab.evaluation.bootstrap import Bootstrap, wilson
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task
from nested_lm_lab.tasks.language_modelling import Reading
from nested_lm_lab.tasks.needles.metrics import PasskeyLength, PasskeyMetrics, PasskeySample

_DEPTH_OF_ONE = 0.5


class PasskeyTask(Task[Passkey, PasskeyMetrics]):
    """A five-digit key hidden in noise."""

    name = "passkey"
    version = "1"
    Settings = Passkey
    Metrics = PasskeyMetrics
    on_the_page = True

    @classmethod
    def of_run(cls, settings: EvalConfig) -> "PasskeyTask":
        """The task as the section `eval` asks for it."""
        assert settings.passkey is not None
        return cls(settings.passkey)

    def record(self, subject: Subject) -> dict[str, Any]:
        """The settings, and how often samples are drawn."""
        return super().record(subject) | {"bootstrap_samples": subject.settings.bootstrap_samples}

    def measure(self, subject: Subject, progress: Progress) -> PasskeyMetrics:  # noqa: ARG002
        """Score all lengths."""
        return evaluate(
            subject.loaded.model,
            subject.loaded.tokenizer,
            self.settings,
            reading=Reading.of(subject),
            bootstrap=Bootstrap(samples=subject.settings.bootstrap_samples),
        )

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """What the key is worth, and how often it is found."""
        assert isinstance(result.metrics, PasskeyMetrics)
        for entry in result.metrics.lengths:
            yield (
                f"  {entry.length:,} tokens: found {entry.exact.text(2)}, the key saves {entry.worth.text()} nats a "
                "token of the answer"
            )


def depths(samples: int) -> list[float]:
    """Depths of the key, spread evenly from the start of the document (0) to its end (1)."""
    if samples == 1:
        return [_DEPTH_OF_ONE]
    return [index / (samples - 1) for index in range(samples)]


def evaluate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    config: Passkey,
    *,
    reading: Reading,
    bootstrap: Bootstrap,
) -> PasskeyMetrics:
    """Score the passkey at every length. The same tokenizer gives every model the same samples."""
    return PasskeyMetrics(
        kind="passkey",
        reading="segments",
        lengths=tuple(
            _score_length(model, tokenizer, length, config.samples, reading, bootstrap) for length in config.lengths
        ),
    )


def _score_length(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    length: int,
    samples: int,
    reading: Reading,
    bootstrap: Bootstrap,
) -> PasskeyLength:
    places = depths(samples)
    documents = [
        passkey_document(tokenizer, length=length, depth=depth, seed=seed, with_key=with_key)
        for with_key in (True, False)
        for seed, depth in enumerate(places)
    ]
    started = time.perf_counter()
    texts = [np.concatenate([document.prompt, document.answer]) for document in documents]
    sequences = [(Scored(text, len(document.prompt)),) for text, document in zip(texts, documents, strict=True)]
    found = [scores for (scores,) in Reader(model, rows=reading.batch_size).score(sequences)]
    seconds = time.perf_counter() - started
    nats = np.array([scores.nats.mean() for scores in found])
    exact = np.array([scores.greedy for scores in found])
    first_rank = np.array([scores.ranks[0] for scores in found])
    key, control = slice(0, samples), slice(samples, None)
    return PasskeyLength(
        length=length,
        nats_per_token=bootstrap.mean(nats[key]),
        exact=wilson(int(exact[key].sum()), samples),
        median_first_rank=float(np.median(first_rank[key])),
        control_nats_per_token=bootstrap.mean(nats[control]),
        control_exact=wilson(int(exact[control].sum()), samples),
        control_median_first_rank=float(np.median(first_rank[control])),
        worth=bootstrap.mean(nats[control] - nats[key]),
        tokens_per_s=len(documents) * length / seconds,
        samples=tuple(
            PasskeySample(
                depth=depth,
                answer_tokens=len(found[i].nats),
                nats_per_token=float(nats[i]),
                exact=bool(exact[i]),
                first_rank=int(first_rank[i]),
                control_nats_per_token=float(nats[samples + i]),
                control_exact=bool(exact[samples + i]),
                control_first_rank=int(first_rank[samples + i]),
            )
            for i, depth in enumerate(places)
        ),
    )

"""Held-out bits per byte: overall, by chronological period and by position, beside the floors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nested_lm.config.evaluation import EvalConfig, LanguageModelling
from nested_lm.data.shards import DocumentRow, Period, TokenDataset
from nested_lm.errors import DataError, ReportError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.held_out import DocumentScores, score_streaming, score_window
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.floors import NgramFloors
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.evaluation.task import Task
from nested_lm_lab.tasks.schema import (
    DocumentSums,
    FloorScores,
    LanguageModellingMetrics,
    PeriodScore,
    PositionScore,
    ProtocolScores,
)

BITS = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Reading:
    """How text is given to a model: tokens of a context, rows of a batch, alignment of document starts."""

    context_length: int
    batch_size: int
    align: int

    @classmethod
    def of(cls, subject: Subject) -> "Reading":
        """As the run of a subject was trained to read."""
        config = subject.config
        return cls(config.train.context_length, subject.settings.batch_size, config.document_alignment)


class LanguageModellingTask(Task[LanguageModelling, LanguageModellingMetrics]):
    """Held-out bits per byte, beside the floors."""

    name = "language_modelling"
    version = "1"
    Settings = LanguageModelling
    Metrics = LanguageModellingMetrics
    on_the_page = True

    @classmethod
    def of_run(cls, settings: EvalConfig) -> "LanguageModellingTask":
        """The task as the section `eval` asks for it."""
        assert settings.language_modelling is not None
        return cls(settings.language_modelling)

    def record(self, subject: Subject) -> dict[str, Any]:
        """The settings, and how often documents are drawn."""
        return super().record(subject) | {"bootstrap_samples": subject.settings.bootstrap_samples}

    def measure(self, subject: Subject, progress: Progress) -> LanguageModellingMetrics:  # noqa: ARG002
        """Score the split."""
        return evaluate(
            subject.loaded.model,
            subject.split(self.settings.split),
            subject.split("train"),
            self.settings,
            reading=Reading.of(subject),
            bootstrap=Bootstrap(samples=subject.settings.bootstrap_samples),
        )

    @classmethod
    def lines(cls, result: ResultFile) -> Iterator[str]:
        """Bits per byte of each way of reading, beside the floors."""
        found = result.metrics
        assert isinstance(found, LanguageModellingMetrics)
        for way, scores in (("window", found.window), ("streaming", found.streaming)):
            if scores is not None:
                yield f"  {way}: {scores.bits_per_byte.text(4)} bits per byte of the {found.split} split"
        yield f"  floors: bigram {found.bigram.bits_per_byte.text(4)}, unigram {found.unigram.bits_per_byte.text(4)}"


def chosen_documents(dataset: TokenDataset, limit: int | None) -> list[int]:
    """Indices of the scored documents: all, or `limit` of them spread evenly over the split."""
    count = len(dataset.documents)
    if count == 0:
        raise DataError(
            f"{dataset.folder}: the split has no documents to score; give the split a larger share in the "
            "data preset (data.split) or evaluate another one (eval.language_modelling.split)"
        )
    if limit is None or limit >= count:
        return list(range(count))
    return [int(index) for index in np.linspace(0, count - 1, limit).round()]


def evaluate(
    model: LanguageModel,
    held_out: TokenDataset,
    training: TokenDataset,
    config: LanguageModelling,
    *,
    reading: Reading,
    bootstrap: Bootstrap,
) -> LanguageModellingMetrics:
    """Score a model and the floors on the same held-out documents."""
    chosen = chosen_documents(held_out, config.max_documents)
    rows = [held_out.documents[index] for index in chosen]
    texts = [held_out.tokens(index) for index in chosen]
    window = score_window(
        model,
        held_out,
        chosen,
        context_length=reading.context_length,
        batch_size=reading.batch_size,
    )
    streaming = None
    if config.streaming and model.has_constant_state:
        streaming = score_streaming(
            model,
            texts,
            batch_size=reading.batch_size,
            boundary=held_out.boundary,
        )
    counted = (training.tokens(index) for index in range(len(training.documents)))
    floors = NgramFloors.count(counted, vocab_size=training.vocab_size, boundary=training.boundary)
    unigram = np.array([floors.unigram_nats(text) for text in texts])
    bigram = np.array([floors.bigram_nats(text) for text in texts])
    summary = _Summary(rows, held_out.periods, window.tokens, bootstrap)
    return LanguageModellingMetrics(
        kind="language_modelling",
        split=config.split,
        window=summary.protocol(window, bigram),
        streaming=summary.protocol(streaming, bigram) if streaming else None,
        streaming_gain=summary.gain(window.nats, streaming.nats) if streaming else None,
        unigram=summary.floor(unigram),
        bigram=summary.floor(bigram),
        documents=DocumentSums(
            id=tuple(row.id for row in rows),
            period=tuple(row.period for row in rows),
            bytes=tuple(row.bytes for row in rows),
            tokens=tuple(window.tokens.tolist()),
            window_nats=tuple(window.nats.tolist()),
            streaming_nats=tuple(streaming.nats.tolist()) if streaming else None,
            unigram_nats=tuple(unigram.tolist()),
            bigram_nats=tuple(bigram.tolist()),
        ),
    )


class _Summary:
    """Turns sums of documents into intervals."""

    def __init__(
        self,
        rows: Sequence[DocumentRow],
        periods: Sequence[Period],
        tokens: np.ndarray,
        bootstrap: Bootstrap,
    ) -> None:
        self.bytes = np.array([row.bytes for row in rows], dtype=np.float64)
        self.period = np.array([-1 if row.period is None else row.period for row in rows])
        self.periods = periods
        self.tokens = tokens.astype(np.float64)
        self.bootstrap = bootstrap

    def protocol(self, scores: DocumentScores, bigram: np.ndarray) -> ProtocolScores:
        return ProtocolScores(
            bits_per_byte=self.bootstrap.ratio(scores.nats, self.bytes, scale=BITS),
            nats_per_token=self.bootstrap.ratio(scores.nats, self.tokens),
            below_bigram=self.gain(bigram, scores.nats),
            by_period=self.by_period(scores.nats),
            by_position=self.by_position(scores),
            tokens_per_s=scores.tokens_per_s,
        )

    def floor(self, nats: np.ndarray) -> FloorScores:
        return FloorScores(
            bits_per_byte=self.bootstrap.ratio(nats, self.bytes, scale=BITS),
            nats_per_token=self.bootstrap.ratio(nats, self.tokens),
            by_period=self.by_period(nats),
        )

    def gain(self, worse: np.ndarray, better: np.ndarray) -> Interval:
        return self.bootstrap.paired(worse, better, self.bytes, scale=BITS)

    def by_period(self, nats: np.ndarray) -> tuple[PeriodScore, ...]:
        found = []
        for index, period in enumerate(self.periods):
            here = self.period == index
            found.append(
                PeriodScore(
                    label=period.label,
                    first_year=period.first_year,
                    last_year=period.last_year,
                    documents=int(here.sum()),
                    bits_per_byte=self.bootstrap.ratio(nats[here], self.bytes[here], scale=BITS)
                    if here.any()
                    else None,
                )
            )
        return tuple(found)

    def by_position(self, scores: DocumentScores) -> tuple[PositionScore, ...]:
        found = []
        for index, (first, end) in enumerate(zip(scores.edges, scores.edges[1:], strict=False)):
            tokens = scores.position_tokens[:, index]
            here = tokens > 0
            found.append(
                PositionScore(
                    first=first,
                    last=end - 1,
                    tokens=int(tokens.sum()),
                    nats_per_token=self.bootstrap.ratio(scores.position_nats[here, index], tokens[here])
                    if here.any()
                    else None,
                )
            )
        return tuple(found)


def paired_difference(a: ResultFile, b: ResultFile, *, bootstrap: Bootstrap) -> Interval:
    """Bits per byte of run `a` minus run `b` under the window protocol, resampling the documents they share.

    Raises ReportError when the two did not score the same documents.
    """
    documents = []
    for result in (a, b):
        if not isinstance(result.metrics, LanguageModellingMetrics):
            raise ReportError(
                f"{result.identity.name}: the result is of task {result.task!r}; documents are compared pair "
                "by pair in results of 'language_modelling'"
            )
        documents.append(result.metrics.documents)
    first, second = documents
    if first.id != second.id or first.bytes != second.bytes:
        raise ReportError(
            f"{a.identity.name} scored {len(first.id)} documents and {b.identity.name} {len(second.id)}, and "
            "they are not the same ones in the same order; evaluate both on the same split with the same "
            "max_documents"
        )
    return bootstrap.paired(
        np.array(first.window_nats), np.array(second.window_nats), np.array(first.bytes), scale=BITS
    )

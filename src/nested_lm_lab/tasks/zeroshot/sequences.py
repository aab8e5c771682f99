"""Log-likelihoods of the sequences of zero-shot documents."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from nested_lm.nn.model import LanguageModel
from nested_lm.reading.reader import Document, Reader, Starts


class Likelihood(NamedTuple):
    """Of the scored tokens of a sequence. greedy: each is the model's first choice after the ones before it."""

    nats: float
    greedy: bool


class Scorer(Protocol):
    """Anything that tells log-likelihoods of sequences. Documents know nothing of each other."""

    def score(self, documents: Sequence[Document]) -> list[list[Likelihood]]:
        """Negative log-likelihoods of every sequence of every document, in the order given."""
        ...


class ModelScorer:
    """Scores with a model; what sequences have in common is read once.

    batch_rows: streams side by side. shared: False reads every sequence from the start, by itself: the slow way, which
        gives the same numbers. starts: where documents start; None: fresh states. on_tokens: see `Reader`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_rows: int,
        shared: bool = True,
        starts: Starts | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.batch_rows, self.starts = batch_rows, starts
        self.reader = Reader(model, rows=batch_rows, shared=shared, on_tokens=on_tokens)

    def score(self, documents: Sequence[Document]) -> list[list[Likelihood]]:
        """Score every document from its own start. Raises as `Reader.score`."""
        found = self.reader.score(documents, starts=self.starts)
        return [[Likelihood(scores.total, scores.greedy) for scores in document] for document in found]

    def planned_tokens(self, documents: Sequence[Document]) -> int:
        """Tokens that `score` will read, those of the starts aside."""
        return self.reader.planned_tokens(documents, starts=self.starts)

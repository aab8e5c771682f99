"""The floor under every zero-shot score: the bigram of the run's training text, on the same documents."""

from collections.abc import Iterator, Sequence

import numpy as np

from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError
from nested_lm.reading.reader import Document
from nested_lm_lab.evaluation.floors import NgramFloors
from nested_lm_lab.tasks.zeroshot.sequences import Likelihood


class BigramScorer:
    """Scores sequences with a count model: each token given the one before it."""

    def __init__(self, floors: NgramFloors) -> None:
        self.floors = floors
        self._best: dict[int, int] = {}

    def score(self, documents: Sequence[Document]) -> list[list[Likelihood]]:
        """Score every sequence of every document."""
        return [[self._likelihood(sequence.tokens, sequence.first) for sequence in document] for document in documents]

    def _likelihood(self, tokens: np.ndarray, first: int) -> Likelihood:
        previous, following = tokens[first - 1 : -1], tokens[first:]
        nats = -np.log(self.floors.bigram_probabilities(previous, following)).sum()
        greedy = all(self.best(int(a)) == b for a, b in zip(previous, following, strict=True))
        return Likelihood(float(nats), greedy)

    def best(self, previous: int) -> int:
        """The most likely token after another."""
        if previous not in self._best:
            size = self.floors.vocab_size
            after = self.floors.bigram_probabilities(np.full(size, previous), np.arange(size))
            self._best[previous] = int(after.argmax())
        return self._best[previous]


def count_bigrams(dataset: TokenDataset, *, tokenizer_hash: str, max_tokens: int) -> tuple[NgramFloors, int]:
    """Count the first documents of a training split, as many as hold `max_tokens`, the last of them whole.

    Returns: the model and the tokens counted.

    Raises:
        CheckpointError: the data set has another tokenizer.
    """
    if dataset.tokenizer_hash != tokenizer_hash:
        raise CheckpointError(
            f"{dataset.folder} has tokenizer {dataset.tokenizer_hash[:16]}, the checkpoint {tokenizer_hash[:16]}; "
            "build the data set of the run again, or leave the bigram floor out with --no-bigram"
        )
    counted = 0

    def documents() -> Iterator[np.ndarray]:
        nonlocal counted
        for index, row in enumerate(dataset.documents):
            if counted >= max_tokens:
                return
            counted += row.tokens
            yield dataset.tokens(index)

    floors = NgramFloors.count(documents(), vocab_size=dataset.vocab_size, boundary=dataset.boundary)
    return floors, counted

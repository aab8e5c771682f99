"""Count models of the training split that a trained model has to beat: unigram and Kneser-Ney bigram.

Own numpy code: the libraries that estimate Kneser-Ney models (KenLM, nltk.lm) work on strings and need a
compiler or loop in Python over n-grams; this counts token ids by sorting, about a second for 2.6 M tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_FLUSH_TOKENS = 16_000_000  # bigram keys held before they are merged into counts


@dataclass(frozen=True)
class NgramFloors:
    """Counts of a training split and the probabilities they give.

    Tokens are predicted in the stream start + document + end, as the models do it; `boundary` has both tokens.

    Source of the bigram: Ney, Essen, Kneser 1994, interpolated, one discount d = n1 / (n1 + 2 n2) per order;
    continuation probabilities are interpolated with the uniform distribution so that tokens the training
    split never holds keep some probability.
    """

    vocab_size: int
    unigram_counts: np.ndarray  # (V,)
    bigram_keys: np.ndarray  # (M,) previous * V + next, sorted
    bigram_counts: np.ndarray  # (M,)
    boundary: tuple[int, int] = (0, 0)

    @classmethod
    def count(
        cls, documents: Iterable[np.ndarray], *, vocab_size: int, boundary: tuple[int, int] = (0, 0)
    ) -> "NgramFloors":
        """Count token ids of training documents (without start and end tokens)."""
        keys = np.empty(0, dtype=np.int64)
        counts = np.empty(0, dtype=np.int64)
        unigram = np.zeros(vocab_size, dtype=np.int64)
        held: list[np.ndarray] = []
        size = 0
        for tokens in documents:
            stream = _stream(tokens, boundary)
            unigram += np.bincount(stream[1:], minlength=vocab_size)
            held.append(stream[:-1] * vocab_size + stream[1:])
            size += len(tokens)
            if size >= _FLUSH_TOKENS:
                keys, counts = _merge(keys, counts, held)
                held, size = [], 0
        keys, counts = _merge(keys, counts, held)
        return cls(vocab_size, unigram, keys, counts, boundary)

    def unigram_nats(self, tokens: np.ndarray) -> float:
        """Nats of a document and its end token under add-one unigram probabilities."""
        probabilities = (self.unigram_counts + 1) / (self.unigram_counts.sum() + self.vocab_size)
        return float(-np.log(probabilities[_stream(tokens, self.boundary)[1:]]).sum())

    def bigram_nats(self, tokens: np.ndarray) -> float:
        """Nats of a document and its end token under the Kneser-Ney bigram."""
        stream = _stream(tokens, self.boundary)
        return float(-np.log(self.bigram_probabilities(stream[:-1], stream[1:])).sum())

    def bigram_probabilities(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """P(following | previous) for arrays of token ids of one shape."""
        keys = previous.astype(np.int64) * self.vocab_size + following
        if len(self.bigram_keys):
            at = np.minimum(np.searchsorted(self.bigram_keys, keys), len(self.bigram_keys) - 1)
            seen = np.where(self.bigram_keys[at] == keys, self.bigram_counts[at], 0)
        else:
            seen = np.zeros(keys.shape, dtype=np.int64)
        total = self._context_total[previous]
        discount = self._discount
        # A context never seen gives all its mass to the lower order.
        left = np.where(total > 0, discount * self._context_types[previous] / np.maximum(total, 1), 1.0)
        kept = np.maximum(seen - discount, 0.0) / np.maximum(total, 1)
        return kept + left * self._continuation[following]

    @cached_property
    def _discount(self) -> float:
        return discount_of(self.bigram_counts)

    @cached_property
    def _context_types(self) -> np.ndarray:
        return np.bincount(self.bigram_keys // self.vocab_size, minlength=self.vocab_size)

    @cached_property
    def _context_total(self) -> np.ndarray:
        previous = self.bigram_keys // self.vocab_size
        return np.bincount(previous, weights=self.bigram_counts, minlength=self.vocab_size)

    @cached_property
    def _continuation(self) -> np.ndarray:
        size = self.vocab_size
        types = np.bincount(self.bigram_keys % size, minlength=size)  # contexts each token was seen after
        total = types.sum()
        if not total:
            return np.full(size, 1.0 / size)
        discount = discount_of(types)
        left = discount * np.count_nonzero(types) / total
        return np.maximum(types - discount, 0.0) / total + left / size


def discount_of(counts: np.ndarray) -> float:
    """Absolute discount n1 / (n1 + 2 n2) of Ney, Essen and Kneser; 0.5 where no count is 1.

    Without a count of 1 the estimate is 0, which would leave unseen bigrams no probability.
    """
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once else 0.5


def _stream(tokens: np.ndarray, boundary: tuple[int, int]) -> np.ndarray:
    start, end = boundary
    return np.concatenate([[start], tokens, [end]]).astype(np.int64)


def _merge(keys: np.ndarray, counts: np.ndarray, held: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    fresh, fresh_counts = np.unique(np.concatenate([*held, keys[:0]]), return_counts=True)
    if not len(keys):
        return fresh, fresh_counts
    merged, where = np.unique(np.concatenate([keys, fresh]), return_inverse=True)
    summed = np.bincount(where, weights=np.concatenate([counts, fresh_counts]), minlength=len(merged))
    return merged, summed.astype(np.int64)

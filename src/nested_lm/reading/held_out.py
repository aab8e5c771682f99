"""Negative log-likelihood of held-out documents, under two ways of reading them.

window: documents are cut into pieces of the training context and each piece starts from a fresh state.
streaming: a document is read whole, with the state carried along; constant memory.

Shapes: V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from nested_lm.data.packing import Pieces
from nested_lm.data.shards import TokenDataset
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.state import StreamState
from nested_lm.reading.reader import Reader, Scored
from nested_lm.reading.stream import Boundary

_FIRST_BIN = 4  # positions 0 to 3 share a bin; the ones after double in width


@dataclass(frozen=True)
class DocumentScores:
    """Sums of each scored document, in the order the documents were given.

    nats, tokens: (n,). position_nats, position_tokens: (n, bins), by position since the last fresh state;
    bin b holds positions edges[b] to edges[b + 1] - 1.
    """

    nats: np.ndarray
    tokens: np.ndarray
    position_nats: np.ndarray
    position_tokens: np.ndarray
    edges: tuple[int, ...]
    tokens_per_s: float


def position_edges(longest: int) -> tuple[int, ...]:
    """Edges of position bins that double in width: 0, 4, 8, 16, ... up to the first one past `longest`."""
    edges = [0, _FIRST_BIN]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return tuple(edges)


def score_window(
    model: LanguageModel,
    dataset: TokenDataset,
    documents: Sequence[int],
    *,
    context_length: int,
    batch_size: int,
    max_pieces: int | None = None,
) -> DocumentScores:
    """Score documents in pieces of `context_length` tokens, each from a fresh state.

    Args:
        documents: indices into the data set.
        batch_size: pieces read side by side.
        max_pieces: score this many pieces of a document, spread evenly over it; None: all.

    Raises:
        NumericsError: a score is not finite.
    """
    pieces = Pieces.of(dataset, np.asarray(documents, dtype=np.int64), context_length)
    located = pieces.locate(spread_pieces(pieces, max_pieces))
    places = {document: place for place, document in enumerate(documents)}
    start, end = dataset.boundary
    parts, owners, streams = [], [], {}
    for document, first, length in zip(*(column.tolist() for column in located), strict=True):
        if document not in streams:
            streams = {document: np.concatenate([[start], dataset.tokens(document), [end]])}
        parts.append(Scored(streams[document][first : first + length + 1]))
        owners.append(places[document])
    return _score(model, parts, owners, len(documents), batch_size, None)


def spread_pieces(pieces: Pieces, limit: int | None) -> np.ndarray:
    """Numbers of at most `limit` pieces of each document, spread evenly from its first to its last; None: all."""
    if limit is None:
        return np.arange(pieces.count)
    counts = np.diff(pieces.first)
    chosen = [
        first + np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)
        for first, count in zip(pieces.first, counts, strict=False)
    ]
    return np.concatenate(chosen)


def scored_sizes(
    dataset: TokenDataset,
    documents: Sequence[int],
    *,
    context_length: int,
    max_pieces: int | None,
    token_bytes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and tokens that `score_window` scores of each document. token_bytes: (V,) bytes of each token."""
    pieces = Pieces.of(dataset, np.asarray(documents, dtype=np.int64), context_length)
    located = pieces.locate(spread_pieces(pieces, max_pieces))
    size, count = dict.fromkeys(documents, 0), dict.fromkeys(documents, 0)
    for document, start, length in zip(*(column.tolist() for column in located), strict=True):
        stop = min(start + length, dataset.documents[document].tokens)  # the end of text has no bytes
        size[document] += int(token_bytes[dataset.tokens(document, start, stop)].sum())
        count[document] += length
    return np.array([size[d] for d in documents], dtype=np.float64), np.array([count[d] for d in documents])


def score_streaming(
    model: LanguageModel,
    documents: Sequence[Int[np.ndarray, "T"]],
    *,
    batch_size: int,
    state: StreamState | None = None,
    boundary: tuple[int, int] = (0, 0),
) -> DocumentScores:
    """Score whole documents with carried state.

    Args:
        documents: token ids without start and end tokens.
        batch_size: documents read side by side; those of like length share a batch.
        state: one row that every document goes on from; None: a fresh one. It is forked, never changed.
        boundary: the tokens that start and end every document.

    Raises:
        NumericsError: a score is not finite.
    """
    assert model.has_constant_state, "a state that grows with the document cannot be streamed"
    parts = [Boundary(*boundary).scored(document) for document in documents]
    return _score(model, parts, range(len(parts)), len(parts), batch_size, state)


def _score(
    model: LanguageModel,
    parts: Sequence[Scored],
    owners: Sequence[int],
    count: int,
    batch_size: int,
    state: StreamState | None,
) -> DocumentScores:
    """Score parts of `count` documents and add them up. owners: the document of each part."""
    started = time.perf_counter()
    found = Reader(model, rows=batch_size).score([(part,) for part in parts], starts=state)
    seconds = time.perf_counter() - started
    edges = position_edges(max(len(part.tokens) - 1 for part in parts))
    nats = np.zeros((count, len(edges) - 1))
    tokens = np.zeros(nats.shape, dtype=np.int64)
    for owner, (scores,) in zip(owners, found, strict=True):
        cells = np.searchsorted(edges, np.arange(len(scores.nats)), side="right") - 1
        nats[owner] += np.bincount(cells, weights=scores.nats, minlength=nats.shape[1])
        tokens[owner] += np.bincount(cells, minlength=nats.shape[1])
    return DocumentScores(
        nats=nats.sum(axis=1),
        tokens=tokens.sum(axis=1),
        position_nats=nats,
        position_tokens=tokens,
        edges=edges,
        tokens_per_s=float(tokens.sum() / seconds),
    )

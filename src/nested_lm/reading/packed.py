"""Negative log-likelihood of held-out documents, under two ways of reading them, and of given answers.

window: documents are cut into pieces of the training context and each piece starts from a fresh state.
streaming: a document is read whole, in segments, with the state carried along; constant memory.

Shapes: B rows of a batch, T tokens of a piece or segment, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nested_lm.data.packing import IGNORED_TARGET, Pieces, Placed, fill, pack
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import NumericsError
from nested_lm.nn.model import LanguageModel, token_losses
from nested_lm.nn.nonfinite import locate_nonfinite
from nested_lm.nn.state import StreamState

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


class _Sums:
    """Adds losses up by document and by position."""

    def __init__(self, num_documents: int, longest: int) -> None:
        self.edges = position_edges(longest)
        self.shape = (num_documents, len(self.edges) - 1)
        self.nats = np.zeros(self.shape)
        self.tokens = np.zeros(self.shape, dtype=np.int64)
        self.started = time.perf_counter()

    def add(self, losses: np.ndarray, document: np.ndarray, position: np.ndarray) -> None:
        """Add scored tokens: three arrays of one shape."""
        cell = document * self.shape[1] + np.searchsorted(self.edges, position, side="right") - 1
        size = self.shape[0] * self.shape[1]
        self.nats += np.bincount(cell, weights=losses, minlength=size).reshape(self.shape)
        self.tokens += np.bincount(cell, minlength=size).reshape(self.shape)

    def finish(self) -> DocumentScores:
        tokens = self.tokens.sum(axis=1)
        seconds = time.perf_counter() - self.started
        return DocumentScores(
            nats=self.nats.sum(axis=1),
            tokens=tokens,
            position_nats=self.nats,
            position_tokens=self.tokens,
            edges=self.edges,
            tokens_per_s=float(tokens.sum() / seconds),
        )


@torch.no_grad()
def score_window(
    model: LanguageModel,
    dataset: TokenDataset,
    documents: Sequence[int],
    *,
    context_length: int,
    batch_size: int,
    align: int,
    max_pieces: int | None = None,
) -> DocumentScores:
    """Score documents in pieces of `context_length` tokens, each from a fresh state, packed into rows.

    Args:
        documents: indices into the data set.
        align: pieces start at multiples of it, as in training.
        max_pieces: score this many pieces of a document, spread evenly over it; None: all.
    """
    device = next(model.parameters()).device
    pieces = Pieces.of(dataset, np.asarray(documents, dtype=np.int64), context_length)
    numbers = spread_pieces(pieces, max_pieces)
    lengths = pieces.locate(numbers)[2]
    rows = [
        [Placed(int(numbers[placed.piece]), placed.column) for placed in row]
        for row in pack(lengths, context_length, align)
    ]
    place = np.full(len(dataset.documents), -1)
    place[pieces.documents] = np.arange(len(documents))
    sums = _Sums(len(documents), int(lengths.max()))
    for start in range(0, len(rows), batch_size):
        batch = fill(dataset, pieces, rows[start : start + batch_size])
        targets = torch.from_numpy(batch.targets).to(device)
        resets = torch.from_numpy(batch.resets).to(device)
        inputs = torch.from_numpy(batch.inputs).to(device)
        logits = model(inputs, resets=resets).logits
        losses = token_losses(logits, targets).double().cpu().numpy()
        _require_finite(losses, model, inputs, resets=resets, state=None)
        column = np.arange(context_length)
        fresh = np.maximum.accumulate(np.where(batch.resets, column, 0), axis=1)
        scored = batch.targets != IGNORED_TARGET
        sums.add(losses[scored], place[batch.documents[scored]], (column - fresh)[scored])
    return sums.finish()


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


@torch.no_grad()
def score_streaming(
    model: LanguageModel,
    documents: Sequence[Int[np.ndarray, "T"]],
    *,
    segment_length: int,
    batch_size: int,
    state: StreamState | None = None,
    boundary: tuple[int, int] = (0, 0),
) -> DocumentScores:
    """Score whole documents with carried state, `segment_length` tokens at a time.

    Documents of like length share a batch; rows leave it when their document ends.

    Args:
        documents: token ids without start and end tokens.
        state: one row that every document goes on from; None: a fresh one. It is forked, never changed.
        boundary: the tokens that start and end every document.
    """
    assert model.has_constant_state, "a state that grows with the document cannot be streamed"
    device = next(model.parameters()).device
    lengths = np.array([len(tokens) + 1 for tokens in documents])
    order = np.argsort(-lengths, kind="stable")
    sums = _Sums(len(documents), int(lengths.max()))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        carried = model.initial_state(1) if state is None else state
        carried = carried.select(torch.zeros(len(rows), dtype=torch.long))
        inputs, targets = _padded(documents, rows, lengths, boundary)
        for start in range(0, inputs.shape[1], segment_length):
            active = int((lengths[rows] > start).sum())  # longest first: the rows that go on come first
            if active < len(rows):
                rows = rows[:active]
                carried = carried.select(torch.arange(active))
            part = slice(start, start + segment_length)
            wanted = targets[:active, part]
            given = inputs[:active, part].to(device)
            output = model(given, state=carried)
            losses = token_losses(output.logits, wanted.to(device)).double().cpu().numpy()
            _require_finite(losses, model, given, resets=None, state=carried)
            carried = output.state
            row, column = np.nonzero(wanted.numpy() != IGNORED_TARGET)
            sums.add(losses[row, column], rows[row], column + start)
    return sums.finish()


def _padded(
    documents: Sequence[np.ndarray], rows: np.ndarray, lengths: np.ndarray, boundary: tuple[int, int]
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and targets of some documents with start and end tokens, padded on the right."""
    inputs = np.zeros((len(rows), lengths[rows].max()), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED_TARGET)
    start, end = boundary
    for row, document in enumerate(rows):
        tokens = documents[document]
        inputs[row, 0] = start
        inputs[row, 1 : len(tokens) + 1] = tokens
        targets[row, : len(tokens)] = tokens
        targets[row, len(tokens)] = end
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _require_finite(
    losses: np.ndarray, model: LanguageModel, inputs: Tensor, *, resets: Tensor | None, state: StreamState | None
) -> None:
    """Refuse losses that are not finite, with the place in the model where the first such value arises.

    Raises:
        NumericsError: names layer, part or memory, row and token.
    """
    if np.isfinite(losses).all():
        return
    found = locate_nonfinite(model, inputs, resets=resets, state=state)
    where = (
        f"first seen in {found}" if found else "a replay in parts is finite: rounding decides, so it is near overflow"
    )
    raise NumericsError(
        f"a score is not finite; {where}. Evaluate an earlier checkpoint, or train with a lower rate; "
        "`nested-lm audit` on the checkpoint says whether its memories stay bounded"
    )


class AnswerScores(NamedTuple):
    """Each row's answer under teacher forcing. exact: greedy decoding would give the answer."""

    nats: Float[np.ndarray, "B"]
    tokens: Int[np.ndarray, "B"]
    exact: np.ndarray  # (B,) bool
    first_rank: Int[np.ndarray, "B"]  # of the first answer token; 1 is the most likely


@torch.no_grad()
def score_answers(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    segment_length: int | None,
) -> AnswerScores:
    """Score an answer after each prompt. Prompts have one length and begin with the start token.

    Greedy decoding gives the answer exactly when each of its tokens is the first choice after the ones before
    it, so one teacher-forced pass tells both scores.

    Args:
        segment_length: tokens read at a time with carried state; None reads everything in one call.
    """
    device = next(model.parameters()).device
    length = len(prompts[0])
    assert all(len(prompt) == length for prompt in prompts), "prompts of one batch have one length"
    sizes = np.array([len(answer) for answer in answers])
    inputs = np.zeros((len(prompts), length + int(sizes.max()) - 1), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED_TARGET)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        inputs[row, :length] = prompt
        inputs[row, length : length + len(answer) - 1] = answer[:-1]
        targets[row, length - 1 : length - 1 + len(answer)] = answer
    nats = np.zeros(len(prompts))
    wrong = np.zeros(len(prompts), dtype=np.int64)
    first_rank = np.zeros(len(prompts), dtype=np.int64)
    step = segment_length or inputs.shape[1]
    state = None
    for start in range(0, inputs.shape[1], step):
        wanted = torch.from_numpy(targets[:, start : start + step])
        given = torch.from_numpy(inputs[:, start : start + step]).to(device)
        output, before = model(given, state=state), state
        state = output.state
        row, column = torch.nonzero(wanted != IGNORED_TARGET, as_tuple=True)
        if not len(row):
            continue
        logits = output.logits[row.to(device), column.to(device)].float()  # (answer tokens, V)
        target = wanted[row, column].to(device)[:, None]
        chosen = logits.gather(1, target)
        # Ties count against the model: equal logits for all tokens must not pass for knowing the answer.
        rank = (logits >= chosen).sum(dim=1).cpu().numpy()
        losses = -logits.log_softmax(dim=1).gather(1, target)[:, 0].double().cpu().numpy()
        _require_finite(losses, model, given, resets=None, state=before)
        at = row.numpy()
        nats += np.bincount(at, weights=losses, minlength=len(prompts))
        wrong += np.bincount(at, weights=rank != 1, minlength=len(prompts)).astype(np.int64)
        opens = column.numpy() + start == length - 1
        first_rank[at[opens]] = rank[opens]
    return AnswerScores(nats, sizes, wrong == 0, first_rank)

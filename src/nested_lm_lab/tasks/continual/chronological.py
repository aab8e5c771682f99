"""Chronological stream: loss on each segment after each segment, and what it says about forgetting.

A run that reads periods in the order of time keeps a checkpoint at each border: `period-0` before training,
`period-t` after segment t. L[t][s] is the loss of checkpoint t on the held-out documents of segment s, for
S segments, t = 0..S and s = 1..S (column s - 1 of the arrays here). Lower is better.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nested_lm.checkpoint import LoadedCheckpoint
from nested_lm.data.chronology import ReadingGroup
from nested_lm.data.shards import TokenDataset
from nested_lm.data.token_bytes import bytes_per_token
from nested_lm.errors import DataError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.held_out import score_window, scored_sizes
from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.tasks.continual.matrix import accuracy, backward_transfer, forgetting, forward_transfer, plasticity
from nested_lm_lab.tasks.continual.schema import ContinualMetrics, Segment
from nested_lm_lab.tasks.language_modelling import BITS, Reading

TASK_VERSION = "1"

_COMBINED = "squares of segments' intervals added:"


@dataclass(frozen=True)
class SegmentDocuments:
    """Held-out documents of one segment: indices into each held-out split, and the bytes and tokens scored of them."""

    group: ReadingGroup
    indices: tuple[list[int], ...]  # one list a split
    bytes: np.ndarray  # of each
    tokens: int  # of all


def segment_documents(
    splits: Sequence[TokenDataset],
    groups: Sequence[ReadingGroup],
    *,
    seed: int,
    context_length: int,
    max_pieces: int | None,
) -> list[SegmentDocuments]:
    """Collect the held-out documents of every segment, and what `score_segments` scores of them.

    seed: of the run, which also deals out the documents of a shuffled stream.

    Raises DataError when a segment has none: its column could not be filled.
    """
    token_bytes = bytes_per_token(splits[0])
    found = []
    for group in groups:
        indices = tuple(_documents(split, group, seed) for split in splits)
        if not any(indices):
            raise DataError(
                f"{splits[0].folder}: no validation or test document is dated in {group.label}, so "
                "forgetting cannot be measured there; use fewer train.stream.periods or larger held-out "
                "shares (data.split)"
            )
        sizes = [
            scored_sizes(split, chosen, context_length=context_length, max_pieces=max_pieces, token_bytes=token_bytes)
            for split, chosen in zip(splits, indices, strict=True)
            if chosen
        ]
        bytes_of, tokens_of = (np.concatenate(column) for column in zip(*sizes, strict=True))
        found.append(SegmentDocuments(group, indices, bytes_of, int(tokens_of.sum())))
    return found


def _documents(split: TokenDataset, group: ReadingGroup, seed: int) -> list[int]:
    """Documents of a group; none where the split has none, which another split may make up for."""
    try:
        return group.documents(split, seed=seed)
    except DataError:
        return []


def score_segments(
    model: LanguageModel,
    splits: Sequence[TokenDataset],
    segments: Sequence[SegmentDocuments],
    *,
    reading: Reading,
    max_pieces: int | None,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Nats and tokens of each held-out document of each segment under one checkpoint, window protocol.

    on_tokens: is told how many tokens have been scored, a segment at a time.
    """
    nats, tokens = [], []
    for segment in segments:
        scores = [
            score_window(
                model,
                split,
                chosen,
                context_length=reading.context_length,
                batch_size=reading.batch_size,
                max_pieces=max_pieces,
            )
            for split, chosen in zip(splits, segment.indices, strict=True)
            if chosen
        ]
        nats.append(np.concatenate([part.nats for part in scores]))
        tokens.append(np.concatenate([part.tokens for part in scores]))
        if on_tokens is not None:
            on_tokens(segment.tokens)
    return nats, tokens


def matrix_over(
    borders: Iterable[LoadedCheckpoint],
    score: Callable[[LoadedCheckpoint], tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
    segments: Sequence[SegmentDocuments],
    bootstrap: Bootstrap,
) -> ContinualMetrics:
    """Score every checkpoint of the borders, in order, one in memory at a time.

    score: nats and scored tokens, [s] arrays over the documents of segment s.
    """
    nats, trained = [], []
    tokens: Sequence[np.ndarray] = ()
    for loaded in borders:
        scored, tokens = score(loaded)
        nats.append(scored)
        trained.append(loaded.tokens)
    return summarise(nats, tokens, segments, trained_tokens=trained[1:], bootstrap=bootstrap)


def summarise(
    nats: Sequence[Sequence[np.ndarray]],
    tokens: Sequence[np.ndarray],
    segments: Sequence[SegmentDocuments],
    *,
    trained_tokens: Sequence[int],
    bootstrap: Bootstrap,
) -> ContinualMetrics:
    """Build the loss matrices and their metrics with intervals.

    Args:
        nats: [t][s] arrays over the documents of segment s, t = 0..S.
        tokens: [s] arrays of scored tokens.
        trained_tokens: [s] training tokens seen at the end of segment s.
    """
    columns = [np.stack([row[s] for row in nats], axis=1) for s in range(len(segments))]  # (n_s, S + 1)
    bits_per_byte = _matrix(columns, [segment.bytes for segment in segments], bootstrap, BITS)
    value = np.stack(
        [BITS * c.sum(axis=0) / segment.bytes.sum() for c, segment in zip(columns, segments, strict=True)],
        axis=1,
    )
    drawn = []
    for s, (column, segment) in enumerate(zip(columns, segments, strict=True)):
        # Segments are drawn apart from each other; every checkpoint is scored on the same draw.
        top, bottom = replace(bootstrap, seed=bootstrap.seed + s).resample(column, segment.bytes)
        drawn.append(BITS * top / bottom[:, None])
    resampled = np.stack(drawn, axis=2)  # (samples, S + 1, S)
    documents = sum(len(segment.bytes) for segment in segments)

    def interval(metric: np.ndarray, over: np.ndarray, n: int) -> Interval:
        return bootstrap.percentile(float(metric), over, n)

    size = len(segments)
    forgotten, forgotten_drawn = forgetting(value), forgetting(resampled)
    return ContinualMetrics(
        kind="continual",
        segments=tuple(
            Segment(
                label=segment.group.label,
                periods=segment.group.periods,
                documents=len(segment.bytes),
                bytes=int(segment.bytes.sum()),
                tokens=int(scored.sum()),
                trained_tokens=trained,
            )
            for segment, scored, trained in zip(segments, tokens, trained_tokens, strict=True)
        ),
        bits_per_byte=bits_per_byte,
        nats_per_token=_matrix(columns, tokens, bootstrap, 1.0),
        forgetting=tuple(
            tuple(
                interval(forgotten[t, s], forgotten_drawn[:, t, s], len(segments[s].bytes)) if s <= t else None
                for s in range(size)
            )
            for t in range(size)
        ),
        backward_transfer=interval(backward_transfer(value), backward_transfer(resampled), documents),
        forward_transfer=interval(forward_transfer(value), forward_transfer(resampled), documents),
        plasticity=interval(plasticity(value), plasticity(resampled), documents),
        accuracy=interval(accuracy(value), accuracy(resampled), documents),
    )


def mean_forgetting(metrics: ContinualMetrics) -> Interval:
    """Mean at the end over all segments but the last, which nothing followed, with an interval from theirs.

    Segments have documents of their own, drawn apart from each other, so that the mean's distance to its limits is the
    root of the summed squares of theirs, divided by their number; on both sides by itself.

    Source: Zou and Donner, Statistics in Medicine 27 (2008), "method of variance estimates recovery".
    """
    cells = [cell for cell in metrics.forgetting[-1][:-1] if cell is not None]
    value, n = float(np.mean([cell.value for cell in cells])), sum(cell.n for cell in cells)
    known = [(cell.value, cell.low, cell.high) for cell in cells if cell.low is not None and cell.high is not None]
    if len(known) < len(cells):
        return Interval(value=value, low=None, high=None, n=n, method="none: a segment with one document")
    below, above = (math.sqrt(sum((cell[0] - cell[side]) ** 2 for cell in known)) / len(known) for side in (1, 2))
    return Interval(value=value, low=value - below, high=value + above, n=n, method=f"{_COMBINED} {cells[0].method}")


def _matrix(
    columns: Sequence[np.ndarray], denominators: Sequence[np.ndarray], bootstrap: Bootstrap, scale: float
) -> tuple[tuple[Interval, ...], ...]:
    return tuple(
        tuple(
            bootstrap.ratio(column[:, t], bottom, scale=scale)
            for column, bottom in zip(columns, denominators, strict=True)
        )
        for t in range(columns[0].shape[1])
    )

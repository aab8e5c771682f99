"""Chronological stream: loss on each segment after each segment, and what it says about forgetting.

A run that reads periods in the order of time keeps a checkpoint at each border: `period-0` before training,
`period-t` after segment t. L[t][s] is the loss of checkpoint t on the held-out documents of segment s, for
S segments, t = 0..S and s = 1..S (column s - 1 of the arrays here). Lower is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from nested_lm.data.shards import TokenDataset
from nested_lm.data.token_bytes import bytes_per_token
from nested_lm.errors import DataError
from nested_lm.eval.bootstrap import Bootstrap
from nested_lm.eval.language_modelling import BITS, Reading
from nested_lm.eval.schema import ContinualMetrics, Interval, Segment
from nested_lm.eval.scoring import score_window, scored_bytes
from nested_lm.nn.model import LanguageModel

TASK_VERSION = "1"

Losses = Float[np.ndarray, "*resamples rows segments"]


def forgetting(losses: Losses) -> Float[np.ndarray, "*resamples segments segments"]:
    """F[t][s] = L[t][s] - min over s <= u <= t of L[u][s], for t >= s; NaN above the diagonal.

    What the model knew of a segment before it read it (u < s) does not count. Never negative. Row t - 1 is
    checkpoint t.
    """
    trained = losses[..., 1:, :]
    read = np.tril(np.ones(trained.shape[-2:], dtype=bool))
    best = np.minimum.accumulate(np.where(read, trained, np.inf), axis=-2)
    return np.where(read, trained - best, np.nan)


def backward_transfer(losses: Losses) -> np.ndarray:
    """BWT = -mean over s < S of (L[S][s] - L[s][s]). Positive: later segments helped earlier ones."""
    return -(losses[..., -1, :] - _diagonal(losses))[..., :-1].mean(axis=-1)


def forward_transfer(losses: Losses) -> np.ndarray:
    """FWT = -mean over s > 1 of (L[s-1][s] - L[0][s]). Positive: earlier segments helped later ones."""
    before = np.diagonal(losses[..., :-1, :], axis1=-2, axis2=-1)  # L[s-1][s]
    return -(before - losses[..., 0, :])[..., 1:].mean(axis=-1)


def plasticity(losses: Losses) -> np.ndarray:
    """Mean over s of L[s][s]: how well a segment is learnt when it is read."""
    return _diagonal(losses).mean(axis=-1)


def accuracy(losses: Losses) -> np.ndarray:
    """ACC = mean over s of L[S][s]: loss over all segments at the end."""
    return losses[..., -1, :].mean(axis=-1)


def _diagonal(losses: Losses) -> np.ndarray:
    return np.diagonal(losses[..., 1:, :], axis1=-2, axis2=-1)


@dataclass(frozen=True)
class SegmentDocuments:
    """Held-out documents of one segment: indices into each held-out split, and the bytes scored of each."""

    periods: tuple[int, ...]
    indices: tuple[list[int], ...]  # one list a split
    bytes: np.ndarray


def segment_documents(
    splits: Sequence[TokenDataset],
    plan: Sequence[tuple[int, ...]],
    *,
    context_length: int,
    max_pieces: int | None,
) -> list[SegmentDocuments]:
    """Collect the held-out documents of every segment, and the bytes that `score_segments` scores of them.

    Raises DataError when a segment has none: its column could not be filled.
    """
    token_bytes = bytes_per_token(splits[0])
    found = []
    for periods in plan:
        indices = tuple(
            [index for index, row in enumerate(split.documents) if row.period in periods] for split in splits
        )
        if not any(indices):
            labels = [splits[0].periods[period].label for period in periods]
            raise DataError(
                f"{splits[0].folder}: no validation or test document is dated in {', '.join(labels)}, so "
                "forgetting cannot be measured there; use fewer train.stream.periods or larger held-out "
                "shares (data.split)"
            )
        sizes = [
            scored_bytes(split, chosen, context_length=context_length, max_pieces=max_pieces, token_bytes=token_bytes)
            for split, chosen in zip(splits, indices, strict=True)
            if chosen
        ]
        found.append(SegmentDocuments(periods, indices, np.concatenate(sizes)))
    return found


def score_segments(
    model: LanguageModel,
    splits: Sequence[TokenDataset],
    segments: Sequence[SegmentDocuments],
    *,
    reading: Reading,
    max_pieces: int | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Nats and tokens of each held-out document of each segment under one checkpoint, window protocol."""
    nats, tokens = [], []
    for segment in segments:
        scores = [
            score_window(
                model,
                split,
                chosen,
                context_length=reading.context_length,
                batch_size=reading.batch_size,
                align=reading.align,
                max_pieces=max_pieces,
            )
            for split, chosen in zip(splits, segment.indices, strict=True)
            if chosen
        ]
        nats.append(np.concatenate([part.nats for part in scores]))
        tokens.append(np.concatenate([part.tokens for part in scores]))
    return nats, tokens


def summarise(
    nats: Sequence[Sequence[np.ndarray]],
    tokens: Sequence[np.ndarray],
    segments: Sequence[SegmentDocuments],
    *,
    labels: Sequence[str],
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
                label=label,
                periods=segment.periods,
                documents=len(segment.bytes),
                bytes=int(segment.bytes.sum()),
                tokens=int(scored.sum()),
                trained_tokens=trained,
            )
            for label, segment, scored, trained in zip(labels, segments, tokens, trained_tokens, strict=True)
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

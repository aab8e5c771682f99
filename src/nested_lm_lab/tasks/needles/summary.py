"""From rows to intervals: by length, by depth, against controls, and how long a text may be.

Intervals by length count samples, not rows: the depths of a sample share its text, so they are not independent.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nested_lm_lab.evaluation.bootstrap import Bootstrap, wilson
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.tasks.needles.metrics import (
    Cell,
    ControlRows,
    Controls,
    EffectiveLength,
    LengthScores,
    NeedleLength,
    NeedleTask,
    Rows,
    Score,
)

if TYPE_CHECKING:
    from nested_lm_lab.tasks.needles.measure import ControlRow, Measured, Row

THRESHOLDS = (0.5, 0.856)
"""Of effective lengths. The second is RULER's: what Llama-2-7B reaches at 4,096 tokens (arXiv 2404.06654)."""

_OUTPUT_CHARACTERS = 80


def summarise(measured: "Measured", bootstrap: Bootstrap) -> LengthScores:
    """Make a length's part of the result file."""
    rows = [row for row in measured.rows if row.has_needle]
    empty = [row for row in measured.rows if not row.has_needle]
    depths = sorted({row.depth for row in rows if row.depth is not None})
    cells = tuple(_cell(depth, [row for row in rows if row.depth == depth], bootstrap) for depth in depths)
    without = {row.sample: row.nats for row in empty}
    worth = _by_sample(rows, [without[row.sample] - row.nats for row in rows])
    return LengthScores(
        score=_score_rows(rows, bootstrap),
        worth=bootstrap.mean(worth),
        controls=_controls(rows, empty, measured.controls, bootstrap),
        cells=cells,
        rows=_columns(rows),
        control_rows=_control_columns(empty, measured.controls),
        state_bytes=measured.state_bytes,
        tokens=measured.tokens,
        tokens_read=measured.tokens_read,
        seconds=measured.seconds,
    )


def effective_lengths(lengths: Sequence[NeedleLength]) -> tuple[EffectiveLength, ...]:
    """Find for each threshold the longest length up to which every length's lower bound reaches it."""
    found = []
    for threshold in THRESHOLDS:
        longest = None
        for entry in sorted(lengths, key=lambda entry: entry.length):
            match = None if entry.scores is None else entry.scores.score.match
            if match is None or match.low is None or match.low < threshold:
                break
            longest = entry.length
        found.append(EffectiveLength(threshold=threshold, length=longest))
    return tuple(found)


def effective_words(task: NeedleTask, found: EffectiveLength) -> str:
    """An effective length in words. Too few samples for any score to show one is something else than none."""
    if found.length is not None:
        return f"{found.length:,}"
    shortest = task.lengths[0].scores
    if shortest is None:
        return "not measured"
    n = shortest.score.exact.n
    perfect = wilson(n, n).low
    assert perfect is not None
    return f"not decidable with {n} sample{'s'[: n > 1]}" if perfect < found.threshold else "none"


def curve_lines(tasks: Sequence[NeedleTask]) -> Iterator[str]:
    """The share found at each length, and the effective lengths: two lines a task, for the terminal."""
    for task in tasks:
        yield f"  {task.task}: match {', '.join(_match_at(entry) for entry in task.lengths)}"
        yield f"  {effective_line(task)}"


def _match_at(entry: NeedleLength) -> str:
    match = None if entry.scores is None else entry.scores.score.match
    return f"{'not read' if match is None else match.text(2)} at {entry.length:,}"


def effective_line(task: NeedleTask) -> str:
    """The effective lengths of a task, for the terminal."""
    found = (f"{effective_words(task, entry)} (match at least {entry.threshold:g})" for entry in task.effective)
    return f"{task.task}: effective length {', '.join(found)}"


def length_line(task: str, entry: NeedleLength) -> str:
    """One line about a length, for the terminal."""
    where = f"{task} at {entry.length:,} tokens"
    if entry.scores is None:
        return f"{where}: {entry.stopped}"
    scores, control = entry.scores, entry.scores.controls.no_needle
    match = scores.score.match
    assert match is not None
    assert control.match is not None
    return (
        f"{where}: match {match.value:.3f} [{match.low:.3f}, {match.high:.3f}], without needle "
        f"{control.match.value:.3f}; {scores.score.nats.value:.2f} nats, needle saves {scores.worth.value:+.3f}; "
        f"{scores.tokens / max(scores.seconds, 1e-9):,.0f} tokens/s"
    )


def _by_sample(rows: "Sequence[Row] | Sequence[ControlRow]", values: Sequence[float]) -> np.ndarray:
    """Mean of the values of each sample."""
    samples = np.array([row.sample for row in rows])
    return np.array([np.asarray(values, dtype=np.float64)[samples == number].mean() for number in np.unique(samples)])


def _share(rows: "Sequence[Row] | Sequence[ControlRow]", values: Sequence[float]) -> Interval:
    means = _by_sample(rows, values)
    return wilson(float(means.sum()), len(means))


def _score(
    rows: "Sequence[Row] | Sequence[ControlRow]",
    scores: Sequence[tuple[float, bool, int]],
    matches: Sequence[float] | None,
    bootstrap: Bootstrap,
) -> Score:
    nats, exact, ranks = zip(*scores, strict=True)
    return Score(
        match=None if matches is None else _share(rows, matches),
        exact=_share(rows, exact),
        nats=bootstrap.mean(_by_sample(rows, nats)),
        median_rank=float(np.median(ranks)),
    )


def _score_rows(rows: "Sequence[Row]", bootstrap: Bootstrap) -> Score:
    return _score(rows, [(row.nats, row.exact, row.rank) for row in rows], [row.match for row in rows], bootstrap)


def _cell(depth: float, rows: "Sequence[Row]", bootstrap: Bootstrap) -> Cell:
    distances = [row.distance for row in rows if row.distance is not None]
    return Cell(depth=depth, distance=round(float(np.median(distances))), score=_score_rows(rows, bootstrap))


def _controls(
    rows: "Sequence[Row]", empty: "Sequence[Row]", controls: "Sequence[ControlRow]", bootstrap: Bootstrap
) -> Controls:
    frozen = [row.frozen for row in rows if row.frozen is not None]
    only = [row.only for row in controls if row.only is not None]
    unwritten = [row.unwritten for row in controls if row.unwritten is not None]
    return Controls(
        no_needle=_score_rows(empty, bootstrap),
        needle_only=_score(controls, only, None, bootstrap) if only else None,
        reset=_score(controls, [row.reset for row in controls], None, bootstrap),
        frozen=_score(rows, frozen, None, bootstrap) if frozen else None,
        unwritten=_score(controls, unwritten, None, bootstrap) if unwritten else None,
    )


def _columns(rows: "Sequence[Row]") -> Rows:
    frozen = [row.frozen for row in rows if row.frozen is not None]
    return Rows(
        sample=tuple(row.sample for row in rows),
        depth=tuple(row.depth for row in rows),
        distance=tuple(row.distance for row in rows),
        match=tuple(row.match for row in rows),
        exact=tuple(row.exact for row in rows),
        nats=tuple(row.nats for row in rows),
        rank=tuple(row.rank for row in rows),
        frozen_exact=tuple(exact for _, exact, _ in frozen) if frozen else None,
        frozen_nats=tuple(nats for nats, _, _ in frozen) if frozen else None,
        output=tuple(row.output[:_OUTPUT_CHARACTERS] for row in rows),
    )


def _control_columns(empty: "Sequence[Row]", controls: "Sequence[ControlRow]") -> ControlRows:
    only = [row.only for row in controls if row.only is not None]
    unwritten = [row.unwritten for row in controls if row.unwritten is not None]
    return ControlRows(
        no_needle_match=tuple(row.match for row in empty),
        no_needle_exact=tuple(row.exact for row in empty),
        no_needle_nats=tuple(row.nats for row in empty),
        needle_only_exact=tuple(exact for _, exact, _ in only) if only else None,
        needle_only_nats=tuple(nats for nats, _, _ in only) if only else None,
        reset_exact=tuple(row.reset[1] for row in controls),
        reset_nats=tuple(row.reset[0] for row in controls),
        unwritten_exact=tuple(exact for _, exact, _ in unwritten) if unwritten else None,
        unwritten_nats=tuple(nats for nats, _, _ in unwritten) if unwritten else None,
    )

"""Tables of needle curves and of long books: every score beside its controls."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.tables import ABSENT, Cell, Shown, Table, interval_cell
from nested_lm_lab.tasks.needles.metrics import (
    BabilongMetrics,
    BooksMetrics,
    LengthScores,
    NeedleLength,
    NiahMetrics,
    Score,
)
from nested_lm_lab.tasks.needles.stops import explain_stop
from nested_lm_lab.tasks.needles.summary import effective_words

_FREEZING = (
    "frozen: freezes the fast weights from the question on: they are read and no longer written, while the text "
    "before was written as ever, and convolution tails and attention caches go on. unwritten: freezes them from the "
    "first token of the text on (middle depth), so that what is left is not the memory's; - for a model without fast "
    "weights."
)
_EXPLAINED = (
    "Share of the questions whose answer greedy decoding begins with, its interval, and the share of the references in "
    "the output (match) with its own."
)


def needles(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Answers found by task and length, their controls, nats saved and effective lengths."""
    label = runs[0].results[task].label
    return _curves(campaign, runs, task, f"Needles, {label}" if label else "Needles", missing="needle")


def babilong(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """The same of questions about facts in books."""
    return _curves(campaign, runs, task, "Facts in books", missing="facts")


def books(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Loss by position in long books, and what carried state saves."""
    found = []
    for run in runs:
        metrics = run.results[task].metrics
        assert isinstance(metrics, BooksMetrics)
        found.append(metrics)
    rows = [
        (
            Cell("nats / token, carried state", "whole books"),
            *(
                Cell(interval_cell(one.carried).text, f"{interval_cell(one.carried).detail}; {one.books} books")
                for one in found
            ),
        ),
        (Cell("nats / token, fresh state"), *(interval_cell(one.fresh) for one in found)),
        (Cell("saved by carried state", "paired by book"), *(interval_cell(one.saved, signed=True) for one in found)),
        (Cell("perplexity, carried state"), *(interval_cell(one.perplexity) for one in found)),
        (
            Cell("read", "tokens of each book"),
            *(Cell(f"{one.reached:,} of {one.length:,}", one.stopped or "") for one in found),
        ),
        (Cell("tokens / s"), *(Cell(f"{one.tokens_per_s:,.0f}") for one in found)),
    ]
    places = [{(position.first, position.last): position for position in one.positions} for one in found]
    for first, last in sorted({place for one in places for place in one}):
        cells = (
            interval_cell(one[first, last].saved, signed=True) if (first, last) in one else Cell("-") for one in places
        )
        rows.append((Cell("saved", f"positions {first:,} to {last:,}"), *cells))
    text = (
        "Long books read from their start; a state that is merely not fresh saves something too, so what counts is "
        "whether it grows with the position."
    )
    return [Shown("Long books", text, Table(("measure", *_labels(campaign, runs)), tuple(rows)))]


def _curves(campaign: Campaign, runs: Sequence[Run], task: str, title: str, *, missing: str) -> list[Shown]:
    found: list[NiahMetrics | BabilongMetrics] = []
    for run in runs:
        metrics = run.results[task].metrics
        assert isinstance(metrics, NiahMetrics | BabilongMetrics)
        found.append(metrics)
    labels = _labels(campaign, runs)
    text = " ".join([_EXPLAINED, *_emptiness(labels, found)])
    without = f"The same questions without what they need. no {missing}: the text without it; {missing} only: no text "
    without += f"but the {missing}, the ceiling; reset: a fresh state right before the question. " + _FREEZING
    without += " A control of which every score is 0 is one row."
    controls = [
        (f"no {missing}", lambda s: s.controls.no_needle),
        (f"{missing} only", lambda s: s.controls.needle_only),
        ("reset", lambda s: s.controls.reset),
        ("frozen", lambda s: s.controls.frozen),
        ("unwritten", lambda s: s.controls.unwritten),
    ]
    saved = (
        f"Nats a token of the answer that the {missing} in the text saves against the same text without it, paired by "
        f"sample; below it the nats with it. Above 0 is a trace of memory, also where no answer is found."
    )
    return [
        Shown(title, text, Table(("task, tokens", *labels), _by_length(found, _score))),
        Shown(f"{title}: controls", without, Table(("task, tokens", *labels), _controls(found, controls))),
        Shown(f"{title}: nats saved", saved, Table(("task, tokens", *labels), _by_length(found, _worth))),
        Shown(f"{title}: effective length", *_effective(labels, found)),
    ]


def _emptiness(labels: Sequence[str], found: Sequence[NiahMetrics | BabilongMetrics]) -> list[str]:
    """Sentences about arms whose scores are all 0: with `needle only` at 0 too, the curve measures nothing."""
    empty: list[str] = []
    silent: list[str] = []
    for label, metrics in zip(labels, found, strict=True):
        measured = [length.scores for task in metrics.tasks for length in task.lengths if length.scores is not None]
        if not measured or any(_answers(scores.score) for scores in measured):
            continue
        ceilings = [scores.controls.needle_only for scores in measured if scores.controls.needle_only is not None]
        (empty if ceilings and not any(map(_answers, ceilings)) else silent).append(label)
    lines = []
    if empty:
        lines.append(
            f"Every score of {', '.join(empty)} is 0, and so is it with the needle and the question alone "
            "(needle only): "
            "at this size the task is not understood without any text either, so the curves carry no retrieval "
            "information. What is left are the nats saved."
        )
    if silent:
        lines.append(f"Every score of {', '.join(silent)} is 0; what is left are the nats saved.")
    return lines


def _answers(score: Score) -> bool:
    return score.exact.value > 0 or (score.match is not None and score.match.value > 0)


class _Place(NamedTuple):
    """One length of one task. stopped: why it has no scores; empty where it has."""

    entry: NeedleLength
    stopped: str


def _places(metrics: NiahMetrics | BabilongMetrics) -> dict[tuple[str, int], _Place]:
    return {
        (task.task, one.length): _Place(
            one, "" if one.stopped is None else explain_stop(one, task.lengths, metrics.max_state_mib)
        )
        for task in metrics.tasks
        for one in task.lengths
    }


def _by_length(
    found: Sequence[NiahMetrics | BabilongMetrics], cell: Callable[[LengthScores], Cell]
) -> tuple[tuple[Cell, ...], ...]:
    """One row a task and length."""
    lengths = [_places(each) for each in found]
    return tuple(
        (Cell(f"{name}, {length:,}"), *(_length(each.get((name, length)), cell) for each in lengths))
        for name, length in dict.fromkeys(key for each in lengths for key in each)
    )


def _length(place: _Place | None, cell: Callable[[LengthScores], Cell]) -> Cell:
    if place is None:
        return Cell(ABSENT)
    scores = place.entry.scores
    return Cell("stopped", place.stopped) if scores is None else cell(scores)


def _score(scores: LengthScores) -> Cell:
    exact, match = scores.score.exact, scores.score.match
    detail = interval_cell(exact).detail + (f"; n = {exact.n}" if exact.low is not None else "")
    return Cell(f"{exact.value:.2f}", detail + _match(match))


def _worth(scores: LengthScores) -> Cell:
    worth = scores.worth
    span = f"no interval, n = {worth.n}" if worth.low is None else f"{worth.low:+.4f} to {worth.high:+.4f}"
    return Cell(f"{worth.value:+.4f}", f"{span}; with it {scores.score.nats.value:.2f}")


def _controls(
    found: Sequence[NiahMetrics | BabilongMetrics],
    controls: Sequence[tuple[str, Callable[[LengthScores], Score | None]]],
) -> tuple[tuple[Cell, ...], ...]:
    """One row a task and length; one row in all for a control of which every score is 0."""
    rows: list[tuple[Cell, ...]] = []
    for name, control in controls:
        scores = [_scores_of(each, control) for each in found]
        if not any(_answers(score) for each in scores for score in each):
            cells = map(_nothing, found, scores)
            rows.append((Cell("all tasks and lengths", name), *cells))
            continue
        found_rows = _by_length(found, lambda scores, control=control: _control(control(scores)))  # type: ignore[misc]
        rows += [(Cell(row[0].text, name), *row[1:]) for row in found_rows]
    return tuple(rows)


def _control(score: Score | None) -> Cell:
    if score is None:
        return Cell("-")
    return Cell(
        f"{score.exact.value:.2f}",
        f"{interval_cell(score.exact).detail}{_match(score.match)}; {score.nats.value:.2f} nats",
    )


def _match(match: Interval | None) -> str:
    """Match with its interval, as the rest of a detail."""
    if match is None:
        return ""
    span = "" if match.low is None else f", {interval_cell(match).detail}"
    return f"; match {match.value:.2f}{span}"


def _scores_of(metrics: NiahMetrics | BabilongMetrics, control: Callable[[LengthScores], Score | None]) -> list[Score]:
    """Scores of a control at all tasks and lengths that have it."""
    measured = [one.scores for task in metrics.tasks for one in task.lengths if one.scores is not None]
    return [score for scores in measured if (score := control(scores)) is not None]


def _nothing(metrics: NiahMetrics | BabilongMetrics, scores: Sequence[Score]) -> Cell:
    """One cell for many scores of 0. The interval is that of the fewest samples."""
    if not scores:
        places = _places(metrics).values()
        return Cell("stopped", "at every length") if all(place.stopped for place in places) else Cell("-")
    widest = max((score.exact for score in scores), key=lambda exact: exact.high or 0.0)
    nats = [score.nats.value for score in scores]
    kinds = "exact and match" if scores[0].match is not None else "exact"
    return Cell(
        "0.00",
        f"{kinds} 0 in {len(scores)} of {len(scores)} rows; {interval_cell(widest).detail} each; {min(nats):.2f} to "
        f"{max(nats):.2f} nats",
    )


def _effective(labels: Sequence[str], found: Sequence[NiahMetrics | BabilongMetrics]) -> tuple[str, Table]:
    lengths = [
        {(task.task, one.threshold): effective_words(task, one) for task in each.tasks for one in task.effective}
        for each in found
    ]
    rows = tuple(
        (Cell(name, f"match at least {threshold:g}"), *(Cell(each.get((name, threshold), ABSENT)) for each in lengths))
        for name, threshold in dict.fromkeys(key for each in lengths for key in each)
    )
    text = (
        "Longest length up to which the lower bound of match stays at the threshold or above, in tokens. Not "
        "decidable: with so few samples even a perfect score has a lower bound below the threshold."
    )
    return text, Table(("task", *labels), rows)


def _labels(campaign: Campaign, runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(campaign.label(run) for run in runs)

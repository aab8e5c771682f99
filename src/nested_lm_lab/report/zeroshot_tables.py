"""Tables of zero-shot tasks: scores with standard errors beside their floors, memorising, the papers' rows, time."""

from collections.abc import Sequence

import numpy as np

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.tables import ABSENT, Cell, Shown, Table, duration
from nested_lm_lab.tasks.zeroshot.metrics import Arm, Floors, TaskScores, ZeroShotMetrics
from nested_lm_lab.tasks.zeroshot.papers import PaperRow, nearest_rows
from nested_lm_lab.tasks.zeroshot.table import SHORT_NAMES, reading_notes
from nested_lm_lab.tasks.zeroshot.tasks import AVERAGED, TASKS, printed_accuracy

_ACCURACIES = ("acc", "acc_norm")
_BITS = ("wikitext", "bits_per_byte")


def zero_shot(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Everything that a reader has to see of the tasks at once."""
    found: list[ZeroShotMetrics] = []
    for run in runs:
        metrics = run.results[task].metrics
        assert isinstance(metrics, ZeroShotMetrics)
        found.append(metrics)
    labels = tuple(campaign.label(run) for run in runs)
    columns = tuple(
        (name, metric) for name in dict.fromkeys(n for m in found for n in m.data) for metric in TASKS[name].printed
    )
    shown = [_plain(labels, found, columns, _reading([run.results[task] for run in runs]))]
    if any(len(metrics.arms) > 1 for metrics in found):
        shown.append(_memorized(labels, found, columns))
    label = runs[0].results[task].label
    if not label:  # a labelled result is a part, for a purpose of its own
        parameters = [run.results[task].identity.parameters for run in runs]
        shown.append(_papers(labels, found, columns, parameters))
    shown.append(_time(labels, found, [run.results[task].wall_seconds for run in runs]))
    return [one._replace(title=f"{one.title}, {label}") for one in shown] if label else shown


def _plain(
    labels: Sequence[str],
    found: Sequence[ZeroShotMetrics],
    columns: Sequence[tuple[str, str]],
    reading: Sequence[str],
) -> Shown:
    rows = []
    for name, metric in columns:
        floors = next(metrics.floors[name] for metrics in found if name in metrics.floors)
        scores = (_scores(metrics.arms[0], name) for metrics in found)
        cells = (Cell(ABSENT) if one is None else _score(one, metric) for one in scores)
        rows.append((Cell(name, _word(metric)), *_floors(floors, metric), *cells))
    averages = [metrics.arms[0].average for metrics in found]
    if any(averages):
        chance, constant, bigram = _average_floors(found)
        cells = (Cell(ABSENT) if one is None else Cell(f"{one.value:.3f}", _span(one)) for one in averages)
        rows.append((Cell("mean of the 8 accuracies", "as the papers average"), chance, constant, bigram, *cells))
    text = (
        "The plain score of each task, 0 shots, with its standard error (the harness's formula) and its interval, "
        "beside guessing, the best constant answer and the bigram of the training text on the same documents. "
        + " ".join([*_near_chance(labels, found), *_bits(labels, found), *reading])
    )
    header = ("task", "chance", "constant answer", "bigram", *labels)
    return Shown("Zero-shot", text.strip(), Table(header, tuple(rows)))


def is_above_floors(metrics: ZeroShotMetrics, entry: TaskScores) -> bool | None:
    """Whether the interval of a task's accuracy lies above guessing, the constant answer and the bigram.

    None for tasks without an accuracy.
    """
    metric = printed_accuracy(TASKS[entry.task])
    if metric is None:
        return None
    floors, low = metrics.floors[entry.task], entry.metrics[metric].low
    known = (floors.chance, floors.constant, (floors.bigram or {}).get(metric))
    return low is not None and low > max(value for value in known if value is not None)


def _near_chance(labels: Sequence[str], found: Sequence[ZeroShotMetrics]) -> list[str]:
    """How many accuracies lie above every floor, counted by interval; near chance is said where few do."""
    lines = []
    for label, metrics in zip(labels, found, strict=True):
        judged = {entry.task: is_above_floors(metrics, entry) for entry in metrics.arms[0].tasks}
        above = [task for task, is_above in judged.items() if is_above]
        measured = sum(is_above is not None for is_above in judged.values())
        if not measured:
            continue
        near = " It is near chance." if 2 * len(above) < measured else ""
        which = f" ({', '.join(above)})" if above else ""
        lines.append(
            f"{label}: {len(above)} of {measured} accuracies above every floor with the whole interval{which}.{near}"
        )
    return lines


def _bits(labels: Sequence[str], found: Sequence[ZeroShotMetrics]) -> list[str]:
    """WikiText bits per byte of every arm against those of the bigram."""
    lines = []
    for label, metrics in zip(labels, found, strict=True):
        own = _scores(metrics.arms[0], _BITS[0])
        floors = metrics.floors.get(_BITS[0])
        if own is None or floors is None or floors.bigram is None or _BITS[1] not in floors.bigram:
            continue
        score, floor = own.metrics[_BITS[1]], floors.bigram[_BITS[1]]
        verdict = "below" if score.value < floor else "above"
        whole = score.low is not None and score.high is not None and not score.low <= floor <= score.high
        lines.append(
            f"WikiText: {label} needs {score.value:.3f} bits per byte, {abs(score.value - floor):.3f} {verdict} the "
            f"bigram's {floor:.3f}{' with its whole interval' if whole else ', within its interval'}."
        )
    return lines


def _reading(results: Sequence[ResultFile]) -> list[str]:
    """Sentences about what was read of the documents, each once."""
    notes = dict.fromkeys(note for result in results for note in reading_notes(result))
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def _memorized(labels: Sequence[str], found: Sequence[ZeroShotMetrics], columns: Sequence[tuple[str, str]]) -> Shown:
    """The memorize arms beside the plain score; gains are of a task's first printed metric, paired by document."""
    names = dict.fromkeys(arm.name for metrics in found for arm in metrics.arms if arm.memorize is not None)
    rows = []
    for arm_name in names:
        for name, metric in columns:
            cells, any_here = [], False
            for metrics in found:
                plain = _scores(metrics.arms[0], name)
                arm = next((arm for arm in metrics.arms if arm.name == arm_name), None)
                memorized = None if arm is None else _scores(arm, name)
                if plain is None or memorized is None:
                    cells.append(Cell("-"))
                    continue
                any_here = True
                first = TASKS[name].printed[0] == metric
                detail = f"plain {_number(metric, plain.metrics[metric].value)}"
                if first and memorized.gain is not None:
                    unit = "" if metric in _ACCURACIES else " nats a document"
                    detail += f"; gain {memorized.gain.value:+.3f}{unit}, {_span(memorized.gain, signed=True)}"
                cells.append(Cell(_number(metric, memorized.metrics[metric].value), detail))
            if any_here:
                rows.append((Cell(f"{arm_name}: {name}", _word(metric)), *cells))
        averages = [
            (metrics.arms[0].average, next((arm.average for arm in metrics.arms if arm.name == arm_name), None))
            for metrics in found
        ]
        if any(after is not None for _, after in averages):
            cells = [
                Cell("-")
                if plain is None or after is None
                else Cell(f"{after.value:.3f}", f"{_span(after)}; plain {plain.value:.3f}")
                for plain, after in averages
            ]
            rows.append((Cell(f"{arm_name}: mean of the 8 accuracies"), *cells))
    text = (
        "Each text is read into the memory first, then scored; beside it the plain score and the gain, paired by "
        "document. - for a run without this arm: a model without a memory that writes cannot have one."
    )
    return Shown("Zero-shot after memorising", text, Table(("arm: task", *labels), tuple(rows)))


def _papers(
    labels: Sequence[str],
    found: Sequence[ZeroShotMetrics],
    columns: Sequence[tuple[str, str]],
    parameters: Sequence[int],
) -> Shown:
    """Ours above the papers' rows of the nearest scale, which are no contestants."""
    rows = []
    for label, metrics, count in zip(labels, found, parameters, strict=True):
        cells = []
        for name, metric in columns:
            scores = _scores(metrics.arms[0], name)
            cells.append(Cell("-") if scores is None else Cell(_percent(metric, scores.metrics[metric].value)))
        average = metrics.arms[0].average
        mean = Cell("-") if average is None else Cell(f"{100 * average.value:.2f}")
        rows.append((Cell(label, f"{count:,} parameters; ours"), *cells, mean))
    ours = len(rows)
    papers = list(
        {(row.model, row.scale, row.source): row for count in parameters for row in nearest_rows(count)}.values()
    )
    rows += [_paper(row, columns) for row in papers]
    text = (
        "Accuracies in percent; n: by length of the answer. The papers' rows of the scale nearest to ours as printed, "
        "without seeds or intervals, of models of other sizes, data and tokenizers: not comparable with ours. "
        "*: with attention. In brackets: the mean where the printed one is not that of the printed accuracies."
    )
    header = ("model", *(SHORT_NAMES[f"{name}/{metric}"] for name, metric in columns), "mean of 8")
    muted = (False,) * ours + (True,) * (len(rows) - ours)
    return Shown("Zero-shot: the papers' rows", text, Table(header, tuple(rows), muted))


def _paper(row: PaperRow, columns: Sequence[tuple[str, str]]) -> tuple[Cell, ...]:
    cells = []
    for name, metric in columns:
        score = row.scores.get(f"{name}/{metric}")
        cells.append(Cell("-" if score is None else f"{score:.2f}"))
    again = "" if row.recomputed_average is None else f" ({row.recomputed_average:.2f})"
    first = Cell(f"{row.model}{'*' if row.hybrid else ''}", f"{row.scale}; {row.source}")
    return (first, *cells, Cell(f"{row.average:.2f}{again}"))


def _time(labels: Sequence[str], found: Sequence[ZeroShotMetrics], seconds: Sequence[float]) -> Shown:
    rows = [(Cell("whole evaluation", "wall time"), *(Cell(duration(one)) for one in seconds))]
    for name in dict.fromkeys(arm.name for metrics in found for arm in metrics.arms):
        cells = []
        for metrics in found:
            arm = next((arm for arm in metrics.arms if arm.name == name), None)
            if arm is None:
                cells.append(Cell("-"))
                continue
            documents = sum(entry.documents for entry in arm.tasks)
            read, whole = (sum(getattr(entry, field) for entry in arm.tasks) for field in ("tokens_read", "tokens"))
            detail = f"{duration(arm.seconds)}, {documents:,} documents; {read:,} tokens read instead of {whole:,}"
            cells.append(Cell(f"{arm.tokens_per_s:,.0f} tokens/s", detail))
        rows.append((Cell(name, "scoring"), *cells))
    text = "What the measurement took. Contexts that several choices share are read once."
    return Shown("Zero-shot: time", text, Table(("arm", *labels), tuple(rows)))


def _scores(arm: Arm, name: str) -> TaskScores | None:
    return next((entry for entry in arm.tasks if entry.task == name), None)


def _score(scores: TaskScores, metric: str) -> Cell:
    interval, error = scores.metrics[metric], scores.standard_errors.get(metric)
    text = _number(metric, interval.value) + ("" if error is None else f" ± {error:.3f}")
    return Cell(text, _span(interval, metric=metric))


def _floors(floors: Floors, metric: str) -> tuple[Cell, Cell, Cell]:
    bigram = (floors.bigram or {}).get(metric)
    accuracy = metric in _ACCURACIES
    known = (floors.chance if accuracy else None, floors.constant if accuracy else None, bigram)
    chance, constant, counted = (Cell("-" if value is None else _number(metric, value)) for value in known)
    return chance, constant, counted


def _average_floors(found: Sequence[ZeroShotMetrics]) -> tuple[Cell, Cell, Cell]:
    """Floors of the mean, from the first result that has all tasks."""
    metrics = next(metrics for metrics in found if set(AVERAGED) <= metrics.floors.keys())
    columns: list[list[float | None]] = [[], [], []]
    for name in AVERAGED:
        floors, metric = metrics.floors[name], printed_accuracy(TASKS[name])
        values = (floors.chance, floors.constant, (floors.bigram or {}).get(metric or ""))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    cells = []
    for column in columns:
        known = [value for value in column if value is not None]
        cells.append(Cell(f"{np.mean(known):.3f}" if len(known) == len(column) else "-"))
    return cells[0], cells[1], cells[2]


def _span(interval: Interval, *, metric: str = "acc", signed: bool = False) -> str:
    if interval.low is None or interval.high is None:
        return f"no interval, n = {interval.n}"
    if signed:
        return f"{interval.low:+.3f} to {interval.high:+.3f}"
    return f"{_number(metric, interval.low)} to {_number(metric, interval.high)}"


def _number(metric: str, value: float) -> str:
    """Perplexities of weak models are long numbers."""
    return f"{value:.3f}" if metric in (*_ACCURACIES, "bits_per_byte") or value < 100 else f"{value:,.0f}"


def _percent(metric: str, value: float) -> str:
    return f"{100 * value:.2f}" if metric in _ACCURACIES else _number(metric, value)


def _word(metric: str) -> str:
    return {"acc": "accuracy", "acc_norm": "accuracy by length of the answer"}.get(metric, metric.replace("_", " "))

"""Zero-shot scores as a table: ours with intervals, the floors of the same documents, the papers' rows."""

from collections.abc import Sequence

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.schema import ResultFile
from nested_lm_lab.tasks.zeroshot.metrics import Arm, ZeroShotMetrics
from nested_lm_lab.tasks.zeroshot.papers import PaperRow, nearest_rows
from nested_lm_lab.tasks.zeroshot.tasks import TASKS

SHORT_NAMES = {
    "wikitext/word_perplexity": "Wiki ppl",
    "wikitext/bits_per_byte": "Wiki bpb",
    "lambada_openai/perplexity": "LMB ppl",
    "lambada_openai/acc": "LMB",
    "piqa/acc": "PIQA",
    "hellaswag/acc_norm": "Hella n",
    "winogrande/acc": "Wino",
    "arc_easy/acc": "ARC-e",
    "arc_challenge/acc_norm": "ARC-c n",
    "social_iqa/acc": "SIQA",
    "boolq/acc": "BoolQ",
    "commonsense_qa/acc": "CSQA",
    "openbookqa/acc_norm": "OBQA n",
}
"""Names of columns, by `task/metric`; n: by length of the answer."""


def table_lines(result: ResultFile) -> list[str]:
    """Lines for the terminal: one column a score, one row an arm, floor or paper."""
    metrics = result.metrics
    assert isinstance(metrics, ZeroShotMetrics)
    columns = [f"{name}/{metric}" for name in metrics.data for metric in TASKS[name].printed]
    rows = [["", *(SHORT_NAMES[column] for column in columns), "avg"]]
    for arm in metrics.arms:
        rows += _arm_rows(result.identity.name, arm, columns)
    rows += _floor_rows(metrics, columns)
    rows += [_paper_row(row, columns) for row in nearest_rows(result.identity.parameters)]
    return [*_aligned(rows), *_notes(result, metrics)]


def _arm_rows(model: str, arm: Arm, columns: Sequence[str]) -> list[list[str]]:
    """Scores, their intervals and standard errors, and what memorising gains."""
    scores = {entry.task: entry for entry in arm.tasks}
    found: list[Interval | None] = []
    errors: list[float | None] = []
    for column in columns:
        task, metric = column.split("/")
        found.append(scores[task].metrics[metric] if task in scores else None)
        errors.append(scores[task].standard_errors.get(metric) if task in scores else None)
    name = model if arm.memorize is None else f"  {arm.name}"
    rows = [
        [name, *(_value(column, value) for column, value in zip(columns, found, strict=True)), _average(arm.average)],
        ["  95 %", *(_range(column, value) for column, value in zip(columns, found, strict=True)), ""],
        ["  std. error", *(_error(column, value) for column, value in zip(columns, errors, strict=True)), ""],
    ]
    if arm.memorize is not None:
        gains = []
        for column in columns:
            name, metric = column.split("/")
            entry = scores.get(name)
            first = entry is not None and TASKS[name].printed[0] == metric
            gains.append(_gain(column, entry.gain) if first and entry is not None and entry.gain is not None else "")
        rows.append(["  gain", *gains, ""])
    return rows


def _floor_rows(metrics: ZeroShotMetrics, columns: Sequence[str]) -> list[list[str]]:
    chance, constant, bigram = ["chance"], ["constant answer"], ["bigram"]
    for column in columns:
        task, metric = column.split("/")
        floors = metrics.floors[task]
        is_accuracy = metric in ("acc", "acc_norm")
        chance.append(_percent(floors.chance) if is_accuracy else "")
        constant.append(_percent(floors.constant) if is_accuracy else "")
        value = None if floors.bigram is None else floors.bigram.get(metric)
        bigram.append("" if value is None else _number(column, value))
    return [[*row, ""] for row in (chance, constant, *([bigram] if metrics.bigram_tokens else []))]


def _paper_row(row: PaperRow, columns: Sequence[str]) -> list[str]:
    name = f"{row.model}{'*' if row.hybrid else ''} {row.scale}"
    cells = ["" if (found := row.scores.get(column)) is None else f"{found:.2f}" for column in columns]
    average = f"{row.average:.2f}"
    return [name, *cells, average if row.recomputed_average is None else f"{average} ({row.recomputed_average:.2f})"]


def _notes(result: ResultFile, metrics: ZeroShotMetrics) -> list[str]:
    sources = sorted({row.source for row in nearest_rows(result.identity.parameters)})
    gain = "gain of memorising: accuracies in points, perplexities in nats a document; !: its interval excludes zero"
    return [
        f"accuracies in percent, n: by length of the answer; 0 shots, lm-eval {metrics.code.harness}",
        *([gain] if len(metrics.arms) > 1 else []),
        "papers' rows as printed, without seeds or intervals, of other sizes, data and tokenizers: "
        + "; ".join(sources),
        *reading_notes(result),
    ]


def reading_notes(result: ResultFile) -> list[str]:
    """What was read of the documents, and which they were: lengths, cuts, missing documents, unknown copies."""
    metrics, limit = result.metrics, result.settings["limit"]
    assert isinstance(metrics, ZeroShotMetrics)
    tasks = metrics.arms[0].tasks
    cut = [f"{entry.task} {entry.cut:,} of {entry.documents:,}" for entry in tasks if entry.cut]
    first, missing = [], []
    for entry in tasks:
        published = metrics.data[entry.task].published
        if entry.documents < published and entry.documents == limit:
            first.append(f"{entry.task} the first {limit:,} of {published:,}")
        elif entry.documents != published:
            missing.append(f"{entry.task} {entry.documents:,} of {published:,}")
    unknown = [name for name, data in metrics.data.items() if data.known_copy is False]
    lines = [f"at most {result.settings['max_length']:,} tokens of a document are read; perplexities depend on it"]
    lines += [f"documents cut at their beginning: {', '.join(cut)}"] if cut else []
    lines += [f"--limit took the beginning of each task, not a sample: {', '.join(first)}"] if first else []
    lines += [f"not all documents: {', '.join(missing)}"] if missing else []
    lines += [f"not a known copy of the documents: {', '.join(unknown)}"] if unknown else []
    return lines


def _value(column: str, interval: Interval | None) -> str:
    return "" if interval is None else _number(column, interval.value)


def _range(column: str, interval: Interval | None) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"{_number(column, interval.low)}-{_number(column, interval.high)}"


def _number(column: str, value: float) -> str:
    if column.endswith(("acc", "acc_norm")):
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if column.endswith("bits_per_byte") else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _error(column: str, value: float | None) -> str:
    """A standard error in the units of its score."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" if column.endswith(("acc", "acc_norm")) else f"{value:.3f}"


def _gain(column: str, interval: Interval) -> str:
    scale, unit = (100, "") if column.endswith(("acc", "acc_norm")) else (1, " nats")
    sign = "" if interval.low is None or interval.high is None or interval.low <= 0 <= interval.high else "!"
    return f"{scale * interval.value:+.2f}{unit}{sign}"


def _average(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

"""Tables of a report as rows of text, ready for any format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Campaign, Run
from nested_lm_lab.report.findings import compared_runs, language, shortened
from nested_lm_lab.tasks.continual.chronological import mean_forgetting
from nested_lm_lab.tasks.continual.schema import ContinualMetrics
from nested_lm_lab.tasks.needles.metrics import PasskeyMetrics
from nested_lm_lab.tasks.schema import SamplingMetrics

ABSENT = "not measured"


@dataclass(frozen=True)
class Cell:
    """Text of a cell, a smaller second line, and a relative link."""

    text: str
    detail: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row. `muted` rows are references, not contestants."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    muted: tuple[bool, ...] = ()


class Shown(NamedTuple):
    """A table under a title, and what a reader has to know of it."""

    title: str
    text: str
    table: Table


@dataclass(frozen=True)
class Sample:
    """A generated text."""

    arm: str
    prompt: str
    text: str
    note: str


def main_table(campaign: Campaign) -> Table:
    """Size, cost and held-out bits per byte of every run, and the floors."""
    runs = compared_runs(campaign)
    measured = [metrics for run in runs if (metrics := language(run)) is not None]
    split = measured[0].split if measured else "held-out"
    header = (
        "arm",
        "parameters",
        "tokens",
        "training time",
        "tokens / s",
        f"{split} bits / byte",
        "state carried",
        "below bigram floor",
    )
    rows = [_main_row(campaign, run) for run in runs]
    muted = [False] * len(rows)
    if measured:
        for name, floor in (
            ("unigram floor", measured[0].unigram),
            ("Kneser-Ney bigram floor", measured[0].bigram),
        ):
            empty = (Cell(""),) * 4
            rows.append((Cell(name), *empty, interval_cell(floor.bits_per_byte), Cell(""), Cell("")))
            muted.append(True)
    return Table(header, tuple(rows), tuple(muted))


def _main_row(campaign: Campaign, run: Run) -> tuple[Cell, ...]:
    tokens, seconds = run.steps.last("tokens"), run.steps.last("seconds")
    metrics = language(run)
    streaming = metrics.streaming if metrics else None
    return (
        Cell(campaign.label(run), "" if run.finished else "unfinished"),
        Cell(ABSENT if run.parameters is None else f"{run.parameters:,}"),
        Cell(ABSENT if tokens is None else f"{tokens:,.0f}"),
        Cell(ABSENT if seconds is None else duration(seconds)),
        Cell(f"{tokens / seconds:,.0f}" if tokens and seconds else ABSENT),
        interval_cell(metrics.window.bits_per_byte) if metrics else Cell(ABSENT),
        interval_cell(streaming.bits_per_byte) if streaming else Cell("-" if metrics else ABSENT),
        interval_cell(metrics.window.below_bigram) if metrics else Cell(ABSENT),
    )


def interval_cell(interval: Interval, *, signed: bool = False) -> Cell:
    """A number over its interval; signed: with a plus where it is above 0."""
    form = "+.3f" if signed else ".3f"
    if interval.low is None or interval.high is None:
        return Cell(f"{interval.value:{form}}", f"no interval, n = {interval.n}")
    return Cell(f"{interval.value:{form}}", f"{interval.low:{form}} to {interval.high:{form}}")


def continual_table(campaign: Campaign, order: str) -> Table | None:
    """ACC, BWT, FWT, plasticity and forgetting of the runs that read periods in one order."""
    found = []
    for run in campaign.with_result("continual", chronological=True):
        if run.order != order:
            continue
        metrics = run.results["continual"].metrics
        assert isinstance(metrics, ContinualMetrics)
        found.append((run, metrics))
    if not found:
        return None
    measures: tuple[tuple[str, str, Callable[[ContinualMetrics], Interval]], ...] = (
        ("ACC", "mean bits / byte over all periods at the end; lower is better", lambda m: m.accuracy),
        (
            "plasticity",
            "mean bits / byte on a period right after reading it; lower is better",
            lambda m: m.plasticity,
        ),
        ("BWT", "above 0: later reading helped earlier periods", lambda m: m.backward_transfer),
        ("FWT", "above 0: earlier reading helped periods not read yet", lambda m: m.forward_transfer),
        ("forgetting", "mean bits / byte lost at the end since a period's best; 0 is none", mean_forgetting),
    )
    rows = [
        (Cell(campaign.label(run)), *(interval_cell(measure(metrics)) for *_, measure in measures))
        for run, metrics in found
    ]
    return Table(("run", *(f"{name}: {meaning}" for name, meaning, _ in measures)), tuple(rows))


def passkey_table(campaign: Campaign) -> Table | None:
    """What the key in the text saves, and exact answers, by length."""
    runs = campaign.with_result("passkey") or campaign.with_result("passkey", chronological=True)
    if not runs:
        return None
    by_run = []
    for run in runs:
        metrics = run.results["passkey"].metrics
        assert isinstance(metrics, PasskeyMetrics)
        by_run.append({score.length: score for score in metrics.lengths})
    lengths = sorted({length for scores in by_run for length in scores})
    header = ["length"]
    for run in runs:
        header += [f"{campaign.label(run)}: nats", "saved by the key", "exact"]
    rows = []
    for length in lengths:
        row = [Cell(f"{length:,}")]
        for scores in by_run:
            score = scores.get(length)
            if score is None:
                row += [Cell(ABSENT)] * 3
            else:
                right = sum(sample.exact for sample in score.samples)
                row += [interval_cell(score.nats_per_token), interval_cell(score.worth)]
                row.append(Cell(f"{right} of {len(score.samples)}"))
        rows.append(tuple(row))
    return Table(tuple(header), tuple(rows))


def samples(campaign: Campaign) -> list[Sample]:
    """Generated text of every arm."""
    found = []
    for run in campaign.with_result("sampling") or campaign.with_result("sampling", chronological=True):
        result = run.results["sampling"]
        assert isinstance(result.metrics, SamplingMetrics)
        for sample in result.metrics.samples:
            temperature, top_p = result.settings.get("temperature"), result.settings.get("top_p")
            how = f"temperature {temperature}, top-p {top_p}, seed {sample.seed}"
            end = ", ended by itself" if sample.ended else ""
            note = f"{sample.tokens} tokens, {how}{end}"
            found.append(Sample(campaign.label(run), sample.prompt, sample.text, note))
    return found


def identity_table(campaign: Campaign) -> Table:
    """Where every number comes from, one row a run."""
    keys = {
        "run": "run_id",
        "configuration hash": "config_hash",
        "commit": "commit",
        "seed": "seed",
        "data hash": "data_hash",
        "tokenizer hash": "tokenizer_hash",
        "started": "created",
        "device": "device",
    }
    rows = [
        (
            Cell(campaign.label(run) + (", in order of time" if run.chronological else "")),
            Cell("config.resolved.yaml", link=f"{run.entry.folder}/config.resolved.yaml"),
            *(Cell(_short(key, run.record.get(key))) for key in keys.values()),
            Cell(_versions(run)),
            Cell(*_checkpoint(run)),
            Cell(_evaluated(run)),
        )
        for run in campaign.runs
    ]
    return Table(("", "configuration", *keys, "versions", "checkpoint scored", "evaluated"), tuple(rows))


def _short(key: str, value: object) -> str:
    if value is None:
        return "not recorded"
    return shortened(str(value)) if key.endswith("_hash") or key == "commit" else str(value)


def _versions(run: Run) -> str:
    versions = run.record.get("versions")
    if not isinstance(versions, dict):
        return "not recorded"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _checkpoint(run: Run) -> tuple[str, str]:
    marks = {(r.checkpoint.name, r.checkpoint.digest) for task, r in run.results.items() if task != "continual"}
    marks = marks or {(result.checkpoint.name, result.checkpoint.digest) for result in run.results.values()}
    names = ", ".join(sorted(name for name, _ in marks))
    return names or ABSENT, ", ".join(sorted(digest[:12] for _, digest in marks))


def _evaluated(run: Run) -> str:
    return max((result.created for result in run.results.values()), default=ABSENT)


def duration(seconds: float) -> str:
    """A time in two units at most: 48 s, 2 min 31 s, 3 h 5 min."""
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.0f} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

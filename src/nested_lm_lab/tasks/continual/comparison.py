"""A clock sweep: what forgetting has to do with the clocks, over several runs that may be compared."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from nested_lm.config.load import parse_run
from nested_lm.config.section import Count, NonNegativeFloat, Section
from nested_lm.errors import ConfigError, ReportError
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit
from nested_lm_lab.evaluation.interval import Interval, Natural
from nested_lm_lab.evaluation.results import content_digest, load_result, require_comparable
from nested_lm_lab.evaluation.schema import ResultFile, RunIdentity
from nested_lm_lab.tasks.continual.chronological import mean_forgetting
from nested_lm_lab.tasks.continual.clocks import spearman
from nested_lm_lab.tasks.continual.schema import ContinualMetrics, CorrelationScore, RegretMetrics, RetentionMetrics
from nested_lm_lab.tasks.continual.settings import ContinualSettings

_Clock = Literal["log slowest period", "log fastest period", "number of levels"]


class SweepRow(Section):
    """One run of the sweep. forgetting: mean over all but the last segment, at the end, in bits per byte."""

    identity: RunIdentity
    checkpoint_digest: str
    periods: tuple[Count, ...]  # clocks of training, fastest first; empty: no levels
    forgetting: float
    backward_transfer: Interval
    forward_transfer: Interval
    plasticity: Interval
    accuracy: Interval
    regret_below: Interval | None  # null: not measured
    retention_scale: NonNegativeFloat | None  # kappa of the tied fit; null: not measured


class Trend(Section):
    """Rank correlation over the runs of one property of the clocks with one score."""

    clock: _Clock
    score: Literal["forgetting", "accuracy"]
    correlation: CorrelationScore | None


class SweepFile(Section):
    """All rows, and their trends. Rows that may not be compared are never written."""

    schema_version: Literal[1]
    scored_commit: str | None
    settings_seed: Natural
    rows: tuple[SweepRow, ...]
    trends: tuple[Trend, ...]


def compare_runs(
    runs: Sequence[Path], path: Path, *, settings: ContinualSettings, report: Callable[[str], None]
) -> SweepFile:
    """Collect the results of runs into one file.

    Raises:
        ConfigError: fewer than two runs.
        ReportError: a result is missing, was edited, or may not share a table with the others; nothing is written.
    """
    if len(runs) < 2:
        raise ConfigError("--compare puts runs side by side; name two or more")
    matrices = [load_result(run / "results" / "continual.json") for run in runs]
    require_comparable(matrices)
    rows = tuple(_row(run, result) for run, result in zip(runs, matrices, strict=True))
    found = SweepFile(
        schema_version=1,
        scored_commit=current_commit(),
        settings_seed=settings.seed,
        rows=rows,
        trends=trends(rows, permutations=settings.permutations, seed=settings.seed),
    )
    document = found.model_dump(mode="json")
    document["digest"] = content_digest(document)
    write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    report(f"comparison of {len(rows)} runs in {path}")
    return found


def load_comparison(path: Path) -> SweepFile:
    """Read a comparison. Raises ReportError when it is missing, damaged or was edited."""
    again = "Run `nested-lm eval continual ... --compare` to write it again."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        written = document.pop("digest")
        changed = content_digest(document) != written
        found = SweepFile.model_validate_json(json.dumps(document))
    except FileNotFoundError:
        raise ReportError(f"{path}: there is no such comparison\n  {again}") from None
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise ReportError(f"{path} is no comparison of runs: {error}\n  {again}") from error
    if changed:
        raise ReportError(f"{path} was changed after it was written\n  Results are never edited. {again}")
    return found


def _row(run: Path, result: ResultFile) -> SweepRow:
    config_path = next((run / "checkpoints").glob("step-*/config.json"), None)
    if config_path is None:
        raise ReportError(f"{run}/checkpoints holds no config.json, so the clocks of the run are not known")
    config = parse_run(json.loads(config_path.read_text(encoding="utf-8")), str(config_path))
    others = _other(run, "regret", result), _other(run, "retention", result)
    return sweep_row(result, config.model.channel.periods, *others)


def sweep_row(result: ResultFile, periods: tuple[int, ...], regret: object, retention: object) -> SweepRow:
    """One run of a sweep. result: its matrix. regret, retention: metrics of other results; None: not measured."""
    metrics = result.metrics
    assert isinstance(metrics, ContinualMetrics)
    return SweepRow(
        identity=result.identity,
        checkpoint_digest=result.checkpoint.digest,
        periods=periods,
        forgetting=mean_forgetting(metrics).value,
        backward_transfer=metrics.backward_transfer,
        forward_transfer=metrics.forward_transfer,
        plasticity=metrics.plasticity,
        accuracy=metrics.accuracy,
        regret_below=regret.below if isinstance(regret, RegretMetrics) else None,
        retention_scale=retention.tied.scale if isinstance(retention, RetentionMetrics) else None,
    )


def _other(run: Path, task: str, matrix: ResultFile) -> object | None:
    """Metrics of another result of the same run, None where it was not measured."""
    path = run / "results" / f"{task}.json"
    if not path.exists():
        return None
    result = load_result(path)
    if result.identity != matrix.identity:
        raise ReportError(f"{path} is of another run or checkpoint than continual.json beside it; measure it again")
    return result.metrics


def trends(rows: Sequence[SweepRow], *, permutations: int, seed: int) -> tuple[Trend, ...]:
    """Rank correlations over the runs that have levels, with permutation tests."""
    levelled = [row for row in rows if row.periods]
    clocks: dict[_Clock, list[float]] = {
        "log slowest period": [math.log(row.periods[-1]) for row in levelled],
        "log fastest period": [math.log(row.periods[0]) for row in levelled],
        "number of levels": [float(len(row.periods)) for row in levelled],
    }
    scores: dict[Literal["forgetting", "accuracy"], list[float]] = {
        "forgetting": [row.forgetting for row in levelled],
        "accuracy": [row.accuracy.value for row in levelled],
    }
    found = []
    for clock, x in clocks.items():
        for score, y in scores.items():
            correlation = spearman(np.array(x), np.array(y), permutations=permutations, seed=seed)
            kept = None if correlation is None else CorrelationScore(**vars(correlation))
            found.append(Trend(clock=clock, score=score, correlation=kept))
    return tuple(found)

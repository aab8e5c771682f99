"""The losses that a run's probe wrote into `metrics.jsonl`, as arrays."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nested_lm.config.run import RunConfig
from nested_lm.errors import NumericsError, ReportError

_FIELD = "probe/"


@dataclass(frozen=True)
class ProbeLog:
    """One row a step that was taken, one column a period in the order of the stream; nats a token."""

    steps: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    steps_per_period: int
    step_tokens: int


def read_probe_log(path: Path, config: RunConfig, *, periods: int) -> ProbeLog:
    """Read the step records of a finished run.

    Raises:
        ReportError: there is no log, a line was changed or lost, or the run did not reach its end.
        NumericsError: a loss is not finite.
    """
    if not path.is_file():
        raise ReportError(f"{path} is missing; the step records of a run lie beside its checkpoints")
    rows: dict[int, list[float]] = {}
    tokens: dict[int, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["event"] != "step":
                continue
            losses = [record[f"{_FIELD}{period}"] for period in range(periods)]
            step = int(record["step"])
            tokens[step] = int(record["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path}:{number} is no step record with the probe's {periods} losses ({error!r}); the file was "
                "changed, or the run was trained without train.probe"
            ) from error
        if any(loss is None or not math.isfinite(loss) for loss in losses):
            raise NumericsError(f"{path}:{number}: a loss of the probe at step {step} is not finite")
        rows[step] = losses
    steps_per_period = config.train.num_steps // periods
    steps = sorted(rows)
    if not steps or steps[-1] != steps_per_period * periods:
        raise ReportError(
            f"{path} ends at step {steps[-1] if steps else 0} of {steps_per_period * periods}; finish the run with "
            "`nested-lm train ... --resume auto`"
        )
    return ProbeLog(
        np.array(steps),
        np.array([tokens[step] for step in steps], dtype=np.int64),
        np.array([rows[step] for step in steps]),
        steps_per_period,
        config.train.step_tokens,
    )

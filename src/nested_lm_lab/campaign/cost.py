"""What a campaign will cost: tokens, floating point operations, hours at a stated speed, disk."""

from collections.abc import Sequence
from functools import cache

from nested_lm.config.campaign import CampaignConfig
from nested_lm.config.run import RunConfig
from nested_lm_lab.campaign.steps import PlannedStep


def estimate(config: CampaignConfig, to_do: Sequence[PlannedStep]) -> list[str]:
    """Say what the steps that are still to do will take.

    Hours are those of the stated speed, so they are as good as that: variants of a grid differ in speed. Operations are
    by the rule of thumb, because counting takes seconds for every variant; `nested-lm train PRESET --dry-run` counts.
    """
    runs = [step.run for step in to_do if step.run is not None]
    stated = [step.seconds for step in to_do if step.seconds is not None]
    kinds = {kind: sum(step.kind == kind for step in to_do) for kind in ("data", "train", "eval", "report")}
    rows = {"to do": ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "nothing"}
    if runs:
        tokens = sum(_tokens(run) for run in runs)
        operations = sum(_operations(run) for run in runs)
        rows["tokens"] = f"{tokens:,} in {len(runs)} trainings"
        rows["compute"] = f"{operations:.2g} FLOPs, by 6 x parameters x tokens"
    if runs or stated:
        rows["time"] = _time(config, [(step.arguments[1], step.run) for step in to_do if step.run is not None], stated)
    if runs:
        rows["disk"] = f"{_size(sum(_checkpoint_bytes(run) for run in runs))} of checkpoints at the end"
    return [f"{label:<12} {text}" for label, text in rows.items()] + ["dry run: nothing was run or written"]


def _time(config: CampaignConfig, trainings: Sequence[tuple[str, RunConfig]], stated: Sequence[float]) -> str:
    """trainings: their presets and runs. stated: seconds of evaluations that state them."""
    speed, runs = config.speed, len(trainings)
    if speed is None:
        return "unknown: the preset states no speed (speed: {tokens_per_s: ..., run_seconds: ..., measured_on: ...})"
    parallel = min(config.runner.parallel, runs + len(stated))
    speeds = [speed.by_preset.get(preset, speed.tokens_per_s) for preset, _ in trainings]
    training = sum(_tokens(run) / own for (_, run), own in zip(trainings, speeds, strict=True))
    seconds = (training + runs * speed.run_seconds + sum(stated)) / parallel
    words = " or ".join(f"{own:,.0f}" for own in sorted(set(speeds)))
    parts = [f"{words} tokens/s and {speed.run_seconds:g} s besides training for each run"] if runs else []
    if stated:
        parts.append(f"{_duration(sum(stated))} of evaluations that state theirs")
    how = ", ".join(parts)
    together = f", {parallel} at a time" if parallel > 1 else ""
    return f"{_duration(seconds)} at {how}{together} (measured on {speed.measured_on})"


def _tokens(run: RunConfig) -> int:
    return run.train.num_steps * run.train.step_tokens


@cache
def _operations(run: RunConfig) -> float:
    from nested_lm.train.costs.count import rule_of_thumb  # imports torch

    return rule_of_thumb(run)


def _checkpoint_bytes(run: RunConfig) -> int:
    """Newest checkpoints, and the border checkpoints of a chronological run, which are all kept."""
    stream = run.train.stream
    kept = run.train.checkpoints.keep + (stream.periods + 1 if stream.kind == "chronological" else 0)
    from nested_lm.train.costs.footprint import held_bytes  # imports torch

    held = held_bytes(run.model, run.train.optimizer, run.train.step_tokens)
    return kept * (held.weights + held.optimizer)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

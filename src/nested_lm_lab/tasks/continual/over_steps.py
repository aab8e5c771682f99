"""Tasks that look at every step of a run: what a tick of a level does to old text, and how forgetting ages."""

from collections.abc import Sequence

import numpy as np

from nested_lm.config.run import RunConfig
from nested_lm.errors import ConfigError, ReportError
from nested_lm.nn.model import LanguageModel
from nested_lm.reading.calls import read
from nested_lm_lab.evaluation.progress import Progress
from nested_lm_lab.evaluation.subject import Subject
from nested_lm_lab.tasks.continual.clocks import (
    Effect,
    RetentionCurve,
    RetentionFit,
    event_study,
    fit_retention,
    ticks,
)
from nested_lm_lab.tasks.continual.schema import (
    EffectScore,
    EventMetrics,
    LevelEvents,
    RetentionCurveScore,
    RetentionMetrics,
    RetentionScore,
)
from nested_lm_lab.tasks.continual.settings import ContinualSettings
from nested_lm_lab.tasks.continual.step_log import ProbeLog, read_probe_log

EVENTS_VERSION = RETENTION_VERSION = "1"

MAX_CURVE_POINTS = 200
"""Points of a forgetting curve that are fitted and kept, spread evenly."""

SCALES = np.geomspace(1e-3, 1e3, 121)
"""Factors between a level's period and its time constant that are tried; 5 % of a decade apart."""

READING_TOKENS = 16_384
"""Tokens of held-out text whose losses around ticks are taken, at most, of each document."""


def measure_events(subject: Subject, settings: ContinualSettings, progress: Progress) -> EventMetrics:
    """Compare what happens at ticks of each level with what happens at like places without a tick.

    Raises:
        ConfigError: the run has neither a probe nor a level that writes in context.
    """
    probed = subject.config.train.probe is not None
    writes = [w.period_tokens for w in subject.config.model.channel.writes if w is not None]
    if not probed and not writes:
        raise ConfigError(
            f"{subject.config.name}: no step says what became of old text, and no level writes while reading; train "
            "with train.probe={sequences: 1} on a chronological stream to see the ticks of training"
        )
    labels = tuple(group.label for group in subject.groups()) if probed else ()
    return EventMetrics(
        kind="events",
        segments=labels,
        training=_training_events(subject, settings) if probed else None,
        reading=_reading_events(subject, settings, progress) if writes else None,
    )


def _training_events(subject: Subject, settings: ContinualSettings) -> tuple[LevelEvents, ...]:
    """Change of the loss on old periods over each step; a block is the time in which one period is read."""
    log = _probe_log(subject)
    tokens, changes, blocks = old_changes(log)
    return study_levels(
        subject.config.model.channel.periods,
        tokens,
        changes,
        blocks,
        shortest=subject.config.train.step_tokens,
        settings=settings,
    )


def old_changes(log: ProbeLog) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens passed, change of the mean loss on the periods that are over, and a block number, for each step.

    Steps of the first period, before which nothing is over, and steps after a gap in the log (a step that was not
    taken) are left out. A new block begins with each period and after each gap.
    """
    tokens, changes, blocks = [], [], []
    block, last = 0, 0
    for row in range(1, len(log.steps)):
        stage = (int(log.steps[row]) - 1) // log.steps_per_period
        is_gap = log.steps[row] != log.steps[row - 1] + 1
        block, last = block + (is_gap or stage != last), stage
        if stage == 0 or is_gap:
            continue
        tokens.append(log.tokens[row])
        changes.append((log.losses[row, :stage] - log.losses[row - 1, :stage]).mean())
        blocks.append(block)
    return np.array(tokens, dtype=np.int64), np.array(changes), np.array(blocks, dtype=np.int64)


def study_levels(
    periods: Sequence[int],
    tokens: np.ndarray,
    changes: np.ndarray,
    blocks: np.ndarray,
    *,
    shortest: int,
    settings: ContinualSettings,
) -> tuple[LevelEvents, ...]:
    """Event study of each level, among the borders of the next faster clock; `shortest` apart for the fastest."""
    found = []
    for level, period in enumerate(periods):
        matched = periods[level - 1] if level else shortest
        effect, why = None, None
        if period == matched:
            why = "it ticks at every place, so that there is nothing to compare with"
        else:
            here = ticks(tokens, matched)
            effect = event_study(
                changes[here],
                ticks(tokens[here], period),
                blocks[here],
                spacing=period // matched,
                permutations=settings.permutations,
                seed=settings.seed + level,
            )
            if effect is None:
                why = f"no stretch is longer than two of its periods, {2 * period:,} tokens"
        found.append(
            LevelEvents(
                level=level,
                period_tokens=period,
                matched_tokens=matched,
                effect=None if effect is None else _effect(effect),
                why=why,
            )
        )
    return tuple(found)


def _effect(effect: Effect) -> EffectScore:
    fields = dict(vars(effect))
    return EffectScore(exact=fields.pop("is_exact"), **fields)


def _reading_events(subject: Subject, settings: ContinualSettings, progress: Progress) -> tuple[LevelEvents, ...]:
    """Mean loss after a place minus mean loss before it, on held-out documents; a block is a document."""
    writes = [w.period_tokens for w in subject.config.model.channel.writes if w is not None]
    shortest = max(1, writes[0] // 4)
    split = subject.split("test")
    longest = sorted(range(len(split.documents)), key=lambda i: -split.documents[i].tokens)[
        : settings.reading_documents
    ]
    tokens, changes, blocks = [], [], []
    texts = [split.tokens(index)[:READING_TOKENS] for index in longest]
    progress.total += sum(map(len, texts))
    for block, text in enumerate(texts):
        losses = _token_losses(subject.loaded.model, text, split.boundary[0])
        progress.add(len(text))
        places, found = changes_around(losses, shortest)
        tokens.append(places)
        changes.append(found)
        blocks.append(np.full(len(places), block))
    joined = (np.concatenate(column) for column in (tokens, changes, blocks))
    return study_levels(writes, *joined, shortest=shortest, settings=settings)


def changes_around(losses: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `window` losses after each multiple of the window minus the mean of as many before it."""
    means = losses[: len(losses) // window * window].reshape(-1, window).mean(axis=1)
    return np.arange(1, len(means)) * window, np.diff(means)


def _token_losses(model: LanguageModel, document: np.ndarray, start: int) -> np.ndarray:
    """Nats of each token of a document, read with carried state; entry i is that of the (i + 1)-th token read."""
    inputs = np.concatenate([[start], document[:-1]])
    return read(model, inputs[None], targets=document[None]).nats[0]


def measure_retention(subject: Subject, settings: ContinualSettings, progress: Progress) -> RetentionMetrics:
    """Fit forgetting curves with times tied to the levels' periods, and with one free exponential.

    Raises:
        ConfigError: the run has no probe, or the model no levels.
        ReportError: fewer than two periods were followed by another.
    """
    del settings, progress  # the log has been written, and the fits take no time
    periods = subject.config.model.channel.periods
    if subject.config.train.probe is None or not periods:
        raise ConfigError(
            f"{subject.config.name}: the task `retention` follows the loss on old periods step by step, for a model "
            "with levels; train one with train.probe={sequences: 1} on a chronological stream"
        )
    labels = [group.label for group in subject.groups()]
    log = _probe_log(subject)
    curves = forgetting_curves(log)
    if len(curves) < 2:
        raise ReportError(
            f"{subject.run_dir}: the log follows {len(curves)} periods after their end, and a fit is tried on one that "
            "it has not seen: at least 2 are needed; train on three periods or more, to the end"
        )
    tied = fit_retention(curves, periods, scales=SCALES)
    longest = max(float(curve.age.max()) for curve in curves)
    free = fit_retention(curves, (1,), scales=np.geomspace(subject.config.train.step_tokens / 10, 100 * longest, 241))
    return RetentionMetrics(
        kind="retention",
        periods=periods,
        curves=tuple(
            RetentionCurveScore(
                segment=label, age_tokens=tuple(int(age) for age in curve.age), lost=tuple(map(float, curve.lost))
            )
            for label, curve in zip(labels, curves, strict=False)
        ),
        tied=_retention(tied),
        free=_retention(free),
        tied_is_better=tied.held_out_error < free.held_out_error,
    )


def _retention(fit: RetentionFit) -> RetentionScore:
    return RetentionScore(**vars(fit), held_out_error=fit.held_out_error)


def forgetting_curves(log: ProbeLog) -> list[RetentionCurve]:
    """Loss above the best since the period's end, by tokens since then, of every period that another one followed."""
    curves = []
    for period in range(log.losses.shape[1] - 1):
        end = log.steps_per_period * (period + 1)
        after = log.steps >= end
        if after.sum() < 3:
            continue
        losses, tokens = log.losses[after, period], log.tokens[after]
        lost = losses - np.minimum.accumulate(losses)
        age = tokens - log.step_tokens * end
        chosen = np.unique(np.linspace(1, len(age) - 1, min(len(age) - 1, MAX_CURVE_POINTS)).round().astype(np.int64))
        curves.append(RetentionCurve(age[chosen].astype(np.float64), lost[chosen]))
    return curves


def _probe_log(subject: Subject) -> ProbeLog:
    config: RunConfig = subject.config
    if subject.run_dir is None:
        raise ConfigError(f"{subject.path} lies in no run folder, and this task reads the run's metrics.jsonl")
    return read_probe_log(subject.run_dir / "metrics.jsonl", config, periods=subject.stream.periods)

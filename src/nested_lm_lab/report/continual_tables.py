"""Tables of continual learning beside the matrix: regret, lesions, ticks, retention, classes, facts and languages."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import ARM_NAMES, Campaign, Run
from nested_lm_lab.report.tables import ABSENT, Cell, Shown, Table, interval_cell
from nested_lm_lab.tasks.continual.schema import (
    CarriedMetrics,
    ClassIncrementalMetrics,
    ClassStream,
    EffectScore,
    EventMetrics,
    FactsEpoch,
    FactsMetrics,
    LanguageScores,
    LanguagesMetrics,
    LesionMetrics,
    LevelEvents,
    OtherRun,
    RegretMetrics,
    RetentionMetrics,
    TranslationScore,
)

M = TypeVar("M")


def regret(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Mean regret on the period just read, on those read before, and on those not yet read."""
    measures: tuple[tuple[str, Callable[[RegretMetrics], Interval]], ...] = (
        ("on the period just read", lambda m: m.on),
        ("on periods read before", lambda m: m.below),
        ("on periods not yet read", lambda m: m.above),
    )
    found = _metrics(runs, task, RegretMetrics)
    rows = [(Cell(name), *(interval_cell(measure(metrics)) for metrics in found)) for name, measure in measures]
    oracles = [_oracle(campaign, run, metrics.oracle) for run, metrics in zip(runs, found, strict=True)]
    rows.append((Cell("oracle", "the model that read the text mixed"), *(cell for cell, _ in oracles)))
    text = "Bits per byte above a model that read the same text mixed, with the same budget; lower is better."
    strange = [campaign.label(run) for run, (_, differs) in zip(runs, oracles, strict=True) if differs]
    if strange:
        text += (
            f" The oracle of {', '.join(strange)} is not of the arm's own model: what stands there is forgetting plus "
            "the difference between the two models, and may be below 0."
        )
    return [Shown("Regret", text, _table(campaign, runs, "regret", rows))]


def _oracle(campaign: Campaign, run: Run, oracle: OtherRun) -> tuple[Cell, bool]:
    """What the oracle is, and whether it is known to be another model than the run's."""
    known = next((other for other in campaign.runs if other.record.get("run_id") == oracle.run_id), None)
    if known is not None:
        differs = known.config.model != run.config.model
        return Cell(known.arm, f"{oracle.name}{'; another model' if differs else ''}"), differs
    if oracle.arm is None:
        return Cell("kind not known", f"{oracle.name}, which is no run of this campaign"), False
    differs = oracle.arm != run.results["regret"].identity.arm
    name = ARM_NAMES.get(oracle.arm, oracle.arm)
    return Cell(name, f"{oracle.name}{'; another model' if differs else ''}"), differs


def carried(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """The matrix with state carried through whole documents: its last row, and how much was lost."""
    found = _metrics(runs, task, CarriedMetrics)
    rows = [
        (Cell("mean over the periods", "at the end"), *(interval_cell(metrics.accuracy) for metrics in found)),
        (
            Cell("backward transfer", "above 0: later reading helped earlier periods"),
            *(interval_cell(metrics.backward_transfer, signed=True) for metrics in found),
        ),
    ]
    for place in range(max(len(metrics.segments) for metrics in found)):
        cells = (
            interval_cell(metrics.bits_per_byte[-1][place]) if place < len(metrics.segments) else Cell("-")
            for metrics in found
        )
        names = dict.fromkeys(metrics.segments[place] for metrics in found if place < len(metrics.segments))
        rows.append((Cell(f"period {place + 1}", ", ".join(names)), *cells))
    text = "Bits per byte at the end with whole documents read in one stream each and the memories writing on."
    return [Shown("Periods with carried state", text, _table(campaign, runs, "measure", rows))]


def lesions(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """What setting one level back costs on each period, and whether slow levels hold old knowledge."""
    found = _metrics(runs, task, LesionMetrics)
    rows = []
    for period in sorted({level.period_tokens for metrics in found for level in metrics.levels}):
        cells = []
        for metrics in found:
            level = next((level for level in metrics.levels if level.period_tokens == period), None)
            cells.append(Cell("-") if level is None else _damages(level.damage))
        rows.append((Cell(f"level of {period:,} tokens"), *cells))
    rows.append((Cell("everything but the levels"), *(_damages(metrics.others) for metrics in found)))
    correlations = [_correlation(metrics) for metrics in found]
    rows.append((Cell("rank correlation", "of what a level holds, oldest to newest, with its period"), *correlations))
    text = (
        "Bits per byte that the text of each period, oldest first, gets worse by when one level goes back to its "
        f"weights at {found[0].set_back_to}; intervals are in the figure. Slow levels that hold old knowledge give a "
        "correlation below 0. Few levels cannot give a small p: the smallest possible one stands beside it."
    )
    return [Shown("Lesions of levels", text, _table(campaign, runs, "set back", rows))]


def _damages(damage: Iterable[Interval]) -> Cell:
    return Cell(" / ".join(f"{one.value:+.3f}" for one in damage))


def _correlation(metrics: LesionMetrics) -> Cell:
    found = metrics.correlation
    if found is None:
        return Cell("-", "fewer than three levels that hold anything")
    return Cell(f"{found.value:+.2f}", f"p = {found.p_value:.3g}, at least {found.smallest_p:.3g}; n = {found.n}")


def events(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Effect of a level's tick, with the p-value of its permutation test."""
    found = _metrics(runs, task, EventMetrics)
    clocks: tuple[tuple[str, Callable[[EventMetrics], Sequence[LevelEvents] | None]], ...] = (
        ("training", lambda m: m.training),
        ("reading", lambda m: m.reading),
    )
    rows = []
    for name, levels_of in clocks:
        levels = [{one.period_tokens: one for one in levels_of(metrics) or ()} for metrics in found]
        for period in sorted({period for one in levels for period in one}):
            cells = [_effect(one[period]) if period in one else Cell("-") for one in levels]
            rows.append((Cell(f"{name}, level of {period:,} tokens"), *cells))
    text = (
        "Change of the loss in nats a token over an update of a level, minus that over like updates without it (in "
        "training on held-out text of periods that are over): above 0, ticks make old text worse. p-values by circular "
        "shifts of the ticks."
    )
    return [Shown("Ticks of levels", text, _table(campaign, runs, "clock", rows))]


def _effect(level: LevelEvents) -> Cell:
    effect: EffectScore | None = level.effect
    if effect is None:
        return Cell("-", level.why or "")
    detail = f"p = {effect.p_value:.3g}, at least {effect.smallest_p:.3g}; {effect.ticks} ticks, {effect.others} others"
    return Cell(f"{effect.value:+.4f}", detail)


def retention(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Which fit predicts a forgetting curve that it has not seen."""
    found = _metrics(runs, task, RetentionMetrics)
    rows = [
        (
            Cell("tied to the levels' periods", "held-out error, nats a token"),
            *(Cell(f"{metrics.tied.held_out_error:.4f}", f"factor {metrics.tied.scale:.3g}") for metrics in found),
        ),
        (
            Cell("one free exponential", "held-out error, nats a token"),
            *(
                Cell(
                    f"{metrics.free.held_out_error:.4f}",
                    f"{metrics.free.scale:,.0f} tokens; {len(metrics.curves)} curves",
                )
                for metrics in found
            ),
        ),
    ]
    text = "What was lost of each period since its end, by age: each curve is predicted by a fit to the others."
    return [Shown("Fits of forgetting", text, _table(campaign, runs, "time constants", rows))]


def classes(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Class-incremental accuracy beside its floor, joint reading, no reading, and chance."""
    measures: tuple[tuple[str, Callable[[ClassStream], Cell]], ...] = (
        ("accuracy", lambda s: interval_cell(s.model.accuracy)),
        ("floor: nearest class mean of words", lambda s: interval_cell(s.floor.accuracy)),
        ("accuracy minus floor, paired", lambda s: interval_cell(s.above_floor, signed=True)),
        ("all classes read in mixed order", lambda s: interval_cell(s.joint)),
        ("nothing read", lambda s: interval_cell(s.unread)),
        ("forgetting", lambda s: interval_cell(s.model.forgetting)),
        ("forgetting of the floor", lambda s: interval_cell(s.floor.forgetting)),
        ("chance", lambda s: Cell(f"{s.chance:.3f}")),
    )
    found = [
        {(s.data, s.order, s.shots): s for s in metrics.streams}
        for metrics in _metrics(runs, task, ClassIncrementalMetrics)
    ]
    rows = []
    for key in dict.fromkeys(key for streams in found for key in streams):
        data, order, shots = key
        name = f"{data}, {order} order, {'all' if shots is None else shots} a class"
        for measure, cell in measures:
            cells = (cell(streams[key]) if key in streams else Cell(ABSENT) for streams in found)
            rows.append((Cell(measure, name), *cells))
    text = "Classes come task after task and are read once; accuracy at the end, among all classes seen."
    return [Shown("Classes, one group after another", text, _table(campaign, runs, "measure", rows))]


def facts(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Changing facts at the end of the story, beside chance and the same questions before reading."""
    measures: tuple[tuple[str, Callable[[FactsEpoch], Interval | None]], ...] = (
        ("current value", lambda e: e.current),
        ("facts just changed", lambda e: e.updated),
        ("stale rate", lambda e: e.stale),
        ("facts left alone", lambda e: e.unchanged),
        ("asked in other words", lambda e: e.paraphrase),
    )
    found = _metrics(runs, task, FactsMetrics)
    rows = [(Cell(name), *(_optional(measure(metrics.epochs[-1])) for metrics in found)) for name, measure in measures]
    rows.append((Cell("current value, nothing read"), *(interval_cell(metrics.unread) for metrics in found)))
    chances = (Cell(f"{metrics.chance:.3f}", f"stale {metrics.stale_chance:.3f}") for metrics in found)
    rows.append((Cell("chance"), *chances))
    text = (
        "Facts of an invented world, told again and again while some change: shares of questions after the last epoch."
    )
    return [Shown("Facts that change", text, _table(campaign, runs, "share", rows))]


def _optional(interval: Interval | None) -> Cell:
    return Cell("-") if interval is None else interval_cell(interval)


def languages(campaign: Campaign, runs: Sequence[Run], task: str) -> list[Shown]:
    """Two invented languages: translation of held-out sentences at four moments."""
    moments: tuple[tuple[str, Callable[[LanguageScores], TranslationScore]], ...] = (
        ("nothing read", lambda s: s.unread),
        ("after this language", lambda s: s.alone),
        ("then the other one", lambda s: s.first_then_other),
        ("as the second one", lambda s: s.other_then_this),
    )
    found = _metrics(runs, task, LanguagesMetrics)
    rows = []
    for letter in ("a", "b"):
        languages = [getattr(metrics, letter) for metrics in found]
        name = f"language {letter.upper()}"
        for moment, of in moments:
            rows.append((Cell(moment, f"{name}, chrF"), *(interval_cell(of(one).chrf) for one in languages)))
            rows.append((Cell(moment, f"{name}, exact"), *(interval_cell(of(one).exact) for one in languages)))
        kept = (interval_cell(one.kept, signed=True) for one in languages)
        rows.append((Cell("kept: then the other one, minus alone", f"{name}, chrF"), *kept))
    repeated = Cell("floor", "the sentence repeated, language A, chrF")
    rows.append((repeated, *(interval_cell(m.copy_chrf) for m in found)))
    text = (
        "Held-out sentences translated into English after reading lessons, with frozen slow weights: chrF (0 to 100), "
        "and the share that is right word for word. The floor repeats the sentence untranslated."
    )
    return [Shown("Two languages, one after the other", text, _table(campaign, runs, "measure", rows))]


def _metrics(runs: Sequence[Run], task: str, kind: type[M]) -> list[M]:
    found = []
    for run in runs:
        metrics = run.results[task].metrics
        assert isinstance(metrics, kind)
        found.append(metrics)
    return found


def _table(campaign: Campaign, runs: Sequence[Run], corner: str, rows: list[tuple[Cell, ...]]) -> Table:
    return Table((corner, *(campaign.label(run) for run in runs)), tuple(rows))

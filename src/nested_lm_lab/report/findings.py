"""What the numbers say: verdicts, fairness checks and limits as sentences, every number from a result."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.results import PARAMETER_TOLERANCE
from nested_lm_lab.report.collect import Campaign, Run, parameter_gap
from nested_lm_lab.report.plot_style import short_count
from nested_lm_lab.tasks.continual.schema import ContinualMetrics
from nested_lm_lab.tasks.language_modelling import paired_difference
from nested_lm_lab.tasks.needles.metrics import PasskeyMetrics
from nested_lm_lab.tasks.schema import LanguageModellingMetrics


class Check(NamedTuple):
    """One condition of a fair comparison."""

    passed: bool
    text: str


def compared_runs(campaign: Campaign) -> tuple[Run, ...]:
    """The runs of the main table: those on the shuffled stream, where there are any."""
    return tuple(run for run in campaign.runs if not run.chronological) or campaign.runs


def language(run: Run) -> LanguageModellingMetrics | None:
    """Language modelling metrics of a run, None where it was not measured."""
    result = run.results.get("language_modelling")
    if result is None:
        return None
    assert isinstance(result.metrics, LanguageModellingMetrics)
    return result.metrics


def verdicts(campaign: Campaign) -> list[str]:
    """Who won by how much: the first arm against each other arm, seed by seed, paired by document."""
    found = []
    for own, other in _pairs(campaign):
        difference = paired_difference(
            own.results["language_modelling"],
            other.results["language_modelling"],
            bootstrap=Bootstrap(samples=own.config.eval.bootstrap_samples),
        )
        found.append(_verdict(campaign.label(own), campaign.label(other), difference))
    return found or ["No verdict: it needs language modelling results of two arms with the same seed."]


def supports(campaign: Campaign) -> list[str]:
    """Sentences that qualify the verdict: floors and the worth of carried state."""
    found = []
    for run in compared_runs(campaign):
        metrics = language(run)
        if metrics is None:
            continue
        label, below = campaign.label(run), metrics.window.below_bigram
        word = "below" if below.value >= 0 else "above"
        found.append(
            f"{label} is {abs(below.value):.3f} bits per byte {word} the Kneser-Ney bigram floor "
            f"({_span(below, absolute=True)}{_excludes(below)})."
        )
        gain = metrics.streaming_gain
        if gain is not None:
            verb = "lowers" if gain.value >= 0 else "raises"
            found.append(
                f"Carrying its state through whole documents {verb} {label}'s bits per byte by "
                f"{abs(gain.value):.3f} ({_span(gain, absolute=True)}{_excludes(gain)})."
            )
    return found


def _pairs(campaign: Campaign) -> Iterator[tuple[Run, Run]]:
    measured = [run for run in compared_runs(campaign) if "language_modelling" in run.results]
    if not measured:
        return
    for own in measured:
        if own.arm != measured[0].arm:
            continue
        for other in measured:
            if other.arm != own.arm and other.config.seed == own.config.seed:
                yield own, other


def _verdict(own: str, other: str, difference: Interval) -> str:
    """difference: bits per byte of `own` minus `other`; negative is better."""
    n = difference.n
    if difference.low is None or difference.high is None:
        return (
            f"{own} scores {difference.value:+.3f} bits per byte against {other} on {n} document: "
            "too few for an interval, so nothing follows."
        )
    size = f"{abs(difference.value):.3f} bits per byte"
    span = _span(difference, absolute=True)
    how = f"{span}, paired bootstrap over {n} documents"
    if difference.high < 0:
        return f"{own} beats {other} by {size} ({how}); the interval excludes 0."
    if difference.low > 0:
        return f"{other} beats {own} by {size} ({how}); the interval excludes 0."
    signed = f"95 % interval {difference.low:+.3f} to {difference.high:+.3f}"
    return (
        f"{own} and {other} cannot be told apart: {own} minus {other} is {difference.value:+.3f} bits per "
        f"byte ({signed}, paired bootstrap over {n} documents); the interval includes 0."
    )


def _span(interval: Interval, *, absolute: bool = False) -> str:
    """An interval in words; `absolute` turns it so that its value is positive."""
    if interval.low is None or interval.high is None:
        return "no interval: one document"
    low, high = interval.low, interval.high
    if absolute and interval.value < 0:
        low, high = -high, -low
    return f"95 % interval {low:.3f} to {high:.3f}"


def _excludes(interval: Interval) -> str:
    if interval.low is None or interval.high is None or interval.low > 0 or interval.high < 0:
        return ""
    return ", which includes 0"


def checks(campaign: Campaign) -> list[Check]:
    """Whether the arms were given the same chances."""
    runs = compared_runs(campaign)
    found = []
    gap = parameter_gap(runs)
    if gap is not None:
        counts = ", ".join(f"{campaign.label(run)} {run.parameters:,}" for run in runs if run.parameters)
        found.append(
            Check(
                gap <= PARAMETER_TOLERANCE,
                f"Parameters within {PARAMETER_TOLERANCE:.0%}: {gap:.2%} apart ({counts}).",
            )
        )
    tokens = {run.steps.last("tokens") for run in runs}
    found.append(
        Check(
            len(tokens) == 1 and None not in tokens,
            "Same training tokens: "
            + ", ".join(f"{campaign.label(run)} {run.steps.last('tokens') or 0:,.0f}" for run in runs)
            + ".",
        )
    )
    for key, text in (("data_hash", "data"), ("tokenizer_hash", "tokenizer"), ("commit", "commit")):
        values = sorted({str(run.record.get(key)) for run in campaign.runs})
        shown = ", ".join(shortened(value) for value in values)
        found.append(Check(len(values) == 1, f"Same {text} in all runs: {shown}."))
    found.append(_recipe_check(runs))
    unfinished = [campaign.label(run) for run in campaign.runs if not run.finished]
    text = f"Unfinished runs: {', '.join(unfinished)}." if unfinished else "All runs reached their token budget."
    found.append(Check(not unfinished, text))
    skipped = sum(run.nonfinite for run in campaign.runs)
    found.append(Check(skipped == 0, f"Steps skipped because a value was not finite: {skipped}."))
    return found


def shortened(digest: str) -> str:
    """First digits of a hash or commit, with the mark of a working tree that had uncommitted changes."""
    head, mark, _ = digest.partition("-dirty")
    return head[:12] + mark


def _recipe_check(runs: tuple[Run, ...]) -> Check:
    flat = [dict(_leaves(run.config.model_dump(mode="json"))) for run in runs]
    paths = sorted({path for one in flat for path in one if any(o.get(path) != one[path] for o in flat)})
    paths = [path for path in paths if path not in ("name", "output_dir", "seed")]
    sections = sorted({".".join(path.split(".")[:2]) for path in paths})
    passed = all(section.startswith("model") for section in sections)
    where = ", ".join(sections) or "nothing"
    return Check(passed, f"Same recipe: besides names and seed the configurations differ in {where}.")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def limits(campaign: Campaign) -> list[str]:
    """What the results do not show."""
    runs = compared_runs(campaign)
    return [
        *_seed_limit(campaign, runs),
        *_scale_limit(campaign, runs),
        *_document_limit(runs),
        *_passkey_limit(campaign),
        *_continual_limit(campaign),
        *_time_limit(runs),
    ]


def _seed_limit(campaign: Campaign, runs: tuple[Run, ...]) -> list[str]:
    seeds = {arm: sorted({run.config.seed for run in runs if run.arm == arm}) for arm in campaign.arms()}
    fewest = min((len(found) for found in seeds.values() if found), default=0)
    if fewest == 1:
        return [
            "One seed for each arm: the intervals cover the choice of documents, not the luck of an "
            "initialisation or of a data order. Another seed may turn a small difference round."
        ]
    shown = "; ".join(f"{arm}: {', '.join(map(str, found))}" for arm, found in seeds.items() if found)
    word = "Fewer than three seeds" if fewest < 3 else f"{fewest} seeds or more"
    return [f"{word} for each arm ({shown}); the intervals are within one seed."]


def _scale_limit(campaign: Campaign, runs: tuple[Run, ...]) -> list[str]:
    counts = [run.parameters for run in runs if run.parameters]
    tokens = [value for run in runs if (value := run.steps.last("tokens"))]
    if not counts or not tokens:
        return []
    text = (
        f"Models of {short_count(max(counts))} parameters trained on {short_count(max(tokens))} tokens "
        f"({max(tokens) / max(counts):.1f} tokens a parameter): which arm is better at another size "
        "or budget is a different question."
    )
    found = [text]
    for data in campaign.data:
        train = data.splits["train"]
        found.append(
            f"One corpus, {data.name} ({train.documents:,} training documents, {short_count(train.tokens)} "
            f"tokens, {max(tokens) / train.tokens:.2f} epochs): results on other text may differ."
        )
    return found


def _document_limit(runs: tuple[Run, ...]) -> list[str]:
    counts = {len(metrics.documents.id) for run in runs if (metrics := language(run)) is not None}
    if not counts:
        return []
    count = min(counts)
    few = " That is few: intervals of a percentile bootstrap are then somewhat too narrow." if count < 30 else ""
    return [f"{count} held-out documents stand behind every overall number.{few}"]


def _passkey_limit(campaign: Campaign) -> list[str]:
    found = []
    for run in campaign.with_result("passkey") or campaign.with_result("passkey", chronological=True):
        metrics = run.results["passkey"].metrics
        assert isinstance(metrics, PasskeyMetrics)
        right = sum(sample.exact for length in metrics.lengths for sample in length.samples)
        total = sum(len(length.samples) for length in metrics.lengths)
        found.append(f"{campaign.label(run)} {right} of {total}")
    if not found:
        return []
    return [
        f"Keys repeated without a mistake: {'; '.join(found)}. A lower loss of the key is a trace of memory, "
        "not retrieval one could use."
    ]


def _continual_limit(campaign: Campaign) -> list[str]:
    runs = campaign.with_result("continual", chronological=True)
    if not runs:
        return []
    metrics = runs[0].results["continual"].metrics
    assert isinstance(metrics, ContinualMetrics)
    found = []
    orders = {run.order for run in runs}
    if "reverse" not in orders:
        found.append(
            f"One order of {len(metrics.segments)} periods: forgetting cannot be told from a change in the "
            "difficulty of the text."
        )
    budgets = {run.config.train.budget_tokens for run in runs}
    mixed = any(run.config.train.budget_tokens in budgets for run in campaign.runs if not run.chronological)
    if not mixed and "shuffled" not in orders:
        found.append("No run read all periods shuffled at the same budget, so the price of the order is unknown.")
    return found


def _time_limit(runs: tuple[Run, ...]) -> list[str]:
    devices = sorted({str(run.record.get("device")) for run in runs})
    return [
        f"Times are those of single runs on {'; '.join(devices)}, without repeats; other load on the machine counts."
    ]

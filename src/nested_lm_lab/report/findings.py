"""What the numbers say: verdicts, fairness checks and limits as sentences, every number from a result."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.evaluation.results import PARAMETER_TOLERANCE
from nested_lm_lab.report.collect import Campaign, Run, parameter_gap
from nested_lm_lab.report.plot_style import short_count
from nested_lm_lab.report.seeds import over_seeds
from nested_lm_lab.tasks.continual.schema import ContinualMetrics
from nested_lm_lab.tasks.language_modelling import paired_difference
from nested_lm_lab.tasks.needles.metrics import PasskeyMetrics
from nested_lm_lab.tasks.schema import LanguageModellingMetrics

FEWEST_DOCUMENTS = 10
"""A difference over fewer is printed without a claim."""
SPEED_TOLERANCE = 1.5
"""Times by which tokens a second may differ where the same work was done."""


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
    """The first arm against each other arm, paired by document and seed: which has fewer bits per byte, if any.

    A win is claimed from several seeds alone. Every sentence says on how many seeds and documents it rests.
    """
    measured = [run for run in compared_runs(campaign) if "language_modelling" in run.results]
    found: dict[str, list[Interval]] = {}
    for own in measured:
        for other in measured:
            if own.arm == measured[0].arm != other.arm and other.config.seed == own.config.seed:
                pair = (own.results["language_modelling"], other.results["language_modelling"])
                bootstrap = Bootstrap(samples=own.config.eval.bootstrap_samples)
                found.setdefault(other.arm, []).append(paired_difference(*pair, bootstrap=bootstrap))
    if not found:
        return ["No verdict: it needs language modelling results of two arms with the same seed."]
    return [_verdict(measured[0].arm, other, differences) for other, differences in found.items()]


def _verdict(own: str, other: str, by_seed: Sequence[Interval]) -> str:
    """by_seed: bits per byte of `own` minus `other`; negative is better."""
    documents = by_seed[0].n
    difference = by_seed[0] if len(by_seed) == 1 else over_seeds([one.value for one in by_seed])
    if documents < FEWEST_DOCUMENTS or difference.low is None or difference.high is None:
        return (
            f"{own} has {difference.value:+.3f} bits per byte against {other} on {documents} "
            f"document{'s' * (documents > 1)}: too few, so nothing follows."
        )
    better, worse = (own, other) if difference.value < 0 else (other, own)
    low, high = sorted((difference.low, difference.high), reverse=difference.value < 0)
    sign = -1 if difference.value < 0 else 1
    size = f"{abs(difference.value):.3f}"
    span = f"95 % interval {sign * low:.3f} to {sign * high:.3f}"
    if len(by_seed) == 1:
        clear = "" if low * high > 0 else " The interval includes 0."
        return (
            f"With one seed, {better} has {size} bits per byte less than {worse} ({span} over {documents} documents)."
            f"{clear} Another seed may differ: nothing follows about the arms."
        )
    basis = f"{span} over {len(by_seed)} seeds; the same {documents} documents for all"
    if low * high > 0:
        return f"{better} beats {worse} by {size} bits per byte ({basis})."
    return f"{own} and {other} cannot be told apart: {better} has {size} bits per byte less ({basis})."


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
    found += [_recipe_check(runs), *_speed_check(campaign, runs)]
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


def _speed_check(campaign: Campaign, runs: tuple[Run, ...]) -> list[Check]:
    """Whether the machine was as free for every arm, as far as speeds tell: seeds of an arm, and steps of a run."""
    by_arm: dict[str, list[float]] = {}
    for run in runs:
        if run.tokens_per_s is not None:
            by_arm.setdefault(run.arm, []).append(run.tokens_per_s)
    spread = {f"the seeds of {arm}": max(found) / min(found) for arm, found in by_arm.items() if len(found) > 1}
    for run in runs:
        if len(speeds := sorted(run.speeds)) >= 10:
            spread[f"the steps of {campaign.label(run)}"] = speeds[len(speeds) * 9 // 10] / speeds[len(speeds) // 10]
    if not spread:
        return []
    uneven = [f"{where} by {times:.1f} times" for where, times in spread.items() if times > SPEED_TOLERANCE]
    if not uneven:
        return [Check(True, f"Speed even within {SPEED_TOLERANCE} times, so the machine was as free for every arm.")]
    text = (
        f"Speed differs between {'; '.join(uneven)}: other work ran beside, so times and tokens/s are not comparable."
    )
    return [Check(False, text)]


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

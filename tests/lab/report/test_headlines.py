"""Sentences of the suites and the table of times: what they say follows from the numbers, on fakes and on evidence."""

from dataclasses import replace
from pathlib import Path

import pytest

from nested_lm_lab.report.collect import collect
from nested_lm_lab.report.cost import cost
from nested_lm_lab.report.headlines import headlines
from tests.lab.report.fake_continual import at, write_continual
from tests.lab.report.test_needle_tables import curve
from tests.lab.report.test_zeroshot_tables import metrics as zero_shot

EVIDENCE = Path(__file__).parents[3] / "eval/evaluation-demo"


def with_results(campaign, task, *found):
    """The first runs of a campaign with one result each."""
    runs = [
        replace(run, results={task: run.results["passkey"].model_copy(update={"task": task, "metrics": one})})
        for run, one in zip(campaign.runs, found, strict=False)
    ]
    return replace(campaign, runs=tuple(runs))


def reading(run, name, order, transfer, **train):
    """A chronological run as one of another order or recipe."""
    result = run.results["continual"]
    metrics = result.metrics.model_copy(update={"backward_transfer": at(transfer)})
    stream = run.config.train.stream.model_copy(update={"order": order, **train})
    config = run.config.model_copy(
        update={"name": name, "train": run.config.train.model_copy(update={"stream": stream})}
    )
    return replace(run, config=config, results={"continual": result.model_copy(update={"metrics": metrics})})


@pytest.fixture(scope="module")
def history(complete):
    """The chronological Hope run of the fake campaign."""
    return next(run for run in complete.runs if run.chronological and run.arm == "Hope")


def test_a_campaign_without_these_suites_is_silent(complete):
    plain = replace(complete, runs=tuple(run for run in complete.runs if not run.chronological))
    assert headlines(plain) == []


def test_needles_have_their_share_what_they_save_and_where_memory_ended(complete):
    found, lost = curve("niah", found=True, alone=True), curve("niah", found=False, alone=True)
    (line,) = headlines(with_results(complete, "niah", found, lost))
    assert line == (
        "Needles in 2,048 to 4,096 tokens, mean share found over tasks and lengths: "
        "Hope 1.00 (+4.500 nats a token saved, the whole interval above 0 in 1 of 1, to 2,048 tokens: memory ended "
        "at 4,096 tokens); Transformer++ 0.00 (+4.500 nats a token saved, the whole interval above 0 in 1 of 1, to "
        "2,048 tokens: memory ended at 4,096 tokens)."
    )
    task = found.tasks[0]
    ended = found.model_copy(update={"tasks": (task.model_copy(update={"lengths": task.lengths[1:]}),)})
    (line,) = headlines(with_results(complete, "niah", ended))
    assert line.endswith("Hope none, memory ended at 4,096 tokens.")


def test_zero_shot_counts_what_is_above_the_floors(complete):
    (line,) = headlines(with_results(complete, "zeroshot", zero_shot(0.25), zero_shot(0.5)))
    assert "Hope 0 of 8, WikiText 1.771 bits per byte beside the bigram's 2.000" in line
    assert "Transformer++ 8 of 8" in line


@pytest.mark.parametrize(
    ("transfer", "said"),
    [
        (0.3, "Without a shift the transfer is no smaller: it shows learning that was not finished"),
        (0.1, "The transfer is larger than without a shift in 1 of 1 runs."),
        (None, "No run read the same text without a shift"),
    ],
)
def test_transfer_stands_beside_the_control_without_a_shift(complete, history, transfer, said):
    runs = [reading(history, "forward", "forward", 0.2), reading(history, "replay", "forward", 0.9, replay=0.5)]
    if transfer is not None:
        runs.append(reading(history, "shuffled", "shuffled", transfer))
    (line,) = headlines(replace(complete, runs=tuple(runs)))
    assert said in line
    assert "and +0.200" in line
    assert "0.900" not in line  # replay is no plain reading
    assert ("without a shift 0." in line) == (transfer is not None)


def test_ticks_and_lesions(tmp_path):
    write_continual(tmp_path)
    lines = headlines(collect(tmp_path))
    assert (
        "Updates of levels leave a mark on the loss (p at most 0.05) in 1 of 1 comparisons, of which 1 had ticks "
        "enough to show one; p 0.03." in lines
    )
    assert lines[-1].endswith("below 0 if slow levels hold old knowledge: Hope -1.00 (p = 0.33, at least 0.33).")


def test_times_are_summed_by_model_and_suite(complete):
    (shown,) = cost(complete)
    assert shown.table.header == ("time", "Hope", "Transformer++")
    rows = {row[0].text: row[1:] for row in shown.table.rows}
    assert list(rows) == ["training", "language modelling", "passkey", "sampling", "continual", "all"]
    spent = [run.results["passkey"].wall_seconds for run in complete.runs if "passkey" in run.results]
    assert rows["passkey"][0].text == f"{spent[0]:.0f} s"
    assert rows["training"][0].detail.startswith("2 runs, ")
    bare = [replace(run, results={}, steps=replace(run.steps, rows=())) for run in complete.runs]
    assert cost(replace(complete, runs=tuple(bare))) == []


@pytest.mark.skipif(not EVIDENCE.exists(), reason="an installed copy has no evidence")
def test_the_published_evaluation_has_a_sentence_for_every_suite():
    campaign = collect(EVIDENCE)
    lines = headlines(campaign)
    starts = ("Needles in", "Zero-shot", "Periods in the order of time", "Updates of levels", "Levels set back")
    assert all(any(line.startswith(start) for line in lines) for start in starts)
    (shown,) = cost(campaign)
    names = [row[0].text for row in shown.table.rows]
    assert {"training", "niah", "books", "class incremental", "zeroshot", "all"} <= set(names)

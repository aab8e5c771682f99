from dataclasses import replace

import numpy as np
import pytest

from nested_lm_lab.evaluation.interval import Interval
from nested_lm_lab.report.collect import Trace, collect
from nested_lm_lab.report.findings import _verdict, checks, limits, verdicts
from nested_lm_lab.report.tables import continual_table, duration, main_table, passkey_table
from tests.lab.report.fake_runs import BITS, preset, write_campaign

LM = ("language_modelling",)


def interval(value, low, high, n=14):
    return Interval(value=value, low=low, high=high, n=n, method="test")


def test_the_verdict_is_the_paired_difference_over_documents(complete):
    (sentence,) = verdicts(complete)
    own, other = (run.results["language_modelling"].metrics.documents for run in complete.runs[:2])
    nats = np.array(other.window_nats) - np.array(own.window_nats)
    expected = BITS * nats.sum() / np.sum(own.bytes)
    assert sentence.startswith(
        f"With one seed, Hope has {expected:.3f} bits per byte less than Transformer++ (95 % int"
    )
    assert sentence.endswith("over 14 documents). Another seed may differ: nothing follows about the arms.")


@pytest.mark.parametrize(
    ("by_seed", "sentence"),
    [
        (
            [interval(-0.03, -0.04, -0.02), interval(-0.03, -0.05, -0.01), interval(-0.036, -0.04, -0.02)],
            "A beats B by 0.032 bits per byte (95 % interval 0.023 to 0.041 over 3 seeds; the same 14 documents",
        ),
        (
            [interval(0.03, 0.02, 0.04), interval(0.03, 0.01, 0.05), interval(0.036, 0.02, 0.04)],
            "B beats A by 0.032 bits per byte (95 % interval 0.023 to 0.041 over 3 seeds; the same 14 documents",
        ),
        (
            [interval(-0.03, -0.05, -0.01), interval(0.02, 0.01, 0.03)],
            "A and B cannot be told apart: A has 0.005 bits per byte less (95 % interval -0.313 to 0.323 over 2 seeds;",
        ),
        ([interval(-0.01, -0.03, 0.01)], "With one seed, A has 0.010 bits per byte less than B (95 % interval -0.010 "),
        ([interval(-0.01, None, None, n=1)], "A has -0.010 bits per byte against B on 1 document: too few"),
        ([interval(-0.09, -0.1, -0.08, n=3)] * 3, "A has -0.090 bits per byte against B on 3 documents: too few"),
    ],
)
def test_verdicts_in_words(by_seed, sentence):
    assert _verdict("A", "B", by_seed).startswith(sentence)


def test_one_seed_never_beats(rendered):
    for name in ("report.html", "report.md"):
        assert "beats" not in (rendered / name).read_text()


def test_a_loss_is_said_as_plainly_as_a_win(tmp_path):
    write_campaign(tmp_path, ("hope", "transformer"), tasks=LM, better=0.4)
    (sentence,) = verdicts(collect(tmp_path))
    assert sentence.startswith("With one seed, Transformer++ has 0.")


def test_without_results_there_is_no_verdict(tmp_path):
    write_campaign(tmp_path, ("hope", "transformer"), tasks=())
    campaign = collect(tmp_path)
    assert verdicts(campaign)[0].startswith("No verdict")
    assert [row[5].text for row in main_table(campaign).rows] == ["not measured", "not measured"]


def test_fair_comparison_passes_every_check(complete):
    assert [check.text for check in checks(complete) if not check.passed] == []
    assert any("differ in model.channel, model.mixer." in check.text for check in checks(complete))


def test_unequal_size_is_flagged(tmp_path):
    write_campaign(tmp_path, ("hope", "transformer"), tasks=LM, parameters={"transformer": 1_100_000})
    failed = [check.text for check in checks(collect(tmp_path)) if not check.passed]
    assert failed == ["Parameters within 2%: 9.27% apart (Hope 1,212,416, Transformer++ 1,100,000)."]


def test_a_busy_machine_is_flagged(complete):
    """Half of the steps of one run at a third of the speed, as beside other work."""
    run, *others = complete.runs
    rows, late = [], 0.0
    for place, row in enumerate(run.steps.rows):
        late += 0.5 if place % 2 else 0.0
        rows.append({**row, "seconds": row["seconds"] + late})
    busy = replace(complete, runs=(replace(run, steps=Trace(tuple(rows))), *others))
    (failed,) = [check.text for check in checks(busy) if not check.passed]
    assert failed.startswith("Speed differs between the steps of Hope by ")
    assert failed.endswith("times and tokens/s are not comparable.")


def test_limits_come_from_the_data(complete):
    text = " ".join(limits(complete))
    assert "One seed for each arm" in text
    tokens = preset("hope", "x", 1).train.budget_tokens
    assert (
        f"1.21 M parameters trained on {tokens / 1000:.0f} k tokens ({tokens / 1_212_416:.1f} tokens a parameter)"
        in text
    )
    assert "14 held-out documents" in text
    assert f"{tokens / 2_400_000:.2f} epochs" in text
    assert "Hope 0 of 80; Transformer++ 0 of 80" in text
    assert "One order of 4 periods" in text


def test_tables_repeat_the_results(complete):
    metrics = complete.runs[0].results["language_modelling"].metrics
    row = main_table(complete).rows[0]
    low, high = metrics.window.bits_per_byte.low, metrics.window.bits_per_byte.high
    assert (row[5].text, row[5].detail) == (
        f"{metrics.window.bits_per_byte.value:.3f}",
        f"{low:.3f} to {high:.3f}",
    )
    assert [row[0].text for row in main_table(complete).rows][2:] == [
        "unigram floor",
        "Kneser-Ney bigram floor",
    ]
    forgetting = complete.runs[3].results["continual"].metrics.forgetting[-1]
    expected = sum(cell.value for cell in forgetting[:-1]) / 3
    shown = continual_table(complete, "forward").rows[1][-1]
    assert shown.text == f"{expected:.3f}"
    assert " to " in shown.detail
    assert len(passkey_table(complete).rows) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(48.2, "48 s"), (151, "2 min 31 s"), (119.6, "2 min 0 s"), (11_100, "3 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text

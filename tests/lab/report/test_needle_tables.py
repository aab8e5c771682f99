"""Tables of needle curves and long books: scores beside controls, and a plain word where they carry nothing."""

from dataclasses import replace

import pytest

from nested_lm_lab.evaluation.bootstrap import Bootstrap
from nested_lm_lab.report.kinds import other_results
from nested_lm_lab.tasks.needles.measure import ControlRow, Measured, Row
from nested_lm_lab.tasks.needles.metrics import BabilongMetrics, NeedleLength, NeedleTask, NiahMetrics
from nested_lm_lab.tasks.needles.summary import effective_lengths, summarise
from tests.lab.report.test_plots_needles import of_books

SAMPLES = 40


def curve(kind, *, found, alone, frozen=None, guessed=0.0, stopped="memory ended", samples=SAMPLES):
    """One task at 2,048 tokens that is (not) solved with the text, and with the needle alone; 4,096 did not fit."""
    rows, controls = [], []
    asked = None if frozen is None else (2.0, frozen, 3)
    for sample in range(samples):
        rows.append(Row(sample, 0.5, 1000, True, float(found), 0.5, found, 1, asked, "x"))
        rows.append(Row(sample, None, None, False, guessed, 5.0, False, 90, None, "no"))
        controls.append(ControlRow(sample, (0.1, alone, 1), (4.0, False, 80), asked))
    scores = summarise(Measured(rows, controls, 1024, 2048, 2048, 2.0), Bootstrap(samples=100))
    lengths = (
        NeedleLength(length=2048, scores=scores, stopped=None),
        NeedleLength(length=4096, scores=None, stopped=stopped),
    )
    task = NeedleTask(
        task="s1", upstream="niah_single_1", haystack="noise", lengths=lengths, effective=effective_lengths(lengths)
    )
    fields = {"constant_state": True, "max_state_mib": 64, "tasks": (task,)}
    made = NiahMetrics if kind == "niah" else BabilongMetrics
    return made(kind=kind, tokens_per_s=1.0, tokens_read_per_s=1.0, **fields)


@pytest.fixture
def shown(complete):
    """Renders what metrics of two runs come to: title -> (text, rows)."""

    def render(*metrics):
        runs = [
            replace(
                run, results={one.kind: run.results["passkey"].model_copy(update={"task": one.kind, "metrics": one})}
            )
            for run, one in zip(complete.runs, metrics, strict=False)
        ]
        tables = other_results(replace(complete, runs=tuple(runs)))
        assert not any("no table of its own" in table.text for table in tables)
        return {
            table.title: (
                table.text,
                {
                    (row[0].text, row[0].detail): [(cell.text, cell.detail) for cell in row[1:]]
                    for row in table.table.rows
                },
            )
            for table in tables
        }

    return render


def test_scores_stand_beside_all_controls(shown):
    tables = shown(curve("niah", found=True, alone=True, frozen=False), curve("niah", found=False, alone=True))
    text, scores = tables["Needles"]
    assert scores["s1, 2,048", ""][0] == ("1.00", "0.912 to 1.000; n = 40; match 1.00, 0.912 to 1.000")
    assert scores["s1, 4,096", ""][0] == ("stopped", "memory ended at 4,096 tokens")
    assert "Every score of Transformer++ is 0; what is left" in text
    _, controls = tables["Needles: controls"]
    nothing = "exact 0 in 1 of 1 rows; 0.000 to 0.088 each; {0} to {0} nats"
    both = nothing.replace("exact", "exact and match").format("5.00")
    assert controls["all tasks and lengths", "no needle"][0] == ("0.00", both)
    assert controls["s1, 2,048", "needle only"][0] == ("1.00", "0.912 to 1.000; 0.10 nats")
    assert controls["all tasks and lengths", "reset"][0] == ("0.00", nothing.format("4.00"))
    assert controls["all tasks and lengths", "frozen"] == [("0.00", nothing.format("2.00")), ("-", "")]
    assert controls["all tasks and lengths", "unwritten"] == controls["all tasks and lengths", "frozen"]
    assert ("s1, 2,048", "reset") not in controls
    assert "frozen: freezes the fast weights from the question on" in tables["Needles: controls"][0]
    assert tables["Needles: nats saved"][1]["s1, 2,048", ""][0] == ("+4.5000", "+4.5000 to +4.5000; with it 0.50")
    effective = tables["Needles: effective length"][1]
    assert effective["s1", "match at least 0.856"] == [("2,048", ""), ("none", "")]


def test_what_is_found_without_the_needle_is_printed_row_for_row(shown):
    leaky = curve("niah", found=True, alone=True, guessed=0.5)
    _, controls = shown(leaky)["Needles: controls"]
    assert controls["s1, 2,048", "no needle"][0] == (
        "0.00",
        "0.000 to 0.088; match 0.50, 0.352 to 0.648; 5.00 nats",
    )
    assert controls["s1, 4,096", "no needle"][0] == ("stopped", "memory ended at 4,096 tokens")


def test_a_limit_that_was_set_is_not_called_the_end_of_memory(shown):
    limited = curve(
        "niah", found=True, alone=True, stopped="a state: 99 MiB while it is copied, and the limit is 64 MiB"
    )
    _, rows = shown(limited)["Needles"]
    assert rows["s1, 4,096", ""][0] == ("stopped", "the limit of 64 MiB (--max-state-mib) was reached at 4,096 tokens")


def test_few_samples_leave_an_effective_length_open(shown):
    _, effective = shown(curve("niah", found=True, alone=True, samples=4))["Needles: effective length"]
    assert effective["s1", "match at least 0.5"] == [("2,048", "")]
    assert effective["s1", "match at least 0.856"] == [("not decidable with 4 samples", "")]


def test_a_labelled_result_has_tables_of_its_own(complete):
    run = complete.runs[0]
    found = curve("niah", found=True, alone=True)
    results = {
        name: run.results["passkey"].model_copy(update={"task": name, "metrics": found})
        for name in ("niah", "niah_long")
    }
    tables = other_results(replace(complete, runs=(replace(run, results=results),)))
    assert [table.title for table in tables if "controls" in table.title] == [
        "Needles: controls",
        "Needles, long: controls",
    ]


def test_where_not_even_the_needle_alone_is_found_the_report_says_so(shown):
    text, _ = shown(*(curve("niah", found=False, alone=False) for _ in range(2)))["Needles"]
    assert "Every score of Hope, Transformer++ is 0, and so is it with the needle and the question alone" in text
    assert "carry no retrieval information" in text


def test_facts_in_books_have_the_same_tables(shown):
    tables = shown(curve("babilong", found=True, alone=True))
    assert tables["Facts in books"][1]["s1, 2,048", ""][0][0] == "1.00"
    assert "no facts: the text without it" in tables["Facts in books: controls"][0]


def test_long_books_have_a_table(shown):
    _, rows = shown(of_books())["Long books"]
    assert rows["nats / token, carried state", "whole books"][0][1].endswith("3 books")
    assert rows["read", "tokens of each book"] == [("4,096 of 4,096", "")]
    assert any(name == "saved" for name, _ in rows)

"""Tables of continual learning: every kind has one, and it says numbers, floors and p-values."""

import pytest

from nested_lm_lab.evaluation.registry import ENTRIES, find_task
from nested_lm_lab.report.collect import collect
from nested_lm_lab.report.kinds import other_results
from tests.lab.report.fake_continual import METRICS, write_continual


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Title of each table -> its rows, cells as text and detail."""
    root = tmp_path_factory.mktemp("campaign")
    write_continual(root)
    shown = other_results(collect(root))
    assert len(shown) == len(METRICS)
    assert not any("no table of its own" in one.text for one in shown)
    (regret,) = [one for one in shown if one.title == "Regret"]
    assert "The oracle of Hope is not of the arm's own model" in regret.text
    return {one.title: [[(cell.text, cell.detail) for cell in row] for row in one.table.rows] for one in shown}


@pytest.mark.parametrize(
    ("title", "row", "cell"),
    [
        ("Regret", "oracle", ("Transformer++", "mixed; another model")),
        ("Regret", "on the period just read", ("0.123", "0.023 to 0.223")),
        ("Periods with carried state", "backward transfer", ("-0.200", "-0.300 to -0.100")),
        ("Periods with carried state", "period 1", ("2.200", "2.100 to 2.300")),
        ("Lesions of levels", "level of 2,048 tokens", ("+0.010 / +0.512", "")),
        ("Lesions of levels", "everything but the levels", ("+3.000 / +3.000", "")),
        ("Lesions of levels", "rank correlation", ("-1.00", "p = 0.33, at least 0.33; n = 3")),
        ("Ticks of levels", "training, level of 2,048 tokens", ("-", "it ticks at every place")),
        (
            "Ticks of levels",
            "training, level of 8,192 tokens",
            ("+0.0200", "p = 0.03, at least 0.001; 9 ticks, 27 others"),
        ),
        ("Fits of forgetting", "tied to the levels' periods", ("0.0200", "factor 0.1")),
        ("Fits of forgetting", "one free exponential", ("0.0300", "150 tokens; 2 curves")),
        ("Classes, one group after another", "accuracy", ("0.600", "0.500 to 0.700")),
        ("Classes, one group after another", "accuracy minus floor, paired", ("-0.300", "-0.400 to -0.200")),
        ("Classes, one group after another", "forgetting of the floor", ("0.300", "0.200 to 0.400")),
        ("Classes, one group after another", "chance", ("0.250", "")),
        ("Facts that change", "stale rate", ("0.600", "0.500 to 0.700")),
        ("Facts that change", "chance", ("0.125", "stale 0.500")),
        ("Two languages, one after the other", "after this language", ("20.500", "20.400 to 20.600")),
        ("Two languages, one after the other", "kept: then the other one, minus alone", ("-1.500", "-1.600 to -1.400")),
        ("Two languages, one after the other", "floor", ("14.000", "13.900 to 14.100")),
    ],
)
def test_tables_say_the_numbers_of_their_results(tables, title, row, cell):
    assert next(cells[1] for cells in tables[title] if cells[0][0] == row) == cell


def test_every_kind_of_result_has_a_table():
    for entry in ENTRIES:
        task = find_task(entry.kind)
        assert task.on_the_page or "tables" in vars(task) or "tables_by" in vars(task), entry.kind


def test_exact_translations_stand_beside_their_chrf(tables):
    rows = [cells for cells in tables["Two languages, one after the other"] if cells[0][0] == "after this language"]
    assert [cells[0][1] for cells in rows] == [
        f"language {letter}, {score}" for letter in "AB" for score in ("chrF", "exact")
    ]
    assert [cells[1][0] for cells in rows] == ["20.500", "0.100"] * 2

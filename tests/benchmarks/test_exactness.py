"""The table of published errors is that of the result file, and has every option that the tests compare."""

import json
from pathlib import Path

from benchmarks import exactness
from tests.ops.memory_problems import OPTIONS

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_result_file():
    found = json.loads((ROOT / "benchmarks" / "results" / "exactness.json").read_text())
    assert [row["option"] for row in found["rows"]] == list(OPTIONS), "run python benchmarks/exactness.py again"
    assert exactness.table(found["rows"]) in (ROOT / "docs" / "exactness.md").read_text()
    assert found["commit"]


def test_no_published_error_is_above_what_the_tests_allow():
    rows = json.loads((ROOT / "benchmarks" / "results" / "exactness.json").read_text())["rows"]
    assert all(row[what] < 1e-10 for row in rows for what in ("outputs", "states", "gradients"))
    assert all(row["cpu"] is None or row["cpu"] < 1e-10 for row in rows)

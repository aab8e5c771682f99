"""What `make gpu` writes, and what the kernels' benchmark counts. The kernels themselves: tests/ops/test_triton.py."""

import json

import pytest
from benchmarks.gpu.__main__ import PARTS, SHARES, Report, deadlines

pytest.importorskip("triton")


def test_figures_are_written_as_they_come_and_failures_are_figures(tmp_path):
    report = Report(tmp_path / "found.json", {"gpu": "none"})
    report.add("speed", "first", {"tokens_per_second": 1.0})
    written = json.loads(report.path.read_text())
    report.attempt("speed", "second", lambda: 1 / 0)
    assert [figure["name"] for figure in written["figures"]] == ["first"]
    assert json.loads(report.path.read_text())["figures"][1]["failed"] == "ZeroDivisionError: division by zero"


def test_parts_share_all_the_minutes():
    assert sum(SHARES.values()) == pytest.approx(1.0)
    found = list(deadlines(8.0))
    assert [part for part, _ in found] == list(PARTS)
    assert found[-1][1] - found[0][1] == pytest.approx((1 - SHARES["doctor"]) * 480)


def test_a_layer_of_the_pilot_takes_few_launches():
    from benchmarks.kernels.__main__ import micro_batch

    counted = micro_batch()
    assert sum(counted["launches"].values()) <= 400
    assert counted["launches"]["read"] == 1


def test_a_changed_constant_is_another_kernel():
    from benchmarks.kernels.__main__ import HOPE
    from benchmarks.kernels.compiling import identity
    from benchmarks.kernels.recording import launches

    narrow, wide = (launches(HOPE, width=width, hidden=width, low=True)[0] for width in (32, 64))
    assert identity(narrow, 90) == identity(launches(HOPE, width=32, hidden=32, low=True)[0], 90)
    assert len({identity(narrow, 90), identity(narrow, 80), identity(wide, 90)}) == 3

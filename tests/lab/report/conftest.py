"""A complete campaign folder, written and rendered once for all tests that only read it."""

from pathlib import Path

import pytest

from nested_lm_lab.report.collect import Campaign, collect
from nested_lm_lab.report.render import render_campaign
from tests.lab.report.fake_runs import write_campaign


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_campaign(tmp_path_factory.mktemp("campaign"))
    render_campaign(folder)
    return folder


@pytest.fixture(scope="session")
def complete(rendered: Path) -> Campaign:
    return collect(rendered)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were not installed; rendering is fast then."""
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)

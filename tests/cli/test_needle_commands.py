"""The verbs that measure memory over long texts: what they hand on, and what they refuse."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm_lab.cli import needles as cli_needles


@pytest.fixture
def seen(monkeypatch):
    found = []
    module = ModuleType("nested_lm_lab.tasks.needles.run")
    module.default_output = lambda source, path, task: source / "results" / f"{task}.json"
    module.plan_niah = lambda loaded, settings, *, label: SimpleNamespace(settings=settings, task="niah")
    module.evaluate_plan = lambda loaded, path, plan, *, output, report: found.append((plan, output))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli_needles, "open_source", lambda source, device: (None, source / "checkpoints" / "step-1"))
    return found


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_niah_hands_its_settings_on(seen, tmp_path):
    book = tmp_path / "book.txt"
    result = invoke("niah", tmp_path, "--tasks", "s1,s2", "--lengths", "512,2k", "--depths", "3", "--books", book)
    assert result.exit_code == 0, result.output
    ((plan, output),) = seen
    settings = plan.settings
    assert settings.tasks == ("s1", "s2")
    assert settings.lengths == (512, 2048)
    assert settings.depths == (0.0, 0.5, 1.0)
    assert settings.samples == 24
    assert settings.files == (book,)
    assert output == tmp_path / "results" / "niah.json"


def test_niah_refuses_what_it_does_not_know(seen, tmp_path):
    result = invoke("niah", tmp_path, "--tasks", "s9")
    assert result.exit_code == 2
    assert "unknown task 's9'" in result.stderr
    assert invoke("niah", tmp_path, "--haystack", "hay").exit_code == 2
    assert seen == []

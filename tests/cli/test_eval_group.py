"""The `eval` group: its verbs, and the run folder that needs none."""

import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app


@pytest.fixture
def seen(monkeypatch):
    found = []
    module = ModuleType("nested_lm_lab.evaluation.run")
    module.evaluate_run = lambda run_dir, names, *, settings, device: found.append((run_dir, names))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("verb", [(), ("run",)])
@pytest.mark.parametrize("options_first", [True, False])
def test_a_run_folder_needs_no_verb(seen, tmp_path, verb, options_first):
    options = ["--tasks", "passkey,sampling"]
    given = [*options, tmp_path] if options_first else [tmp_path, *options]
    result = invoke("eval", *verb, *given)
    assert result.exit_code == 0, result.output
    assert seen == [(tmp_path, ("passkey", "sampling"))]


def test_help_lists_the_verbs(seen):
    result = invoke("eval", "--help")
    assert result.exit_code == 0
    assert "RUN_DIR" in result.stdout
    assert "run " in result.stdout
    assert "eval run" in invoke("eval", "run", "-h").stdout
    assert seen == []

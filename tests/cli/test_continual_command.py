"""`nested-lm eval continual`: what it hands on, and what it refuses."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def seen(monkeypatch):
    found = {}
    run = ModuleType("nested_lm_lab.tasks.continual.evaluate")
    run.evaluate_continual = lambda sources, settings, **options: found.update(
        options, sources=sources, settings=settings
    )
    comparison = ModuleType("nested_lm_lab.tasks.continual.comparison")
    comparison.compare_runs = lambda sources, path, **options: found.update(compared=(list(sources), path))
    for module in (run, comparison):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", "continual", *map(str, arguments)])


def test_options_are_handed_on(seen, tmp_path):
    result = invoke(
        *("a", "b", "--tasks", "classes, facts", "--shots", "5,all", "--class-sets", "banking77", "--pieces", "all"),
        *("--oracle", "c", "--class-data", tmp_path, "--tests-per-class", "2", "--seed", "4", "--device", "cpu"),
        *("--compare", tmp_path / "x.json"),
    )
    assert result.exit_code == 0, result.output
    assert seen["sources"] == [Path("a"), Path("b")]
    settings = seen["settings"]
    assert settings.tasks == ("classes", "facts")
    assert (settings.shots, settings.class_sets, settings.tests_per_class) == ((5, None), ("banking77",), 2)
    assert (settings.pieces_per_document, settings.seed) == (None, 4)
    assert (settings.oracle, settings.class_data, seen["output_dir"]) == (Path("c"), tmp_path, None)
    assert seen["compared"] == ([Path("a"), Path("b")], tmp_path / "x.json")


def test_by_default_tasks_are_chosen_by_the_run(seen):
    assert invoke("a").exit_code == 0
    assert seen["settings"].tasks is None
    assert "compared" not in seen
    assert "pieces_per_document" not in seen["settings"].model_fields_set  # each run says how many


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shots", "some"), "--shots: 'some' is neither a number of at least 1 nor `all`"),
        (("--tests-per-class", "0"), "--tests-per-class: '0' is neither"),
        (("--class-sets", "mnist"), "--class-sets: Input should be"),
        (("--compare", "x.json"), "--compare puts runs side by side; name two or more"),
        (("--tasks", ","), "--tasks: ',' names nothing"),
        (("--set-back-to", "start"), "--set-back-to: String should match pattern"),
    ],
)
def test_impossible_options_are_refused(seen, options, message):
    result = invoke("a", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not seen


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    result = invoke(tmp_path, "--tasks", "facts")
    assert result.exit_code == 2
    assert "neither a checkpoint nor a run folder" in result.output


def test_the_script_is_the_verb():
    command = [sys.executable, str(ROOT / "scripts" / "eval" / "continual.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "RUN_OR_CHECKPOINT" in done.stdout

"""The example of docs/extending.md: a task in one file and one line, from the model to the report's table."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm_lab.evaluation import registry
from nested_lm_lab.evaluation.results import load_result
from tests.lab.tasks.test_runner import run_config, save

PAGE = Path(__file__).resolve().parents[3] / "docs" / "extending.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Write the page's file and add its line."""
    section = PAGE.read_text(encoding="utf-8").split("## An evaluation task\n")[1].split("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "repeats.py").write_text(file)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = eval(line.strip().rstrip(",").replace("nested_lm_lab.tasks.repeats", "repeats"), {"Entry": registry.Entry})
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, entry))
    yield
    sys.modules.pop("repeats", None)


@pytest.mark.usefixtures("example")
def test_a_new_task_is_one_file_and_one_line(tmp_path, data_config):
    save(tmp_path / "run", run_config(data_config))
    given = ["eval", "repeats", str(tmp_path / "run"), "--words", "the army", "--times", "3", "--device", "cpu"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    result = load_result(tmp_path / "run" / "results" / "repeats.json")
    assert (result.task, result.settings) == ("repeats", {"words": "the army", "times": 3})
    assert f"saved {result.metrics.saved.text()}" in done.output
    assert "kept" in CliRunner().invoke(app, given).output
    refused = CliRunner().invoke(app, [*given[:-2], "--times", "1"])
    assert refused.exit_code == 2
    assert "--times" in refused.output
    assert "repeats" in CliRunner().invoke(app, ["eval", "--help"]).output

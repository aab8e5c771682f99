"""`nested-lm report RUN` prints the results of a run folder."""

import pytest
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm.errors import ReportError
from nested_lm_lab.report.run import run_lines


def test_a_run_folder_is_shown_with_its_scores(complete, rendered):
    result = CliRunner().invoke(app, ["report", str(rendered / "runs" / "hope")])
    assert result.exit_code == 0, result.output
    score = complete.runs[0].results["language_modelling"].metrics.window.bits_per_byte
    assert result.output.startswith("Hope, run hope-demo, seed 1: 1,212,416 parameters, 737,280 training tokens in ")
    assert f"{score.value:.4f}" in result.output
    assert "One seed" in result.output


def test_a_run_cannot_be_published(rendered):
    result = CliRunner().invoke(app, ["report", str(rendered / "runs" / "hope"), "--publish"])
    assert result.exit_code != 0
    assert "is a run" in result.output


def test_an_empty_folder_is_no_run(tmp_path):
    with pytest.raises(ReportError, match="no run folder that was trained"):
        list(run_lines(tmp_path))

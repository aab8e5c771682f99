"""Whole audits of sound models, what is written about them, and what the command line says."""

import json

import pytest
import torch
from typer.testing import CliRunner

from nested_lm.cli.main import app
from nested_lm.errors import CheckpointError, ConfigError, ReportError
from nested_lm_lab.audit import report, runner
from nested_lm_lab.audit.finding import Finding, at_least, at_most, between, broken, does_not_apply
from nested_lm_lab.audit.runner import CHECKS, Check, choose_checks, describe, run_audit, show
from nested_lm_lab.audit.subject import open_subject

CPU = torch.device("cpu")


def silent(_line):
    pass


@pytest.mark.parametrize("model", ["hope", "transformer"])
def test_a_sound_model_passes_every_check(make_subject, model):
    audit = run_audit(make_subject(model), tuple(CHECKS), report=silent)
    assert [row.figure for row in audit.rows if row.state == "missed"] == []
    assert audit.passed
    assert {row.check for row in audit.rows} == set(CHECKS)
    absent = [row.check for row in audit.rows if row.state == "does not apply"]
    assert ("reference" in absent) == (model == "transformer")


@pytest.mark.parametrize("model", ["writing", "delta"])
def test_models_with_other_mechanisms_pass(make_subject, model):
    names = ("reference", "causality", "split", "isolation", "ranges", "clock_a", "clock_b", "long_stream")
    audit = run_audit(make_subject(model), names, report=silent)
    assert [row.figure for row in audit.rows if row.state == "missed"] == []


class TestFinding:
    @pytest.mark.parametrize(
        ("finding", "state"),
        [
            (at_most("x", 1.0, 1.0), "passed"),
            (at_most("x", 1.1, 1.0), "missed"),
            (at_most("x", float("nan"), 1.0), "missed"),
            (at_least("x", float("inf"), 1.0), "missed"),
            (at_least("x", 0.9, 1.0), "missed"),
            (between("x", 0.5, 0.0, 1.0), "passed"),
            (between("x", -0.5, 0.0, 1.0), "missed"),
            (does_not_apply("x", "no memory"), "does not apply"),
            (broken("x", "an error"), "missed"),
        ],
    )
    def test_state(self, finding, state):
        assert finding.state == state

    def test_a_figure_needs_a_limit_and_an_absence_a_reason(self):
        with pytest.raises(AssertionError, match="without a limit"):
            Finding("x", 1.0)
        with pytest.raises(AssertionError, match="says why"):
            Finding("x", None)


class TestFile:
    @pytest.fixture
    def audit(self, make_subject):
        return run_audit(make_subject("hope"), ("initial_loss", "clock_b"), report=silent)

    def test_round_trip(self, audit, tmp_path):
        report.write_audit(tmp_path / "a.json", audit)
        assert report.load_audit(tmp_path / "a.json") == audit
        assert audit.identity.parameters == audit.identity.audited_parameters > 0
        assert {"torch", "python", "nested-lm"} <= set(audit.identity.versions)
        assert audit.identity.hardware["device"] == "cpu"

    def test_an_edited_file_is_refused(self, audit, tmp_path):
        path = tmp_path / "a.json"
        report.write_audit(path, audit)
        path.write_text(path.read_text().replace('"passed": true', '"passed": false'))
        with pytest.raises(ReportError, match="changed after it was written"):
            report.load_audit(path)

    @pytest.mark.parametrize("content", ["", "[]", '{"digest": 1}'])
    def test_another_file_is_refused(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ReportError):
            report.load_audit(tmp_path / "a.json")

    def test_a_verdict_that_the_rows_deny_does_not_fit_the_schema(self, audit):
        document = json.loads(audit.model_dump_json())
        document["rows"][0]["value"] = 9.0
        with pytest.raises(ValueError, match="is passed, against"):
            report.AuditFile.model_validate_json(json.dumps(document))
        document = json.loads(audit.model_dump_json())
        document["passed"] = False
        with pytest.raises(ValueError, match="not what the rows say"):
            report.AuditFile.model_validate_json(json.dumps(document))

    def test_a_figure_that_is_not_finite_is_a_miss_with_its_reason(self):
        row = report.make_row("split", at_most("x", float("nan"), 1.0))
        assert (row.value, row.state, row.reason) == (None, "missed", "the figure is nan")


class TestRunner:
    def test_a_check_that_breaks_is_a_miss_and_the_others_run(self, make_subject, monkeypatch):
        def explode(_subject):
            raise RuntimeError("shapes do not fit")

        monkeypatch.setitem(CHECKS, "split", Check("?", explode))
        audit = run_audit(make_subject("hope"), ("split", "clock_b"), report=silent)
        assert not audit.passed
        assert audit.rows[0].reason == "RuntimeError: shapes do not fit"
        assert [row.check for row in audit.rows] == ["split", "clock_b"]

    def test_check_names(self):
        assert choose_checks(None) == tuple(CHECKS)
        assert choose_checks("split, causality,split") == ("split", "causality")
        for wrong in ("splt", "", ","):
            with pytest.raises(ConfigError, match="is no check; there are reference, causality"):
                choose_checks(wrong)

    def test_the_table_says_what_was_found(self, make_subject, capsys):
        show(run_audit(make_subject("hope"), ("clock_b", "initial_loss"), report=silent))
        printed = capsys.readouterr().out
        assert "no level of this model writes in context" in printed
        assert "<= 0.05" in printed
        assert "3 passed, 0 missed, 1 do not apply" in printed


class TestSubject:
    def test_a_small_preset_is_audited_as_it_is(self):
        subject = open_subject("hope/demo", (), device=CPU)
        assert subject.config == subject.run.model
        assert describe(subject) == ["hope/demo: width 128, 3 layers, self_modifying + cms, fresh weights"]

    def test_overrides_are_taken(self):
        assert open_subject("hope/demo", ("model.num_layers=1",), device=CPU).config.num_layers == 1

    def test_a_large_preset_is_shrunk_and_says_so(self):
        changes = ("model.width=1024", "model.mixer.num_heads=16", "model.mixer.chunk=64", "model.num_layers=8")
        subject = open_subject("hope/demo", changes, device=CPU)
        assert subject.run.model.width == 1024
        assert (subject.config.width, subject.config.num_layers, subject.config.mixer.chunk) == (64, 2, 32)
        assert {"width: 1024 -> 64", "mixer.chunk: 64 -> 32", "mixer.num_heads: 16 -> 2"} <= set(subject.shrunk)
        assert "  width: 1024 -> 64" in describe(subject)
        assert subject.config.channel == subject.run.model.channel

    def test_a_folder_that_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
            open_subject(str(tmp_path), (), device=CPU)

    def test_overrides_of_a_trained_model_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="is a trained model"):
            open_subject(str(tmp_path), ("model.width=8",), device=CPU)


class TestCommandLine:
    def run(self, *args):
        return CliRunner().invoke(app, ["audit", *args])

    def test_figures_go_to_a_file(self, tmp_path):
        path = tmp_path / "audit.json"
        result = self.run("hope/demo", "--checks", "initial_loss,optimizers", "--json", str(path))
        assert result.exit_code == 0, result.output
        assert "0 missed" in result.output
        assert report.load_audit(path).checks == ("initial_loss", "optimizers")

    def test_a_miss_ends_with_1(self):
        result = self.run("hope/demo", "model.init_std=3.0", "--checks", "initial_loss")
        assert result.exit_code == 1
        assert "missed" in result.output

    def test_a_wrong_check_ends_with_2(self):
        assert self.run("hope/demo", "--checks", "nothing").exit_code == 2

    def test_an_unknown_preset_ends_with_2(self):
        assert self.run("hope/nothing").exit_code == 2


def test_every_check_has_a_question():
    assert all(check.question.endswith("?") for check in CHECKS.values())
    assert runner.STYLES.keys() == {"passed", "missed", "does not apply"}

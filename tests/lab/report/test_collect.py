import json

import pytest

from nested_lm.errors import ReportError
from nested_lm_lab.report.collect import collect, parameter_gap
from tests.lab.report.fake_runs import preset, write_campaign

TWO = ("hope", "transformer")
STEPS = preset("hope", "x", 1).train.num_steps
STEP_TOKENS = preset("hope", "x", 1).train.step_tokens


def test_reads_runs_results_and_data(complete):
    assert [(run.arm, run.chronological) for run in complete.runs] == [
        ("Hope", False),
        ("Transformer++", False),
        ("Hope", True),
        ("Transformer++", True),
    ]
    assert complete.runs[0].steps.last("tokens") == STEPS * STEP_TOKENS
    assert set(complete.runs[0].results) == {"language_modelling", "passkey", "sampling"}
    assert set(complete.runs[2].results) == {"continual"}
    assert complete.data[0].licence == "public domain"
    assert complete.notes == ()
    assert parameter_gap(complete.runs[:2]) == pytest.approx((1_212_416 - 1_206_528) / 1_212_416)


@pytest.mark.parametrize(
    ("field", "value"),
    [("data_hash", "another-data"), ("tokenizer_hash", "another"), ("tokens", 4096), ("context_length", 128)],
)
def test_results_of_unlike_conditions_are_refused(tmp_path, field, value):
    write_campaign(tmp_path, TWO, tasks=("sampling",), identity={"transformer": {field: value}})
    with pytest.raises(ReportError, match=rf"(?s)may not share a table:.*{field}: .*{value}"):
        collect(tmp_path)


def test_runs_in_order_of_time_are_no_rows_of_the_main_table(tmp_path):
    write_campaign(tmp_path, ("hope", "hope-chronological"), tasks=("sampling", "continual"))
    campaign = collect(tmp_path)  # their token budgets differ, which one table would not allow
    assert len(campaign.runs) == 2


def test_results_of_an_older_training_are_refused(tmp_path):
    write_campaign(tmp_path, TWO, tasks=("sampling",))
    path = tmp_path / "runs" / "hope" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "0" * 16}))
    with pytest.raises(ReportError, match=r"belongs to another run: its config_hash is .*, .* has 0000"):
        collect(tmp_path)


def test_edited_results_are_refused(tmp_path):
    write_campaign(tmp_path, TWO, tasks=("sampling",))
    path = tmp_path / "runs" / "hope" / "results" / "sampling.json"
    path.write_text(path.read_text().replace("Congress", "congress"))
    with pytest.raises(ReportError, match="was changed after it was written"):
        collect(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    write_campaign(tmp_path, TWO, tasks=())
    (tmp_path / "runs" / "transformer" / "run.json").unlink()
    (tmp_path / "data" / "manifest.json").unlink()
    metrics = tmp_path / "runs" / "hope" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]) + '{"event": "st')
    notes = " ".join(collect(tmp_path).notes)
    assert "transformer-demo (step transformer) is left out: runs/transformer has no run.json" in notes
    assert "hope-demo has not reached its token budget" in notes
    assert "hope-demo has not been evaluated" in notes
    assert "The data set is not described" in notes


def test_a_repeated_step_counts_once(tmp_path):
    write_campaign(tmp_path, ("hope",), tasks=())
    metrics = tmp_path / "runs" / "hope" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    again = json.dumps(json.loads(lines[0]) | {"loss": 99.0}) + "\n"
    metrics.write_text("".join(lines) + again)
    (run,) = collect(tmp_path).runs
    assert len(run.steps.rows) == STEPS
    assert run.steps.rows[0]["loss"] == 99.0


def test_not_a_campaign(tmp_path):
    with pytest.raises(ReportError, match=r"is not a campaign folder: it holds no campaign\.json"):
        collect(tmp_path)
    (tmp_path / "campaign.json").write_text('{"schema_version": 1, "na')
    with pytest.raises(ReportError, match="is not a campaign manifest"):
        collect(tmp_path)


def test_nothing_trained_yet(tmp_path):
    write_campaign(tmp_path, ("hope",), tasks=())
    (tmp_path / "runs" / "hope" / "run.json").unlink()
    with pytest.raises(ReportError, match="no run of the campaign has been trained yet"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "config.resolved.yaml"])
def test_a_damaged_file_is_named(tmp_path, name):
    write_campaign(tmp_path, ("hope",), tasks=())
    (tmp_path / "runs" / "hope" / name).write_text('{"a": [')
    with pytest.raises(ReportError, match=rf"{name} is not "):
        collect(tmp_path)

"""Keys and passwords stay out of written configurations and messages."""

import pytest
import yaml

from nested_lm.config.load import dump_resolved, load_run
from nested_lm.config.secrets import REDACTED, names_secret, redact_text
from nested_lm.config.section import Section
from nested_lm.errors import ConfigError

SECRET = "hunter2-hunter2"


class Sink(Section):
    """A section as a later tracker might have."""

    project: str
    api_key: str
    auth_token: str | None
    budget_tokens: int


def resolved(config, tmp_path) -> dict:
    dump_resolved(config, tmp_path / "config.resolved.yaml")
    return yaml.safe_load((tmp_path / "config.resolved.yaml").read_text())


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "hf_token", "MY_SECRET", "DB_PASSWORD", "GITHUB_PAT", "DB_URL"])
@pytest.mark.parametrize("field", ["data.source.licence", "output_dir", "train.logging.wandb_project"])
@pytest.mark.parametrize("written", ["${{oc.env:{}}}", "${{oc.env:{},x}}", "by hand"])
def test_value_of_a_secret_variable_is_refused(monkeypatch, variable, field, written):
    monkeypatch.setenv(variable, SECRET)
    value = f"x-{SECRET}" if written == "by hand" else written.format(variable)
    with pytest.raises(ConfigError, match=field) as caught:
        load_run("hope/demo", [f"{field}='{value}'"])
    assert variable in str(caught.value)
    assert SECRET not in str(caught.value)


def test_variables_may_name_folders_and_nothing_else(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert load_run("hope/demo", ["output_dir=${oc.env:SCRATCH}/runs"]).output_dir == "/scratch/me/runs"
    with pytest.raises(ConfigError, match=r"train\.logging\.wandb_project(?s:.*)only folders"):
        load_run("hope/demo", ["train.logging.wandb_project=${oc.env:SCRATCH}"])


def test_secret_inside_a_longer_value_or_a_list_is_redacted(tmp_path, monkeypatch):
    values = Sink(project=f"p-{SECRET}", api_key="a", auth_token=None, budget_tokens=7)
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    assert SECRET not in str(resolved(values, tmp_path))


def test_fields_that_look_like_a_secret_are_redacted_and_counts_are_not(tmp_path):
    values = resolved(Sink(project="p", api_key="a", auth_token="b", budget_tokens=7), tmp_path)
    assert values == {"project": "p", "api_key": REDACTED, "auth_token": REDACTED, "budget_tokens": 7}
    assert resolved(Sink(project="p", api_key="a", auth_token=None, budget_tokens=7), tmp_path)["auth_token"] is None


def test_every_field_of_a_run_stays_readable(tmp_path):
    run = load_run("hope/demo")
    assert resolved(run, tmp_path) == run.model_dump(mode="json")


def test_other_variables_are_not_secret():
    assert redact_text("cpu", {"DEVICE": "cpu"}) == "cpu"
    assert redact_text("/home/me/runs", {"SSH_KEY_FILE": "/home/me"}) == "/home/me/runs"
    assert redact_text("demo-demo", {"SHORT_KEY": "demo"}) == "demo-demo"
    assert redact_text("demo", {"SHORT_KEY": "demo"}) == REDACTED
    assert not names_secret("budget_tokens")
    assert not names_secret("passkey")


def test_an_error_does_not_print_the_secret(monkeypatch):
    monkeypatch.setenv("SOME_KEY", SECRET)
    with pytest.raises(ConfigError) as caught:
        load_run("hope/demo", [f"seed={SECRET}"])
    assert SECRET not in str(caught.value)
    assert REDACTED in str(caught.value)

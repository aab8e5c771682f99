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


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "hf_token", "MY_SECRET", "DB_PASSWORD"])
def test_value_of_a_secret_variable_is_redacted(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, SECRET)
    run = load_run("hope/demo", [f"train.logging.wandb_project=${{oc.env:{variable}}}"])
    assert run.train.logging.wandb_project == SECRET
    assert resolved(run, tmp_path)["train"]["logging"]["wandb_project"] == REDACTED
    assert SECRET not in (tmp_path / "config.resolved.yaml").read_text()


def test_secret_inside_a_longer_value_or_a_list_is_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    run = load_run(
        "hope/demo",
        ["output_dir=runs/x-${oc.env:SOME_TOKEN}", "eval.sampling.prompts=['${oc.env:SOME_TOKEN}']"],
    )
    assert SECRET not in str(resolved(run, tmp_path))


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
        load_run("hope/demo", ["seed=${oc.env:SOME_KEY}"])
    assert SECRET not in str(caught.value)
    assert REDACTED in str(caught.value)

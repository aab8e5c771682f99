"""The doctor: every failed check names its fix, and only necessary parts decide the exit code."""

import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nested_lm.cli import doctor
from nested_lm.cli.main import app
from nested_lm.data import corpora
from nested_lm.errors import ConfigError, DataError
from nested_lm.ops.memory.cpu import library as cpu_library


def states(output: Path) -> dict[str, str]:
    return {check.name: check.state for check in doctor.examine(output)}


def test_this_machine_passes_and_the_json_says_the_same(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", "--output", str(tmp_path / "new" / "folder")])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["ok"] is True
    assert {check["name"]: check["state"] for check in content["checks"]} == states(tmp_path)
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_lines_state_and_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path)])
    assert result.exit_code == 0  # extras are not necessary
    assert "absent    extra wandb" in result.stdout
    assert "fix: pip install -c constraints.txt -e '.[wandb]'" in result.stdout


def test_extras_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def broken_corpus(corpus):
    if corpus is corpora.CORPORA["sotu"]:
        raise DataError("changed")
    return b""


def no_presets():
    raise ConfigError("the presets are missing")


class Usage:
    free = 10**6


@pytest.mark.parametrize(
    ("name", "target", "attribute", "value"),
    [
        ("python", doctor, "MIN_PYTHON", (99, 0)),
        ("torch", doctor, "MIN_TORCH", (99, 0)),
        ("presets", sys.modules["nested_lm.config.compose"], "presets_folder", no_presets),
        ("corpus sotu", corpora, "read_archive", broken_corpus),
        ("free disk", doctor.shutil, "disk_usage", lambda folder: Usage),
    ],
)
def test_a_failed_check_names_its_fix(monkeypatch, tmp_path, name, target, attribute, value):
    monkeypatch.setattr(target, attribute, value)
    [check] = [check for check in doctor.examine(tmp_path) if check.state == "failed"]
    assert check.name == name
    assert check.fix
    assert check.fix in str(check)
    monkeypatch.undo()
    assert "failed" not in states(tmp_path).values()


def test_torch_that_cannot_be_imported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    [check] = [check for check in doctor.examine(tmp_path) if check.state == "failed"]
    assert (check.name, check.fix) == ("torch", "pip install 'torch>=2.11'")


def test_exit_code_of_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "MIN_PYTHON", (99, 0))
    result = CliRunner().invoke(app, ["doctor", "--json", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


class TestMemoriesInC:
    def found(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cpu_library, "reason_missing", cpu_library.reason_missing.__wrapped__)
        [check] = [check for check in doctor.examine(tmp_path) if check.name == "memories in C"]
        return check

    @pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C compiler")
    def test_a_compiler_and_the_place_of_the_library_are_named(self, monkeypatch, tmp_path):
        check = self.found(monkeypatch, tmp_path)
        assert check.state == "ok"
        assert cpu_library.compiler_version() in check.found
        assert str(cpu_library.cache_folder()) in check.found

    def test_without_one_the_program_works_and_says_what_is_lost(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CC", "/nonexistent")
        check = self.found(monkeypatch, tmp_path)
        assert check.state == "absent"
        assert "$CC is `/nonexistent`, which is no command here" in check.found
        assert "run in torch" in check.found
        assert "gcc" in check.fix


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    [check] = [check for check in doctor.examine(tmp_path / "file" / "runs") if check.state == "failed"]
    assert check.name == "output folder"


def test_little_space_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(Usage, "free", 10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage)
    assert states(tmp_path)["free disk"] == "warning"

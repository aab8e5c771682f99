"""Paths in presets: a home is expanded, and what no file system can hold is refused before anything is made."""

from pathlib import Path

import pytest

from nested_lm.config.load import load_data, load_run
from nested_lm.errors import ConfigError


def test_a_home_is_expanded_wherever_a_path_is_set(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    run = load_run("hope/demo", ["output_dir='~/run'", "data.output_dir='~/data'", "train.init_from='~/other'"])
    assert (run.output_dir, run.data.output_dir, run.train.init_from) == (
        "/home/ada/run",
        "/home/ada/data",
        "/home/ada/other",
    )
    source = ["source={kind:folder,path:'~/texts'}", "tokenizer={kind:file,path:'~/tokenizer.json'}"]
    data = load_data("data/demo", [f"~{key}" for key in ("source", "tokenizer")] + [f"+{line}" for line in source])
    assert (data.source.path, data.tokenizer.path) == ("/home/ada/texts", "/home/ada/tokenizer.json")


@pytest.mark.parametrize(("path", "found"), [("a/" + "x" * 300, "a name of 300 bytes"), ("~nobody-here/x", "home of")])
def test_names_that_cannot_be_made_are_refused(path, found):
    with pytest.raises(ConfigError, match=found):
        load_run("hope/demo", [f"output_dir='{path}'"])


def test_shipped_places_are_as_they_are_written():
    assert load_data("data/demo").output_dir == "artifacts/data/demo"
    assert not Path("~").exists()

"""A run that starts from the weights of another: which weights, what is recorded, what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from nested_lm.checkpoint import find_checkpoint, list_checkpoints, read_document, read_tensors
from nested_lm.errors import CheckpointError
from nested_lm.train.trainer import train

BRIEF = {"budget_tokens": 64, "schedule": {"kind": "cosine", "warmup_tokens": 32}}


@pytest.fixture
def source(make_config):
    """A finished run."""
    config = make_config(folder="source", **BRIEF)
    train(config)
    return config


def chronological(init_from, **settings):
    """Settings of a run that keeps the checkpoint of step 0."""
    return BRIEF | {"init_from": str(init_from), "stream": {"kind": "chronological", "periods": 2}} | settings


def test_a_run_starts_with_the_weights_and_says_where_they_came_from(make_config, source):
    config = make_config(folder="next", seed=9, **chronological(source.output_dir))
    train(config)
    root = Path(config.output_dir) / "checkpoints"
    given, first = find_checkpoint(Path(source.output_dir)), list_checkpoints(root)[0]
    expected, found = read_tensors(given, "model"), read_tensors(first, "model")
    assert first.name == "step-00000000"
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert read_tensors(first, "optimizer") == {}
    identity = json.loads((Path(config.output_dir) / "run.json").read_text())["initialised_from"]
    assert identity["checkpoint"] == str(given)
    assert identity["run_id"] == json.loads((Path(source.output_dir) / "run.json").read_text())["run_id"]
    assert len(identity["manifest_sha256"]) == 64


def test_a_run_goes_on_without_what_it_started_from(make_config, source, comparable):
    whole = make_config(folder="whole", **chronological(source.output_dir))
    train(whole)
    cut = make_config(folder="cut", **chronological(source.output_dir))
    train(cut)
    newest = list_checkpoints(Path(cut.output_dir) / "checkpoints")
    shutil.rmtree(newest[-1])
    shutil.rmtree(source.output_dir)
    train(cut)
    assert comparable(cut.output_dir) == comparable(whole.output_dir)


def test_clocks_may_differ_and_nothing_else_of_the_model(make_config, tmp_path):
    source = make_config("hope", folder="source", **BRIEF)
    train(source)
    levels = source.model.channel.levels
    slower = [level.model_copy(update={"period_tokens": 2 * level.period_tokens}) for level in levels]
    changed = source.model.channel.model_copy(update={"levels": tuple(slower)})
    config = make_config("hope", folder="next", **BRIEF, init_from=source.output_dir)
    config = config.model_copy(update={"model": config.model.model_copy(update={"channel": changed})})
    train(config)
    mixer = config.model.mixer.model_copy(update={"read": "exclusive"})
    other = config.model_copy(
        update={
            "model": config.model.model_copy(update={"mixer": mixer, "norm_epsilon": 1e-3}),
            "output_dir": str(tmp_path / "other"),
        }
    )
    with pytest.raises(CheckpointError, match="is of another architecture") as caught:
        train(other)
    assert "model.mixer.read: inclusive -> exclusive" in str(caught.value)
    assert "model.norm_epsilon: 1e-06 -> 0.001" in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_another_architecture_is_refused_by_name(make_config, source):
    config = make_config("hope", folder="next", **BRIEF, init_from=source.output_dir)
    with pytest.raises(CheckpointError, match=r"model\.mixer\.kind: attention -> self_modifying"):
        train(config)


def test_another_tokenizer_is_refused(make_config, source, monkeypatch):
    foreign = {"tokenizer_hash": "f" * 64}
    monkeypatch.setattr("nested_lm.train.start.read_identity", lambda path: read_document(path, "run.json") | foreign)
    config = make_config(folder="next", **BRIEF, init_from=source.output_dir)
    with pytest.raises(CheckpointError, match=r"has tokenizer f{16}, the data set in .* has"):
        train(config)


def test_what_is_no_checkpoint_is_refused(make_config, tmp_path):
    config = make_config(folder="next", **BRIEF, init_from=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="is neither a checkpoint nor a run folder"):
        train(config)
    assert not Path(config.output_dir).exists()

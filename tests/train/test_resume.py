import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nested_lm.checkpoint import load_model
from nested_lm.data.shards import TokenDataset
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.train.recorder import Recorder
from nested_lm.train.run_folder import open_run_folder, read_run_identity, write_run_identity
from nested_lm.train.trainer import train
from nested_lm.train.validation import Validator

STEPS = 10
SLOW_STEPS = 4  # period of the slow CMS level
ADAMW = {"kind": "adamw", "rate": 1e-2}
MUON = {"kind": "muon", "rate": 1e-2, "adamw_rate": 1e-2}
DEEP = {
    "kind": "deep",
    "rule": {"kind": "dmgd", "scale": "adamw"},
    "rate": 1e-2,
    "adamw_rate": 1e-2,
    "levels": [
        {"rule": {"kind": "delta_momentum", "square_keep": 0.9}, "rate": 1e-3},
        {"rule": {"kind": "m3", "slow_every": 1}, "rate": 1e-2},
    ],
}


@pytest.fixture
def signal_after(monkeypatch):
    """Send this process a signal as soon as the record of a step is written."""
    original = Recorder.event

    def arm(step, number=signal.SIGTERM):
        def event(self, name, progress, fields, *, note=None):
            original(self, name, progress, fields, note=note)
            if name == "step" and progress.step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Recorder, "event", event)

    yield arm
    monkeypatch.setattr(Recorder, "event", original)


@pytest.fixture
def disarm(monkeypatch, signal_after):
    return lambda: signal_after(-1)


@pytest.mark.parametrize(
    ("model", "optimizer", "stops"),
    [
        ("transformer", ADAMW, range(1, STEPS)),
        ("hope", ADAMW, (1, 3, 6)),
        ("hope", MUON, (5,)),
        ("hope", DEEP, (5,)),
        ("nested", ADAMW, (6,)),
    ],
    ids=["transformer-adamw", "hope-adamw", "hope-muon", "hope-deep", "nested-in-context"],
)
def test_a_stopped_run_continues_bit_for_bit(
    make_config, signal_after, disarm, model, optimizer, stops, comparable, final_bytes
):
    """Some of the stops lie inside the period of the slow level, some on checkpoints, some on evaluations."""
    whole = make_config(model, folder="whole", optimizer=optimizer)
    assert train(whole).stopped_by is None
    expected, log = final_bytes(whole.output_dir), comparable(whole.output_dir)
    assert [row["step"] for row in log if row["event"] == "step"] == list(range(1, STEPS + 1))
    for stop in stops:
        config = make_config(model, folder=f"stop-{stop}", optimizer=optimizer)
        signal_after(stop)
        first = train(config)
        assert (first.step, first.stopped_by, first.exit_code) == (stop, "SIGTERM", 143)
        disarm()
        second = train(config)
        assert (second.step, second.stopped_by, second.exit_code) == (STEPS, None, 0)
        assert final_bytes(config.output_dir) == expected, f"stopped at {stop}"
        assert comparable(config.output_dir) == log, f"stopped at {stop}"
        shutil.rmtree(config.output_dir)


def test_a_stop_within_a_period_keeps_the_waiting_gradients(make_config, signal_after):
    config = make_config("hope")
    signal_after(SLOW_STEPS - 1)
    summary = train(config)
    assert b"pending/blocks.0.channel.levels.1" in (summary.checkpoint / "optimizer.safetensors").read_bytes()


def test_many_stops_in_one_run(make_config, signal_after, disarm, records, comparable, final_bytes):
    whole, pieces = make_config(folder="whole"), make_config(folder="pieces")
    train(whole)
    for stop in (2, 4, 5, 9):
        signal_after(stop)
        assert train(pieces).step == stop
    disarm()
    train(pieces)
    assert final_bytes(pieces.output_dir) == final_bytes(whole.output_dir)
    assert comparable(pieces.output_dir) == comparable(whole.output_dir)
    assert len(records(pieces.output_dir, "resume")) == 4
    assert len(records(pieces.output_dir, "stop")) == 4


def test_ctrl_c_stops_cleanly_too(make_config, signal_after, records):
    signal_after(2, signal.SIGINT)
    summary = train(make_config())
    assert (summary.step, summary.stopped_by, summary.exit_code) == (2, "SIGINT", 130)
    assert records(summary.folder)[-1] == {"event": "stop", "step": 2, "tokens": 64, "signal": "SIGINT"}
    assert load_model(summary.checkpoint, device="cpu").step == 2


def test_a_stop_during_an_evaluation_is_made_up_for(make_config, monkeypatch, records, comparable, final_bytes):
    whole, config = make_config(folder="whole"), make_config(folder="stopped")
    train(whole)
    original = Validator.run

    def interrupted(self, model, computer, strategy, *, is_stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, computer, strategy, is_stopped=is_stopped)

    monkeypatch.setattr(Validator, "run", interrupted)
    summary = train(config)
    assert (summary.step, summary.stopped_by) == (5, "SIGTERM")
    assert not records(config.output_dir, "eval")
    monkeypatch.setattr(Validator, "run", original)
    train(config)
    assert comparable(config.output_dir) == comparable(whole.output_dir)
    assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)


def test_a_finished_run_says_so_and_does_nothing(make_config, capsys, records):
    config = make_config()
    train(config)
    before = records(config.output_dir)
    capsys.readouterr()
    summary = train(config)
    assert summary.step == STEPS
    assert "finished at step 10, nothing to do" in " ".join(capsys.readouterr().out.split())
    assert records(config.output_dir) == before


def test_another_configuration_is_refused_with_its_differences(make_config):
    train(make_config())
    other = make_config(seed=4, optimizer={"kind": "adamw", "rate": 2e-2})
    with pytest.raises(ConfigError) as error:
        train(other)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert "seed: 3 -> 4" in lines
    assert "train.optimizer.rate: 0.01 -> 0.02" in lines
    assert len(lines) == 4  # the sentence, two differences, what to do


def test_another_backend_goes_on_with_the_run(make_config, signal_after, disarm):
    config = make_config("hope")
    mixer = config.model.mixer.model_copy(update={"backend": "torch"})
    in_torch = config.model_copy(update={"model": config.model.model_copy(update={"mixer": mixer})})
    signal_after(4)
    assert train(in_torch).step == 4
    disarm()
    assert train(config).step == STEPS


def test_a_run_that_an_earlier_version_began_goes_on(make_config):
    """It lacked fields, and so hashed its configuration otherwise."""
    config = make_config("hope", budget_tokens=64)
    train(config)
    folder = Path(config.output_dir)
    stored = OmegaConf.load(folder / "config.resolved.yaml")
    del stored.model.mixer["backend"], stored.model.mixer["erase_after_decay"]
    OmegaConf.save(stored, folder / "config.resolved.yaml")
    identity = folder / "run.json"
    earlier = json.loads(identity.read_text())
    del earlier["seal"], earlier["config_resolved_xxh3_128"]
    identity.write_text(json.dumps(earlier | {"config_hash": "0" * 16}))
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        train(config.model_copy(update={"seed": 4}))
    dataset = TokenDataset.open(Path(config.data.output_dir), "train")
    assert open_run_folder(config, dataset, resume="auto", device="cpu", parameters=1)["config_hash"] == "0" * 16


def test_never_refuses_a_folder_with_a_run(make_config):
    config = make_config()
    train(config, resume="never")
    with pytest.raises(ConfigError, match="already holds run tiny-"):
        train(config, resume="never")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    make_config, signal_after, disarm, capsys, comparable, final_bytes
):
    whole, config = make_config(folder="whole"), make_config(folder="damaged")
    train(whole)
    signal_after(7)
    newest = train(config).checkpoint
    disarm()
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    capsys.readouterr()
    train(config)
    shown = " ".join(capsys.readouterr().out.split())
    assert "skipped damaged checkpoint" in shown
    assert "continuing after step 6" in shown
    assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)
    assert comparable(config.output_dir) == comparable(whole.output_dir)


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(make_config):
    config = make_config()
    summary = train(config)
    for path in (summary.folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        train(config)


def test_a_run_ended_before_its_first_checkpoint_begins_again(make_config, comparable):
    whole, config = make_config(folder="whole"), make_config(folder="again")
    train(whole)
    train(config)
    shutil.rmtree(config.output_dir + "/checkpoints")
    run_id = json.loads((train(config).folder / "run.json").read_text())["run_id"]
    assert comparable(config.output_dir) == comparable(whole.output_dir)
    assert run_id.startswith("tiny-")


def test_a_changed_data_set_is_refused(make_config):
    config = make_config()
    summary = train(config)
    identity = read_run_identity(summary.folder)
    for field in ("data_hash", "tokenizer_hash"):
        write_run_identity(summary.folder, identity | {field: "0" * 64})
        with pytest.raises(CheckpointError, match=f"begun with {field} 0000000000000000"):
            train(config)


def test_a_checkpoint_of_another_run_is_refused(make_config, signal_after):
    signal_after(3)
    first = train(make_config(folder="first"))
    second = train(make_config(folder="second", seed=8))
    shutil.rmtree(second.checkpoint)
    shutil.copytree(first.checkpoint, second.checkpoint)
    with pytest.raises(CheckpointError, match="was written with configuration"):
        train(make_config(folder="second", seed=8))

"""What identifies a training, and where evaluation settings come from."""

import pytest

from nested_lm.config.architecture import architecture_differences
from nested_lm.config.load import config_hash, load_evaluation, load_run, parse_run, training_hash
from nested_lm.errors import ConfigError


def test_evaluation_settings_do_not_identify_a_training():
    run, other = load_run("hope/demo"), load_run("hope/demo", ["eval=smoke"])
    assert config_hash(run) != config_hash(other)
    assert training_hash(run) == training_hash(other)
    assert training_hash(run) != training_hash(load_run("hope/demo", ["train.clip_norm=2.0"]))


@pytest.mark.parametrize(
    ("preset", "field", "backends"),
    [
        ("hope/demo", "model.mixer.backend", ("auto", "torch", "cpu")),
        ("baselines/titans_mac_demo", "model.mixer.memory.backend", ("auto", "torch", "cpu")),
        ("baselines/delta_net_demo", "model.mixer.backend", ("auto", "torch", "fla")),
    ],
)
def test_what_computes_a_model_is_no_part_of_it(preset, field, backends):
    runs = [load_run(preset, [f"{field}={backend}"]) for backend in backends]
    assert len({training_hash(run) for run in runs}) == len({config_hash(run.model) for run in runs}) == 1
    assert architecture_differences(runs[0].model, runs[1].model) == []


def test_a_configuration_without_a_backend_gets_the_default():
    plain = load_run("hope/demo").model_dump(mode="json")
    del plain["model"]["mixer"]["backend"]
    run = parse_run(plain, "an older run")
    assert run.model.mixer.backend == "auto"
    assert training_hash(run) == training_hash(load_run("hope/demo"))


def test_writes_that_grow_without_bound_are_refused_in_presets_and_read_where_they_were_trained():
    off, slow = "model.mixer.erase=none", "model.mixer.rates={memory: 0.0625, generators: 0.0625}"
    message = r"rate 0\.1 and chunk 64 of k: (?s:.*)use rates up to 0\.03125, chunks of up to 20"
    with pytest.raises(ConfigError, match=message):
        load_run("hope/demo", [off, "model.mixer.chunk=64", "model.mixer.rates.memory=0.03"])
    run = load_run("hope/demo", [off, slow])
    stored = run.model_dump(mode="json")
    stored["model"]["mixer"]["rates"]["memory"] = 0.1
    assert parse_run(stored, "an older run").model.mixer.rates.memory == 0.1


def test_settings_come_from_an_evaluation_preset_or_from_a_run():
    assert load_evaluation("eval/demo", ["passkey.samples=5"]).passkey.samples == 5
    assert load_evaluation("hope/demo") == load_run("hope/demo").eval
    assert load_evaluation("hope/demo", ["eval=smoke", "eval.passkey.samples=7"]).passkey.samples == 7


def test_settings_from_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("passkey: {lengths: [64], samples: 2}\n")
    assert load_evaluation(str(file)).passkey.lengths == (64,)
    file.write_text("passky: {lengths: [64]}\n")
    with pytest.raises(ConfigError, match="did you mean `passkey`"):
        load_evaluation(str(file))


def test_other_presets_hold_no_settings():
    with pytest.raises(ConfigError, match=r"data/demo is a data set, not evaluation settings(?s:.*)eval/demo"):
        load_evaluation("data/demo")
    with pytest.raises(ConfigError, match=r"eval/demo is evaluation settings, not a run(?s:.*)--settings eval/demo"):
        load_run("eval/demo")

"""What a user gets wrong in a preset, and what they are told: place, found, allowed, repair."""

import pytest

from nested_lm.config.load import load_campaign, load_data, load_run, parse_run
from nested_lm.errors import ConfigError

EXTENDS_HOPE = "defaults:\n  - /hope/demo\n  - _self_\n"
EXTENDS_TRANSFORMER = "defaults:\n  - /baselines/transformer_demo\n  - _self_\n"


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Write a preset of the user's own into a folder outside the project, and work there."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, base: str = EXTENDS_HOPE) -> str:
        (tmp_path / "mine.yaml").write_text(base + body, encoding="utf-8")
        return "mine.yaml"

    return write


def mistake(preset: str, overrides=(), load=load_run) -> str:
    with pytest.raises(ConfigError) as caught:
        load(preset, overrides)
    return str(caught.value)


class TestElevenCases:
    """The mistakes tabulated in the design; the third is none."""

    def test_typo_in_a_key(self, preset):
        text = mistake(preset("model:\n  widht: 64\n"))
        assert "model.widht  (mine.yaml:5)" in text
        assert "did you mean `width`?" in text

    def test_text_for_a_number(self, preset):
        text = mistake(preset("train:\n  batch_size: many\n"))
        assert "train.batch_size  (mine.yaml:5)" in text
        assert "found    'many' (text)" in text
        assert "allowed  a whole number >= 1" in text

    def test_a_number_in_quotes_is_text(self, preset):
        text = mistake(preset('train:\n  batch_size: "8"\n'))
        assert "found    '8' (text)" in text
        assert "write it without quotes: `batch_size: 8`" in text

    def test_scientific_notation_is_a_number(self, preset):
        run = load_run(preset("train:\n  optimizer:\n    rate: 3e-4\n"))
        assert run.train.optimizer.rate == 0.0003
        assert load_run("hope/demo", ["train.optimizer.rate=3e-4"]).train.optimizer.rate == 0.0003

    def test_unknown_variant(self, preset):
        text = mistake(preset("train:\n  optimizer:\n    kind: muno\n"))
        assert "train.optimizer.kind  (mine.yaml:6)" in text
        assert "allowed  one of adamw, muon" in text
        assert "did you mean `muon`?" in text

    def test_field_of_another_variant(self, preset):
        text = mistake(preset("model:\n  mixer:\n    rope_base: 500.0\n"))
        assert "model.mixer.rope_base  (mine.yaml:6)" in text
        assert "a key of kind attention" in text
        assert "the kind here is self_modifying" in text
        assert "model.mixer.self_modifying" not in text  # pydantic's union tag

    def test_width_not_a_multiple_of_heads(self, preset):
        text = mistake(preset("model:\n  mixer:\n    num_heads: 3\n", base=EXTENDS_TRANSFORMER))
        assert "width 128 is not a multiple of mixer.num_heads 3" in text
        assert "mixer.num_heads in mine.yaml:6" in text
        assert "model/transformer_demo.yaml:" in text  # where the width was set
        assert "repair   try num_heads=2" in text

    def test_missing_required(self, preset):
        text = mistake(preset("", base="name: mine\noutput_dir: out\n"))
        for key in ("seed", "data", "model", "train", "eval"):
            assert f"{key}  (mine.yaml)" in text
        assert "found    nothing: the key is required" in text
        assert "add `seed: ...`" in text

    def test_missing_value_marked_with_question_marks(self, preset):
        text = mistake(preset("seed: ???\n", base="name: mine\noutput_dir: out\n"))
        assert "seed  (mine.yaml:3)" in text
        assert load_run(preset("seed: ???\n")).seed == load_run("hope/demo").seed  # a value below it stays

    def test_out_of_range(self, preset):
        text = mistake(preset("eval:\n  sampling:\n    top_p: 1.5\n"))
        assert "eval.sampling.top_p  (mine.yaml:6)" in text
        assert "found    1.5" in text
        assert "allowed  a number > 0.0 and <= 1.0" in text
        assert "such as 1.0" in text

    def test_true_for_an_integer(self, preset):
        text = mistake(preset("seed: true\n"))
        assert "found    true (a boolean)" in text

    def test_fraction_for_an_integer(self, preset):
        text = mistake(preset("model:\n  width: 768.5\n"))
        assert "model.width  (mine.yaml:5)" in text
        assert "found    768.5" in text
        assert "write `width: 768`" in text

    def test_key_given_twice(self, preset):
        text = mistake(preset("seed: 1\nmodel:\n  width: 64\n  num_layers: 2\n  width: 128\nseed: 2\n"))
        assert "seed  (mine.yaml:4 and mine.yaml:9)" in text
        assert "model.width  (mine.yaml:6 and mine.yaml:8)" in text


class TestAllAtOnce:
    def test_every_mistake_is_reported_with_its_own_place(self, preset):
        body = "model:\n  widht: 64\ntrain:\n  batch_size: 0\n  device: cdua\n"
        text = mistake(preset(body), ["seed=true", "eval.passkey.samples=no"])
        assert "5 mistakes" in text
        assert "model.widht  (mine.yaml:5)" in text
        assert "train.batch_size  (mine.yaml:7)" in text
        assert "train.device  (mine.yaml:8)" in text
        assert "did you mean `cuda`?" in text
        assert "seed  (command line override `seed=true`)" in text
        assert "eval.passkey.samples  (command line override `eval.passkey.samples=no`)" in text

    def test_entries_of_a_list_are_named(self):
        text = mistake("hope/demo", ["model.channel.levels.1.period_tokens=hi"])
        assert "1 mistake\n" in text  # and none about the length of the list
        assert "model.channel.levels.1.period_tokens  (command line override" in text

    def test_later_files_own_what_they_override(self, preset):
        preset("train:\n  batch_size: 0\n")
        text = mistake("mine.yaml", ["train.batch_size=-1"])
        assert "command line override `train.batch_size=-1`" in text
        assert "mine.yaml:5" not in text

    def test_a_rule_between_sections_names_all_places(self, preset):
        text = mistake(preset("train:\n  context_length: 256\n  batch_size: 24\n"))
        period = load_run("hope/demo").model.channel.levels[0].period_tokens
        assert f"model.channel.levels[0].period_tokens {period} is not a multiple of the 6144 tokens" in text
        assert "train.batch_size in mine.yaml:6" in text
        assert "model/hope_demo.yaml:14" in text
        assert "repair   try 6144" in text

    def test_section_expected(self):
        text = mistake("hope/demo", ["train.checkpoints=3"])
        assert "allowed  a section with the keys every_tokens, keep" in text


class TestOverrides:
    def test_fields_that_no_file_mentions_can_be_set(self):
        assert load_run("hope/demo", ["train.accumulation=1", "train.clip_norm=0.5"]).train.clip_norm == 0.5

    def test_explicit_additions_and_removals(self):
        run = load_run("hope/demo", ["+train.clip_norm=0.5", "~eval.passkey"])
        assert run.train.clip_norm == 0.5
        assert run.eval.passkey is None

    def test_group_option(self):
        assert load_run("hope/demo", ["model=transformer_demo"]).model.mixer.kind == "attention"

    def test_all_bad_overrides_are_named(self):
        text = mistake("hope/demo", ["seed 3", "seed=1,2", "hydra.run.dir=x", "a.levels[0]=1"])
        assert "4 mistakes" in text
        assert "add -m to sweep" in text
        assert "levels.0.period_tokens" in text

    def test_unknown_group_option_lists_the_choices(self):
        text = mistake("hope/demo", ["model=hope_dmo"])
        assert "allowed  one of " in text
        assert "hope_demo, " in text
        assert ", transformer_demo" in text
        assert "did you mean `hope_demo`?" in text

    @pytest.mark.parametrize("override", ["model=3", "+seed=3", "~sead", "model.channel.levels.9.expansion=1.0"])
    def test_what_hydra_refuses_is_a_config_error(self, override):
        assert "repair" in mistake("hope/demo", [override])


class TestFiles:
    def test_unknown_preset_names_the_nearest(self):
        text = mistake("hope/dmeo")
        assert "no preset is called `hope/dmeo`" in text
        assert "did you mean `hope/demo`" in text

    def test_preset_for_another_verb(self):
        assert "`nested-lm train hope/demo` takes it" in mistake("hope/demo", load=load_data)
        assert "the part `model` of a run" in mistake("model/hope_demo")
        assert "data/demo" in mistake("campaign/demo", load=load_data)

    def test_unknown_option_in_a_defaults_list(self, preset):
        text = mistake(preset("", base="defaults:\n  - /hope/demo\n  - override /model: hope_dem\n"))
        assert "mine.yaml" in text
        assert "did you mean `hope_demo`?" in text

    def test_key_given_twice_in_a_group_file(self, preset, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text("width: 1\nwidth: 2\n")
        text = mistake(preset("", base="defaults:\n  - /hope/demo\n  - override /model: mine\n"))
        assert "model/mine.yaml:1 and model/mine.yaml:2" in text.replace("\\", "/")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"seed: [1\n", "is not YAML"),
            (b"- a\n- b\n", "a list"),
            (b"just text\n", "a single value"),
            (b"name: caf\xe9\n", "not UTF-8"),
            (b"name: a\x00b\n", "is not YAML"),
        ],
    )
    def test_unreadable_file(self, tmp_path, content, reason):
        (tmp_path / "bad.yaml").write_bytes(content)
        text = mistake(str(tmp_path / "bad.yaml"))
        assert reason in text
        assert "bad.yaml" in text

    def test_group_file_that_is_not_utf8(self, preset, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_bytes(b"width: \xff\n")
        text = mistake(preset("", base="defaults:\n  - /hope/demo\n  - override /model: mine\n"))
        assert "not UTF-8" in text

    def test_empty_file_misses_everything(self, tmp_path):
        (tmp_path / "empty.yaml").write_text("")
        assert "7 mistakes" in mistake(str(tmp_path / "empty.yaml"))

    def test_yml_is_refused_with_the_repair(self):
        assert "rename it to .yaml" in mistake("mine.yml")

    def test_interpolations_that_fail_are_all_named(self, preset, monkeypatch):
        monkeypatch.delenv("NOT_SET", raising=False)
        text = mistake(preset("name: ${nothing}\noutput_dir: ${oc.env:NOT_SET}\nseed: true\n"))
        assert "name  (mine.yaml:4)" in text
        assert "NOT_SET" in text
        assert "output_dir  (mine.yaml:5)" in text
        assert "seed  (mine.yaml:6)" in text


def test_campaign_steps_must_form_a_graph(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "name: c\ntitle: c\noutput_dir: out\nsteps:\n"
        "  - {kind: train, id: a, config: hope/demo}\n  - {kind: eval, id: e, run: b}\n"
    )
    text = mistake(str(tmp_path / "c.yaml"), load=load_campaign)
    assert "step 'e' needs 'b', which no earlier step has" in text
    assert "name one of the earlier steps: a" in text


def test_stored_configuration_is_judged_too():
    stored = load_run("hope/demo").model_dump(mode="json")
    assert parse_run(stored, "run/config.json") == load_run("hope/demo")
    stored["model"]["width"] = "wide"
    with pytest.raises(ConfigError, match=r"model\.width  \(run/config\.json\)"):
        parse_run(stored, "run/config.json")
    with pytest.raises(ConfigError, match="does not hold a configuration but list"):
        parse_run([], "run/config.json")

"""The presets that ship: they load, from anywhere, and baselines differ in the model alone."""

import logging
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from nested_lm.config.campaign import EvalStep, TrainStep
from nested_lm.config.compose import PARTS, find_preset, hydra_at, preset_names, presets_folder
from nested_lm.config.load import config_hash, dump_resolved, load_campaign, load_data, load_run
from nested_lm.nn.sizing import count_parameters
from nested_lm_lab.evaluation.results import PARAMETER_TOLERANCE

RUNS = [n for n in preset_names() if n.partition("/")[0] not in {*PARTS, "campaign", "ablations"}]
CAMPAIGNS = [n for n in preset_names() if n.startswith("campaign/")]
DATA = [n for n in preset_names() if n.startswith("data/")]


@pytest.mark.parametrize("name", RUNS)
def test_run_preset_loads(name):
    run = load_run(name)
    assert run.model.vocab_size == run.data.tokenizer.vocab_size
    assert run.name == name.replace("hope/", "hope-").replace("baselines/", "").replace("_", "-")


@pytest.mark.parametrize("name", DATA)
def test_data_preset_is_what_runs_use(name):
    assert load_data(name) == load_run("hope/demo", [f"data={name.partition('/')[2]}"]).data


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_campaign_steps_load_and_have_folders_of_their_own(name):
    campaign = load_campaign(name)
    trained = {step.id: load_run(step.config, step.overrides) for step in campaign.steps if isinstance(step, TrainStep)}
    folders = [run.output_dir for run in trained.values()]
    assert len(set(folders)) == len(folders)
    assert all(folder == f"{campaign.output_dir}/runs/{Path(folder).name}" for folder in folders)
    assert {step.run for step in campaign.steps if isinstance(step, EvalStep)} == set(trained)
    assert campaign.steps[-1].kind == "report"


@pytest.mark.parametrize(
    ("baseline", "hope"),
    [
        ("baselines/transformer_demo", "hope/demo"),
        ("baselines/transformer_demo_chronological", "hope/demo_chronological"),
        ("baselines/titans_lmm_recall", "hope/recall"),
        ("baselines/gated_delta_net_recall", "hope/recall"),
        ("baselines/sliding_window_recall", "hope/recall"),
        ("baselines/transformer_recall", "hope/recall"),
    ],
)
def test_baseline_differs_in_the_model_alone(baseline, hope):
    ours, theirs = load_run(hope).model_dump(), load_run(baseline).model_dump()
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different == {"name", "output_dir", "model"}
    sizes = [count_parameters(load_run(preset).model)["total"] for preset in (baseline, hope)]
    assert abs(sizes[0] - sizes[1]) <= PARAMETER_TOLERANCE * max(sizes)


def test_chronological_preset_differs_in_the_stream_and_its_length_alone():
    usual, dated = (
        load_run("hope/demo").train.model_dump(),
        load_run("hope/demo_chronological").train.model_dump(),
    )
    assert {key for key in usual if usual[key] != dated[key]} == {"budget_tokens", "stream", "schedule"}


def test_passkey_lengths_are_multiples_of_the_context():
    run = load_run("hope/demo")
    assert [length / run.train.context_length for length in run.eval.passkey.lengths] == [1, 2, 4, 8]


class TestWhereAPresetIsFound:
    def test_by_name_by_path_and_from_any_folder(self, tmp_path, monkeypatch):
        expected = load_run("hope/demo")
        assert load_run(str(presets_folder() / "hope" / "demo.yaml")) == expected
        monkeypatch.chdir(tmp_path)
        assert load_run("hope/demo") == expected
        assert load_run("configs/hope/demo.yaml") == expected

    def test_a_users_file_may_use_our_groups_and_its_own(self, tmp_path, monkeypatch):
        folder = tmp_path / "it's mine, [1]"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "wide.yaml").write_text("defaults:\n  - hope_demo\n  - _self_\nwidth: 256\n")
        (folder / "run.yaml").write_text(
            "defaults:\n  - /hope/demo\n  - override /model: wide\n  - _self_\nname: mine\n"
        )
        monkeypatch.chdir(tmp_path)
        run = load_run(str(folder / "run.yaml"), ["seed=7"])
        assert (run.model.width, run.name, run.seed) == (256, "mine", 7)
        assert run.model.num_layers == load_run("hope/demo").model.num_layers

    def test_a_users_file_may_name_more_folders(self, tmp_path):
        (tmp_path / "more" / "train").mkdir(parents=True)
        (tmp_path / "more" / "train" / "slow.yaml").write_text("defaults: [demo]\nclip_norm: 0.1\n")
        (tmp_path / "run.yaml").write_text(
            "defaults: [/hope/demo, override /train: slow, _self_]\n"
            f"hydra:\n  searchpath: ['file://{tmp_path / 'more'}']\n"
        )
        assert load_run(str(tmp_path / "run.yaml")).train.clip_norm == 0.1

    def test_a_users_data_preset_needs_no_package(self, tmp_path):
        (tmp_path / "texts.yaml").write_text(
            "defaults: [/data/demo@_here_, _self_]\nname: mine\nsource: {kind: folder, path: texts}\n"
        )
        text = "corpus"  # of the other kind of source, merged in from data/demo
        with pytest.raises(Exception, match=f"source.{text}"):
            load_data(str(tmp_path / "texts.yaml"))
        assert load_data(str(tmp_path / "texts.yaml"), ["~source.corpus", "period_years=5"]).period_years == 5


class TestNoSideEffects:
    def test_hydra_leaves_nothing_behind(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        handlers, level = list(logging.root.handlers), logging.root.level
        load_run("hope/demo")
        assert not GlobalHydra.instance().is_initialized()
        assert list(tmp_path.iterdir()) == []
        assert (logging.root.handlers, logging.root.level) == (handlers, level)

    def test_an_outer_hydra_application_is_left_as_it_was(self):
        with hydra_at(find_preset("hope/demo")):
            outer = GlobalHydra.instance().hydra
            load_run("baselines/transformer_demo")
            assert GlobalHydra.instance().hydra is outer
        assert not GlobalHydra.instance().is_initialized()

    def test_state_is_restored_after_a_mistake(self):
        with pytest.raises(Exception, match="hope_dmo"):
            load_run("hope/demo", ["model=hope_dmo"])
        assert not GlobalHydra.instance().is_initialized()


class TestIdentity:
    def test_hash_follows_the_values_not_the_way_they_were_given(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("defaults:\n  - /hope/demo\n  - _self_\nseed: 5\n")
        run = load_run("hope/demo", ["seed=5"])
        assert config_hash(run) == config_hash(load_run(str(tmp_path / "mine.yaml")))
        assert config_hash(run) != config_hash(load_run("hope/demo", ["seed=6"]))
        assert len(config_hash(run)) == 16
        assert int(config_hash(run), 16) >= 0

    def test_resolved_dump_loads_again(self, tmp_path):
        run = load_run("hope/demo", ["train.optimizer.rate=3e-4", "name='3e-4'", "eval.sampling=null"])
        dump_resolved(run, tmp_path / "new" / "config.resolved.yaml")
        assert load_run(str(tmp_path / "new" / "config.resolved.yaml")) == run

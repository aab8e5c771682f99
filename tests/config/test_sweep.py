"""Sweeps through Hydra's own sweeper: each job is judged and has a folder of its own."""

import pytest
from hydra.core.global_hydra import GlobalHydra

from nested_lm.config.sweep import run_sweep
from nested_lm.errors import ConfigError


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return []


def test_two_values_make_two_runs_in_two_folders(jobs, tmp_path):
    run_sweep("hope/demo", ["seed=1,2", "train.clip_norm=0.5", "output_dir=out"], jobs.append)
    assert [(run.seed, run.train.clip_norm, run.output_dir) for run in jobs] == [
        (1, 0.5, "out/sweep/seed=1"),
        (2, 0.5, "out/sweep/seed=2"),
    ]
    assert sorted(path.name for path in (tmp_path / "out" / "sweep").iterdir()) == ["multirun.yaml"]
    assert not GlobalHydra.instance().is_initialized()


def test_groups_and_fields_that_no_file_mentions_can_be_swept(jobs):
    run_sweep("hope/demo", ["model=hope_demo,transformer_demo", "train.clip_norm=0.5,1.0"], jobs.append)
    assert {(run.model.mixer.kind, run.train.clip_norm) for run in jobs} == {
        ("self_modifying", 0.5),
        ("self_modifying", 1.0),
        ("attention", 0.5),
        ("attention", 1.0),
    }
    assert len({run.output_dir for run in jobs}) == 4


def test_values_that_no_file_name_can_hold_stay_apart(jobs):
    run_sweep("hope/demo", ["data.output_dir='a/b','a:b'", "output_dir=out"], jobs.append)
    assert len({run.output_dir for run in jobs}) == 2
    assert all("/" not in run.output_dir.removeprefix("out/sweep/") for run in jobs)


def test_a_wrong_job_is_reported_and_the_others_run(jobs):
    with pytest.raises(ConfigError, match="command line override `seed=-1`"):
        run_sweep("hope/demo", ["seed=-1,2"], jobs.append)
    assert [run.seed for run in jobs] == [2]


def test_errors_of_a_job_are_not_taken_for_mistakes_in_the_preset(jobs):
    def fail(run):
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_sweep("hope/demo", ["seed=1,2"], fail)


def test_a_stop_ends_the_sweep(jobs):
    def stop(run):
        jobs.append(run)
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        run_sweep("hope/demo", ["seed=1,2"], stop)
    assert len(jobs) == 1
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "no field with several values"),
        (["seed=1"], "no field with several values"),
        (["model=hope_dmo,transformer_demo"], "did you mean `hope_demo`"),
        (["model=hope_dmo", "seed=1,2"], "did you mean `hope_demo`"),
        (["seed 1,2"], "path.to.field=value"),
    ],
)
def test_mistakes_before_the_first_job(jobs, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_sweep("hope/demo", overrides, jobs.append)
    assert jobs == []


def test_hydras_settings_may_be_chosen(jobs, tmp_path):
    settings = ["hydra.sweep.dir=elsewhere", "hydra.sweep.subdir='${hydra.job.num}'"]
    run_sweep("hope/demo", ["seed=1,2", *settings], jobs.append)
    assert [run.output_dir for run in jobs] == ["elsewhere/0", "elsewhere/1"]


@pytest.mark.parametrize("setting", ["hydra.callbacks.x._target_=hubconf.X", "hydra.launcher._target_=hubconf.X"])
def test_a_sweep_runs_no_code_of_a_folder(jobs, tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hubconf.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a setting of Hydra"):
        run_sweep("hope/demo", ["seed=1,2", f"+{setting}"], jobs.append)
    (tmp_path / "mine.yaml").write_text("defaults: [/hope/demo, _self_]\nhydra: {callbacks: {}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a setting of Hydra"):
        run_sweep("mine.yaml", ["seed=1,2"], jobs.append)
    assert jobs == []

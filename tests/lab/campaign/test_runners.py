"""Steps side by side, shared by torchrun, as jobs of a scheduler; grids as steps; what a dry run says of cost."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from nested_lm.config.campaign import CampaignConfig, Slurm, Speed
from nested_lm.config.load import load_campaign, load_run
from nested_lm.errors import CampaignError, ConfigError
from nested_lm_lab.campaign import ledger as ledger_module
from nested_lm_lab.campaign import runners
from nested_lm_lab.campaign.ledger import Ledger
from nested_lm_lab.campaign.lock import CampaignLock
from nested_lm_lab.campaign.plan import run_campaign
from nested_lm_lab.campaign.process import Child, _copy, end_all
from nested_lm_lab.campaign.slurm import JobQueue, StepJob
from nested_lm_lab.campaign.steps import PlannedStep, describe, plan_steps
from tests.lab.campaign.fake_campaign import campaign

SLURM = {"kind": "slurm", "timeout_minutes": 5, "cpus": 1}
GRID = {
    "kind": "grid",
    "id": "g",
    "ablations": "ablations/phase2_nano",
    "evaluation": "eval/smoke",
    "seeds": [1, 2],
    "only": ["no-k"],
    "overrides": ["train=smoke"],
    "after": ["data"],
}


def nothing() -> None:
    """Before a step starts."""


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def with_runner(runner: dict[str, object], **changes: object) -> CampaignConfig:
    return CampaignConfig.model_validate({**campaign().model_dump(mode="json"), "runner": runner, **changes})


def with_grid(**changes: object) -> CampaignConfig:
    data = {"kind": "data", "id": "data", "config": "data/demo", "overrides": ["output_dir=out/text"]}
    report = {"kind": "report", "id": "report", "after": ["g"]}
    steps = [data, {**GRID, **changes}, report]
    return CampaignConfig.model_validate({"name": "grid", "title": "A grid", "output_dir": "out", "steps": steps})


@cache
def planned() -> tuple[PlannedStep, ...]:
    return plan_steps(with_grid())


class TestSideBySide:
    def test_steps_that_do_not_need_each_other_run_together(self, prefix, calls):
        Path("behaviour.json").write_text(json.dumps({"train hope": "meet", "train transformer": "meet"}))
        run_campaign(with_runner({"kind": "local", "parallel": 2, "threads": 1}), prefix=prefix)
        assert sorted(Path("met.txt").read_text().split()) == ["hope:1", "transformer:1"]  # name and OMP_NUM_THREADS
        assert sorted(calls()[1:3]) == ["train hope", "train transformer"]
        assert calls() == []

    def test_a_failure_beside_others_stops_its_dependants_only(self, prefix, calls):
        Path("behaviour.json").write_text(json.dumps({"train hope": "fail"}))
        with pytest.raises(CampaignError, match="3 of 6 steps"):
            run_campaign(with_runner({"kind": "local", "parallel": 3}), prefix=prefix)
        assert "eval transformer" in calls()

    def test_a_full_disk_ends_the_campaign_after_what_runs_has_saved(self, prefix, monkeypatch):
        """The campaign cannot go on when it cannot record; nothing may train on behind its back."""
        Path("behaviour.json").write_text(json.dumps({"train transformer": "wait"}))
        real = ledger_module._drop_half_line

        def full(path):
            if Path("ready").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path)

        monkeypatch.setattr(ledger_module, "_drop_half_line", full)
        said: list[str] = []
        with pytest.raises(CampaignError, match=r"(?s)ledger\.jsonl cannot be written: No space left.*Free some space"):
            run_campaign(with_runner({"kind": "local", "parallel": 2}), prefix=prefix, say=said.append)
        assert Path("signals.txt").read_text() == "SIGTERM\n"
        assert not is_running(int(Path("ready").read_text()))
        assert any("asking what runs to save and stop" in line and "transformer" in line for line in said)

    def test_a_step_whose_start_cannot_be_noted_is_ended(self, prefix, monkeypatch):
        Path("behaviour.json").write_text(json.dumps({"data text": "wait"}))

        def full(self, step, pid):
            while not Path("ready").exists():
                time.sleep(0.02)
            raise CampaignError("lock cannot be written")

        monkeypatch.setattr(CampaignLock, "note_step", full)
        with pytest.raises(CampaignError, match="lock cannot be written"):
            run_campaign(campaign(), prefix=prefix)
        assert Path("signals.txt").read_text() == "SIGTERM\n"


def test_a_step_gets_the_same_signal_once_and_is_killed_when_it_does_not_end(tmp_path):
    program = (
        "import signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: open({str(tmp_path / 'got')!r}, 'a').write('x'))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(0.05)"
    )
    with CampaignLock(tmp_path, say=print) as lock:
        child = Child([sys.executable, "-S", "-c", program], log=tmp_path / "log", inherit=lock.descriptor)
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        child.stop(signal.SIGTERM)
        end_all([child], patience_s=0.5)
        assert child.poll().exit_code == -signal.SIGKILL
    assert (tmp_path / "got").read_text() == "x"


class TestTorchrun:
    def test_trainings_alone_are_shared(self, prefix):
        steps = campaign().model_dump(mode="json")["steps"]
        for step in steps[1:3]:
            step["overrides"].append("train.strategy=fsdp2")
        said: list[str] = []
        config = with_runner({"kind": "torchrun", "processes": 2}, steps=steps)
        run_campaign(config, prefix=prefix, dry_run=True, say=said.append)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        commands = [shlex.split(line) for line in said[1:12:2]]
        assert commands[1][: len(launcher)] == launcher
        assert " ".join([*prefix, "train", "hope/demo"]) in " ".join(commands[1][len(launcher) :])
        assert [command[0] for command in commands] == [sys.executable] * 6
        assert "torch.distributed.run" not in [*commands[0], *commands[3], *commands[5]]

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends them")
    def test_processes_end_with_a_killed_agent(self, tmp_path):
        program = (
            "import os, sys, time\nname = os.environ['LOCAL_RANK']\n"
            f"with open(os.path.join({str(tmp_path)!r}, name), 'w') as file: file.write(str(os.getpid()))\n"
            "time.sleep(120)"
        )
        steps = campaign().model_dump(mode="json")["steps"][:2]
        steps[1]["overrides"].append("train.strategy=fsdp2")
        config = with_runner({"kind": "torchrun", "processes": 2}, steps=steps)
        prefix = (sys.executable, "-S", "-c", program)
        agent = subprocess.Popen(runners.command_of(plan_steps(config)[1], prefix, config))
        files = [tmp_path / "0", tmp_path / "1"]
        end = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < end
            time.sleep(0.05)
        agent.kill()  # as a second Ctrl-C does
        agent.wait()
        pids = [int(file.read_text()) for file in files]
        end = time.monotonic() + 10
        while any(map(is_running, pids)):
            assert time.monotonic() < end, [os.kill(pid, signal.SIGKILL) for pid in pids if is_running(pid)]
            time.sleep(0.05)

    def test_copies_of_a_run_are_refused(self):
        with pytest.raises(ConfigError, match=r"(?s)starts 2 processes, but step 'hope' .*train\.strategy=fsdp2"):
            plan_steps(with_runner({"kind": "torchrun", "processes": 2}))


class TestJobs:
    """The queue on submitit's local executor, which runs jobs as processes of this machine."""

    @pytest.fixture
    def queue(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        return lambda: JobQueue(Slurm.model_validate(SLURM), tmp_path, cluster="local", poll_s=0.05)

    @staticmethod
    def outcome(job):
        while (found := job.poll()) is None:
            pass
        return found

    def test_a_job_runs_its_command_and_an_earlier_one_is_found_again(self, queue, tmp_path):
        command = [sys.executable, "-S", "-c", "print('hello'); raise SystemExit(3)"]
        first = queue()
        assert self.outcome(first.start("train", "f1", command, before=nothing)).exit_code == 3
        assert (tmp_path / "logs/train.log").read_text() == "hello\n"
        later = queue()  # the campaign was killed before the end reached its ledger
        assert self.outcome(later.start("train", "f1", ["/no/such/program"], before=nothing)).exit_code == 3
        later.forget("train")
        assert not (tmp_path / "jobs/train.json").exists()

    def test_a_job_of_other_settings_has_ended_before_its_folder_is_touched(self, queue, tmp_path, monkeypatch):
        seen: list[str] = []

        class Handle:
            """A job that ends at the second look after it was cancelled. submitit's local ones cannot be cancelled."""

            job_id = "7"

            def __init__(self, *_) -> None:
                self.looks = 0

            def cancel(self, check) -> None:
                seen.append("cancelled")

            def done(self) -> bool:
                self.looks += 1
                if self.looks == 2:
                    seen.append("ended")
                return self.looks >= 2

        jobs = queue()
        scheduler = SimpleNamespace(
            job_class=Handle, update_parameters=lambda **_: None, submit=lambda _: seen.append("submitted") or Handle()
        )
        monkeypatch.setattr(jobs, "_executor", scheduler)
        for fingerprint in ("f1", "f1", "f2"):
            jobs.start("train", fingerprint, ["true"], before=lambda: seen.append("before"))
        assert seen == ["before", "submitted", "cancelled", "ended", "before", "submitted"]  # the second f1 is found

    def test_a_campaign_killed_while_submitting_asks_for_a_look(self, queue, tmp_path):
        (tmp_path / "jobs").mkdir()
        record = {"job_id": None, "fingerprint": "f", "name": "train-f"}
        (tmp_path / "jobs/train.json").write_text(json.dumps(record))
        with pytest.raises(CampaignError, match=r"(?s)'train-f' may exist.*delete .*train\.json"):
            queue().start("train", "f", ["true"], before=nothing)

    def test_a_campaign_runs_through_jobs(self, prefix, calls, monkeypatch, tmp_path):
        def local(config, folder, lock):
            runner = runners.SlurmRunner(config.runner, folder, lock, cluster="local")
            monkeypatch.setattr(runner._queue, "_poll_s", 0.05)
            return runner

        monkeypatch.setattr("nested_lm_lab.campaign.plan.open_runner", local)
        steps = campaign().model_dump(mode="json")["steps"][:2]
        run_campaign(with_runner(SLURM, steps=steps), prefix=prefix)
        assert calls() == ["data text", "train hope"]
        assert [attempt.exit_code for attempt in Ledger(Path("out/ledger.jsonl")).attempts] == [0, 0]
        assert list(Path("out/jobs").glob("*.json")) == []

    def test_time_that_ends_lets_the_command_save_and_submits_it_again(self, tmp_path):
        program = (
            "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(open('saved', 'w').close()))"
        )
        job = StepJob(
            [sys.executable, "-S", "-c", f"{program}\nopen('up', 'w').close()\ntime.sleep(60)"],
            tmp_path,
            tmp_path / "log",
        )
        import threading

        thread = threading.Thread(target=job, daemon=True)
        thread.start()
        while not (tmp_path / "up").exists():
            pass
        again = job.checkpoint()
        thread.join(timeout=10)
        assert (tmp_path / "saved").exists()
        assert again.function._command == job._command

    def test_no_scheduler_and_no_submitit_are_said(self, tmp_path, monkeypatch):
        with pytest.raises(ConfigError, match=r"(?s)cannot submit jobs from this machine.*runner=\{kind: local\}"):
            JobQueue(Slurm.model_validate(SLURM), tmp_path)
        monkeypatch.setitem(sys.modules, "submitit", None)
        with pytest.raises(ConfigError, match=r"(?s)needs submitit.*\[slurm\]"):
            JobQueue(Slurm.model_validate(SLURM), tmp_path)


def test_jobs_go_on_when_the_campaign_is_told_to_stop(tmp_path):
    with CampaignLock(tmp_path, say=print):
        assert runners.SlurmRunner.outlives
        assert not runners.LocalRunner.outlives


class TestGrid:
    def test_arms_and_seeds_become_runs_and_evaluations_seed_by_seed(self, prefix):
        steps = planned()
        ids = [step.id for step in steps]
        made = ["g.base-seed1", "g.no-k-seed1", "g.base-seed2", "g.no-k-seed2"]
        assert ids == ["data", *(id for one in made for id in (one, f"{one}.eval")), "report"]
        assert steps[-1].needs == tuple(ids[1:-1])
        run = steps[3].run
        assert (run.name, run.seed, run.output_dir) == ("no-k-seed1", 1, "out/runs/g-no-k-seed1")
        assert (run.model.mixer.adapt, run.train.budget_tokens) == (("eta", "alpha", "v", "memory"), 16384)
        assert steps[3].arguments[:4] == (
            "train",
            "hope/demo",
            "train=smoke",
            "model.mixer.adapt=[eta, alpha, v, memory]",
        )
        assert steps[4].arguments == ("eval", "out/runs/g-no-k-seed1", "--settings", "eval/smoke")

    def test_the_command_of_a_step_makes_its_configuration(self, prefix):
        from nested_lm.config.load import load_run

        step = planned()[3]
        assert load_run(step.arguments[1], step.arguments[2:]) == step.run

    def test_the_manifest_says_what_the_arms_are(self, prefix):
        config = with_grid()
        manifest = describe(config, planned())
        assert [(run.grid, run.arm, run.evaluated) for run in manifest.runs[:2]] == [
            ("g", "base", True),
            ("g", "no-k", True),
        ]
        (grid,) = manifest.grids
        assert (grid.base, grid.seeds, [variant.row for variant in grid.variants]) == (
            "hope/demo",
            (1, 2),
            ["w/o inner projection k"],
        )

    def test_other_measurements_do_not_train_again(self, prefix):
        before, after = planned(), plan_steps(with_grid(evaluation="eval/demo"))
        same = {a.id for a, b in zip(before, after, strict=True) if a.fingerprint == b.fingerprint}
        assert same == {"data", "g.base-seed1", "g.no-k-seed1", "g.base-seed2", "g.no-k-seed2"}

    def test_a_seed_twice_is_refused(self):
        with pytest.raises(ValueError, match="name a seed twice"):
            with_grid(seeds=[1, 1])

    def test_a_dry_run_says_tokens_hours_and_disk(self, prefix):
        speed = {"tokens_per_s": 1000.0, "run_seconds": 10.0, "measured_on": "a laptop"}
        config = with_grid().model_copy(
            update={
                "speed": CampaignConfig.model_validate({**with_grid().model_dump(mode="json"), "speed": speed}).speed
            }
        )
        said: list[str] = []
        run_campaign(config, prefix=prefix, dry_run=True, say=said.append)
        text = "\n".join(said)
        assert "to do        1 data, 4 train, 4 eval, 1 report" in text
        assert "tokens       65,536 in 4 trainings" in text
        assert "4.1e+11 FLOPs" in text  # 6 x 1,033,848 x 65,536
        assert "2 min at 1,000 tokens/s and 10 s besides training for each run (measured on a laptop)" in text
        faster = {**speed, "by_preset": {"hope/demo": 65_536 / 4 / 20}}  # 20 s a training
        said.clear()
        made = CampaignConfig.model_validate({**with_grid().model_dump(mode="json"), "speed": faster})
        run_campaign(made, prefix=prefix, dry_run=True, say=said.append)
        assert any("2 min at 819 tokens/s and 10 s besides" in line for line in said)
        # 4 runs x 2 kept x (weights, one moment of Muon's matrices and two of the rest, gradients that wait)
        assert "84.8 MB of checkpoints" in text


@pytest.mark.parametrize("name", ["campaign/demo", "campaign/smoke"])
def test_the_shipped_campaigns_can_be_planned(name):
    steps = plan_steps(load_campaign(name))
    assert all(step.needs == (step.id.removeprefix("eval-"),) for step in steps if step.kind == "eval")


@pytest.mark.parametrize("path", sorted(Path("configs/campaign").absolute().glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_campaign_states_a_speed_of_presets_that_it_trains(path):
    config = load_campaign(str(path))
    assert config.speed is not None
    trained = {step.config for step in config.steps if step.kind == "train"}
    assert not {*config.speed.by_preset} - trained


def test_a_first_signal_leaves_jobs_alone_and_a_second_cancels_them():
    cancelled = []

    class Handle:
        def cancel(self, check):
            cancelled.append(check)

    from nested_lm_lab.campaign.slurm import Job

    job = Job(Handle(), poll_s=1.0)
    job.stop(signal.SIGTERM)
    assert cancelled == []
    job.stop(signal.SIGKILL)
    assert cancelled == [False]


def test_suites_are_verbs_of_their_own_and_take_options(prefix):
    steps = campaign().model_dump(mode="json")["steps"]
    steps[3] |= {"suite": "niah", "options": ["--tasks=s1", "--lengths=256"]}
    planned = plan_steps(with_runner({"kind": "local"}, steps=steps))
    assert planned[3].arguments == ("eval", "niah", "out/hope", "--tasks=s1", "--lengths=256")
    steps[3]["options"] = ["--tasks=s1"]
    again = plan_steps(with_runner({"kind": "local"}, steps=steps))
    changed = [a.id for a, b in zip(planned, again, strict=True) if a.fingerprint != b.fingerprint]
    assert changed == ["eval-hope", "report"]
    for wrong, message in (
        ({"settings": "eval/demo"}, "suite niah takes command line options, not settings"),
        ({"options": ["tasks=s1"]}, "must be one word that begins with --"),
        ({"suite": "run"}, "options belong to suites"),
    ):
        with pytest.raises(ValueError, match=message):
            with_runner({"kind": "local"}, steps=[*steps[:3], {**steps[3], **wrong}])


def with_variables(folder: str | None) -> CampaignConfig:
    """The zero-shot suite in place of Hope's evaluation, with a folder that only the user knows."""
    steps = campaign().model_dump(mode="json")["steps"]
    options = [f"--data-dir={folder}"]
    steps[3] |= {"suite": "zeroshot", "options": options, "requires": ["data"], "seconds": 90.0}
    return CampaignConfig.model_validate(
        campaign().model_dump(mode="json") | {"steps": steps, "variables": {"data": folder}}
    )


def test_a_step_whose_variable_is_not_set_is_left_out_and_named(prefix, calls):
    assert [step.id for step in plan_steps(with_variables("there"))] == [step.id for step in plan_steps(campaign())]
    planned = {step.id: step for step in plan_steps(with_variables(None))}
    assert "eval-hope" not in planned
    assert planned["report"].needs == ("eval-transformer",)
    said: list[str] = []
    run_campaign(with_variables(None), prefix=prefix, say=said.append)
    assert said[0] == "left out: eval-hope; it needs variables.data=..."
    assert "eval hope" not in calls()
    steps = with_variables("there").model_dump(mode="json")["steps"]
    steps[3] |= {"requires": ["facts"]}
    with pytest.raises(ValueError, match="step 'eval-hope' requires variable 'facts'; `variables` has data"):
        with_runner({"kind": "local"}, steps=steps, variables={"data": None})


def test_what_is_published_of_a_campaign_names_no_folder_of_the_user():
    config = with_variables("/home/somebody/data")
    steps = plan_steps(config)
    assert any("--data-dir=/home/somebody/data" in step.arguments for step in steps)
    manifest = describe(config, steps)
    assert "--data-dir=${variables.data}" in manifest.steps[3].arguments
    assert "somebody" not in manifest.model_dump_json()


def test_seconds_of_evaluations_count_in_a_dry_run(prefix):
    speed = {"tokens_per_s": 737_280 / 60, "run_seconds": 10.0, "measured_on": "a test"}
    config = with_variables("there").model_copy(update={"speed": Speed(**speed)})
    said: list[str] = []
    run_campaign(config, prefix=prefix, dry_run=True, say=said.append)
    line = next(line for line in said if line.startswith("time"))
    assert line.startswith(
        "time         4 min at 12,288 tokens/s and 10 s besides training for each run, 2 min of eval"
    )


def test_a_variable_that_no_step_names_is_refused(tmp_path):
    message = r"(?s)variables\.zeroshat .*found .*allowed  one of zeroshot, .*did you mean `zeroshot`\?"
    with pytest.raises(ConfigError, match=message):
        load_campaign("campaign/evaluation_demo", ["variables.zeroshat=/there"])
    with pytest.raises(ConfigError, match=r"(?s)variables\.data .*none: the campaign has no variables.*leave it out"):
        load_campaign("campaign/smoke", ["variables.data=/there"])


def test_numbers_are_text_in_a_variable():
    config = load_campaign("campaign/evaluation_demo", ["variables.zeroshot_limit=500", "variables.zeroshot=/there"])
    assert config.variables["zeroshot_limit"] == "500"


def test_presets_take_paths_as_variables(tmp_path, prefix):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntitle: t\noutput_dir: out\nvariables: {facts: null}\nsteps:\n"
        "  - {kind: train, id: hope, config: hope/demo, overrides: [name=hope, 'output_dir=${output_dir}/hope']}\n"
        "  - {kind: eval, id: b, run: hope, suite: babilong, requires: [facts],\n"
        "     options: ['--facts=${variables.facts}']}\n"
    )
    assert [step.id for step in plan_steps(load_campaign(str(path)))] == ["hope"]
    hope, babilong = plan_steps(load_campaign(str(path), ["variables.facts=/a b/c", "output_dir=there"]))
    assert hope.folder.as_posix() == "there/hope"
    assert babilong.arguments == ("eval", "babilong", "there/hope", "--facts=/a b/c")


def test_every_oracle_of_the_evaluation_is_of_the_arms_own_model():
    config = load_campaign("campaign/evaluation_demo")
    runs = {step.id: step for step in config.steps if step.kind == "train"}
    compared = 0
    for step in config.steps:
        oracles = [option for option in step.options if option.startswith("--oracle=")] if step.kind == "eval" else []
        for option in oracles:
            name = option.rpartition("/")[2]
            ours, theirs = (load_run(runs[id].config, runs[id].overrides) for id in (step.run, name))
            assert ours.model == theirs.model
            assert (ours.train.stream.order, theirs.train.stream.order) == ("forward", "shuffled")
            assert name in step.after
            compared += 1
    assert compared == 9


def test_a_full_disk_keeps_the_log_thread_and_the_end_of_what_a_step_said(tmp_path, monkeypatch, capsys):
    """The pipe is emptied while the disk refuses; when there is space again the log has what waited."""
    log = tmp_path / "logs" / "step.log"
    source, sink = os.pipe()
    original, refused = Path.open, []

    def full(self, *args, **kwargs):
        if self == log and len(refused) < 2:
            refused.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    copier = threading.Thread(target=_copy, args=(os.fdopen(source, "rb"), log))
    copier.start()
    for text in (b"one\n", b"two\n", b"DataError: three\n"):
        os.write(sink, text)
        time.sleep(0.05)
    os.close(sink)
    copier.join(timeout=10)
    assert not copier.is_alive()
    assert log.read_bytes() == b"one\ntwo\nDataError: three\n"
    assert "DataError: three" in capsys.readouterr().out

"""Steps as Ray tasks: the logic on a stub of Ray's module, and, where Ray is installed, on a Ray of this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nested_lm.config.campaign import CampaignConfig, Ray
from nested_lm.errors import CampaignInterruptedError, ConfigError
from nested_lm_lab.campaign.ledger import Ledger
from nested_lm_lab.campaign.plan import run_campaign
from nested_lm_lab.campaign.ray_tasks import Tasks, run_step
from tests.lab.campaign.fake_campaign import campaign

PROGRAM_THAT_SAVES = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(143)))\n"
    "open('up', 'w').close()\ntime.sleep(60)"
)


class RayError(Exception):
    """As in ray.exceptions."""


class TaskCancelledError(RayError):
    """As in ray.exceptions."""


class FakeRay:
    """The part of Ray's module that the runner uses; tasks run at once. `outcome`: an exception to end them with."""

    exceptions = SimpleNamespace(RayError=RayError, TaskCancelledError=TaskCancelledError)

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.alive = False
        self.outcome: Exception | None = None
        self.sizes: list[dict[str, float]] = [{"CPU": 4.0}]

    def is_initialized(self) -> bool:
        return self.alive

    def init(self, **options) -> None:
        self.calls.append(("init", options))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does
        if options["address"] == "nowhere:1":
            raise ConnectionError("no answer")
        self.alive = True

    def shutdown(self) -> None:
        self.calls.append(("shutdown", None))
        self.alive = False

    def nodes(self):
        return [{"Alive": True, "Resources": size} for size in self.sizes]

    def remote(self, **options):
        self.calls.append(("remote", options))

        def wrap(function):
            def call(*arguments, **named):
                return self.outcome or function(*arguments, **named)

            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

        return wrap

    def wait(self, references, *, timeout):
        assert timeout == 0
        return references, []

    def get(self, reference):
        if isinstance(reference, Exception):
            raise reference
        return reference

    def cancel(self, reference, *, force) -> None:
        self.calls.append(("cancel", force))


@pytest.fixture
def ray(monkeypatch, tmp_path) -> FakeRay:
    fake = FakeRay()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def with_ray(**changes: object) -> CampaignConfig:
    return CampaignConfig.model_validate({**campaign().model_dump(mode="json"), "runner": {"kind": "ray", **changes}})


def tasks(**changes: object) -> Tasks:
    return Tasks(Ray.model_validate({"kind": "ray", **changes}), Path("out"))


class TestTasks:
    def test_a_campaign_runs_through_tasks_and_the_report_here(self, ray, prefix, calls):
        handler = signal.getsignal(signal.SIGTERM)
        run_campaign(with_ray(parallel=2, cpus_per_step=4), prefix=prefix)
        assert sorted(calls())[-1] == "train transformer"
        assert [attempt.exit_code for attempt in Ledger(Path("out/ledger.jsonl")).attempts] == [0] * 6
        assert "output of data text" in Path("out/logs/data.log").read_text()
        assert [name for name, _ in ray.calls] == ["init", "remote", "shutdown"]
        assert ray.calls[0][1] | {"address": "local", "include_dashboard": False} == ray.calls[0][1]
        assert ray.calls[1][1] == {"num_cpus": 4, "num_gpus": 0, "max_retries": 0}
        assert signal.getsignal(signal.SIGTERM) == handler

    def test_what_a_task_asks_of_ray_and_gives_its_command(self, ray):
        print_threads = [sys.executable, "-S", "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
        runner = tasks(cpus_per_step=4, processes=2, address="auto")
        assert runner.start("train", print_threads).poll().exit_code == 0
        assert Path("out/logs/train.log").read_text() == "2\n"
        assert ray.calls[0] == ("init", {"address": "auto", "log_to_driver": False, "logging_level": "WARNING"})

    def test_a_ray_of_somebody_else_is_left_open(self, ray):
        ray.alive = True
        tasks().close()
        assert [name for name, _ in ray.calls] == ["remote"]

    def test_the_first_signal_cancels_and_the_second_kills(self, ray):
        ray.outcome = TaskCancelledError()
        task = tasks().start("train", ["true"])
        assert task.poll().exit_code == 255  # cancelled by somebody else
        task.stop(signal.SIGINT)
        assert task.poll().exit_code == -signal.SIGINT
        task.stop(signal.SIGKILL)
        assert task.poll().exit_code == -signal.SIGKILL
        assert ray.calls[-2:] == [("cancel", False), ("cancel", True)]

    def test_a_lost_node_is_a_failure(self, ray):
        ray.outcome = RayError("node died")
        assert tasks().start("train", ["true"]).poll().exit_code == 255

    def test_mistakes_name_their_repair(self, ray, monkeypatch):
        with pytest.raises(ConfigError, match=r"(?s)cannot be reached at 'nowhere:1': no answer.*runner\.address="):
            tasks(address="nowhere:1")
        with pytest.raises(ConfigError, match=r"(?s)has the 8 CPUs and 0 GPUs.*nodes: 4 CPUs, 0 GPUs.*cpus_per_step"):
            tasks(cpus_per_step=8)
        assert not ray.alive  # the Ray that was started for nothing has ended
        with pytest.raises(ConfigError, match=r"the 1 CPUs and 0\.5 GPUs"):
            tasks(gpus_per_step=0.5)
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ConfigError, match=r"(?s)needs ray, which is not installed.*\[ray\]"):
            tasks()


class TestCommandOfATask:
    """`run_step` as a worker calls it."""

    @pytest.fixture
    def step(self, tmp_path):
        options = {"folder": tmp_path, "log": tmp_path / "logs/train.log", "threads": 1}
        return lambda command, **more: run_step(command, **options, **more)

    def test_its_exit_code_and_output(self, step, tmp_path):
        assert step([sys.executable, "-S", "-c", "print('hello'); raise SystemExit(3)"]) == 3
        assert step(["/no/such/program"]) in (1, 127)
        assert (tmp_path / "logs/train.log").read_text().startswith("hello\n")

    def test_a_missing_folder_is_said_in_the_log(self, tmp_path):
        log = tmp_path / "train.log"
        assert run_step(["true"], folder=tmp_path / "missing", log=log, threads=1) == 127
        assert "cannot start true in" in log.read_text()

    def test_an_attempt_that_still_saves_is_waited_for(self, step, tmp_path):
        first = threading.Thread(target=step, args=([sys.executable, "-S", "-c", "import time; time.sleep(1.5)"],))
        first.start()
        while not (tmp_path / "logs/train.lock").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        assert step(["true"], patience_s=0.1) == 255
        assert "an earlier attempt of this step still runs" in (tmp_path / "logs/train.log").read_text()
        assert step(["true"], patience_s=20.0) == 0
        first.join()

    def test_a_cancelled_task_lets_its_command_save(self, tmp_path):
        code = (
            f"import pathlib, signal, sys\nsys.path.insert(0, {str(Path.cwd() / 'src')!r})\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be inherited as ignored
            "from nested_lm_lab.campaign.ray_tasks import run_step\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            f"command = [sys.executable, '-S', '-c', {PROGRAM_THAT_SAVES!r}]\n"
            "sys.exit(run_step(command, folder=here, log=here / 'log', threads=1))"
        )
        with subprocess.Popen([sys.executable, "-c", code]) as worker:
            _await(tmp_path / "up")
            worker.send_signal(signal.SIGINT)  # a KeyboardInterrupt in the task, as Ray cancels
            try:
                assert worker.wait(timeout=20) == 143
            finally:
                worker.kill()
        assert (tmp_path / "saved").exists()

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel asks for it")
    def test_the_command_of_a_worker_that_dies_saves_and_ends(self, tmp_path):
        code = (
            "import pathlib, sys\nfrom nested_lm_lab.campaign.ray_tasks import run_step\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
            f"command = [sys.executable, '-S', '-c', {PROGRAM_THAT_SAVES!r}]\n"
            "run_step(command, folder=here, log=here / 'log', threads=1)"
        )
        worker = subprocess.Popen([sys.executable, "-c", code])
        _await(tmp_path / "up")
        worker.kill()
        worker.wait()
        _await(tmp_path / "saved")


class TestRealRay:
    """A Ray of this machine with two processors."""

    @pytest.fixture
    def real(self, prefix, monkeypatch):
        found = pytest.importorskip("ray")
        found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield found
        found.shutdown()

    @pytest.mark.slow
    def test_a_campaign_runs_and_is_kept(self, real, prefix, calls):
        Path("behaviour.json").write_text(json.dumps({"train hope": "meet", "train transformer": "meet"}))
        run_campaign(with_ray(parallel=2), prefix=prefix)
        assert len(calls()) == 6
        run_campaign(with_ray(parallel=2), prefix=prefix)
        assert calls() == []

    @pytest.mark.slow
    def test_a_signal_reaches_the_step_which_is_waited_for(self, real, prefix, calls):
        Path("behaviour.json").write_text(json.dumps({"train hope": "wait"}))

        def interrupt():
            _await(Path("ready"))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(CampaignInterruptedError):
            run_campaign(with_ray(parallel=1), prefix=prefix)
        assert Path("signals.txt").read_text() == "SIGTERM\n"
        assert Ledger(Path("out/ledger.jsonl")).attempts[-1].interrupted
        Path("behaviour.json").unlink()
        run_campaign(with_ray(parallel=1), prefix=prefix)
        assert Path("out/report.html").exists()


def _await(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} was never written"
        time.sleep(0.02)

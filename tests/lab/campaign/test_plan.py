import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nested_lm.errors import CampaignError, ConfigError
from nested_lm_lab.campaign.ledger import Ledger
from nested_lm_lab.campaign.plan import run_campaign, state_of
from nested_lm_lab.campaign.steps import plan_steps
from nested_lm_lab.report.manifest import read_manifest
from tests.lab.campaign.fake_campaign import campaign

ALL = ["data text", "train hope", "train transformer", "eval hope", "eval transformer", "report out"]


def behave(**steps: str) -> None:
    Path("behaviour.json").write_text(json.dumps({key.replace("_", " "): value for key, value in steps.items()}))


def test_first_start_runs_all_and_second_keeps_all(prefix, calls):
    said: list[str] = []
    assert run_campaign(campaign(), prefix=prefix) == Path("out")
    assert calls() == ALL
    run_campaign(campaign(), prefix=prefix, say=said.append)
    assert calls() == []
    assert next(line for line in said if "kept" in line) == "[1/6] data: done in 0 s, kept"
    assert said[-2:] == [
        f"report.html  {Path('out/report.html').absolute()}",
        f"report.md    {Path('out/report.md').absolute()}",
    ]


def test_output_of_steps_is_shown_and_logged(prefix, capfd):
    run_campaign(campaign(), prefix=prefix)
    assert "output of train hope" in capfd.readouterr().out
    assert Path("out/logs/hope.log").read_text() == "output of train hope\n"


def test_dry_run_says_steps_commands_and_states_and_writes_nothing(prefix, calls):
    said: list[str] = []
    run_campaign(campaign(), prefix=prefix, dry_run=True, say=said.append)
    assert calls() == []
    assert not Path("out").exists()
    assert said[2] == "[2/6] hope (after data): not run yet"
    assert shlex.split(said[3]) == [*prefix, "train", "hope/demo", "output_dir=out/hope", "seed=1"]
    assert len(said) == 18
    assert said[12:14] == ["to do        1 data, 2 train, 2 eval, 1 report", "tokens       1,474,560 in 2 trainings"]
    assert said[15].startswith("time         unknown: the preset states no speed")


def test_a_changed_run_repeats_only_what_depends_on_it(prefix, calls):
    run_campaign(campaign(), prefix=prefix)
    calls()
    said: list[str] = []
    run_campaign(campaign(seeds=(1, 2)), prefix=prefix, say=said.append)
    assert calls() == ["train transformer", "eval transformer", "report out"]
    (aside,) = Path("out").glob("transformer.old-*")  # `train` would refuse a folder of other settings
    assert (aside / "metrics.jsonl").exists()
    assert any(str(aside) in line for line in said)


def test_a_lost_output_is_made_again_with_what_follows(prefix, calls):
    run_campaign(campaign(), prefix=prefix)
    calls()
    Path("out/hope/metrics.jsonl").unlink()
    said: list[str] = []
    run_campaign(campaign(), prefix=prefix, dry_run=True, say=said.append)
    assert any("eval-hope" in line and "hope is to run again" in line for line in said)
    run_campaign(campaign(), prefix=prefix)
    assert calls() == ["train hope", "eval hope", "report out"]


def test_a_failed_step_stops_its_dependants_only(prefix, calls):
    run_campaign_fails = pytest.raises(CampaignError, match="3 of 6 steps did not succeed")
    behave(train_hope="fail")
    with run_campaign_fails as caught:
        run_campaign(campaign(), prefix=prefix)
    assert calls() == ["data text", "train hope", "train transformer", "eval transformer"]
    message = str(caught.value)
    assert "hope: failed with exit code 3" in message
    assert "eval-hope: not run: it needs hope" in message
    assert "out/logs/hope.log" in message
    assert "nested-lm report out" in message
    behave()
    run_campaign(campaign(), prefix=prefix)
    assert calls() == ["train hope", "eval hope", "report out"]


def test_a_training_that_stops_early_with_exit_code_0_is_not_done(prefix, calls):
    behave(train_hope="early")
    with pytest.raises(CampaignError, match="hope: stopped before its end"):
        run_campaign(campaign(), prefix=prefix)
    behave()
    calls()
    run_campaign(campaign(), prefix=prefix)
    assert calls() == ["train hope", "eval hope", "report out"]


def test_half_a_ledger_line_is_dropped(prefix, calls):
    run_campaign(campaign(), prefix=prefix)
    calls()
    ledger = Path("out/ledger.jsonl")
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    run_campaign(campaign(), prefix=prefix)
    assert calls() == ["report out"]
    assert [attempt.step for attempt in Ledger(ledger).attempts] == [step.id for step in plan_steps(campaign())]


def test_a_damaged_ledger_line_is_named(prefix):
    run_campaign(campaign(), prefix=prefix)
    ledger = Path("out/ledger.jsonl")
    ledger.write_text("nonsense\n" + ledger.read_text())
    with pytest.raises(CampaignError, match=r"ledger\.jsonl line 1 is not a ledger entry"):
        run_campaign(campaign(), prefix=prefix)


def test_a_program_that_cannot_start_is_an_error(prefix):
    with pytest.raises(CampaignError, match="cannot start /no/such/program"):
        run_campaign(campaign(), prefix=("/no/such/program",))


def test_two_runs_in_one_folder_are_refused(prefix):
    config = campaign()
    steps = config.model_dump(mode="json")["steps"]
    steps[2]["overrides"] = ["output_dir=out/hope"]
    twice = type(config).model_validate({**config.model_dump(mode="json"), "steps": steps})
    with pytest.raises(ConfigError, match="'hope' and 'transformer' both write to out/hope"):
        run_campaign(twice, prefix=prefix)


def test_the_folder_describes_itself(prefix):
    run_campaign(campaign(), prefix=prefix)
    manifest = read_manifest(Path("out"))
    assert manifest.title == "A tiny campaign"
    assert [(run.name, run.folder, run.evaluated) for run in manifest.runs] == [
        ("hope-demo", "hope", True),
        ("transformer-demo", "transformer", True),
    ]
    assert manifest.data == ("text",)


def test_settings_changed_and_changed_back_run_again(prefix):
    run_campaign(campaign(), prefix=prefix)
    ledger = Ledger(Path("out/ledger.jsonl"))
    ledger.begin("transformer", "another")  # and then the campaign was killed
    steps = plan_steps(campaign())
    assert state_of(steps[2], steps, Ledger(ledger.path)) == (False, "settings changed, runs again")


def test_a_step_is_begun_once_for_each_change_of_its_settings(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for fingerprint in ("a", "a", "b", "b", "a"):
        ledger.begin("step", fingerprint)
    assert len(ledger.path.read_text().splitlines()) == 3
    again = Ledger(ledger.path)
    assert (again.fingerprint("step"), again.last("step"), again.fingerprint("other")) == ("a", None, None)


class TestStopped:
    """The campaign in a process of its own, stopped in the middle of a training."""

    @pytest.fixture
    def start(self, prefix):
        started: list[subprocess.Popen[str]] = []

        def start() -> subprocess.Popen[str]:
            code = (
                "import sys; sys.path.insert(0, sys.argv[1])\n"
                "from fake_campaign import campaign\n"
                "from nested_lm_lab.campaign.plan import run_campaign\n"
                "from nested_lm.errors import NestedLMError\n"
                "try: run_campaign(campaign(), prefix=sys.argv[2:])\n"
                "except NestedLMError as error: print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
            )
            root = str(Path(__file__).parent)
            Path("ready").unlink(missing_ok=True)
            child = subprocess.Popen(
                [sys.executable, "-c", code, root, *prefix],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(child)
            return child

        yield start
        for child in started:
            child.kill()
            child.communicate()

    @staticmethod
    def pid_of_step() -> int:
        deadline = time.monotonic() + 20
        while not (Path("ready").exists() and Path("ready").read_text()):
            assert time.monotonic() < deadline, "the step did not start"
            time.sleep(0.02)
        return int(Path("ready").read_text())

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_reaches_the_step_once_and_the_next_start_continues(self, start, prefix, calls, number):
        behave(train_transformer="wait")
        process = start()
        self.pid_of_step()
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # the echo that `timeout` sends to the group
        _, said = process.communicate(timeout=20)
        assert process.returncode == 128 + number
        assert f"interrupted by {signal.Signals(number).name}" in said
        assert Path("signals.txt").read_text() == f"{signal.Signals(number).name}\n"
        behave()
        calls()
        run_campaign(campaign(), prefix=prefix)
        assert calls() == ["train transformer", "eval hope", "eval transformer", "report out"]

    def test_a_killed_step_fails_alone(self, start, prefix, calls):
        behave(train_transformer="wait")
        process = start()
        os.kill(self.pid_of_step(), signal.SIGKILL)
        _, said = process.communicate(timeout=20)
        assert "transformer: was killed by signal 9" in said
        behave()
        assert "eval hope" in calls()
        run_campaign(campaign(), prefix=prefix)
        assert calls() == ["train transformer", "eval transformer", "report out"]

    def test_after_a_killed_campaign_its_orphan_is_stopped_and_the_work_continues(self, start, prefix, calls):
        behave(train_transformer="wait")
        process = start()
        orphan = self.pid_of_step()
        process.kill()
        process.wait()
        behave()
        calls()
        said: list[str] = []
        run_campaign(campaign(), prefix=prefix, say=said.append)
        assert Path("signals.txt").read_text() == "SIGTERM\n"
        assert said[0].startswith(f"step transformer (process {orphan}) outlived")
        assert calls() == ["train transformer", "eval hope", "eval transformer", "report out"]

    def test_settings_changed_after_an_attempt_whose_end_nobody_recorded(self, start, prefix, calls):
        behave(train_transformer="wait")
        process = start()
        orphan = self.pid_of_step()
        process.kill()
        process.wait()
        os.kill(orphan, signal.SIGKILL)
        behave()
        calls()
        said: list[str] = []
        run_campaign(campaign(), prefix=prefix, dry_run=True, say=said.append)
        assert "[3/6] transformer (after data): its end is unknown, continues" in said
        run_campaign(campaign(seeds=(1, 2)), prefix=prefix)
        assert list(Path("out").glob("transformer.old-*"))  # `train` would refuse a folder of other settings
        assert calls() == ["train transformer", "eval hope", "eval transformer", "report out"]

    def test_two_campaigns_in_one_folder_are_refused(self, start, prefix, calls):
        behave(train_transformer="wait")
        process = start()
        self.pid_of_step()
        calls()
        with pytest.raises(CampaignError, match=f"is in use by process {process.pid} on machine .*`campaign`, since"):
            run_campaign(campaign(), prefix=prefix)
        assert calls() == []
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)

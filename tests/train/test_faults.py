"""Kills, signals, full disks and values that are not finite: nothing committed is lost."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from nested_lm import checkpoint
from nested_lm.checkpoint import Disk, newest_checkpoint, read_document, verify_checkpoint
from nested_lm.errors import CheckpointError, ConfigError, DataError, InUseError, NumericsError
from nested_lm.storage.lock import own_folder
from nested_lm.train import metrics
from nested_lm.train import step as step_module
from nested_lm.train import trainer as trainer_module
from nested_lm.train.metrics import MetricsLog, read_records
from nested_lm.train.recorder import Recorder
from nested_lm.train.signals import StopRequest
from nested_lm.train.trainer import train
from nested_lm.train.validation import Validator

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
STEPS = 10


def fork(action):
    """Run in a child; the child's exit code is 0, 77 for an exception, or what it exits with."""
    pid = os.fork()
    if pid == 0:
        try:
            code = action()
            os._exit(code or 0)
        except BaseException:
            os._exit(77)
    return pid


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def spoil(monkeypatch, steps, *, what="loss"):
    """Make the loss of one token, or all gradients, bad in the second micro-batch of the given steps."""
    original, forwards, bad_targets = step_module.token_losses, [], []

    def token_losses(logits, targets):
        losses = original(logits, targets)
        if torch.is_grad_enabled():
            forwards.append(targets)
            if len(forwards) % 2 or len(forwards) // 2 not in steps:
                return losses
            if what == "gradient":
                losses.register_hook(lambda gradient: gradient * float("inf"))
                return losses
            bad_targets.append(targets)
        elif not any(torch.equal(targets, bad) for bad in bad_targets):
            return losses
        mask = torch.zeros_like(losses)
        mask[0, 3] = float("nan")
        return losses + mask

    monkeypatch.setattr(step_module, "token_losses", token_losses)


class TestKilled:
    def test_random_sigkills_lose_nothing(self, make_config, final_bytes, comparable):
        """Five kills at random moments of one run, then it is left to end."""
        whole, config = make_config(folder="whole"), make_config(folder="killed")
        began = time.monotonic()
        train(whole)
        duration = time.monotonic() - began
        rng, killed = random.Random(5), 0
        committed = 0
        for _ in range(5):
            pid = fork(lambda: train(config).exit_code)
            time.sleep(rng.uniform(0.05, 0.5) * duration)
            os.kill(pid, signal.SIGKILL)
            killed += wait(pid) == -signal.SIGKILL
            newest = newest_checkpoint(_root(config))
            step = 0 if newest is None else read_document(newest, "train_state.json")["step"]
            assert step >= committed
            committed = step
        assert killed > 0
        assert wait(fork(lambda: train(config).exit_code)) == 0
        assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)
        assert comparable(config.output_dir) == comparable(whole.output_dir)
        assert not list(_root(config).glob(".tmp-*"))

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_signal_from_outside_saves_and_exits(self, make_config, records, number, code):
        config = make_config(budget_tokens=32 * 4000, checkpoints={"every_tokens": 32 * 4000})
        pid = fork(lambda: train(config).exit_code)
        log = _root(config).parent / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, number)
        assert wait(pid) == code
        last = records(config.output_dir)[-1]
        assert last["event"] == "stop"
        newest = newest_checkpoint(_root(config))
        assert read_document(newest, "train_state.json")["step"] == last["step"] > 0

    def test_the_second_signal_ends_the_process_at_once(self):
        def stubborn():
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.name == "SIGTERM"
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)

        assert wait(fork(stubborn)) == -signal.SIGTERM

    def test_handlers_are_given_back(self):
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) != before[0]
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class TestNonFinite:
    def test_a_bad_loss_is_skipped_named_and_counted(self, make_config, monkeypatch, records):
        spoil(monkeypatch, {4})
        summary = train(make_config(checkpoints={"every_tokens": 32, "keep": 100}))
        assert summary.step == STEPS
        found = records(summary.folder, "nonfinite")
        assert len(found) == 1
        wanted = {"step": 4, "tokens": 128, "tensor": "loss", "micro_batch": 1, "row": 0, "position": 3}
        assert wanted.items() <= found[0].items()
        assert found[0]["stream"]["step"] == 3  # where to start the stream to see the batch again
        steps = [row["step"] for row in records(summary.folder, "step")]
        assert steps == [1, 2, 3, 5, 6, 7, 8, 9, 10]
        assert records(summary.folder, "done")[0]["nonfinite_steps"] == 1
        third, fourth = (
            (_root_of(summary) / f"step-0000000{step}" / "model.safetensors").read_bytes() for step in (3, 4)
        )
        assert third == fourth  # not one bit of the weights moved

    def test_a_bad_gradient_is_named_by_its_parameter(self, make_config, monkeypatch, records):
        spoil(monkeypatch, {2}, what="gradient")
        summary = train(make_config())
        (found,) = records(summary.folder, "nonfinite")
        assert found["tensor"] == "gradient of embedding.weight"
        assert found["micro_batch"] is None

    def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good(self, make_config, monkeypatch, records):
        spoil(monkeypatch, {5, 6, 7, 8})
        config = make_config(max_nonfinite_steps=2)
        with pytest.raises(NumericsError, match=r"step 7: loss is not finite.*3 steps in a row") as error:
            train(config)
        assert "checkpoints/step-00000006" in str(error.value)
        verify_checkpoint(_root(config) / "step-00000006")
        assert [row["step"] for row in records(config.output_dir, "nonfinite")] == [5, 6, 7]

    def test_the_count_survives_a_resume(self, make_config, monkeypatch):
        spoil(monkeypatch, set(range(2, 20)))
        config = make_config(max_nonfinite_steps=5, checkpoints={"every_tokens": 32})
        original = Recorder.event

        def event(self, name, progress, fields, *, note=None):
            original(self, name, progress, fields, note=note)
            if name == "nonfinite" and progress.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Recorder, "event", event)
        assert train(config).step == 5  # four skipped so far
        monkeypatch.setattr(Recorder, "event", original)
        with pytest.raises(NumericsError, match=r"step 7: .* 6 steps in a row"):
            train(config)

    def test_bad_weights_are_never_saved(self, make_config, monkeypatch):
        config = make_config(checkpoints={"every_tokens": 32 * 3})
        original = Recorder.event

        def event(self, name, progress, fields, *, note=None):
            original(self, name, progress, fields, note=note)
            if name == "step" and progress.step == 6:
                with torch.no_grad():
                    holder["model"].blocks[1].mixer.out.weight[0, 0] = float("inf")

        holder = {}
        initialise = step_module.GradientComputer.__init__

        def remember(self, model, *args, **kwargs):
            holder["model"] = model
            initialise(self, model, *args, **kwargs)

        monkeypatch.setattr(Recorder, "event", event)
        monkeypatch.setattr(step_module.GradientComputer, "__init__", remember)
        with pytest.raises(NumericsError, match=r"weight blocks\.1\.mixer\.out\.weight is not finite"):
            train(config)
        assert newest_checkpoint(_root(config)).name == "step-00000003"

    def test_a_bad_validation_loss_ends_the_run(self, make_config, monkeypatch):
        monkeypatch.setattr(Validator, "run", lambda *_, **__: {"validation_loss": float("nan")})
        with pytest.raises(NumericsError, match=r"step 5: validation_loss of the evaluation is not finite"):
            train(make_config())


class TestNoSpace:
    def test_a_full_disk_skips_a_checkpoint_and_training_goes_on(
        self, make_config, monkeypatch, final_bytes, comparable, capsys, records
    ):
        class Full(Disk):
            def write_tensors(self, path, tensors):
                if "step-00000006" in str(path):
                    path.write_bytes(b"part")
                    raise OSError(errno.ENOSPC, "No space left on device")
                super().write_tensors(path, tensors)

        whole, config = make_config(folder="whole"), make_config(folder="full")
        train(whole)
        monkeypatch.setattr(checkpoint, "_disk", Full())
        train(config)
        shown = " ".join(capsys.readouterr().out.split())
        assert "step 6 is not saved" in shown
        assert "step-00000006 could not be written: [Errno 28] No space left" in shown
        assert "Training goes on; 9 more failures end it" in shown
        assert [row["step"] for row in records(config.output_dir, "checkpoint")] == [3, 9, 10]
        assert final_bytes(config.output_dir) == final_bytes(whole.output_dir)
        assert comparable(config.output_dir) == comparable(whole.output_dir)

    def test_a_disk_that_stays_full_ends_the_run_at_its_end_or_after_so_many_failures(
        self, make_config, monkeypatch, capsys
    ):
        class Full(Disk):
            def make_folder(self, path):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint, "_disk", Full())
        config = make_config(checkpoints={"every_tokens": 32})
        with pytest.raises(CheckpointError, match="step-00000010 could not be written"):
            train(config)
        assert capsys.readouterr().out.count("is not saved") == 9
        monkeypatch.setattr(trainer_module, "MAX_FAILED_SAVES", 3)
        with pytest.raises(CheckpointError, match=r"(?s)step-00000003 could not.*3 saves in a row failed"):
            train(config)
        assert not list(_root(config).glob("*"))

    def test_records_wait_while_the_log_cannot_be_written(self, make_config, monkeypatch, comparable, capsys):
        """Half a line reaches the disk; nothing is lost when there is space again, and no checkpoint comes before."""
        whole, config = make_config(folder="whole"), make_config(folder="full")
        train(whole)
        full = {"is": False}
        original, event = MetricsLog._flush, Recorder.event

        class Nearly:
            def __init__(self, file):
                self.file = file

            def write(self, line):
                return self.file.write(line[: len(line) // 2] if full["is"] else line)

            def fileno(self):
                return self.file.fileno()

            def close(self):
                self.file.close()

        def flush(self):
            if not isinstance(self._file, Nearly):
                self._file = Nearly(self._file)
            original(self)

        def watch(self, name, progress, fields, *, note=None):
            full["is"] = 5 <= progress.step <= 7
            event(self, name, progress, fields, note=note)

        monkeypatch.setattr(MetricsLog, "_flush", flush)
        monkeypatch.setattr(Recorder, "event", watch)
        train(config)
        assert comparable(config.output_dir) == comparable(whole.output_dir)
        shown = " ".join(capsys.readouterr().out.split())
        assert "metrics.jsonl cannot be written: only" in shown
        assert "step 6 is not saved" in shown
        saved = [row["step"] for row in read_records(_root(config).parent / "metrics.jsonl") if "folder" in row]
        assert saved == [3, 9, 10]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_log_that_cannot_be_made_durable_is_an_error_of_ours(self, tmp_path):
        log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=-1)
        log._file.close()
        log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
        log.write({"event": "stop", "step": 1})
        with pytest.raises(DataError, match=r"metrics\.jsonl cannot be written: No space left.*1 records wait"):
            log.sync()
        log.close()


class TestRefused:
    """After a refusal nothing stays, and following its advice works."""

    def test_no_validation_text(self, make_config, monkeypatch):
        config = make_config()

        def refuse(*_):
            raise DataError("no validation document")

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "open_validator", refuse)
            with pytest.raises(DataError):
                train(config)
        assert not Path(config.output_dir).exists()
        assert train(make_config(seed=4)).step == STEPS

    def test_a_preset_that_describes_another_data_set(self, make_config):
        """Another split and vocabulary than the data set in output_dir was built with."""
        config = make_config()
        split = config.data.split.model_copy(update={"train": 0.5, "test": 0.3})
        data = config.data.model_copy(update={"split": split})
        with pytest.raises(DataError, match=r"(?s)another recipe.*split\.test 0\.2 -> 0\.3; split\.train 0\.6 -> 0\.5"):
            train(config.model_copy(update={"data": data}))
        assert not Path(config.output_dir).exists()

    def test_a_larger_budget_for_a_finished_run(self, make_config):
        train(make_config(budget_tokens=64))
        with pytest.raises(
            ConfigError, match=r"train\.budget_tokens: 64 -> 96(?s:.*)another output_dir and --init-from"
        ):
            train(make_config(budget_tokens=96))

    def test_a_schedule_that_does_not_fit_names_its_fields(self, make_config):
        schedule = {"kind": "wsd", "warmup_tokens": 64, "decay_tokens": 192}
        fitting = r"train\.schedule\.warmup_tokens=16 train\.schedule\.decay_tokens=48"
        with pytest.raises(
            ConfigError, match=rf"(?s)warmup_tokens 64 and schedule\.decay_tokens 192 need 256.*{fitting}"
        ):
            make_config(budget_tokens=128, schedule=schedule)
        fits = {"kind": "wsd", "warmup_tokens": 16, "decay_tokens": 48}
        assert make_config(budget_tokens=128, schedule=fits).train.budget_tokens == 128

    def test_a_missing_package(self, make_config, monkeypatch):
        config = make_config(logging={"tensorboard": True})

        def absent(name):
            raise ImportError(f"No module named {name!r}", name=name)

        with monkeypatch.context() as patch:
            patch.setattr(metrics.importlib, "import_module", absent)
            with pytest.raises(ConfigError, match="is not installed"):
                train(config)
        assert not Path(config.output_dir).exists()

    def test_a_damaged_newer_checkpoint_does_not_break_the_next_save(self, make_config, records):
        config = make_config(checkpoints={"every_tokens": 32, "keep": 2})
        summary = train(config)
        shutil.rmtree(summary.checkpoint)
        (_root(config) / "step-00000042").mkdir()
        assert train(config).step == STEPS
        assert records(config.output_dir, "done")
        verify_checkpoint(_root(config) / "step-00000010")


class TestTwoWriters:
    def test_the_second_is_refused_before_anything_is_touched(self, make_config):
        config = make_config()
        folder = Path(config.output_dir)
        train(config)
        (folder / "checkpoints" / ".tmp-step-00000003-0123abcd").mkdir()
        (folder / ".tmp-0123abcd-metrics.jsonl").write_text("half a")
        (folder / ".tmp-notes").write_text("mine")
        with own_folder(folder, activity="train"):
            before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
            message = rf"(?s)run is in use by process {os.getpid()} on machine .*kill {os.getpid()}"
            with pytest.raises(InUseError, match=message):
                train(config)
            assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
        assert train(config).step == STEPS
        assert not (folder / "lock").exists()
        assert [path.name for path in folder.rglob(".tmp-*")] == [".tmp-notes"]


def _root(config):
    return Path(config.output_dir) / "checkpoints"


def _root_of(summary):
    return summary.folder / "checkpoints"

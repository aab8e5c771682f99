"""Drills of a training: kills at random moments and before every file operation, second starts, bad disks."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.drills.drill import KILLED, Outcome, fork, wait
from benchmarks.drills.runs import STEPS, committed_step, differences, make_data, make_run, run_once
from nested_lm import checkpoint
from nested_lm.errors import InUseError, NestedLMError
from nested_lm.storage.disk import Disk
from nested_lm.train.metrics import read_records
from nested_lm.train.run_folder import CHECKPOINTS, METRICS

_OPERATIONS = ("make_folder", "write_tensors", "write_bytes", "sync", "rename", "remove_folder")


def kills(folder: Path, trials: int) -> Outcome:
    """SIGKILL at random moments of one run after another; each run is left to end after a few."""
    data, rng, outcome = make_data(folder / "data"), random.Random(1), Outcome()
    whole = make_run(folder / "whole", data)
    began = time.monotonic()
    assert wait(fork(lambda: run_once(whole))) == 0
    duration = time.monotonic() - began
    number = 0
    while outcome.tried < trials:
        number += 1
        config, committed = make_run(folder / f"run{number}", data), 0
        for _ in range(4):
            pid = fork(lambda config=config: run_once(config))
            time.sleep(rng.uniform(0.02, 0.9) * duration)
            os.kill(pid, signal.SIGKILL)
            if (code := wait(pid)) == 0:
                break
            outcome.tried += 1
            outcome.check(code == KILLED, f"run {number} ended with {code}")
            step = committed_step(config)
            outcome.check(step >= committed, f"run {number} lost steps {step + 1} to {committed}")
            committed = step
        outcome.check(wait(fork(lambda config=config: run_once(config))) == 0, f"run {number} did not go on")
        outcome.failures += [f"run {number}: {found}" for found in differences(config, whole)]
    outcome.notes.append(f"{number} runs, {STEPS} steps each")
    return outcome


class _Failing(Disk):
    """Calls `fail(name, method, args)` instead of the n-th operation; counts them in `count`."""

    def __init__(self, number: int, fail: Any) -> None:
        self.count, self.number, self.fail = 0, number, fail

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in _OPERATIONS:
            return method

        def counted(*args: Any) -> Any:
            self.count += 1
            return self.fail(name, method, args) if self.count == self.number else method(*args)

        return counted


def _die(name: str, method: Any, args: Any) -> None:
    """Die before an operation; of a write, half of the file is there."""
    if name.startswith("write"):
        method(*args)
        os.truncate(args[0], args[0].stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(name: str, method: Any, args: Any) -> None:  # noqa: ARG001  (as `_die`)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def crash_points(folder: Path, trials: int) -> Outcome:
    """SIGKILL before the n-th file operation of all checkpoints of a run, n = 1, 2, ... until the run ends."""
    return _at_operations(folder, trials, _die, wanted=KILLED)


def full_disk(folder: Path, trials: int) -> Outcome:
    """ENOSPC at the n-th file operation of all checkpoints of a run: training goes on to the end."""
    return _at_operations(folder, trials, _refuse, wanted=None)


def _at_operations(folder: Path, trials: int, fail: Any, *, wanted: int | None) -> Outcome:
    data, outcome = make_data(folder / "data"), Outcome()
    whole = make_run(folder / "whole", data)
    assert wait(fork(lambda: run_once(whole))) == 0
    number = 0
    while outcome.tried < trials:
        number += 1
        config = make_run(folder / "run", data)
        shutil.rmtree(config.output_dir, ignore_errors=True)
        (folder / "reached").unlink(missing_ok=True)

        def trial(number: int = number, config: Any = config) -> None:
            def failed(*arguments: Any) -> Any:
                (folder / "reached").write_text("")
                return fail(*arguments)

            checkpoint._disk = _Failing(number, failed)
            run_once(config)

        code = wait(fork(trial))
        if not (folder / "reached").exists():
            outcome.notes.append(f"all {number - 1} operations of the run")
            break
        outcome.tried += 1
        # The disk may refuse the last checkpoint: that ends the run, with exit code 2.
        outcome.check(code == wanted if wanted else code in (0, 2), f"operation {number}: exit code {code}")
        outcome.check(wait(fork(lambda config=config: run_once(config))) == 0, f"operation {number}: did not go on")
        outcome.failures += [f"operation {number}: {found}" for found in differences(config, whole)]
    return outcome


def second_starts(folder: Path, trials: int) -> Outcome:
    """The same run started twice at once: one trains to its end, the other is refused and touches nothing."""
    data, outcome = make_data(folder / "data"), Outcome()
    whole = make_run(folder / "whole", data)
    assert wait(fork(lambda: run_once(whole))) == 0
    for number in range(trials):
        config = make_run(folder / "run", data)
        shutil.rmtree(config.output_dir, ignore_errors=True)
        codes = sorted(wait(pid) for pid in [fork(lambda config=config: run_once(config)) for _ in range(2)])
        outcome.tried += 1
        outcome.check(codes == [0, InUseError.exit_code], f"pair {number}: exit codes {codes}")
        outcome.failures += [f"pair {number}: {found}" for found in differences(config, whole)]
        done = [row for row in read_records(Path(config.output_dir) / METRICS) if row["event"] == "done"]
        outcome.check(len(done) == 1, f"pair {number}: {len(done)} records of the end")
    return outcome


def unreadable(folder: Path, trials: int) -> Outcome:
    """EIO, EACCES or a lost file system on one file of the newest checkpoint: the one before is used, bit for bit."""
    data, rng, outcome = make_data(folder / "data"), random.Random(2), Outcome()
    whole = make_run(folder / "whole", data)
    assert wait(fork(lambda: run_once(whole))) == 0
    for number in range(trials):
        config = make_run(folder / "run", data)
        shutil.rmtree(config.output_dir, ignore_errors=True)
        assert wait(fork(lambda config=config: run_once(config))) == 0
        newest = Path(config.output_dir) / CHECKPOINTS / f"step-{STEPS:08d}"
        bad = rng.choice(sorted(newest.iterdir()))
        error = rng.choice([errno.EIO, errno.EACCES, errno.ENOTCONN, errno.ESTALE])

        def trial(config: Any = config, bad: Path = bad, error: int = error) -> None:
            original, inode = Path.open, bad.stat().st_ino  # a file that is written anew lies elsewhere on the disk

            def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
                if self == bad and bad.stat().st_ino == inode and (args[:1] or ("r",))[0].startswith("r"):
                    raise OSError(error, os.strerror(error))
                return original(self, *args, **kwargs)

            Path.open = failing  # type: ignore[method-assign]
            run_once(config)

        outcome.tried += 1
        code = wait(fork(trial))
        outcome.check(code == 0, f"{number}: {errno.errorcode[error]} on {bad.name}: exit code {code}")
        try:
            outcome.failures += [f"{number}: {bad.name}: {found}" for found in differences(config, whole)]
        except NestedLMError as found:
            outcome.failures.append(f"{number}: {found}")
    return outcome

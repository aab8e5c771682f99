"""Steps as Ray tasks (extra `ray`): each runs its command as a process on one node and ends with the campaign."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from nested_lm.config.campaign import Ray
from nested_lm.errors import ConfigError, pip_install
from nested_lm_lab.campaign.process import LOST, SAVE_S, Outcome, end, end_all, tied, wait_for

_NOT_STARTED = 127  # exit code of a command that could not be started, as in a shell


def run_step(command: Sequence[str], *, folder: Path, log: Path, threads: int, patience_s: float = SAVE_S) -> int:
    """What a task does: run the command in the campaign's working directory; its exit code.

    A cancelled task asks the command to stop, which makes a training save, and waits for it. A worker that ends, as all
    do when the campaign is killed, has its command killed by Ray; where the worker itself is killed, the kernel asks
    the command to stop (Linux). The command holds the lock `<log>.lock` while it lives, so an attempt that is still
    saving and the next one never write at once: the next waits `patience_s`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    child: subprocess.Popen[bytes] | None = None
    with log.open("ab") as output, log.with_suffix(".lock").open("wb") as lock:
        try:
            if not _take(lock, patience_s):
                _write(output, f"an earlier attempt of this step still runs; it did not end within {patience_s:.0f} s")
                return LOST
            child = subprocess.Popen(
                tied(command, number=signal.SIGTERM, parent=os.getpid()),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
                process_group=0,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            wait_for(child)
        except OSError as error:
            _write(output, f"cannot start {command[0]} in {folder}: {error.strerror or error}")
            return _NOT_STARTED
        except KeyboardInterrupt:  # this is how Ray cancels a task that runs
            if child is None:
                return -signal.SIGTERM
            end(child)
        return child.wait()


def _take(lock: IO[bytes], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        else:
            return True


def _write(output: IO[bytes], text: str) -> None:
    output.write(f"{text}\n".encode())
    output.flush()


class Task:
    """A step that was handed to Ray. ray: the module."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference
        self._begin = time.monotonic()
        self._asked: signal.Signals | None = None

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs or waits for a node."""
        done, _ = self._ray.wait([self._reference], timeout=0)
        if not done:
            return None
        return Outcome(self._exit_code(), time.monotonic() - self._begin)

    def stop(self, number: signal.Signals) -> None:
        """Cancel it: the command saves and ends; with SIGKILL at once."""
        self._asked = number
        self._ray.cancel(self._reference, force=number == signal.SIGKILL)

    def _exit_code(self) -> int:
        """Exit code of the command; 255 for a task that lost its node or was cancelled by somebody else."""
        try:
            return int(self._ray.get(self._reference))
        except self._ray.exceptions.TaskCancelledError:  # before it began, or killed with its worker
            return LOST if self._asked is None else -self._asked
        except self._ray.exceptions.RayError:
            return LOST


class Tasks:
    """Hands steps to Ray: to a cluster, or to one of this machine that lives as long as this object is open.

    Args:
        config: where Ray is and what each step asks of it.
        folder: of the campaign, on a file system that the nodes share.

    Raises:
        ConfigError: ray is not installed, cannot be reached, or has no node that is large enough for a step.
    """

    def __init__(self, config: Ray, folder: Path) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ConfigError(
                f"runner ray needs ray, which is not installed\n  Install the extra `ray`: {pip_install('ray')}"
            ) from error
        self._ray: Any = ray
        self._logs = folder.absolute() / "logs"
        self._threads = max(1, config.cpus_per_step // config.processes)
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(ray, config.address)
        try:
            _refuse_small(ray.nodes(), config)
        except ConfigError:
            self._leave()
            raise
        # A step that lost its node is tried again by the next call of the campaign, with a line in the ledger for each.
        wanted = {"num_cpus": config.cpus_per_step, "num_gpus": config.gpus_per_step, "max_retries": 0}
        self._run: Any = ray.remote(**wanted)(run_step)
        self._started: dict[str, Task] = {}

    def start(self, step: str, command: Sequence[str]) -> Task:
        """Hand a step to Ray."""
        run = self._run.options(name=step)
        log = self._logs / f"{step}.log"
        reference = run.remote(list(command), folder=Path.cwd(), log=log, threads=self._threads)
        self._started[step] = Task(self._ray, reference)
        return self._started[step]

    def forget(self, step: str) -> None:
        """Drop a task that has ended."""
        self._started.pop(step, None)

    def close(self) -> None:
        """Cancel the tasks that still run and wait until they saved; leave the cluster, or end our own Ray."""
        end_all(self._started.values())
        self._leave()

    def _leave(self) -> None:
        if self._is_ours:
            self._ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """Join a cluster or start one, keeping our signal handlers, which Ray replaces."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in watched}
    here = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(**here, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "start on this machine" if address is None else f"be reached at {address!r}"
        raise ConfigError(
            f"runner ray: Ray cannot {where}: {error}\n"
            "  Name a cluster (runner.address=HOST:PORT, or auto on one of its nodes), or null for a Ray of this "
            "machine; `ray status` says what runs."
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _refuse_small(nodes: Sequence[Any], config: Ray) -> None:
    """Refuse steps that no node can take: Ray would let them wait forever without a word."""
    sizes = [node["Resources"] for node in nodes if node["Alive"]]
    for size in sizes:
        if size.get("CPU", 0) >= config.cpus_per_step and size.get("GPU", 0) >= config.gpus_per_step:
            return
    found = "; ".join(f"{size.get('CPU', 0):g} CPUs, {size.get('GPU', 0):g} GPUs" for size in sizes) or "none"
    raise ConfigError(
        f"runner ray: no node has the {config.cpus_per_step} CPUs and {config.gpus_per_step:g} GPUs of a step; nodes: "
        f"{found}\n  Lower runner.cpus_per_step or runner.gpus_per_step, or add a node before the campaign starts."
    )

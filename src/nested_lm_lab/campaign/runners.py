"""Where steps run: as processes of this machine, shared by torchrun's processes, as Slurm jobs or as Ray tasks."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from nested_lm.config.campaign import CampaignConfig, Local, Ray, Slurm, Torchrun
from nested_lm_lab.campaign.lock import CampaignLock
from nested_lm_lab.campaign.process import Child, Running, end_all, tied
from nested_lm_lab.campaign.steps import PlannedStep


class Runner(Protocol):
    """Starts steps. outlives: what runs goes on when the campaign is told to stop."""

    parallel: int
    outlives: bool

    def start(self, step: PlannedStep, command: Sequence[str], *, before: Callable[[], None]) -> Running:
        """Start a step, or find it running. Raises CampaignError when that is impossible.

        before: called when nothing writes to the step's folder any more, before the step starts; not for a step that
            is found running.
        """

    def ended(self, step: PlannedStep) -> None:
        """Forget a step whose end is in the ledger."""

    def close(self) -> None:
        """Give back what it holds. What still runs is asked to save and awaited, unless it outlives the campaign."""


class LocalRunner:
    """Steps are child processes, which inherit the campaign's lock: an orphan of a killed campaign is noticed."""

    outlives = False

    def __init__(self, config: Local | Torchrun, folder: Path, lock: CampaignLock) -> None:
        self.parallel = config.parallel
        self._folder = folder
        self._lock = lock
        self._children: dict[str, Child] = {}
        self._environment = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}

    def start(self, step: PlannedStep, command: Sequence[str], *, before: Callable[[], None]) -> Running:
        """Start the process and note it in the lock."""
        before()
        child = Child(
            command,
            log=log_of(self._folder, step.id),
            inherit=self._lock.descriptor,
            terminal=self.parallel == 1,
            environment=self._environment,
        )
        self._children[step.id] = child
        self._lock.note_step(step.id, child.pid)
        return child

    def ended(self, step: PlannedStep) -> None:
        """Take the process out of the lock."""
        del self._children[step.id]
        self._lock.forget_step(step.id)

    def close(self) -> None:
        """After an error processes may still run."""
        end_all(self._children.values())


class SlurmRunner:
    """Steps are Slurm jobs; reports, which take seconds and read what the jobs wrote, are local processes."""

    outlives = True

    def __init__(self, config: Slurm, folder: Path, lock: CampaignLock, *, cluster: str = "slurm") -> None:
        from nested_lm_lab.campaign.slurm import JobQueue

        self.parallel = config.parallel
        self._here = LocalRunner(Local(kind="local"), folder, lock)
        self._queue = JobQueue(config, folder, cluster=cluster)

    def start(self, step: PlannedStep, command: Sequence[str], *, before: Callable[[], None]) -> Running:
        """Submit the step, or find the job that an earlier call of the campaign submitted."""
        if step.kind == "report":
            return self._here.start(step, command, before=before)
        return self._queue.start(step.id, step.fingerprint, command, before=before)

    def ended(self, step: PlannedStep) -> None:
        """Forget the job."""
        if step.kind == "report":
            self._here.ended(step)
        else:
            self._queue.forget(step.id)

    def close(self) -> None:
        """Jobs stay in the queue; a report that runs here ends."""
        self._here.close()


class RayRunner:
    """Steps are Ray tasks, which end with the campaign; reports are local processes, as with Slurm."""

    outlives = False

    def __init__(self, config: Ray, folder: Path, lock: CampaignLock) -> None:
        from nested_lm_lab.campaign.ray_tasks import Tasks

        self.parallel = config.parallel
        self._here = LocalRunner(Local(kind="local"), folder, lock)
        self._tasks = Tasks(config, folder)

    def start(self, step: PlannedStep, command: Sequence[str], *, before: Callable[[], None]) -> Running:
        """Hand the step to Ray."""
        if step.kind == "report":
            return self._here.start(step, command, before=before)
        before()
        return self._tasks.start(step.id, command)

    def ended(self, step: PlannedStep) -> None:
        """Forget the task."""
        if step.kind == "report":
            self._here.ended(step)
        else:
            self._tasks.forget(step.id)

    def close(self) -> None:
        """Leave Ray, or end it where the campaign started it."""
        try:
            self._here.close()
        finally:
            self._tasks.close()


def open_runner(config: CampaignConfig, folder: Path, lock: CampaignLock) -> Runner:
    """The runner of a campaign. Raises ConfigError when it needs a package that is not installed."""
    if isinstance(config.runner, Slurm):
        return SlurmRunner(config.runner, folder, lock)
    if isinstance(config.runner, Ray):
        return RayRunner(config.runner, folder, lock)
    return LocalRunner(config.runner, folder, lock)


def command_of(step: PlannedStep, prefix: Sequence[str], config: CampaignConfig) -> tuple[str, ...]:
    """The whole command line of a step; a training that several processes share is started by torchrun.

    Its processes are in sessions of their own and would train on when torchrun's agent is killed, without the lock of
    the campaign: they die with it.
    """
    command = (*prefix, *step.arguments)
    if step.kind != "train" or config.runner.processes == 1:
        return command
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.runner.processes}")
    return (sys.executable, *launcher, "--no-python", *tied(command, number=signal.SIGKILL, parent=None))


def log_of(folder: Path, step: str) -> Path:
    """Where a step's output goes when it is not on a terminal."""
    return folder / "logs" / f"{step}.log"

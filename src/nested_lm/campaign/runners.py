"""Where steps run: as processes of this machine, shared by torchrun's processes, as Slurm jobs or as Ray tasks."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nested_lm.campaign.lock import CampaignLock
from nested_lm.campaign.process import Child, Running
from nested_lm.campaign.steps import PlannedStep
from nested_lm.config.campaign import CampaignConfig, Local, Ray, Slurm, Torchrun


class Runner(Protocol):
    """Starts steps. outlives: what runs goes on when the campaign is told to stop."""

    parallel: int
    outlives: bool

    def start(self, step: PlannedStep, command: Sequence[str]) -> Running:
        """Start a step, or find it running. Raises CampaignError when that is impossible."""

    def ended(self, step: PlannedStep) -> None:
        """Forget a step whose end is in the ledger."""

    def close(self) -> None:
        """Give back what it holds. Nothing of its own runs any more, unless it outlives the campaign."""


class LocalRunner:
    """Steps are child processes, which inherit the campaign's lock: an orphan of a killed campaign is noticed."""

    outlives = False

    def __init__(self, config: Local | Torchrun, folder: Path, lock: CampaignLock) -> None:
        self.parallel = config.parallel
        self._folder = folder
        self._lock = lock
        self._environment = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}

    def start(self, step: PlannedStep, command: Sequence[str]) -> Running:
        """Start the process and note it in the lock."""
        child = Child(
            command,
            log=log_of(self._folder, step.id),
            inherit=self._lock.descriptor,
            terminal=self.parallel == 1,
            environment=self._environment,
        )
        self._lock.note_step(step.id, child.pid)
        return child

    def ended(self, step: PlannedStep) -> None:
        """Take the process out of the lock."""
        self._lock.forget_step(step.id)

    def close(self) -> None:
        """Nothing is held."""


class SlurmRunner:
    """Steps are Slurm jobs; reports, which take seconds and read what the jobs wrote, are local processes."""

    outlives = True

    def __init__(self, config: Slurm, folder: Path, lock: CampaignLock, *, cluster: str = "slurm") -> None:
        from nested_lm.campaign.slurm import JobQueue

        self.parallel = config.parallel
        self._here = LocalRunner(Local(kind="local"), folder, lock)
        self._queue = JobQueue(config, folder, cluster=cluster)

    def start(self, step: PlannedStep, command: Sequence[str]) -> Running:
        """Submit the step, or find the job that an earlier call of the campaign submitted."""
        if step.kind == "report":
            return self._here.start(step, command)
        return self._queue.start(step.id, step.fingerprint, command)

    def ended(self, step: PlannedStep) -> None:
        """Forget the job."""
        if step.kind == "report":
            self._here.ended(step)
        else:
            self._queue.forget(step.id)

    def close(self) -> None:
        """Jobs stay in the queue."""


class RayRunner:
    """Steps are Ray tasks, which end with the campaign; reports are local processes, as with Slurm."""

    outlives = False

    def __init__(self, config: Ray, folder: Path, lock: CampaignLock) -> None:
        from nested_lm.campaign.ray_tasks import Tasks

        self.parallel = config.parallel
        self._here = LocalRunner(Local(kind="local"), folder, lock)
        self._tasks = Tasks(config, folder)

    def start(self, step: PlannedStep, command: Sequence[str]) -> Running:
        """Hand the step to Ray."""
        return self._here.start(step, command) if step.kind == "report" else self._tasks.start(step.id, command)

    def ended(self, step: PlannedStep) -> None:
        """Tasks leave nothing behind."""
        if step.kind == "report":
            self._here.ended(step)

    def close(self) -> None:
        """Leave Ray, or end it where the campaign started it."""
        self._tasks.close()


def open_runner(config: CampaignConfig, folder: Path, lock: CampaignLock) -> Runner:
    """The runner of a campaign. Raises ConfigError when it needs a package that is not installed."""
    if isinstance(config.runner, Slurm):
        return SlurmRunner(config.runner, folder, lock)
    if isinstance(config.runner, Ray):
        return RayRunner(config.runner, folder, lock)
    return LocalRunner(config.runner, folder, lock)


def command_of(step: PlannedStep, prefix: Sequence[str], config: CampaignConfig) -> tuple[str, ...]:
    """The whole command line of a step; a training that several processes share is started by torchrun."""
    command = (*prefix, *step.arguments)
    if step.kind != "train" or config.runner.processes == 1:
        return command
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.runner.processes}")
    return (sys.executable, *launcher, "--no-python", *command)


def log_of(folder: Path, step: str) -> Path:
    """Where a step's output goes when it is not on a terminal."""
    return folder / "logs" / f"{step}.log"

"""Steps as Slurm jobs through submitit (extra `slurm`), found again after the campaign itself was killed."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nested_lm.config.campaign import Slurm
from nested_lm.errors import CampaignError, ConfigError, pip_install
from nested_lm.storage.atomic import write_atomically
from nested_lm_lab.campaign.process import LOST, Outcome, end, wait_for


class StepJob:
    """What a job does: run the step's command. Picklable.

    When the job's time ends or it is preempted, submitit calls `checkpoint`: the command is asked to stop, which makes
    a training save, and the job is queued again; the same command then continues.
    """

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        self._command, self._folder, self._log = list(command), folder, log
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the command in the campaign's working directory; its exit code."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                wait_for(self._child)
            finally:
                self._end()
            return self._child.returncode

    def checkpoint(self) -> Any:
        """Let the command save, and say what to submit again."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(StepJob(self._command, self._folder, self._log))

    def _end(self) -> None:
        if self._child is not None:
            end(self._child)


class Job:
    """A submitted step. It goes on when the campaign is told to stop; the next call of the campaign finds it."""

    def __init__(self, job: Any, *, poll_s: float) -> None:
        self._job, self._poll_s = job, poll_s
        self._begin = time.monotonic()
        self._asked = 0.0

    def poll(self) -> Outcome | None:
        """How it ended. Asks at most every `poll_s` seconds: each look is a file system or scheduler call."""
        now = time.monotonic()
        if now - self._asked < self._poll_s:
            return None
        self._asked = now
        if not self._job.done():
            return None
        return Outcome(_exit_code(self._job), now - self._begin)

    def stop(self, number: signal.Signals) -> None:
        """Leave it alone, but cancel it when everything is to be killed."""
        if number == signal.SIGKILL:
            self._job.cancel(check=False)


class JobQueue:
    """Submits steps and remembers their jobs in `<folder>/jobs/<step>.json` until their end is in the ledger.

    Args:
        config: what each job asks of Slurm.
        folder: of the campaign, on a file system that the nodes share.
        cluster: submitit's name of the scheduler.
        poll_s: time between two looks at a job.

    Raises:
        ConfigError: submitit is not installed, or this machine cannot submit.
    """

    def __init__(self, config: Slurm, folder: Path, *, cluster: str = "slurm", poll_s: float = 5.0) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "runner slurm needs submitit, which is not installed\n"
                f"  Install the extra `slurm`: {pip_install('slurm')}"
            ) from error
        self._folder = folder.absolute() / "jobs"
        self._logs = folder.absolute() / "logs"
        self._poll_s = poll_s
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder / "submitit", cluster=cluster)
        except RuntimeError as error:
            raise ConfigError(
                f"runner slurm cannot submit jobs from this machine: {error}\n"
                "  Start the campaign on a login node, or use runner local: runner={kind: local}"
            ) from error
        wanted: dict[str, object] = {
            "slurm_partition": config.partition,
            "slurm_account": config.account,
            "slurm_qos": config.qos,
        }
        wanted |= {"mem_gb": config.memory_gb, "gpus_per_node": config.gpus or None}
        self._executor.update_parameters(
            timeout_min=config.timeout_minutes,
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=config.cpus,
            **{key: value for key, value in wanted.items() if value is not None},
        )

    def start(self, step: str, fingerprint: str, command: Sequence[str], *, before: Callable[[], None]) -> Job:
        """Submit a step, or find the job of an earlier call. A job with other settings is cancelled first.

        before: called when no job of the step runs any more, before one is submitted.

        Raises CampaignError when an earlier call was killed while it submitted this step, so that nobody knows the job.
        """
        found = self._read(step)
        if found is not None and found["job_id"] is None:
            raise CampaignError(
                f"the campaign was killed while it submitted step {step}; a job called {found['name']!r} may exist\n"
                f"  Cancel it if `squeue --me` shows it, then delete {self._path(step)} and start again."
            )
        if found is not None:
            job = self._executor.job_class(self._folder / "submitit", found["job_id"])
            if found["fingerprint"] == fingerprint:
                return Job(job, poll_s=self._poll_s)
            job.cancel(check=False)
            _await_end(job, step)
            self.forget(step)
        before()
        name = f"{step}-{fingerprint[:8]}"
        self._write(step, {"job_id": None, "fingerprint": fingerprint, "name": name})
        self._executor.update_parameters(name=name)
        job = self._executor.submit(StepJob(command, Path.cwd(), self._logs / f"{step}.log"))
        self._write(step, {"job_id": job.job_id, "fingerprint": fingerprint, "name": name})
        return Job(job, poll_s=self._poll_s)

    def forget(self, step: str) -> None:
        """Drop the record of a job that has ended."""
        self._path(step).unlink(missing_ok=True)

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}.json"

    def _read(self, step: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(self._path(step).read_bytes())
            if not all(isinstance(record[name], str) for name in ("fingerprint", "name")):
                raise ValueError("a field is no text")
            if not isinstance(record["job_id"], str | None):
                raise ValueError("job_id is no text")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CampaignError(
                f"{self._path(step)} does not say which job runs step {step}: {error}\n"
                "  Look at `squeue --me`, cancel its job if there is one, delete the file and start again."
            ) from error
        return record

    def _write(self, step: str, record: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(step), json.dumps(record).encode())


def _exit_code(job: Any) -> int:
    """Exit code of the command; 255 for a job that was cancelled, lost its node or failed outside the command."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return int(job.result())
    except (FailedJobError, UncompletedJobError):
        return LOST


def _await_end(job: Any, step: str, *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not job.done():
        if time.monotonic() > deadline:
            raise CampaignError(
                f"job {job.job_id} of step {step}, whose settings have changed, was cancelled and still runs\n"
                f"  Two jobs would write into one folder. Stop it with `scancel {job.job_id}` and start again."
            )
        time.sleep(0.5)

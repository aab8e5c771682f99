"""Runs a campaign: a subprocess of the same command line a step; finished ones are kept."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nested_lm.config.campaign import CampaignConfig
from nested_lm.errors import CampaignError, CampaignInterruptedError
from nested_lm_lab.campaign.cost import estimate
from nested_lm_lab.campaign.ledger import Attempt, Ledger, now
from nested_lm_lab.campaign.lock import CampaignLock
from nested_lm_lab.campaign.process import Outcome, Running, SignalRelay
from nested_lm_lab.campaign.runners import Runner, command_of, open_runner
from nested_lm_lab.campaign.steps import PlannedStep, describe, plan_steps
from nested_lm_lab.report.manifest import write_manifest

REPORT_NAMES = ("report.html", "report.md")
_POLL_S = 0.05
_SHOWN_NEEDS = 6


class State(NamedTuple):
    """Whether a step has to run, and why in words."""

    is_done: bool
    reason: str


def run_campaign(
    config: CampaignConfig,
    *,
    dry_run: bool = False,
    prefix: Sequence[str] = (sys.executable, "-m", "nested_lm"),
    say: Callable[[str], None] | None = None,
) -> Path:
    """Run every step that is not done yet, in the order of the preset. Returns the campaign folder.

    A step that succeeded with the same fingerprint is kept. A failed step stops the steps that need it; the
    others go on. Stopped at any point, the next call continues.

    Args:
        config: the campaign.
        dry_run: say the steps, their commands and states; run and write nothing.
        prefix: the command line that steps are run with.
        say: gets every line of text; standard output by default.

    Raises:
        ConfigError: a step's preset cannot be resolved.
        CampaignError: a step failed, the campaign was interrupted, or another process runs it.
    """
    say = say or _print
    steps = plan_steps(config)
    folder = Path(config.output_dir)
    if dry_run:
        _describe(config, steps, Ledger(folder / "ledger.jsonl"), prefix, say)
        return folder
    _make(folder)
    with CampaignLock(folder, say=say) as lock, SignalRelay(say) as relay:
        write_manifest(folder, describe(config, steps))
        _say_left_out(config, say)
        runner = open_runner(config, folder, lock)
        campaign = _Campaign(config, steps, prefix=prefix, runner=runner, relay=relay, say=say)
        try:
            campaign.run()
        except BaseException:
            campaign.give_up()
            raise
        finally:
            runner.close()
    if relay.received is not None:
        raise CampaignInterruptedError(
            f"campaign {config.name!r} was interrupted by {relay.received.name}; nothing saved is lost\n"
            "  Start it again with the same command: finished steps are kept, the running one continues.",
            signal_number=relay.received.value,
        )
    if campaign.failed:
        raise CampaignError(_explain(config, steps, campaign.failed, folder))
    for name in REPORT_NAMES:
        if (folder / name).exists():
            say(f"{name:<12} {(folder / name).absolute()}")
    return folder


def state_of(step: PlannedStep, steps: Sequence[PlannedStep], ledger: Ledger) -> State:
    """Say whether a step is done: it succeeded with these settings, after all it needs, and left output."""
    last = ledger.last(step.id)
    if last is None:
        return State(False, "not run yet" if ledger.fingerprint(step.id) is None else "its end is unknown, continues")
    if last.interrupted:
        return State(False, "interrupted, continues")
    if last.exit_code != 0:
        return State(False, f"failed before, exit code {last.exit_code}")
    if last.fingerprint != step.fingerprint or ledger.fingerprint(step.id) != step.fingerprint:
        return State(False, "settings changed, runs again")
    if not step.has_output():
        return State(False, f"its output in {step.folder} is missing or not finished, continues")
    own = ledger.order_of_success(step.id)
    by_id = {other.id: other for other in steps}
    for need in step.needs:
        order = ledger.order_of_success(need)
        if order is None or own is None or order > own:
            return State(False, f"{need} ran again since, runs again")
        if not (before := state_of(by_id[need], steps, ledger)).is_done:
            return State(False, f"{need} is to run again ({before.reason})")
    return State(True, f"done in {_duration(last.seconds)}, kept")


class _Campaign:
    """One pass over the steps: starts those that are ready, records those that end."""

    def __init__(
        self,
        config: CampaignConfig,
        steps: Sequence[PlannedStep],
        *,
        prefix: Sequence[str],
        runner: Runner,
        relay: SignalRelay,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._steps, self._prefix = config, steps, prefix
        self._runner, self._relay, self._say = runner, relay, say
        self._ledger = Ledger(Path(config.output_dir) / "ledger.jsonl")
        self._labels = {step.id: f"[{number}/{len(steps)}] {step.id}" for number, step in enumerate(steps, start=1)}
        self._waiting = list(steps)
        self._running: dict[str, _Started] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Until nothing is left to start and nothing runs. Told to stop, start nothing more and await what runs."""
        while True:
            if self._relay.received is None:
                self._start_ready()
            elif self._runner.outlives:
                self._leave()
                return
            if not self._running:
                return
            time.sleep(_POLL_S)
            for id, started in list(self._running.items()):
                if (outcome := started.running.poll()) is not None:
                    del self._running[id]
                    self._relay.detach(started.running)
                    self._record(started, outcome)

    def _start_ready(self) -> None:
        """Decide on every step whose needs are settled, in the order of the preset."""
        progress = True
        while progress and self._relay.received is None:
            progress = False
            for step in list(self._waiting):
                if len(self._running) >= self._runner.parallel or self._relay.received is not None:
                    return
                unsettled = {*self._running, *(other.id for other in self._waiting)}
                if unsettled.isdisjoint(step.needs):
                    self._waiting.remove(step)
                    self._decide(step)
                    progress = True

    def _decide(self, step: PlannedStep) -> None:
        """Keep a step, give it up, or start it."""
        label = self._labels[step.id]
        if missing := [need for need in step.needs if need in self.failed]:
            self.failed[step.id] = f"not run: it needs {', '.join(missing)}"
            self._say(f"{label}: {self.failed[step.id]}")
            return
        state = state_of(step, self._steps, self._ledger)
        if state.is_done:
            self._say(f"{label}: {state.reason}")
            return
        command = command_of(step, self._prefix, self._config)
        self._say(f"{label}: {state.reason}\n  {shlex.join(command)}")
        started = now()
        running = self._runner.start(step, command, before=lambda: self._prepare(step))
        self._running[step.id] = _Started(step, command, started, running)
        self._relay.attach(running)

    def _prepare(self, step: PlannedStep) -> None:
        """Make room for the output of a step. The ledger has its settings before the step can write anything."""
        _set_aside(step, self._ledger, self._say)
        self._ledger.begin(step.id, step.fingerprint)

    def _record(self, started: "_Started", outcome: Outcome) -> None:
        step = started.step
        self._ledger.append(
            Attempt(
                step=step.id,
                command=started.command,
                fingerprint=step.fingerprint,
                started=started.at,
                ended=now(),
                exit_code=outcome.exit_code,
                seconds=round(outcome.seconds, 3),
                interrupted=self._relay.received is not None,
            )
        )
        self._runner.ended(step)
        if self._relay.received is not None:
            return
        if outcome.exit_code != 0:
            self.failed[step.id] = _ending(outcome.exit_code, outcome.seconds)
        elif not step.has_output():
            self.failed[step.id] = f"stopped before its end: no finished output in {step.folder}"
        self._say(f"{self._labels[step.id]}: {self.failed.get(step.id) or f'done in {_duration(outcome.seconds)}'}")

    def give_up(self) -> None:
        """Say what happens to the steps that run when the campaign itself cannot go on."""
        if self._runner.outlives:
            self._leave()
        elif self._running:
            self._say(f"the campaign cannot go on; asking what runs to save and stop: {', '.join(self._running)}")

    def _leave(self) -> None:
        """Let jobs of a cluster go on: the next call of the campaign waits for them."""
        if self._running:
            self._say(f"these go on without the campaign: {', '.join(self._running)}; start it again to wait for them")


class _Started(NamedTuple):
    step: PlannedStep
    command: tuple[str, ...]
    at: str
    running: Running


def _set_aside(step: PlannedStep, ledger: Ledger, say: Callable[[str], None]) -> None:
    """Rename the output of a step whose settings changed: the stages refuse to mix two configurations in a folder.

    Raises CampaignError when it cannot be renamed.
    """
    fingerprint = ledger.fingerprint(step.id)
    if step.kind not in ("data", "train") or fingerprint is None or fingerprint == step.fingerprint:
        return
    if step.folder.exists():
        aside = step.folder.with_name(f"{step.folder.name}.old-{fingerprint[:8]}")
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{step.folder.name}.old-{fingerprint[:8]}-{number}")
        try:
            step.folder.rename(aside)
        except OSError as error:
            raise CampaignError(
                f"{step.folder} holds output of step {step.id} with other settings and cannot be renamed to "
                f"{aside.name}: {error.strerror or error}\n  Move or delete it, and start again."
            ) from error
        say(f"  its earlier output, of other settings, is now {aside}; delete it when you no longer need it")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CampaignError(
            f"output_dir {folder} cannot be made: {error.strerror or error}\n  Choose a folder this user may write to."
        ) from error


def _describe(
    config: CampaignConfig,
    steps: Sequence[PlannedStep],
    ledger: Ledger,
    prefix: Sequence[str],
    say: Callable[[str], None],
) -> None:
    to_do = []
    for number, step in enumerate(steps, start=1):
        state = state_of(step, steps, ledger)
        if not state.is_done:
            to_do.append(step)
        needs = f" (after {', '.join(step.needs)})" if 0 < len(step.needs) <= _SHOWN_NEEDS else ""
        needs = needs or (f" (after {len(step.needs)} steps)" if step.needs else "")
        say(f"[{number}/{len(steps)}] {step.id}{needs}: {state.reason}")
        say(f"  {shlex.join(command_of(step, prefix, config))}")
    _say_left_out(config, say)
    for line in estimate(config, to_do):
        say(line)


def _say_left_out(config: CampaignConfig, say: Callable[[str], None]) -> None:
    for id, repair in config.left_out().items():
        say(f"left out: {id}; it needs {repair}")


def _explain(config: CampaignConfig, steps: Sequence[PlannedStep], failed: dict[str, str], folder: Path) -> str:
    lines = [f"campaign {config.name!r}: {len(failed)} of {len(steps)} steps did not succeed"]
    lines += [f"  {step}: {reason}" for step, reason in failed.items()]
    for step in steps:
        log = folder / "logs" / f"{step.id}.log"
        if step.id in failed and log.exists() and not failed[step.id].startswith("not run"):
            lines.append(f"  what {step.id} said: {log}")
    lines.append("  Mend the cause and start the same command again: finished steps are kept.")
    if any(step.kind == "report" and step.id in failed for step in steps):
        lines.append(f"  A report of what there is: nested-lm report {shlex.quote(config.output_dir)}")
    return "\n".join(lines)


def _ending(exit_code: int, seconds: float) -> str:
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"failed with exit code {exit_code}"
    return f"{how} after {_duration(seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _print(text: str) -> None:
    print(text, flush=True)

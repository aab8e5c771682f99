"""Runs a campaign: a subprocess of the same command line a step; finished ones are kept."""

import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from nested_lm.campaign.ledger import Attempt, Ledger
from nested_lm.campaign.lock import CampaignLock
from nested_lm.campaign.process import SignalRelay, run_child
from nested_lm.campaign.steps import PlannedStep, describe, plan_steps
from nested_lm.config.campaign import CampaignConfig
from nested_lm.errors import CampaignError, CampaignInterruptedError
from nested_lm.report.manifest import write_manifest

REPORT_NAMES = ("report.html", "report.md")


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
        _describe(steps, Ledger(folder / "ledger.jsonl"), prefix, say)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with CampaignLock(folder, say=say) as lock, SignalRelay(say) as relay:
        write_manifest(folder, describe(config, steps))
        failed = _run_steps(steps, Ledger(folder / "ledger.jsonl"), folder, prefix, lock, relay, say)
    if relay.received is not None:
        raise CampaignInterruptedError(
            f"campaign {config.name!r} was interrupted by {relay.received.name}; nothing saved is lost\n"
            "  Start it again with the same command: finished steps are kept, the running one continues.",
            signal_number=relay.received.value,
        )
    if failed:
        raise CampaignError(_explain(config, steps, failed, folder))
    for name in REPORT_NAMES:
        if (folder / name).exists():
            say(f"{name:<12} {(folder / name).absolute()}")
    return folder


def state_of(step: PlannedStep, steps: Sequence[PlannedStep], ledger: Ledger) -> State:
    """Say whether a step is done: it succeeded with these settings, after all it needs, and left output."""
    last = ledger.last(step.id)
    if last is None:
        return State(False, "not run yet")
    if last.interrupted:
        return State(False, "interrupted, continues")
    if last.exit_code != 0:
        return State(False, f"failed before, exit code {last.exit_code}")
    if last.fingerprint != step.fingerprint:
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


def _run_steps(
    steps: Sequence[PlannedStep],
    ledger: Ledger,
    folder: Path,
    prefix: Sequence[str],
    lock: CampaignLock,
    relay: SignalRelay,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Run what is to do. Returns the steps that did not succeed and why."""
    failed: dict[str, str] = {}
    for number, step in enumerate(steps, start=1):
        if relay.received is not None:
            break
        label = f"[{number}/{len(steps)}] {step.id}"
        if missing := [need for need in step.needs if need in failed]:
            failed[step.id] = f"not run: it needs {', '.join(missing)}"
            say(f"{label}: {failed[step.id]}")
            continue
        state = state_of(step, steps, ledger)
        if state.is_done:
            say(f"{label}: {state.reason}")
            continue
        command = (*prefix, *step.arguments)
        say(f"{label}: {state.reason}\n  {shlex.join(command)}")
        _set_aside(step, ledger, say)
        started = _now()
        outcome = run_child(
            command,
            relay=relay,
            log=folder / "logs" / f"{step.id}.log",
            inherit=lock.descriptor,
            started=lambda pid, step=step: lock.note_step(step.id, pid),  # type: ignore[misc]
        )
        ledger.append(
            Attempt(
                step=step.id,
                command=command,
                fingerprint=step.fingerprint,
                started=started,
                ended=_now(),
                exit_code=outcome.exit_code,
                seconds=round(outcome.seconds, 3),
                interrupted=relay.received is not None,
            )
        )
        if relay.received is not None:
            break
        if outcome.exit_code != 0:
            failed[step.id] = _ending(outcome.exit_code, outcome.seconds)
        elif not step.has_output():
            failed[step.id] = f"stopped before its end: no finished output in {step.folder}"
        say(f"{label}: {failed.get(step.id) or f'done in {_duration(outcome.seconds)}'}")
    return failed


def _set_aside(step: PlannedStep, ledger: Ledger, say: Callable[[str], None]) -> None:
    """Rename the output of a step whose settings changed: the stages refuse to mix two configurations in a folder."""
    last = ledger.last(step.id)
    if step.kind not in ("data", "train") or last is None or last.fingerprint == step.fingerprint:
        return
    if step.folder.exists():
        aside = step.folder.with_name(f"{step.folder.name}.old-{last.fingerprint[:8]}")
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{step.folder.name}.old-{last.fingerprint[:8]}-{number}")
        step.folder.rename(aside)
        say(f"  its earlier output, of other settings, is now {aside}; delete it when you no longer need it")


def _describe(steps: Sequence[PlannedStep], ledger: Ledger, prefix: Sequence[str], say: Callable[[str], None]) -> None:
    for number, step in enumerate(steps, start=1):
        state = state_of(step, steps, ledger)
        needs = f" (after {', '.join(step.needs)})" if step.needs else ""
        say(f"[{number}/{len(steps)}] {step.id}{needs}: {state.reason}")
        say(f"  {shlex.join((*prefix, *step.arguments))}")


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _print(text: str) -> None:
    print(text, flush=True)

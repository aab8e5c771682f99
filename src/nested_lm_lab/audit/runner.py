"""Runs the checks on a model, one after the other, and shows what they find."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nested_lm.errors import ConfigError
from nested_lm_lab.audit.ablations import ablations
from nested_lm_lab.audit.clocks import clock_a, clock_b
from nested_lm_lab.audit.finding import Finding, broken
from nested_lm_lab.audit.gradients import gradients
from nested_lm_lab.audit.memories import long_stream, ranges, reference
from nested_lm_lab.audit.optimizers import optimizers
from nested_lm_lab.audit.report import AuditFile, Row, make_file, make_row
from nested_lm_lab.audit.streams import causality, isolation, split
from nested_lm_lab.audit.subject import Subject
from nested_lm_lab.audit.training import initial_loss, resume, seeds


class Check(NamedTuple):
    """One check: what it asks, and the function that answers."""

    question: str
    run: Callable[[Subject], Iterable[Finding]]


CHECKS: dict[str, Check] = {
    "reference": Check("Does the fast form equal the token-by-token reference?", reference),
    "causality": Check("Does no output depend on a later token?", causality),
    "split": Check("Does a stream cut anywhere equal one pass?", split),
    "isolation": Check("Do rows and packed documents not see each other?", isolation),
    "ranges": Check("Are keys unit vectors, gates in range, padding without effect?", ranges),
    "gradients": Check("Do outer gradients pass through the writes, and are they the derivative?", gradients),
    "ablations": Check("Can each mechanism be switched off?", ablations),
    "clock_a": Check("Do levels change on their training clock, by the sum of gradients?", clock_a),
    "clock_b": Check("Do levels change on their in-context clock, by the sum of gradients?", clock_b),
    "optimizers": Check("Are the optimizers what their equations say?", optimizers),
    "long_stream": Check("Are memories alive and bounded after 8192 tokens?", long_stream),
    "seeds": Check("Do equal seeds make equal runs?", seeds),
    "resume": Check("Is a resumed run the run?", resume),
    "initial_loss": Check("Does training start at the logarithm of the vocabulary?", initial_loss),
}
"""All checks, in the order they run. A new one joins by adding a line."""

STYLES = {"passed": None, "missed": "bold red", "does not apply": "dim"}

FILE_WIDTH = 130
"""Columns of the table where the output is not a terminal."""


def choose_checks(text: str | None) -> tuple[str, ...]:
    """Read `--checks`: names with commas between, all checks where it is left out.

    Raises:
        ConfigError: an unknown name, or none.
    """
    if text is None:
        return tuple(CHECKS)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in CHECKS]
    if unknown or not names:
        raise ConfigError(
            f"--checks {text!r}: {', '.join(unknown) or 'nothing'} is no check; there are {', '.join(CHECKS)}"
        )
    return names


def run_audit(subject: Subject, names: Sequence[str], *, report: Callable[[str], None]) -> AuditFile:
    """Run checks and collect their rows. report: is told what is being done, line by line."""
    began = time.perf_counter()
    rows: list[Row] = []
    for name in names:
        started = time.perf_counter()
        rows += [make_row(name, finding) for finding in _findings(subject, name)]
        report(f"{name:<13} {CHECKS[name].question} {time.perf_counter() - started:.1f} s")
    return make_file(subject, tuple(rows), tuple(names), seconds=time.perf_counter() - began)


def _findings(subject: Subject, name: str) -> list[Finding]:
    """What one check finds. A check that ends with an error is a miss; the others still run."""
    with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
        try:
            return list(CHECKS[name].run(subject))
        except Exception as error:
            # Whatever goes wrong in the audited model is a finding of the audit, not its end.
            return [broken("the check itself", f"{type(error).__name__}: {error}")]


def describe(subject: Subject) -> list[str]:
    """Say what is audited."""
    config = subject.config
    lines = [
        f"{subject.source}: width {config.width}, {config.num_layers} layers, "
        f"{config.mixer.kind} + {config.channel.kind}, "
        + ("fresh weights" if subject.step is None else f"trained for {subject.step} steps")
    ]
    if subject.shrunk:
        lines.append("audited smaller than asked for, with the same mechanisms:")
        lines += [f"  {change}" for change in subject.shrunk]
    return lines


def show(audit: AuditFile, *, console: Console | None = None) -> None:
    """Print the table: check, figure, limit, verdict, and the reason where there is one."""
    console = console or Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "figure", "value", "limit", "verdict"):
        table.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading != "figure")
    last = ""
    for row in audit.rows:
        finding = Finding(row.figure, row.value, row.low, row.high, row.reason, broke=row.state == "missed")
        note = f"\n  {row.reason}" if row.reason else ""
        table.add_row(
            "" if row.check == last else row.check,
            Text(row.figure + note),
            "" if row.value is None else f"{row.value:.3g}",
            finding.limit,
            row.state,
            style=STYLES[row.state],
        )
        last = row.check
    console.print(table)
    missed = sum(row.state == "missed" for row in audit.rows)
    passed = sum(row.state == "passed" for row in audit.rows)
    rest = len(audit.rows) - missed - passed
    console.print(f"{passed} passed, {missed} missed, {rest} do not apply; {audit.seconds:.0f} s", highlight=False)

"""Audits of the demo presets: `python -m benchmarks.audits --out FOLDER --page docs/audit.md` writes the table.

Minutes on one core. A preset whose figures are there already is not audited again; `--again` does. Figures that are to
be published are written outside the checkout and copied to eval/audit, or its commit would count as changed.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.pages import insert, line
from nested_lm.config.compose import preset_names
from nested_lm_lab.audit.report import AuditFile, Row, load_audit, write_audit
from nested_lm_lab.audit.runner import CHECKS, run_audit
from nested_lm_lab.audit.subject import open_subject

MARKERS = "<!-- table of benchmarks.audits: begin -->", "<!-- table of benchmarks.audits: end -->"
HOPE = ("hope/demo", "hope/demo_paper", "hope/demo_in_context")
HEAD = ("Preset", "passed", "missed", "do not apply", "closest to its limit", "value", "limit", "commit")


def presets() -> list[str]:
    """Presets of the table: Hope first, then every baseline of the demo's size."""
    return [*HOPE, *(name for name in preset_names() if name.startswith("baselines/") and name.endswith("_demo"))]


def closeness(row: Row) -> float:
    """How near a figure is to its one limit, as a share of it; 0 where there are two, or the limit is 0.

    A missed figure is beyond 1; one that broke, or is not finite, is as far beyond as can be.
    """
    if row.value is None:
        return float("inf") if row.state == "missed" else 0.0
    if row.state == "missed":
        return max(_share(row), 1.0)
    return 0.0 if row.low is not None and row.high is not None else _share(row)


def _share(row: Row) -> float:
    value = row.value
    assert value is not None
    if row.high is not None and (row.low is None or value > row.high):
        return value / row.high if row.high > 0 else 0.0
    return row.low / value if row.low is not None and value > 0 else 0.0


def limit(row: Row) -> str:
    """The limits in words."""
    parts = [f"at least {row.low:g}"] if row.low is not None else []
    return " and ".join([*parts, *([f"at most {row.high:g}"] if row.high is not None else [])])


def row(preset: str, audit: AuditFile) -> str:
    """Make the line of a preset."""
    counts = [sum(each.state == state for each in audit.rows) for state in ("passed", "missed", "does not apply")]
    worst = max(audit.rows, key=closeness)
    value = worst.reason if worst.value is None else f"{worst.value:.2g}"
    stamp = audit.identity.commit or "-"
    commit = stamp[:7] + (", with changes" if stamp.endswith("-dirty") else "")
    figure = f"{worst.check}: {worst.figure}"
    return line([f"`{preset}`", *map(str, counts), figure, value, limit(worst), commit])


def table(out: Path) -> str:
    """Make the table of all presets that have figures."""
    found = {preset: load_audit(out / f"{preset}.json") for preset in presets() if (out / f"{preset}.json").exists()}
    lines = [line(HEAD), "|---|---:|---:|---:|---|---:|---|---|"]
    return "\n".join([*lines, *(row(preset, audit) for preset, audit in found.items())])


def main() -> None:
    """Audit what is missing, then write the table; the exit code is 1 when a figure missed its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures, a JSON file a preset")
    parser.add_argument("--page", type=Path, help="page that has the markers")
    parser.add_argument("--presets", nargs="*", default=presets())
    parser.add_argument("--again", action="store_true", help="audit presets that have figures as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    all_passed = True
    for preset in given.presets:
        file = given.out / f"{preset}.json"
        if given.again or not file.exists():
            subject = open_subject(preset, (), device=torch.device("cpu"))
            write_audit(file, run_audit(subject, tuple(CHECKS), report=lambda text: print(text, file=sys.stderr)))
        audit = load_audit(file)
        all_passed &= audit.passed
        print(row(preset, audit), flush=True)
    if given.page is not None:
        insert(given.page, table(given.out), MARKERS)
    raise SystemExit(0 if all_passed else 1)


if __name__ == "__main__":
    main()

"""The README's commands: blocks marked `run` are executed; of the others, trainings are resolved, data sets loaded."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nested_lm.config.load import load_data
from nested_lm_lab.evaluation.results import load_result, require_comparable

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash( run)?\n(.*?)```", README, flags=re.DOTALL)
RUN = [line for marked, block in BLOCKS if marked for line in block.splitlines()]
SHOWN = [
    line.split("#")[0].strip()
    for marked, block in BLOCKS
    if not marked
    for line in block.splitlines()
    if line.startswith("nested-lm")
]


def cli(arguments, **environment):
    command = [sys.executable, "-m", "nested_lm", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("line", RUN)
def test_a_command_marked_run_succeeds(line):
    program, *arguments = shlex.split(line)
    assert program == ".venv/bin/nested-lm"
    done = cli(arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_that_is_shown_exists(line):
    verb = shlex.split(line)[1]
    done = cli([verb, "--help"], COLUMNS="200")
    assert done.returncode == 0
    options = re.findall(r"(--[a-z-]+|(?<= )-m)\b", line)
    assert all(option in done.stdout for option in options), (options, done.stdout)
    arguments = shlex.split(line)[2:]
    if verb == "data":
        assert load_data(str(ROOT / arguments[0])).name
    if verb == "train" and "-m" not in arguments:
        resolved = cli([verb, *arguments, "--dry-run"])
        assert resolved.returncode == 0, resolved.stderr


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_has_the_targets_the_readme_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo:", "test:", "check:", "bench:"} <= {line.split(" ")[0] for line in makefile.splitlines()}


def test_the_published_numbers_are_those_of_the_committed_results():
    results = {
        arm: load_result(ROOT / "eval" / "demo" / f"{arm}-demo" / "language_modelling.json")
        for arm in ("hope", "transformer")
    }
    require_comparable(list(results.values()))
    text = " ".join(README.split())
    for arm, label in (("hope", "Hope"), ("transformer", "Transformer++")):
        found = results[arm].metrics.window.bits_per_byte
        assert f"{label} **{found.value:.3f}**" in text
        assert f"({found.low:.3f} to {found.high:.3f})" in text
        identity = results[arm].identity
        assert f"{identity.parameters / 1e6:.2f} M parameters and {identity.tokens:,} training tokens" in text
    floor = results["hope"].metrics.bigram.bits_per_byte
    assert f"bigram floor {floor.value:.3f} ({floor.low:.3f} to {floor.high:.3f})" in text
    assert f"{results['hope'].metrics.window.bits_per_byte.n} held-out documents" in text

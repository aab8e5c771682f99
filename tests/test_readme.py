"""The README's commands: those in blocks marked `run` are executed, every other one at least parses."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_has_the_targets_the_readme_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo:", "test:", "check:", "bench:"} <= {line.split(" ")[0] for line in makefile.splitlines()}

"""A fake `nested-lm` that leaves what the real stages leave, and fails or waits when it is told to."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nested_lm_lab.campaign import steps

FAKE = """
import json, os, pathlib, signal, sys, time
kind, *rest = sys.argv[1:]
here = pathlib.Path.cwd()
options = dict(item.split("=", 1) for item in rest if "=" in item)
suite = rest.pop(0) if rest[0] in ("zeroshot", "niah", "babilong", "books", "continual") else None
folder = pathlib.Path(options.get("output_dir", rest[0]))
step = f"{kind} {folder.name}"
with open("calls.txt", "a") as calls:
    calls.write(step + "\\n")
print("output of", step, flush=True)
script = here / "behaviour.json"
behaviour = json.loads(script.read_text()).get(step) if script.exists() else None
folder.mkdir(parents=True, exist_ok=True)
if behaviour == "fail":
    sys.exit(3)
if behaviour == "meet":
    with open("met.txt", "a") as met:
        met.write(folder.name + ":" + os.environ.get("OMP_NUM_THREADS", "?") + "\\n")
    end = time.monotonic() + 20
    while len(open("met.txt").read().split()) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
if behaviour == "wait":
    def stop(number, frame):
        with open("signals.txt", "a") as file:
            file.write(signal.Signals(number).name + "\\n")
        sys.exit(0)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (here / "ready").write_text(str(os.getpid()))
    time.sleep(60)
if kind == "data":
    (folder / "manifest.json").write_text("{}")
if kind == "train":
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")
    if behaviour != "early":
        (folder / "metrics.jsonl").write_text(json.dumps({"event": "done"}) + "\\n")
if kind == "eval":
    (folder / "results").mkdir(exist_ok=True)
    usual = ("language_modelling", "passkey", "sampling") if suite is None else (suite,)
    names = options["--tasks"].split(",") if suite == "continual" else usual
    for name in names:
        (folder / "results" / f"{name}.json").write_text("{}")
if kind == "report":
    (folder / "report.html").write_text("<p>")
    (folder / "report.md").write_text("#")
"""

LOADERS = {name: cache(getattr(steps, name)) for name in ("load_run", "load_data", "load_evaluation")}
"""Presets are composed once for all tests; they are frozen."""


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Command line of the fake program; the working directory is a fresh folder."""
    monkeypatch.chdir(tmp_path)
    for name, loader in LOADERS.items():
        monkeypatch.setattr(steps, name, loader)
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    return (sys.executable, "-S", str(program))


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """Steps that the fake program ran since the last look."""
    seen = 0

    def look() -> list[str]:
        nonlocal seen
        path = tmp_path / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        new, seen = lines[seen:], len(lines)
        return new

    return look

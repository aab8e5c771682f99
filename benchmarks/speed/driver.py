"""Processes of all sides, and the turns they take."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.speed import peers
from benchmarks.speed.cases import Case, Package, Side
from nested_lm.ops.memory.cpu import library as cpu_library

ROOT = Path(__file__).resolve().parents[2]

Answer = dict[str, Any]


class JobError(Exception):
    """A worker could not do what it was asked to."""


class Worker:
    """A process that runs jobs of one package when it is told to. A context manager: the process ends with it."""

    def __init__(self, package: Package, python: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
        command = [python, "-m", "benchmarks.speed.workers", f"benchmarks.speed.workers.{_module(package)}"]
        self.package = package
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **request: Any) -> Answer:
        """Send a request and wait for its answer.

        Raises:
            JobError: the worker answers with an error, or has ended.
        """
        try:
            print(json.dumps({"do": do} | request), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or '{"error": "its process has ended"}')
        except BrokenPipeError:
            answer = {"error": "its process has ended"}
        if "error" in answer:
            raise JobError(f"{self.package} {request.get('job', do)}: {answer['error']}")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(BrokenPipeError):  # it has ended before
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _module(package: Package) -> str:
    return "ours" if package == "nested_lm" else package


class Workers:
    """A worker for each package that is there; why the others are not. A context manager."""

    def __init__(self, *, with_peers: bool) -> None:
        self.running: dict[str, Worker] = {}
        self.packages: dict[str, Answer] = {}
        self._stack = ExitStack()
        self._with_peers = with_peers

    def __enter__(self) -> "Workers":
        self._start("nested_lm", Path(sys.executable))
        for package in peers.PEERS:
            if not self._with_peers:
                self.packages[package] = {"missing": "not asked for; run with --peers"}
                continue
            try:
                self._start(package, peers.python_of(package))
            except (peers.PeerError, JobError) as error:
                self.running.pop(package, None)
                self.packages[package] = {"missing": str(error)}
        return self

    def _start(self, package: Package, python: Path) -> None:
        worker = self._stack.enter_context(Worker(package, python))
        self.running[package] = worker
        self.packages[package] = worker.ask("stamp") | {"requirement": peers.PEERS.get(package)}

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def drop(self) -> None:
        """Let every worker forget its jobs."""
        for worker in self.running.values():
            worker.ask("drop")


def prepare(case: Case, workers: Workers) -> tuple[dict[str, Answer], dict[str, str]]:
    """Build the case's jobs. Returns what the workers say of each side, and why the others are not timed.

    Raises:
        JobError: one of ours.
    """
    ready: dict[str, Answer] = {}
    missing: dict[str, str] = {}
    for side in case.sides:
        arguments = dict(side.arguments)
        if side.package not in workers.running:
            missing[side.name] = workers.packages[side.package]["missing"]
            continue
        if arguments.get("backend") == "cpu" and (reason := cpu_library.reason_missing()) is not None:
            missing[side.name] = reason
            continue
        if side.same_size_as is not None:
            if side.same_size_as not in ready:
                missing[side.name] = f"{side.same_size_as}, whose size it should have, is missing"
                continue
            arguments["parameters"] = ready[side.same_size_as]["parameters"]
        try:
            ready[side.name] = workers.running[side.package].ask(
                "prepare", key=side.name, job=side.job, precision=side.precision, arguments=arguments
            )
        except JobError as error:
            if side.package == "nested_lm":
                raise
            missing[side.name] = str(error)
    return ready, missing


def take_turns(case: Case, workers: Workers, turns: int) -> list[Answer]:
    """Time all sides of a case in turns. A row a side; one that is not timed says why in `missing`.

    Raises:
        JobError: one of ours.
    """
    ready, missing = prepare(case, workers)
    times: dict[str, list[Answer]] = {name: [] for name in ready}
    for turn in range(-1, turns):  # turn -1 warms up
        for side in case.sides:
            if side.name in missing or not _has_turn(side, turn):
                continue
            try:
                measured = workers.running[side.package].ask("run", key=side.name)
            except JobError as error:
                if side.package == "nested_lm":
                    raise
                missing[side.name] = str(error)
                continue
            if turn >= 0:
                times[side.name].append(measured)
    workers.drop()
    return [_row(side, ready.get(side.name), times.get(side.name), missing.get(side.name)) for side in case.sides]


def _has_turn(side: Side, turn: int) -> bool:
    return side.turns is None or 0 <= turn < side.turns


def _row(side: Side, ready: Answer | None, times: list[Answer] | None, missing: str | None) -> Answer:
    row = {"side": side.name, "package": side.package, "precision": side.precision, "arguments": side.arguments}
    if missing is not None:
        return row | {"missing": missing}
    seconds = {f"{kind}_s": [time[f"{kind}_s"] for time in times] for kind in ("cpu", "wall")}
    return row | ready | seconds

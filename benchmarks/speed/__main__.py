"""Time this project and its peers in turns, judge the goals, write a JSON file and the tables of docs/benchmarks.md.

All sides of a case are ready in processes of their own, one a package, before the first turn; then they take turns, one
at a time, so that a noisy machine disturbs them alike. What counts is processor time of one thread. Nothing is timed
unless both fast forms of the memories agree with their reference.

    python -m benchmarks.speed [--peers] [--turns 5] [--cases "write pass,..."] [--out FILE.json] [--page FILE.md]
                               [--only-page] [--quick]
"""

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import insert
from benchmarks.speed import gate, peak, report
from benchmarks.speed.cases import QUICK, Sizes, cases, timed_mixers
from benchmarks.speed.driver import ROOT, Workers, take_turns
from benchmarks.streaming import hardware
from nested_lm.config.mixers import SelfModifying
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit


def main() -> None:
    """Run the suite."""
    arguments = _parse()
    if not arguments.only_page:
        _run(arguments)
    if arguments.page is not None:
        result = json.loads(arguments.out.read_text())
        if result["version"] != report.VERSION:
            raise SystemExit(f"{arguments.out} has version {result['version']}, this suite reads {report.VERSION}")
        insert(arguments.page, report.tables(result))


def _run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    size = QUICK if arguments.quick else Sizes()
    rules = [SelfModifying.model_validate(mixer) for mixer in timed_mixers(size)]
    result: dict[str, Any] = {
        "version": report.VERSION,
        "what": "float32, one thread a side, tokens per processor second; memory in bytes",
        "gate": {"errors": gate.check(rules), "limit": gate.AGREEMENT},
        "memories": cpu_library.describe(),
        "quick": arguments.quick,
        "turns": arguments.turns,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": current_commit(),
        "hardware": {key: value for key, value in hardware().items() if key != "load_average"} | {"threads": 1},
        "load_average": {"before": os.getloadavg()},
        "sizes": vars(size),
        "cases": [],
    }
    with Workers(with_peers=arguments.peers) as workers:
        result["packages"] = workers.packages
        for case in cases(size):
            if arguments.cases is None or case.name in arguments.cases:
                found = report.judged(case, take_turns(case, workers, arguments.turns))
                result["cases"].append(found)
                _tell(found)
    result["memory"] = peak.measure(size)
    result["load_average"]["after"] = os.getloadavg()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, (json.dumps(result, indent=1) + "\n").encode())


def _tell(case: dict[str, Any]) -> None:
    for row in case["rows"]:
        shown = row.get("missing") or f"{row['tokens_per_cpu_s']['median']:,.1f} tokens per processor second"
        print(f"{case['name']}: {row['side']}: {shown}", flush=True)


def _parse() -> argparse.Namespace:
    known = [case.name for case in cases(Sizes())]

    def names(text: str) -> list[str]:
        given = [name.strip() for name in text.split(";")]  # names have commas in them
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {'; '.join(known)}; put ; between several")
        return given

    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="install the peers below artifacts/bench, and time them")
    parser.add_argument("--turns", type=count, default=5)
    parser.add_argument("--cases", type=names, default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "speed.json")
    parser.add_argument("--page", type=Path, default=None, help="write the tables between the markers of this page")
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one turn: does everything run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.turns = 1
        if arguments.out == parser.get_default("out"):
            parser.error("--quick needs an --out of its own: its numbers mean nothing")
    return arguments


if __name__ == "__main__":
    main()

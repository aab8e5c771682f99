"""Run drills and print what was tried and what failed; exit code 1 when a promise was broken."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # trials are forked, and threads do not survive a fork

from benchmarks.drills.registry import DRILLS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__)
    parser.add_argument("name", choices=[*DRILLS, "all"])
    parser.add_argument("--trials", type=int, help="how many; by default those of the nightly run")
    arguments = parser.parse_args()
    broken = 0
    for drill in DRILLS.values() if arguments.name == "all" else [DRILLS[arguments.name]]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcome = drill.run(Path(folder), arguments.trials or drill.full)
        seconds = time.monotonic() - began
        notes = "".join(f", {note}" for note in outcome.notes)
        print(
            f"{drill.name:<14} {outcome.tried:>6} tried {len(outcome.failures):>4} failed  {seconds:6.0f} s{notes}",
            flush=True,
        )
        for failure in outcome.failures[:20]:
            print(f"  {failure}")
        broken += bool(outcome.failures)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()

"""Train every arm on every task with several seeds, and write tables with intervals.

Cells that the result file already has, with the same configuration and recipe, are skipped: the suite can be stopped at
any time and run in pieces, by several processes at once. Each uses one thread.

    python -m benchmarks.learning [--tasks parity,mqar] [--arms hope,transformer] [--seeds 3] [--out FILE.json]
                                  [--page FILE.md] [--only-page] [--quick]
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from benchmarks.learning import results
from benchmarks.learning.arms import MIXERS
from benchmarks.learning.protocol import Task
from benchmarks.learning.suite import GROUPS, TASKS
from benchmarks.learning.training import run_cell
from benchmarks.pages import insert
from nested_lm.nn.sizing import count_parameters

ROOT = Path(__file__).resolve().parents[2]
TEST_ROWS = 256
QUICK_STEPS, QUICK_ROWS, QUICK_ARMS = 2, 8, ("hope", "transformer", "nested_2")


def main() -> None:
    """Run the cells that are missing."""
    arguments = _parse()
    torch.set_num_threads(1)
    rows = QUICK_ROWS if arguments.quick else TEST_ROWS
    known = results.load(arguments.out)
    cells = [
        (TASKS[task], arm, seed)
        for task in arguments.tasks
        for seed in range(1 if arguments.quick else arguments.seeds)
        for arm in TASKS[task].arms or MIXERS
        if arm in arguments.arms
    ]
    have = {(row["task"], row["arm"], row["seed"]) for row in known if _is_current(row, rows, quick=arguments.quick)}
    missing = []
    for task, arm, seed in [] if arguments.only_page else cells:
        steps = QUICK_STEPS if arguments.quick else task.steps
        if (task.name, arm, seed) not in have:
            missing.append((task, arm, seed, steps, results.identity(task, arm, steps, rows)))
    print(f"{len(missing)} of {len(cells)} cells to run{_expected([cell[:3] for cell in missing], known)}", flush=True)
    for number, (task, arm, seed, steps, key) in enumerate(missing, start=1):
        outcome = run_cell(task, arm, seed, steps=steps, rows=rows)
        size = count_parameters(task.configuration(arm))["total"]
        row = {"task": task.name, "arm": arm, "seed": seed, "identity": key, "steps": steps, "parameters": size}
        row |= vars(outcome) | {"config": task.configuration(arm).model_dump(mode="json")} | results.stamp()
        results.add(arguments.out, [row])
        shown = " ".join(f"{name}={value:.3f}" for name, value in outcome.measures.items())
        state = shown if outcome.diverged_at is None else f"diverged at step {outcome.diverged_at}"
        print(f"{number}/{len(missing)} {task.name} {arm} seed {seed}: {state} ({outcome.cpu_s:.0f} s)", flush=True)
    if arguments.page is not None:
        found = results.load(arguments.out)
        done = [row for row in found if _is_current(row, rows, quick=arguments.quick)]
        if len(done) < len(found):
            print(f"{len(found) - len(done)} of {len(found)} cells are of another configuration or recipe: left out")
        insert(arguments.page, results.tables(GROUPS, list(MIXERS), done, tested=rows))


def _is_current(row: results.Row, rows: int, *, quick: bool) -> bool:
    """Whether a row was made with today's configuration and recipe."""
    task = TASKS.get(row["task"])
    if task is None or row["arm"] not in (task.arms or MIXERS):
        return False
    return results.is_current(row, task, QUICK_STEPS if quick else task.steps, rows)


def _expected(missing: list[tuple[Task, str, int]], known: list[results.Row]) -> str:
    """Processor time that the missing cells took with other seeds, where there are any."""
    seconds, unknown = 0.0, 0
    for task, arm, _ in missing:
        before = [row["cpu_s"] for row in known if (row["task"], row["arm"]) == (task.name, arm)]
        if before:
            seconds += statistics.median(before)
        else:
            unknown += 1
    if not missing:
        return ""
    return f", about {seconds / 60:.0f} processor minutes" + (f" and {unknown} cells not timed yet" if unknown else "")


def _parse() -> argparse.Namespace:
    all_arms = list(dict.fromkeys([*MIXERS, *(arm for task in TASKS.values() for arm in task.arms or ())]))

    def names(allowed: list[str]):
        def parse(text: str) -> list[str]:
            for name in text.split(","):
                if name not in allowed:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
            return text.split(",")

        return parse

    def seeds(text: str) -> int:
        if not text.isdigit() or not 1 <= int(text) <= max(results.T_QUANTILE):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {max(results.T_QUANTILE)}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=names(list(TASKS)), default=list(TASKS))
    parser.add_argument("--arms", type=names(all_arms), default=None)
    parser.add_argument("--seeds", type=seeds, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/learning.json")
    parser.add_argument("--page", type=Path, default=None, help="write the tables between the markers of this page")
    parser.add_argument("--only-page", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="two steps, one seed, three arms: does everything run?")
    arguments = parser.parse_args()
    if arguments.arms is None:
        arguments.arms = list(QUICK_ARMS) if arguments.quick else all_arms
    if arguments.quick and arguments.out == parser.get_default("out"):
        parser.error("--quick needs an --out of its own: its numbers mean nothing")
    return arguments


if __name__ == "__main__":
    main()

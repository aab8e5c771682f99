"""Worst float64 differences between both fast forms of the memories and the token-by-token reference, option by option.

The options and problems are those of the tests (tests/ops/memory_problems.py); here their errors are written down.

    python benchmarks/exactness.py [--tokens 37] [--chunk 8] [--out FILE.json] [--table FILE.md]
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' problems

from tests.ops.memory_problems import OPTIONS, Problem, make_rule, results_of, run_with_gradients, supports, worst

from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.storage.commit import current_commit

EQUATIONS = {
    "erase": "57, 88",
    "erase_after_decay": "88, A6",
    "erase_since": "88, A6",
    "erase_since_generators": "88, A6",
    "read": "83, 90, A5",
    "adapt": "83, 85",
    "rates": "A34",
    "targets": "84",
    "targets_generators": "84",
    "decay_towards": "88, A7",
    "damp": "A6",
    "rate_stretch": "A8",
    "rate_shares": "A8",
    "normalise": "A14",
    "unit_values": "A13",
    "gates": "88, A9",
    "momentum": "Titans 10",
    "depth": "92-93",
    "gradient": "93, A1",
    "objective": "92, A2",
}
"""Option of the write rule -> equation or ruling in docs/equations.md."""


def errors(name: str, tokens: int, chunk: int) -> dict[str, object]:
    problem = Problem(make_rule(chunk, **OPTIONS[name]), tokens=tokens)
    expected, expected_gradients = run_with_gradients(problem, memory_reference, position=3)
    found, gradients = run_with_gradients(problem, memory_chunked, position=3)
    states = len(results_of(problem.run(memory_chunked, position=3))) - 2  # the last two are the gates
    in_c = None
    if supports(memory_cpu, problem.rule):
        in_c = max(map(worst, run_with_gradients(problem, memory_cpu, position=3), (expected, expected_gradients)))
    named = [equation for key in OPTIONS[name] for equation in EQUATIONS[key].split(", ")] or ["83-91"]
    equations = sorted(dict.fromkeys(named), key=lambda equation: (equation[0].isalpha(), equation))
    return {
        "option": name,
        "equations": ", ".join(equations),
        "outputs": worst([found[0], *found[states:]], [expected[0], *expected[states:]]),
        "states": worst(found[1:states], expected[1:states]),
        "gradients": worst(gradients, expected_gradients),
        "cpu": in_c,
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| Option | Equations, rulings | Outputs | States | Gradients | All three in C |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        in_c = "-" if row["cpu"] is None else f"{row['cpu']:.1e}"
        figures = "{outputs:.1e} | {states:.1e} | {gradients:.1e}".format(**row)
        lines.append(f"| {row['option']} | {row['equations']} | {figures} | {in_c} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=37)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if (reason := cpu_library.reason_missing()) is not None:
        sys.exit(f"the column of the C would be empty: {reason}")
    rows = [errors(name, arguments.tokens, arguments.chunk) for name in OPTIONS]
    text = table(rows)
    print(text)
    if arguments.out is not None:
        content = {
            "commit": current_commit(),
            "tokens": arguments.tokens,
            "chunk": arguments.chunk,
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.table is not None:
        arguments.table.write_text(text)


if __name__ == "__main__":
    main()

"""Cases of the Triton kernels, computed in Triton's interpreter: `python -m tests.ops.triton_cases`.

Reads names of cases from its input and answers each with a line of JSON: the relative difference from the float64
reference of every output, state and gradient. A process of its own, because TRITON_INTERPRET must be set before Triton
is first imported.
"""

import json
import random
import sys

import torch
from benchmarks.kernels import interpreting

from nested_lm.ops import triangular_triton
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.triton import backend
from tests.ops.memory_problems import ALL, OPTIONS, Problem, make_rule, results_of, run_with_gradients, worst

PAPER = {"erase_after_decay": False, "gates": "token", "read": "border", "rates": (1.0, 1.0, 1.0)}

CASES = {
    # name: options of the rule; options of the problem and of the call
    "default": ({}, {}),
    "Hope": (OPTIONS["Hope"], {"dtype": "float32"}),
    "all six, rates to 2, exclusive": (OPTIONS["erase since the border, all six, rates to 2"], {}),
    "rows, heads and document starts": (
        OPTIONS["Hope"] | {"adapt": ("k", "memory"), "rates": (0.1, 2.0)},
        {"batch": 2, "heads": 2, "tokens": 22, "position": 5, "resets": True},
    ),
    "shorter chunks of the generators": (
        {"chunk": 32, "chunk_generators": 16, "adapt": ("v", "memory"), "erase_since": "border"},
        {"tokens": 50, "position": 7, "resets": True},
    ),
    "longer chunks of the generators": (
        {"chunk_generators": 32, "adapt": ("k", "memory"), "erase_since_generators": "border", "erase": "input"},
        {"tokens": 40, "position": 16},
    ),
    "paper": (PAPER | {"adapt": ("eta", "alpha", "memory")}, {"heads": 2}),
    "memory alone, raw values": (
        {"adapt": ("memory",), "targets": "values", "unit_values": False, "damp": False},
        {},
    ),
    "erase none": (OPTIONS["erase none"] | {"adapt": ("k", "memory")}, {"dtype": "float32"}),
    "Titans, running mean": (OPTIONS["Titans, mean"], {"hidden": 32, "tokens": 35, "position": 3, "resets": True}),
    "Titans, running sum": (OPTIONS["Titans, towards the start"], {"dtype": "float32"}),
    "linear": ({"depth": 1, "adapt": ("k", "eta", "memory")}, {"resets": True, "position": 9}),
    "linear, inner product": (OPTIONS["linear, dot"] | {"adapt": ("alpha", "memory")}, {}),
    "odd chunk": ({"chunk": 5, "adapt": ("k", "memory")}, {"tokens": 13, "position": 3}),
    "chunk of 64, width 64": (
        {"chunk": 64, "adapt": ("memory",), "rates": (1.0,)},
        {"width": 64, "hidden": 64, "tokens": 70, "dtype": "float32"},
    ),
    "hidden width of half": ({"chunk": 32, "adapt": ("memory",), "rates": (1.0,)}, {"width": 32, "tokens": 33}),
    "bfloat16 operands": (OPTIONS["Hope"] | {"adapt": ("k", "memory"), "rates": (0.1, 2.0)}, {"dtype": "bfloat16"}),
    "bfloat16 operands, Titans": (OPTIONS["Titans, mean"], {"dtype": "bfloat16"}),
}


def random_case(seed):
    """Options that occur together in no case above."""
    drawn = random.Random(seed)
    adapt = (*(name for name in ALL[:-1] if drawn.random() < 0.35), "memory")
    rule = {
        "chunk": drawn.choice((3, 16, 17)),
        "adapt": adapt,
        "rates": tuple(drawn.choice((0.2, 0.9)) for _ in adapt),
        "depth": drawn.choice((1, 2, 2)),
        "targets": drawn.choice(("generated", "values")),
        "erase": drawn.choice(("both", "none", "input")),
        "erase_since": drawn.choice(("start", "border")),
        "erase_after_decay": drawn.random() < 0.7,
        "read": drawn.choice(("inclusive", "exclusive", "border")),
        "gates": drawn.choice(("head", "token")),
        "rate_stretch": drawn.choice((0.0, 0.1)),
    }
    rule["chunk_generators"] = rule["chunk"] * drawn.choice((1, 1, 2))
    if rule["depth"] == 1:
        rule["erase_since"] = "start"
    if rule["erase"] == "none" and drawn.random() < 0.5:
        rule |= {"momentum": drawn.choice(("sum", "mean")), "read": "inclusive"}
    problem = {
        "batch": drawn.choice((1, 2)),
        "heads": drawn.choice((1, 2)),
        "tokens": drawn.randint(1, 2 * rule["chunk"]),
        "position": drawn.randint(0, 40),
        "resets": drawn.random() < 0.5,
        "hidden": 16 if rule["depth"] == 1 else drawn.choice((16, 32)),
    }
    return rule, problem


def document_starts(rule, batch, tokens, position):
    """Every second border of a row, another one in each."""
    starts = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        for index, token in enumerate(range(-position % rule.alignment, tokens, rule.alignment)):
            starts[row, token] = (index + row) % 2 == 0
    return starts


def differences(rule_options, options):
    """Relative difference from the reference, by the name of each tensor."""
    rule = make_rule(**({"chunk": 16} | rule_options))
    assert backend.missing(rule) is None, backend.missing(rule)
    options = {"batch": 1, "heads": 1, "tokens": 20, "width": 16, "hidden": 16, "dtype": "float64"} | options
    position, resets = options.pop("position", 0), options.pop("resets", False)
    low = options.pop("dtype")
    given = Problem(rule, **options, dtype=torch.float64 if low == "float64" else torch.float32)
    exact = Problem(rule, **options)
    exact.leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in given.leaves.items()}
    call = {"position": position, "resets": None}
    if resets:
        call["resets"] = document_starts(rule, options["batch"], options["tokens"], position)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low == "bfloat16"):
        found, gradients = run_with_gradients(given, backend, **call)
    expected, exact_gradients = run_with_gradients(exact, memory_reference, **call)
    leaves = [name for name, leaf in given.leaves.items() if leaf.numel()]
    outputs = {f"output {i}": worst([a], [b]) for i, (a, b) in enumerate(zip(found, expected, strict=True))}
    pairs = zip(leaves, gradients, exact_gradients, strict=True)
    return outputs | {f"gradient of {name}": worst([a], [b]) for name, a, b in pairs}


def sections_without_gradients():
    """A call that is read in sections, since its weights are not kept for a backward pass."""
    problem = Problem(make_rule(4, adapt=("k", "memory")), batch=1, heads=1, tokens=19, width=16, hidden=16)
    backend.SECTION = 2
    with torch.no_grad():
        found, expected = (results_of(problem.run(one, position=3)) for one in (backend, memory_reference))
    return {"outputs": worst(found, expected)}


def inverses():
    """Of matrices of awkward sizes, one of them with entries as large as rates near 2 make them."""
    found = {}
    for size in (1, 3, 16, 17, 33, 64):
        lower = 0.3 * torch.randn(2, 1, size, size, dtype=torch.float64)
        lower[0] = 1.9
        whole = torch.eye(size, dtype=torch.float64) + lower.tril(-1)
        found[f"of {size} rows"] = worst(
            [triangular_triton.inverse(lower) @ whole], [torch.eye(size).expand(2, 1, -1, -1)]
        )
    return found


def answer(name):
    if name == "sections":
        return sections_without_gradients()
    if name == "inverses":
        return inverses()
    if name.startswith("random "):
        return differences(*random_case(int(name.removeprefix("random "))))
    return differences(*CASES[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreting.mend()
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)

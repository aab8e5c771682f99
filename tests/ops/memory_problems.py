"""Random problems for the memory backends, and the options they are compared on."""

import torch

from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.memory.rule import WriteRates, WriteRule
from nested_lm.ops.memory.state import GateReadout, MemoryInputs, MemoryState, MemoryWeights, unit

PLAIN = {"targets": "generated", "erase_since": "start", "rate_stretch": 0.0, "rate_shares": (1.0,)}
"""What the options are changes of: nothing that a default fills in."""

ALL = ("k", "eta", "alpha", "v", "q", "memory")
DEFAULT = ("k", "eta", "alpha", "v", "memory")


def make_rule(
    chunk=16, chunk_generators=None, adapt=DEFAULT, rate_memory=0.9, rate_generators=0.4, rates=None, **options
):
    rates = rates or (rate_generators,) * (len(adapt) - 1) + (rate_memory,)
    given = PLAIN | {"chunk": chunk, "chunk_generators": chunk_generators, "adapt": adapt} | options
    return WriteRule(**given, rates=WriteRates(**dict(zip(adapt, rates, strict=True))))


OPTIONS = {
    "default": {},
    "Hope": {
        "targets": "values",
        "erase_since": "border",
        "rates": (0.1, 0.1, 0.1, 0.1, 2.0),
        "rate_shares": (0.5, 1.0),
        "rate_stretch": 0.1,
    },
    "erase input": {"erase": "input"},
    "erase none": {"erase": "none"},
    "erase before decay": {"erase_after_decay": False},
    "erase before decay, momentum": {"erase_after_decay": False, "momentum": "sum"},
    "erase since the border": {"erase_since": "border", "erase_since_generators": "border"},
    "erase since the border, memory": {"erase_since": "border"},
    "erase since the border, generators": {"erase_since_generators": "border"},
    "erase since the border, input": {"erase_since": "border", "erase_since_generators": "border", "erase": "input"},
    "erase since the border, all six, rates to 2": {
        "erase_since": "border",
        "erase_since_generators": "border",
        "adapt": ALL,
        "rates": (0.1, 0.2, 0.2, 0.4, 0.5, 2.0),
        "read": "exclusive",
    },
    "erase since the border, before decay": {
        "erase_since": "border",
        "erase_since_generators": "border",
        "erase_after_decay": False,
    },
    "erase since the border, momentum": {
        "erase_since": "border",
        "erase_since_generators": "border",
        "momentum": "sum",
    },
    "erase since the border, zero": {
        "erase_since": "border",
        "erase_since_generators": "border",
        "decay_towards": "zero",
    },
    "read exclusive": {"read": "exclusive"},
    "read border": {"read": "border"},
    "adapt all six": {"adapt": ALL},
    "adapt memory only": {"adapt": ("memory",)},
    "adapt v, memory": {"adapt": ("v", "memory")},
    "adapt k, q, memory": {"adapt": ("k", "q", "memory")},
    "adapt eta, alpha, memory": {"adapt": ("eta", "alpha", "memory")},
    "a rate each": {"adapt": ALL, "rates": (0.1, 0.2, 0.2, 0.4, 0.5, 1.5)},
    "rates to 2": {"rates": (0.2, 0.2, 0.2, 0.2, 2.0)},
    "rates to 2, all six, momentum, erase input": {
        "adapt": ALL,
        "rates": (0.2, 0.2, 0.2, 0.2, 0.2, 2.0),
        "momentum": "sum",
        "erase": "input",
    },
    "targets values": {"targets": "values", "targets_generators": "values"},
    "targets values, memory": {"targets": "values"},
    "targets values, generators": {"targets_generators": "values", "adapt": ALL},
    "decay to zero": {"decay_towards": "zero"},
    "decay to zero, read border": {"decay_towards": "zero", "read": "border", "adapt": ALL},
    "no damping": {"damp": False},
    "normalised": {"normalise": True},
    "normalised, targets values, memory": {"normalise": True, "targets": "values"},
    "normalised, raw values": {"normalise": True, "unit_values": False},
    "raw values as targets": {"unit_values": False, "targets": "values", "targets_generators": "values"},
    "gates of a token": {"gates": "token"},
    "stretched rates": {"rate_stretch": 0.1},
    "stretched rates, all six, momentum": {"rate_stretch": 0.2, "adapt": ALL, "momentum": "sum"},
    "a rate a head": {"rate_shares": (0.5, 1.0), "rate_stretch": 0.1},
    "momentum": {"momentum": "sum"},
    "momentum, exclusive, erase none": {"momentum": "sum", "read": "exclusive", "erase": "none"},
    "momentum, erase input, zero": {"momentum": "sum", "erase": "input", "decay_towards": "zero"},
    "momentum, read border": {"momentum": "sum", "read": "border"},
    "momentum, erase none": {"momentum": "sum", "erase": "none"},
    "momentum, erase none, all six": {"momentum": "sum", "erase": "none", "adapt": ALL, "targets": "values"},
    "Titans, towards the start": {"adapt": ("memory",), "targets": "values", "erase": "none", "momentum": "sum"},
    "Titans": {"adapt": ("memory",), "targets": "values", "erase": "none", "momentum": "sum", "decay_towards": "zero"},
    "momentum mean": {"momentum": "mean"},
    "momentum mean, exclusive, erase none": {"momentum": "mean", "read": "exclusive", "erase": "none"},
    "momentum mean, erase since the border": {"momentum": "mean", "erase_since": "border"},
    "momentum mean, erase none, all six": {"momentum": "mean", "erase": "none", "adapt": ALL},
    "Titans, mean": {"adapt": ("memory",), "targets": "values", "erase": "none", "momentum": "mean"},
    "linear": {"depth": 1},
    "linear, all six, exclusive": {"depth": 1, "adapt": ALL, "read": "exclusive"},
    "linear, dot": {"depth": 1, "objective": "dot"},
    "linear, dot, erase none": {"depth": 1, "objective": "dot", "erase": "none"},
    "linear, values": {"depth": 1, "targets": "values", "adapt": ("memory",)},
    "linear, values, memory": {"depth": 1, "targets": "values"},
    "linear, fresh": {"depth": 1, "gradient": "fresh"},
    "linear, fresh, erase none": {"depth": 1, "gradient": "fresh", "erase": "none"},
    "linear, fresh, zero": {"depth": 1, "gradient": "fresh", "decay_towards": "zero"},
    "linear, fresh, dot": {"depth": 1, "gradient": "fresh", "objective": "dot"},
    "linear, self-referential": {"depth": 1, "gradient": "self_referential"},
    "linear, self-referential, dot, zero": {
        "depth": 1,
        "gradient": "self_referential",
        "objective": "dot",
        "decay_towards": "zero",
    },
    "linear, self-referential, erase none": {"depth": 1, "gradient": "self_referential", "erase": "none"},
    "linear, erase since the border": {"depth": 1, "erase_since": "border"},
    "linear, momentum": {"depth": 1, "momentum": "sum"},
    "linear, momentum mean": {"depth": 1, "momentum": "mean", "erase": "none"},
    "linear, momentum, dot, zero": {"depth": 1, "momentum": "sum", "objective": "dot", "decay_towards": "zero"},
    "linear, border read": {"depth": 1, "read": "border"},
}
"""Name -> options of `make_rule`. Every option of WriteRule occurs; `default` is PLAIN, `Hope` the own defaults."""


BACKENDS = {"reference": memory_reference, "chunked": memory_chunked, "cpu": memory_cpu}


def supports(backend, rule):
    """Whether a backend computes a rule on this machine. A compiler that is there must work, or tests fail."""
    return backend is not memory_cpu or (memory_cpu.missing(rule) is None and cpu_library.compiler() is not None)


def backends_by_option(names, chunk=4, **common):
    """All pairs of a backend and an option that it has, as (backend, name), with readable ids."""
    rules = {name: make_rule(chunk, **(common | OPTIONS[name])) for name in names}
    pairs = [(backend, name) for backend in BACKENDS for name in names if supports(BACKENDS[backend], rules[name])]
    return {"argvalues": [(BACKENDS[backend], name) for backend, name in pairs], "ids": ["-".join(p) for p in pairs]}


class Problem:
    """Inputs with different content in every row, a learned start and a state that has already been written.

    `leaves` are what gradients are taken of; `arguments` makes a backend's arguments from them (keys and queries are
    scaled to unit length on the way, as the model does).
    """

    def __init__(self, rule, *, batch=2, tokens=37, heads=2, width=6, hidden=9, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        self.rule = rule
        self.batch = batch
        memories = len(rule.adapt)
        hidden_inner, hidden_outer = (width, 0) if rule.depth == 1 else (hidden, hidden)

        def normal(*shape, scale=1.0, shift=0.0):
            drawn = torch.randn(*shape, generator=generator, dtype=dtype) * scale + shift
            return drawn.requires_grad_()

        self.leaves = {
            "key": normal(batch, tokens, heads, width),
            "value": normal(batch, tokens, heads, width),
            "query": normal(batch, tokens, heads, width),
            "rate": normal(batch, tokens, heads),
            "decay": normal(batch, tokens, heads, shift=3.0),
            "start_inner": normal(heads, memories, hidden_inner, width, scale=width**-0.5),
            "start_outer": normal(heads, memories, width, hidden_outer, scale=0.3 * hidden**-0.5),
            "written_inner": normal(batch, heads, memories, hidden_inner, width, scale=0.1),
            "written_outer": normal(batch, heads, memories, width, hidden_outer, scale=0.1),
        }
        if "eta" in rule.adapt:
            self.leaves["readout_rate"] = normal(heads, width)
        if "alpha" in rule.adapt:
            self.leaves["readout_decay"] = normal(heads, width)
        if rule.normalise:
            self.leaves["gain"] = normal(heads, memories, width, scale=0.5)
        if rule.momentum:
            self.leaves["momentum_gate"] = normal(batch, tokens, heads)
            self.leaves["momentum_inner"] = normal(batch, heads, memories, hidden_inner, width, scale=0.1)
            self.leaves["momentum_outer"] = normal(batch, heads, memories, width, hidden_outer, scale=0.1)

    def arguments(self, leaves=None):
        x = leaves or self.leaves
        inputs = MemoryInputs(
            unit(x["key"]),
            unit(x["value"]) if self.rule.unit_values else x["value"],
            unit(x["query"]),
            x["rate"],
            x["decay"],
            x.get("momentum_gate"),
        )
        start = MemoryWeights(x["start_inner"], x["start_outer"])
        readout = GateReadout(x.get("readout_rate"), x.get("readout_decay"), x.get("gain"))
        written = MemoryWeights(x["written_inner"], x["written_outer"])
        momentum = MemoryWeights(x["momentum_inner"], x["momentum_outer"]) if self.rule.momentum else None
        return inputs, start, readout, MemoryState(written, written, momentum)

    def run(self, backend, *, position=0, resets=None, **options):
        return backend.self_modify(*self.arguments(), rule=self.rule, position=position, resets=resets, **options)


def results_of(output):
    """All tensors of an output that are not empty."""
    found = [output.reads, *output.state.border, *output.state.current, *(output.state.momentum or ())]
    return [x for x in (*found, output.rate, output.decay) if x.numel()]


def run_with_gradients(problem, backend, **kwargs):
    """Outputs, end state, and gradients of a fixed random functional of all of them with respect to every leaf."""
    results = results_of(problem.run(backend, **kwargs))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    leaves = [leaf for leaf in problem.leaves.values() if leaf.numel()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return results, gradients


def worst(found, expected):
    """Largest difference, relative to the largest element of each tensor."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(found, expected, strict=True)
    )

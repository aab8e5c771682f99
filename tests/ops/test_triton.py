"""The memories as Triton kernels, in Triton's interpreter, against the reference: outputs, states, every gradient."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nested_lm.ops.memory.state import MemoryCall
from nested_lm.ops.memory.triton import backend
from tests.ops.memory_problems import OPTIONS, Problem, make_rule

EXACT = 1e-10
SINGLE = 1e-5
HALF = {"output": 0.03, "gradient": 0.05}
"""Relative to the largest element. bfloat16 has 8 bits; a product's operands are rounded, its sums are not."""

NAMES = {
    "float64": (
        *("default", "all six, rates to 2, exclusive", "rows, heads and document starts"),
        *("shorter chunks of the generators", "longer chunks of the generators", "paper"),
        *("memory alone, raw values", "Titans, running mean"),
        *("linear", "linear, inner product", "odd chunk", "hidden width of half", "sections", "inverses"),
    ),
    "float32": ("Hope", "erase none", "Titans, running sum", "chunk of 64, width 64"),
    "bfloat16": ("bfloat16 operands", "bfloat16 operands, Titans"),
}
SEEDS = range(24)
QUICK_SEEDS = 2


@pytest.fixture(scope="module")
def interpreter():
    """A process that computes cases."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.ops.triton_cases"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        process.stdin.close()


def differences(process, name):
    print(name, file=process.stdin, flush=True)
    line = process.stdout.readline()
    assert line, "the process ended; its error stands above"
    return json.loads(line)


@pytest.mark.parametrize("name", NAMES["float64"])
def test_float64_equals_the_reference(interpreter, name):
    found = differences(interpreter, name)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("name", NAMES["float32"])
def test_float32_is_near_the_reference(interpreter, name):
    found = differences(interpreter, name)
    assert max(found.values()) < SINGLE, found


@pytest.mark.parametrize("name", NAMES["bfloat16"])
def test_bfloat16_operands_stay_in_their_budget(interpreter, name):
    found = differences(interpreter, name)
    assert {k: v for k, v in found.items() if not v < HALF[k.split()[0]]} == {}


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < QUICK_SEEDS else pytest.mark.slow) for seed in SEEDS]
)
def test_random_rules_equal_the_reference(interpreter, seed):
    found = differences(interpreter, f"random {seed}")
    assert max(found.values()) < EXACT, found


SUPPORTED = {
    *("default", "Hope", "erase input", "erase none", "erase before decay", "erase since the border"),
    *("erase since the border, memory", "erase since the border, generators", "erase since the border, input"),
    *("erase since the border, all six, rates to 2", "erase since the border, before decay", "read exclusive"),
    *("read border", "adapt all six", "adapt memory only", "adapt v, memory", "adapt k, q, memory"),
    *("adapt eta, alpha, memory", "a rate each", "rates to 2", "targets values", "targets values, memory"),
    *("targets values, generators", "no damping", "raw values as targets", "gates of a token", "stretched rates"),
    *("a rate a head", "momentum, erase none", "momentum, erase none, all six", "Titans, towards the start"),
    *("momentum mean, erase none, all six", "Titans, mean", "linear", "linear, all six, exclusive", "linear, dot"),
    *("linear, dot, erase none", "linear, values", "linear, values, memory", "linear, erase since the border"),
    *("linear, momentum mean", "linear, border read"),
}
"""Options that must have kernels: a change that sends one of them to torch is a loss of speed that no number shows."""


@pytest.mark.parametrize("name", OPTIONS)
def test_which_rules_have_kernels(name):
    found = backend.missing(make_rule(4, **OPTIONS[name]))
    assert (found is None) == (name in SUPPORTED), found


PLAIN = MemoryCall()


def reason(call=PLAIN, *, chunk=4, width=16, hidden=16, dtype=torch.float32, **options):
    problem = Problem(make_rule(chunk, **options), tokens=2, width=width, hidden=hidden, dtype=dtype)
    inputs, start, *_ = problem.arguments()
    return backend.unsupported(problem.rule, inputs.key, start, call)


class TestWhatItRefuses:
    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def test_nothing_of_the_default(self):
        assert reason() is None

    def test_other_widths(self):
        assert "head width 6 with hidden width 16" in reason(width=6)
        assert "hidden width 24" in reason(hidden=24)

    def test_long_chunks(self):
        assert "the shorter of its two chunks has 128 tokens" in reason(chunk=128)

    def test_half_precision_states(self):
        assert "states are float32" in reason(dtype=torch.bfloat16)

    def test_second_order_and_branches(self):
        assert "have no gradients" in reason(MemoryCall(differentiable_twice=True))
        assert "branches" in reason(MemoryCall(final=True, branches=torch.zeros(2, 2)))

    def test_processors_when_not_interpreted(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "on `cpu`" in reason()

    def test_old_gpus(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        start = Problem(make_rule(4), tokens=2, width=16, hidden=16, dtype=torch.float32).arguments()[1]
        key = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
        assert "sm_75" in backend.unsupported(make_rule(4), key, start, MemoryCall())

    @pytest.mark.parametrize(("installed", "words"), [(None, "not installed"), ("3.2.0", "need 3.6")])
    def test_a_missing_or_old_triton(self, monkeypatch, installed, words):
        def version(name):
            if installed is None:
                raise backend.PackageNotFoundError(name)
            return installed

        monkeypatch.setattr(backend, "version", version)
        assert words in reason()

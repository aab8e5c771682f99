"""The memories in C: what `test_memory.py` does not ask of every backend. Sizes, threads, precision, what is kept."""

import ctypes
import re

import pytest
import torch

from nested_lm.nn.state import map_tensors
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.cpu import backend as memory_cpu
from nested_lm.ops.memory.cpu import library as cpu_library
from nested_lm.ops.memory.state import MemoryInputs, MemoryWeights
from tests.ops.memory_problems import ALL, OPTIONS, Problem, make_rule, results_of, run_with_gradients, worst
from tests.ops.test_memory import LIMIT

pytestmark = pytest.mark.skipif(cpu_library.compiler() is None, reason="there is no C compiler")

FLOAT32 = 5e-6
"""Relative, float32 against float64: 2^-24 over the sums of a few hundred chained products. Measured: 2e-6, and half of
that in the chunk form, whose products are summed in blocks."""

SUPPORTED = {
    "default",
    "Hope",
    "erase input",
    "erase none",
    "erase since the border",
    "erase since the border, memory",
    "erase since the border, generators",
    "erase since the border, input",
    "erase since the border, all six, rates to 2",
    "read exclusive",
    "adapt all six",
    "adapt memory only",
    "adapt v, memory",
    "adapt k, q, memory",
    "adapt eta, alpha, memory",
    "a rate each",
    "rates to 2",
    "targets values",
    "targets values, memory",
    "targets values, generators",
    "stretched rates",
    "a rate a head",
    "momentum, erase none",
    "momentum, erase none, all six",
    "momentum mean, erase none, all six",
    "Titans, towards the start",
    "Titans, mean",
}
"""Options that must run in C: a change that sends one of them to torch is a loss of speed that no number shows."""


def reason(problem):
    inputs, start, *_ = problem.arguments()
    return memory_cpu.unsupported(problem.rule, inputs.key, start)


@pytest.mark.parametrize("name", OPTIONS)
def test_which_options_it_has(name):
    found = reason(Problem(make_rule(4, **OPTIONS[name]), tokens=2))
    assert (found is None) == (name in SUPPORTED), found


class TestWhatItRefuses:
    def test_other_number_types(self):
        assert "not in torch.bfloat16" in reason(Problem(make_rule(4), tokens=2, dtype=torch.bfloat16))

    def test_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast is on" in reason(Problem(make_rule(4), tokens=2))

    def test_other_devices(self):
        problem = Problem(make_rule(4), tokens=2)
        problem.leaves = {name: leaf.detach().to("meta") for name, leaf in problem.leaves.items()}
        assert "on `meta`" in reason(problem)

    def test_tensors_without_values(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            assert "no values" in reason(Problem(make_rule(4), tokens=2))


def in_float32(problem):
    problem.leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in problem.leaves.items()}
    return problem


def assert_close(found, expected, limit):
    """Of results and gradients, relative to the largest element of each."""
    for these, those in zip(found, expected, strict=True):
        assert worst([x.double() for x in these], [x.double() for x in those]) < limit


SIZES = [  # batch, tokens, heads, width, hidden, chunk, generators' chunk, position
    (1, 1, 1, 2, 1, 1, 1, 0),
    (2, 9, 1, 2, 7, 4, 4, 0),
    (1, 9, 3, 7, 1, 4, 4, 1),
    (3, 17, 2, 8, 8, 8, 8, 0),
    (1, 19, 1, 9, 15, 9, 3, 2),
    (2, 21, 1, 15, 17, 5, 10, 4),
    (1, 18, 2, 16, 16, 16, 16, 0),
    (1, 22, 1, 17, 33, 17, 17, 16),
    (1, 23, 1, 31, 9, 23, 23, 0),
    (1, 14, 1, 33, 40, 33, 11, 30),
    (1, 12, 5, 3, 2, 64, 64, 60),
]


SOME = ["adapt all six", "adapt memory only", "Hope", "momentum, erase none, all six", "Titans, mean"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sizes_around_those_of_the_vectors_equal_reference(size, name):
    batch, tokens, heads, width, hidden, chunk, generators, position = size
    rule = make_rule(chunk, generators, **({"rate_stretch": 0.1} | OPTIONS[name]))
    problem = Problem(rule, batch=batch, tokens=tokens, heads=heads, width=width, hidden=hidden)
    expected = run_with_gradients(problem, memory_reference, position=position)
    assert_close(run_with_gradients(problem, memory_cpu, position=position), expected, LIMIT)


@pytest.mark.parametrize(
    "name", ["default", "Hope", "adapt all six", "erase none", "read exclusive", "a rate each", "momentum, erase none"]
)
@pytest.mark.parametrize(("width", "hidden", "chunk"), [(6, 9, 8), (16, 32, 16), (20, 12, 5)])
def test_float32_is_near_float64(name, width, hidden, chunk):
    """Float64 of the chunk form, which is held to the reference elsewhere, from the same rounded numbers."""
    rounded = in_float32(Problem(make_rule(chunk, **OPTIONS[name]), tokens=37, width=width, hidden=hidden))
    exact = Problem(rounded.rule, tokens=37, width=width, hidden=hidden)
    exact.leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in rounded.leaves.items()}
    assert_close(
        run_with_gradients(rounded, memory_cpu, position=3),
        run_with_gradients(exact, memory_chunked, position=3),
        FLOAT32,
    )


def test_float32_activations_beside_float64_weights_are_computed_in_float64():
    problem = Problem(make_rule(4), tokens=11)
    problem.leaves = {
        name: leaf if name.startswith(("start", "written")) else leaf.detach().float().requires_grad_()
        for name, leaf in problem.leaves.items()
    }
    found, expected = (run_with_gradients(problem, backend) for backend in (memory_cpu, memory_chunked))
    assert {x.dtype for x in found[0]} == {torch.float64}
    assert [x.dtype for x in found[1]] == [leaf.dtype for leaf in problem.leaves.values()]
    assert worst(found[0], expected[0]) < LIMIT
    assert worst(found[1], expected[1]) < FLOAT32  # rounded to the type of the leaf


def identical(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestBits:
    problem = Problem(make_rule(4, adapt=ALL), batch=3, tokens=21, heads=3, width=5, hidden=6, dtype=torch.float32)

    def run(self, **options):
        results, gradients = run_with_gradients(self.problem, memory_cpu, position=2, **options)
        return [*results, *gradients]

    @pytest.mark.parametrize("threads", [2, 4, 64])  # 9 rows and heads, so that shares differ and some are empty
    def test_do_not_depend_on_the_number_of_threads(self, threads):
        one = self.run()
        torch.set_num_threads(threads)
        try:
            several = self.run()
        finally:
            torch.set_num_threads(1)
        assert identical(one, several)

    def test_do_not_change_from_call_to_call(self):
        assert identical(self.run(), self.run())

    def test_do_not_depend_on_whether_a_gradient_will_be_taken(self):
        with torch.no_grad():
            without = results_of(self.problem.run(memory_cpu, position=2))
        assert identical(without, results_of(self.problem.run(memory_cpu, position=2)))
        assert not any(x.requires_grad for x in without)

    def test_do_not_depend_on_recompute(self):
        assert identical(self.run(), self.run(recompute=True))

    def test_of_a_row_and_a_head_do_not_depend_on_the_others(self):
        inputs, start, readout, state = self.problem.arguments()
        whole = self.problem.run(memory_cpu)
        row, heads = slice(1, 2), slice(2, 3)

        def part(weights):
            return MemoryWeights(*(x[row, heads] for x in weights))

        alone = memory_cpu.self_modify(
            MemoryInputs(*(None if x is None else x[row, :, heads] for x in inputs)),
            MemoryWeights(*(x[heads] for x in start)),
            readout._replace(rate=readout.rate[heads], decay=readout.decay[heads]),
            state._replace(border=part(state.border), current=part(state.current)),
            rule=self.problem.rule,
            position=0,
            resets=None,
        )
        assert torch.equal(alone.reads, whole.reads[row, :, heads])
        assert identical(alone.state.current, part(whole.state.current))

    def test_of_a_second_backward_are_those_of_the_first(self):
        """Backward reads what forward kept and leaves it as it is."""
        total = sum(x.square().sum() for x in results_of(self.problem.run(memory_cpu)))
        leaves = list(self.problem.leaves.values())
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        assert identical(first, torch.autograd.grad(total, leaves))

    def test_of_the_arguments_stay_as_they_are(self):
        before = [leaf.detach().clone() for leaf in self.problem.leaves.values()]
        self.run()
        assert identical(before, [leaf.detach() for leaf in self.problem.leaves.values()])


def test_tensors_of_any_layout_are_taken():
    problem = Problem(make_rule(4), batch=2, tokens=11, heads=3, width=4, hidden=5)
    inputs, start, readout, state = problem.arguments()
    expected = problem.run(memory_cpu)

    def strided(x):
        return None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1)

    found = memory_cpu.self_modify(
        MemoryInputs(*map(strided, inputs)),
        MemoryWeights(*map(strided, start)),
        readout._replace(rate=strided(readout.rate)),
        state._replace(border=MemoryWeights(*map(strided, state.border))),
        rule=problem.rule,
        position=0,
        resets=None,
    )
    assert identical(results_of(found), results_of(expected))


class TestGradientsOfSome:
    problem = Problem(make_rule(4, adapt=ALL), tokens=11, width=3, hidden=4)

    @pytest.mark.parametrize("index", range(7))  # reads, border (2), current (2), rate, decay
    def test_results_alone(self, index):
        """The others are not used, so that nothing is sent back through them."""
        leaves = [leaf for leaf in self.problem.leaves.values() if leaf.numel()]
        found = []
        for backend in (memory_reference, memory_cpu):
            result = results_of(self.problem.run(backend))[index]
            weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
            total = (result * weight).sum()
            found.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        pairs = [(a, b) for a, b in zip(found[1], found[0], strict=True) if a.any() or b.any()]
        assert pairs
        assert worst(*zip(*pairs, strict=True)) < LIMIT

    @pytest.mark.parametrize("name", ["key", "decay", "start_outer", "written_inner", "readout_rate"])
    def test_arguments_alone(self, name):
        """The others need none, as in a model whose slow weights are frozen."""
        _, everything = run_with_gradients(self.problem, memory_cpu)
        expected = dict(zip(self.problem.leaves, everything, strict=True))[name]
        alone = Problem(self.problem.rule, tokens=11, width=3, hidden=4)
        alone.leaves = {key: leaf.detach().requires_grad_(key == name) for key, leaf in self.problem.leaves.items()}
        results = results_of(alone.run(memory_cpu))
        generator = torch.Generator().manual_seed(1)  # the same functional
        weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in results]
        total = sum((x * weight).sum() for x, weight in zip(results, weights, strict=True))
        [found] = torch.autograd.grad(total, [alone.leaves[name]])
        assert worst([found], [expected]) < 1e-14

    def test_nothing_is_kept_where_nothing_needs_one(self):
        still = Problem(self.problem.rule, tokens=11, width=3, hidden=4)
        still.leaves = {key: leaf.detach() for key, leaf in self.problem.leaves.items()}
        assert still.run(memory_cpu).reads.grad_fn is None


class TestWhatIsKept:
    """Weights before a piece, not what the piece computed."""

    def kept(self, chunk, tokens, position=0):
        problem = Problem(make_rule(chunk), batch=1, tokens=tokens, heads=1, width=8, hidden=8)
        function = problem.run(memory_cpu, position=position).reads.grad_fn
        numbers = [x.numel() for x in function.saved_tensors if x is not None]
        given = sum(leaf.numel() for leaf in problem.leaves.values())
        given += sum(problem.leaves[name].numel() for name in ("written_inner", "written_outer"))  # border and current
        return (sum(numbers) - given) / (2 * 5 * 8 * 8)  # in weights of all memories

    def test_weights_once_a_chunk(self):
        assert self.kept(16, 64) == 2 + 3  # the first piece may have a border elsewhere
        assert self.kept(16, 64, position=3) == 2 + 4

    def test_short_chunks_share_them(self):
        assert self.kept(1, 64) == 5
        assert self.kept(4, 64) == 5
        assert self.kept(8, 64) == 2 + 7

    @pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
    @pytest.mark.parametrize("generators", [1, 2, 3])
    def test_gradients_where_they_are_shared(self, chunk, generators):
        """More pieces than share weights, borders of both kinds between them, document starts inside a group.

        Held to the chunk form, which is held to the reference elsewhere, for the reference takes a minute here.
        """
        rule = make_rule(chunk, chunk * generators, adapt=ALL)
        problem = Problem(rule, tokens=53, heads=1, width=3, hidden=4)
        resets = torch.zeros(2, 53, dtype=torch.bool)
        resets[0, rule.alignment * 2 - 1] = resets[1, rule.alignment - 1] = True  # the stream is one token old
        expected = run_with_gradients(problem, memory_chunked, position=1, resets=resets)
        assert_close(run_with_gradients(problem, memory_cpu, position=1, resets=resets), expected, LIMIT)


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma")])
def test_processors_with_narrower_vectors_get_the_same_numbers(flags, monkeypatch, tmp_path):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("not a processor with vectors of 32 bytes")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_library, "FLAGS", (*cpu_library.FLAGS, *flags))
    monkeypatch.setattr(cpu_library, "load", cpu_library.load.__wrapped__)
    problem = Problem(make_rule(9, 3, adapt=ALL), tokens=23, width=7, hidden=10)
    expected = run_with_gradients(problem, memory_chunked)
    assert_close(run_with_gradients(problem, memory_cpu), expected, LIMIT)
    assert_close(run_with_gradients(in_float32(problem), memory_cpu), expected, FLOAT32)


def test_work_space_that_cannot_be_had_is_an_error(monkeypatch):
    class Full:
        def forward(*arguments):
            return 1

    problem = Problem(make_rule(4), tokens=5)
    for leaf in problem.leaves.values():
        leaf.requires_grad_(False)
    monkeypatch.setattr(cpu_library, "load", lambda dtype: Full)
    with pytest.raises(MemoryError, match="found no room for its work space"):
        problem.run(memory_cpu)


C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "pointer": ctypes.c_void_p}


class TestTheLastCall:
    """`finish`: what `self_modify` reads, bit for bit, and no state after it."""

    @pytest.mark.parametrize("name", sorted(SUPPORTED))
    @pytest.mark.parametrize("tokens", [3, 11])  # within a chunk; over a border
    @torch.no_grad()
    def test_reads_are_those_of_other_calls(self, name, tokens):
        problem = Problem(make_rule(4, **OPTIONS[name]), batch=3, tokens=tokens, heads=3, width=5, hidden=6)
        inputs, start, readout, state = problem.arguments()
        rows = torch.tensor([2, 0, 0])
        for chosen in (None, rows):
            here = state if chosen is None else map_tensors(state, lambda x: x.index_select(0, rows))
            expected = memory_cpu.self_modify(inputs, start, readout, here, rule=problem.rule, position=1, resets=None)
            found = memory_cpu.finish(
                inputs, start, readout, state, rule=problem.rule, position=1, resets=None, rows=chosen, branches=None
            )
            assert found.state is state
            assert identical((found.reads, found.rate, found.decay), (expected.reads, expected.rate, expected.decay))

    @pytest.mark.parametrize("threads", [2, 5, 64])
    @torch.no_grad()
    def test_of_forks_over_several_threads(self, threads):
        problem = Problem(make_rule(4), batch=5, tokens=3, heads=3, width=4, hidden=5)
        inputs, start, readout, state = problem.arguments()
        rows = torch.tensor([0, 0, 1, 1, 1])
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            try:
                output = memory_cpu.finish(
                    inputs, start, readout, state, rule=problem.rule, position=1, resets=None, rows=rows, branches=None
                )
            finally:
                torch.set_num_threads(1)
            found.append(output.reads)
        assert torch.equal(*found)


@torch.no_grad()
def test_what_would_be_read_beyond_its_end_is_not():
    problem = Problem(make_rule(4), batch=3, tokens=3, heads=2, width=4, hidden=5)
    inputs, start, readout, state = problem.arguments()
    call = {"rule": problem.rule, "position": 0, "resets": None}
    fewer = map_tensors(state, lambda x: x[:2])
    with pytest.raises(AssertionError, match="a stream for each row of tokens"):
        memory_cpu.self_modify(inputs, start, readout, fewer, **call)
    with pytest.raises(AssertionError, match="a stream for each row of tokens"):
        memory_cpu.finish(inputs, start, readout, state, **call, rows=torch.tensor([0, 1]), branches=None)
    with pytest.raises(IndexError, match="allowed are 0 to 1"):
        memory_cpu.finish(inputs, start, readout, fewer, **call, rows=torch.tensor([0, 1, 2]), branches=None)
    narrow = map_tensors(state, lambda x: x[..., :-1])
    with pytest.raises(AssertionError, match="a state of shapes"):
        memory_cpu.self_modify(inputs, start, readout, narrow, **call)


class TestTheStruct:
    """ctypes lays a call out by its own list of fields: the C must have the same, in the same order."""

    def declared(self):
        source = (cpu_library.SOURCES / "memory.c").read_text(encoding="utf-8")
        body = re.search(r"typedef struct \{([^{}]*)\} Call;", source).group(1)
        found = []
        for declaration in re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(";"):
            kind, _, names = declaration.strip().removeprefix("const ").partition(" ")
            for name in filter(None, map(str.strip, names.split(","))):
                found.append((name.removeprefix("*"), C_TYPES["pointer" if name.startswith("*") else kind]))
        return found

    def test_fields_agree(self):
        declared = self.declared()
        assert len(declared) > 50
        assert declared == list(memory_cpu._Call._fields_)

    def test_gradients_come_in_the_order_of_the_tensors(self):
        """`backward` returns them by position."""
        names = [name.removeprefix("g_").removeprefix("first_") for name in memory_cpu._GRADIENTS]
        assert names == list(memory_cpu._TENSORS)

"""Every backend against the token-by-token reference: outputs, states and every outer gradient, in float64."""

import itertools

import pytest
import torch

from nested_lm.ops.memory import backward as memory_backward
from nested_lm.ops.memory import chunk as memory_chunk
from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory import reference as memory_reference
from nested_lm.ops.memory.rule import MEMORIES, WriteRates, WriteRule
from nested_lm.ops.memory.state import MemoryInputs, MemoryWeights, zero_state
from tests.ops.memory_problems import (
    BACKENDS,
    OPTIONS,
    Problem,
    backends_by_option,
    make_rule,
    results_of,
    run_with_gradients,
    supports,
    worst,
)

LIMIT = 1e-10  # relative, float64: rounding of a few hundred chained products, with room for other machines


def assert_equal_to_reference(problem, **kwargs):
    """Of every other backend that has the rule."""
    expected, expected_gradients = run_with_gradients(problem, memory_reference, **kwargs)
    for name, backend in BACKENDS.items():
        if backend is not memory_reference and supports(backend, problem.rule):
            found, gradients = run_with_gradients(problem, backend, **kwargs)
            assert worst(found, expected) < LIMIT, name
            assert worst(gradients, expected_gradients) < LIMIT, name


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_reference(name):
    problem = Problem(make_rule(4, **OPTIONS[name]), tokens=11, width=3, hidden=4)
    assert_equal_to_reference(problem, position=3)


def test_every_option_of_the_rule_is_among_those_compared():
    covered = {key for options in OPTIONS.values() for key in options} | {"chunk", "chunk_generators"}
    assert set(WriteRule.model_fields) == covered


@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
@pytest.mark.parametrize("erase", ["both", "input"])
@pytest.mark.parametrize(("chunk", "tokens", "position"), [(1, 5, 0), (4, 11, 3), (16, 37, 5)])
def test_every_backend_equals_reference(read, erase, chunk, tokens, position):
    problem = Problem(make_rule(chunk, erase=erase, read=read), tokens=tokens, width=4, hidden=5)
    assert_equal_to_reference(problem, position=position)


TWO_SIZES = ["default", "Hope", "adapt all six", "erase since the border, all six, rates to 2", "momentum"]
TWO_SIZES += [
    "momentum, erase none, all six",
    "momentum mean, erase none, all six",
    "linear, self-referential",
    "read border",
]


@pytest.mark.parametrize("name", TWO_SIZES)
@pytest.mark.parametrize(("chunk", "chunk_generators"), [(2, 8), (8, 2), (1, 4), (6, 3)])
def test_two_chunk_sizes_equal_reference(name, chunk, chunk_generators):
    problem = Problem(make_rule(chunk, chunk_generators, **OPTIONS[name]), tokens=13, width=3, hidden=4)
    assert_equal_to_reference(problem, position=5)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (2.0, 0.2), (0.2, 2.0)])
def test_rates_of_memory_and_generators_are_separate(rates):
    problem = Problem(make_rule(4, rate_memory=rates[0], rate_generators=rates[1]), tokens=11)
    assert_equal_to_reference(problem)


RESET = ["default", "Hope", "adapt all six", "Titans", "momentum, erase none, all six", "linear, fresh, zero"]
RESET += ["momentum mean, erase none, all six"]


@pytest.mark.parametrize("name", RESET)
@pytest.mark.parametrize("chunk_generators", [4, 2])
def test_resets_on_borders_equal_reference(name, chunk_generators):
    problem = Problem(make_rule(4, chunk_generators, **OPTIONS[name]), tokens=12, width=3, hidden=4)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 4] = resets[1, 8] = resets[1, 0] = True
    assert_equal_to_reference(problem, resets=resets)


@pytest.mark.parametrize("name", ["Hope", "momentum, erase none, all six", "Titans, towards the start", "Titans, mean"])
@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_weights_that_are_kept_for_several_groups_of_pieces(name, chunk):
    """The C keeps weights for every 16 tokens of short chunks, and for every chunk of 8: several of each."""
    problem = Problem(make_rule(chunk, **OPTIONS[name]), tokens=43, width=3, hidden=4)
    assert_equal_to_reference(problem, position=1)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("given", [True, False])
def test_momentum_of_the_rule_and_of_the_state_must_agree(backend, given):
    momentum, plain = (
        Problem(make_rule(4, **OPTIONS[name]), tokens=4) for name in ("momentum, erase none", "erase none")
    )
    inputs, start, readout, _ = (momentum if given else plain).arguments()
    state = zero_state(start, momentum.batch, momentum=given)
    rule = (plain if given else momentum).rule
    with pytest.raises(ValueError, match=r"momentum=(True|False)"):
        backend.self_modify(inputs, start, readout, state, rule=rule, position=0, resets=None)


@pytest.mark.parametrize("name", ["default", "momentum"])
def test_recomputation_changes_nothing(name):
    problem = Problem(make_rule(8, **OPTIONS[name]), tokens=20)
    expected, expected_gradients = run_with_gradients(problem, memory_chunked)
    found, gradients = run_with_gradients(problem, memory_chunked, recompute=True)
    for a, b in itertools.chain(zip(found, expected, strict=True), zip(gradients, expected_gradients, strict=True)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["default", "Hope", "adapt all six", "adapt memory only", "erase none"])
def test_hand_written_backward_equals_autograd(name):
    problem = Problem(make_rule(8, **OPTIONS[name]), tokens=20)
    assert memory_backward.has_closed_backward(problem.rule)
    _, by_hand = run_with_gradients(problem, memory_chunked)
    _, by_autograd = run_with_gradients(problem, memory_chunked, differentiable_twice=True)
    assert worst(by_hand, by_autograd) < LIMIT


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["default", "adapt all six", "Titans", "linear, fresh", "normalised"])
def test_gradients_have_gradients(name, recompute):
    problem = Problem(make_rule(4, **OPTIONS[name]), batch=1, tokens=6, heads=1, width=2, hidden=3)
    names = [name for name, leaf in problem.leaves.items() if leaf.numel()]

    def run(*values):
        arguments = problem.arguments(problem.leaves | dict(zip(names, values, strict=True)))
        options = {"recompute": recompute, "differentiable_twice": True}
        found = memory_chunked.self_modify(*arguments, rule=problem.rule, position=0, resets=None, **options)
        return found.reads, *found.state.current

    leaves = [problem.leaves[name] for name in names]
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_the_hand_written_backward_has_none_and_says_so():
    problem = Problem(make_rule(4), tokens=6)
    reads = problem.run(memory_chunked).reads
    (gradient,) = torch.autograd.grad(reads.square().sum(), problem.leaves["key"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_chunk_of_one_is_the_paper_with_fresh_gradients():
    """With a border after every token, gradients at the border are gradients at the fresh weights (eq. 88)."""
    fresh = Problem(make_rule(1, depth=1, gradient="fresh", rate_memory=0.5), tokens=9)
    border = Problem(make_rule(1, depth=1, gradient="border", rate_memory=0.5), tokens=9)
    assert worst(results_of(fresh.run(memory_chunked)), results_of(border.run(memory_chunked))) < LIMIT


SOME = ["default", "Hope", "adapt all six", "momentum", "Titans", "Titans, towards the start"]
SOME += [
    "momentum, erase none, all six",
    "momentum mean, erase none, all six",
    "linear, self-referential",
    "normalised",
    "read border",
]


class TestEveryBackend:
    @pytest.mark.parametrize(("backend", "name"), **backends_by_option(SOME))
    def test_split_anywhere_gives_the_same_stream(self, backend, name):
        problem = Problem(make_rule(4, **OPTIONS[name]), tokens=10, width=3, hidden=4)
        inputs, start, readout, state = problem.arguments()
        common = {"rule": problem.rule, "resets": None}
        whole = backend.self_modify(inputs, start, readout, state, position=0, **common)
        for cut in (3, 4, 9):
            first_half = MemoryInputs(*(None if x is None else x[:, :cut] for x in inputs))
            second_half = MemoryInputs(*(None if x is None else x[:, cut:] for x in inputs))
            first = backend.self_modify(first_half, start, readout, state, position=0, **common)
            second = backend.self_modify(second_half, start, readout, first.state, position=cut, **common)
            assert worst([torch.cat([first.reads, second.reads], dim=1)], [whole.reads]) < LIMIT
            assert worst(results_of(second)[1:-2], results_of(whole)[1:-2]) < LIMIT

    @pytest.mark.parametrize(("backend", "name"), **backends_by_option(SOME))
    def test_rows_do_not_see_each_other(self, backend, name):
        problem = Problem(make_rule(4, **OPTIONS[name]), tokens=7, width=3, hidden=4)
        before = problem.run(backend)
        inputs, start, readout, state = problem.arguments()
        changed = MemoryInputs(*(None if x is None else torch.cat([x[:1] * 0.5, x[1:]]) for x in inputs))
        after = backend.self_modify(changed, start, readout, state, rule=problem.rule, position=0, resets=None)
        assert not torch.allclose(after.reads[0], before.reads[0])
        assert worst([after.reads[1]], [before.reads[1]]) < 1e-14

    @pytest.mark.parametrize(("backend", "name"), **backends_by_option([*SOME, "read exclusive"]))
    def test_future_tokens_do_not_change_past_reads(self, backend, name):
        problem = Problem(make_rule(4, **OPTIONS[name]), tokens=11, width=3, hidden=4)
        before = problem.run(backend)
        inputs, start, readout, state = problem.arguments()
        parts = (None if x is None else torch.cat([x[:, :6], x[:, 6:] * 0.5], dim=1) for x in inputs)
        changed = MemoryInputs(*parts)
        after = backend.self_modify(changed, start, readout, state, rule=problem.rule, position=0, resets=None)
        assert worst([after.reads[:, :6]], [before.reads[:, :6]]) < 1e-14
        assert not torch.allclose(after.reads[:, 6:], before.reads[:, 6:])

    @pytest.mark.parametrize(("backend", "name"), **backends_by_option([*SOME[:3], "linear, self-referential"]))
    def test_gradient_through_the_writes_is_a_finite_difference(self, backend, name):
        problem = Problem(make_rule(4, **OPTIONS[name]), batch=1, tokens=6, heads=1, width=2, hidden=3)
        names = [key for key, leaf in problem.leaves.items() if leaf.numel()]

        def reads(*leaves):
            arguments = problem.arguments(problem.leaves | dict(zip(names, leaves, strict=True)))
            return backend.self_modify(*arguments, rule=problem.rule, position=0, resets=None).reads

        leaves = tuple(problem.leaves[key] for key in names)
        assert torch.autograd.gradcheck(reads, leaves, fast_mode=True, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize(("backend", "name"), **backends_by_option(["default", "adapt all six"]))
    def test_zero_rate_writes_nothing_and_keeps_the_start(self, backend, name):
        problem = Problem(make_rule(4, **OPTIONS[name]), tokens=11)
        inputs, start, readout, _ = problem.arguments()
        silent = inputs._replace(rate=torch.full_like(inputs.rate, -1e4))
        state = zero_state(start, 2)
        out = backend.self_modify(silent, start, readout, state, rule=problem.rule, position=0, resets=None)
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in out.state.current)


LONG = {
    "default": {},
    "Hope": OPTIONS["Hope"],
    "Titans": OPTIONS["Titans, towards the start"] | {"rates": (0.1,)},
    "all six": {"adapt": MEMORIES},
    "rates to 2": {"rate_memory": 2.0},
    "linear, self-referential": {"depth": 1, "gradient": "self_referential", "rate_memory": 1.0},
    "momentum": {"momentum": "sum", "rate_memory": 0.1, "rate_generators": 0.1},
    "Titans, mean": OPTIONS["Titans, mean"] | {"rates": (0.12,)},
}


def long_rule(name):
    return make_rule(16, **({"rate_memory": 1.0, "rate_generators": 1.0} | LONG[name]))


FAST = {name: backend for name, backend in BACKENDS.items() if backend is not memory_reference}


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(backend, name, id=f"{called}-{name}")
        for called, backend in FAST.items()
        for name in LONG
        if supports(backend, long_rule(name))
    ],
)
@pytest.mark.parametrize("stream", ["independent", "repeated"])
def test_memory_is_alive_and_bounded_after_8k_tokens(stream, backend, name):
    rule = long_rule(name)
    problem = Problem(rule, batch=1, tokens=8192, heads=1, width=16, hidden=16, dtype=torch.float32)
    inputs, start, readout, _ = problem.arguments()
    if rule.depth == 1:  # linear memories start near the identity, as the model initialises them
        start = MemoryWeights(0.1 * start.inner + torch.eye(16), start.outer)
    if stream == "repeated":
        inputs = MemoryInputs(*(None if x is None else x[:, :1].expand_as(x) for x in inputs))
    inputs = inputs._replace(decay=torch.full_like(inputs.decay, 7.6))
    state = zero_state(start, 1, momentum=bool(rule.momentum))
    with torch.no_grad():
        out = backend.self_modify(inputs, start, readout, state, rule=rule, position=0, resets=None)
    for tensor in out.state.current:
        if not tensor.numel():
            continue
        norms = tensor.flatten(3).norm(dim=-1)
        assert torch.isfinite(norms).all()
        assert (norms > 1e-3).all()
        assert (norms < 100).all()


@pytest.mark.parametrize("horizon", [7.6, 4.0])  # logit of the retention: 0.9995, 0.982
@pytest.mark.parametrize("chunk", [1, 8])
def test_erase_and_gradient_together_never_overshoot(monkeypatch, chunk, horizon):
    """Rates near 2 in a steep memory; as a control, damping that forgets the erase."""
    rule = make_rule(chunk, adapt=("memory",), rates=(2.0,))
    problem = Problem(rule, batch=1, tokens=512, heads=1, width=16, hidden=16)
    inputs, start, readout, _ = problem.arguments()
    inputs = inputs._replace(rate=torch.full_like(inputs.rate, 6.0), decay=torch.full_like(inputs.decay, horizon))
    start = MemoryWeights(start.inner, 10 * start.outer)

    def largest(backend):
        with torch.no_grad():
            state = zero_state(start, 1)
            out = backend.self_modify(inputs, start, readout, state, rule=rule, position=0, resets=None)
        return max(tensor.norm().item() for tensor in out.state.current)

    for backend in FAST.values():
        if supports(backend, rule):
            assert largest(backend) < 1
    monkeypatch.setattr(memory_chunk, "room_beside_erase", lambda rate, rule: torch.ones_like(rate))
    assert largest(memory_chunked) > 50


def test_a_repeated_key_at_rate_2_does_not_grow_where_memory_fades():
    """As a control, the printed eq. 88 with its eigenvalue alpha - eta, past the rule's own check."""
    rule = make_rule(4, adapt=("memory",), rates=(2.0,), rate_stretch=0.1)
    problem = Problem(rule, batch=1, tokens=600, heads=1, width=8, hidden=8)
    inputs, start, readout, _ = problem.arguments()
    inputs = MemoryInputs(
        *(None if x is None else x[:, :1].expand_as(x) for x in inputs[:3]),
        torch.full_like(inputs.rate, 9.0),
        torch.full_like(inputs.decay, 4.0),
        None,
    )

    def largest(rule, backend):
        with torch.no_grad():
            state = memory_reference.self_modify(
                MemoryInputs(*(None if x is None else x[:, :1] for x in inputs)), start, readout, zero_state(start, 1),
                rule=make_rule(4, adapt=("memory",), rates=(1.0,)), position=0, resets=None,
            ).state  # fmt: skip
            rest = MemoryInputs(*(None if x is None else x[:, 1:] for x in inputs))
            out = backend.self_modify(rest, start, readout, state, rule=rule, position=1, resets=None)
        return max(tensor.norm().item() for tensor in out.state.current)

    for backend in FAST.values():
        if supports(backend, rule):
            assert largest(rule, backend) < 10
    printed = make_rule(4, adapt=("memory",), rates=(1.0,), rate_stretch=0.1, erase_after_decay=False)
    object.__setattr__(printed, "rates", WriteRates(memory=2.0))
    assert largest(printed, memory_chunked) > 1000


@pytest.mark.parametrize("backend", [memory_reference, memory_chunked])
def test_a_write_at_rate_1_replaces_what_a_linear_memory_held(backend):
    """Erasing since the border leaves the value; erasing all, value - old, what eq. 88 says with a squared error."""
    for since, share in (("border", 0.0), ("start", -1.0)):
        rule = make_rule(4, adapt=("memory",), rates=(1.0,), targets="values", depth=1, erase_since=since)
        problem = Problem(rule, batch=1, tokens=8, heads=1)
        inputs, start, readout, _ = problem.arguments()
        inputs = inputs._replace(
            key=inputs.key[:, :1].expand_as(inputs.key),
            query=inputs.key[:, :1].expand_as(inputs.key),
            rate=torch.full_like(inputs.rate, 60.0),
            decay=torch.full_like(inputs.decay, 60.0),
        )
        with torch.no_grad():
            found = backend.self_modify(
                inputs, start, readout, zero_state(start, 1), rule=rule, position=0, resets=None
            ).reads[0, :, 0]
        old = start.inner[0, 0] @ inputs.key[0, 0, 0]
        values = inputs.value[0, :, 0]
        # With a distance d, the error of a border with distance b is start + b - v, and the erase term takes d as well.
        assert torch.allclose(found[0], values[0]), "the first write meets no distance"
        held = found[3] - old  # at the border of token 4
        assert torch.allclose(found[4], values[4] + share * held)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"objective": "dot"}, "no minimum"),
        ({"gradient": "fresh"}, "needs linear memories"),
        ({"depth": 1, "gradient": "self_referential", "targets": "values"}, "target is M\\(v\\)"),
        ({"depth": 1, "gradient": "fresh", "momentum": "sum"}, "known before the chunk"),
        ({"depth": 1, "normalise": True}, "depth: 2"),
        ({"adapt": ("k", "k", "memory"), "rates": (1.0, 1.0, 1.0)}, "names a memory twice"),
        ({"adapt": ("k",), "rates": (1.0,)}, "with `memory`"),
        ({"erase_after_decay": False, "rate_memory": 1.5}, "below -1 for a rate near 2"),
        ({"chunk_generators": 12}, "do not nest"),
        ({"erase_since": "border", "depth": 1, "objective": "dot"}, "squared error's gradient of the border"),
        ({"erase_since": "border", "depth": 1, "gradient": "fresh"}, "use erase_since: start"),
    ],
)
def test_impossible_rules_are_refused_with_the_reason(options, reason):
    with pytest.raises(ValueError, match=reason):
        make_rule(8, **options)

"""Which rules of writing are stable when one key is written again and again and which are refused."""

import math

import pytest
import torch

from nested_lm.ops.memory import chunked as memory_chunked
from nested_lm.ops.memory.state import MemoryInputs, MemoryWeights, unit, zero_state
from tests.ops.memory_problems import Problem, make_rule


@pytest.mark.parametrize(
    ("chunk", "rate", "grows"), [(16, 0.1, False), (64, 0.025, False), (64, 0.1, True), (1, 1.9, False)]
)
def test_without_erase_the_product_of_rate_and_chunk_decides(chunk, rate, grows):
    """One key, 2,048 times, into linear memories, which nothing damps below the bound."""
    rule = make_rule(chunk, adapt=("memory",), rates=(rate,), erase="none", depth=1, targets="values")
    problem = Problem(rule, batch=1, tokens=2048, heads=1, width=16)
    inputs, start, readout, _ = problem.arguments()
    inputs = MemoryInputs(*(None if x is None else x[:, :1].expand_as(x) for x in inputs))
    inputs = inputs._replace(rate=torch.full_like(inputs.rate, 50.0), decay=torch.full_like(inputs.decay, 7.6))
    with torch.no_grad():
        out = memory_chunked.self_modify(
            inputs, start, readout, zero_state(start, 1), rule=rule, position=0, resets=None
        )
    assert (out.state.current.inner.norm().item() > 1e3) == grows
    assert (rule.unbounded() is not None) == grows


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("options", [{"depth": 1}, {}], ids=["linear", "two layers"])
def test_a_running_mean_is_stable_at_every_share_where_writes_alone_are(options, chunk, share):
    """One key, 2,048 times, just below the bound and hardly fading; as a control, the sum, which linear ones refuse."""
    most = 0.99 if options else 1.9
    rule = make_rule(chunk, adapt=("memory",), rates=(most / chunk,), erase="none", targets="values", **options)
    problem = Problem(rule.changed(momentum="mean"), batch=1, tokens=2048, heads=1, width=16)
    inputs, start, readout, _ = problem.arguments()
    inputs = MemoryInputs(*(None if x is None else x[:, :1].expand_as(x) for x in inputs))
    logit = math.log(share / (1 - share))
    inputs = inputs._replace(
        rate=torch.full_like(inputs.rate, 50.0),
        decay=torch.full_like(inputs.decay, 9.0),
        momentum=torch.full_like(inputs.rate, logit),
    )

    def largest(momentum):
        with torch.no_grad():
            state = zero_state(start, 1, momentum=True)
            given = rule.changed(momentum=momentum)
            out = memory_chunked.self_modify(inputs, start, readout, state, rule=given, position=0, resets=None)
        return max(tensor.norm().nan_to_num(math.inf).item() for tensor in out.state.current)

    assert largest("mean") < 20
    assert rule.changed(momentum="mean").unbounded() is None
    if options and chunk > 1:
        assert share < 0.9 or largest("sum") > 1e3
        assert "use momentum: mean" in rule.changed(momentum="sum").unbounded()


@pytest.mark.parametrize("momentum", ["sum", "mean"])
def test_a_mean_is_stable_beside_the_erase_term_where_a_sum_grows(momentum):
    rule = make_rule(16, depth=1, adapt=("memory",), rates=(1.0,), targets="values", momentum=momentum)
    assert (rule.unbounded() is None) == (momentum == "mean")
    assert make_rule(16, erase="none", rate_memory=0.1, rate_generators=0.1, momentum=momentum).unbounded() is None
    found = _written_again_and_again(rule, share=0.9, tokens=2048)
    assert (found > 1e3) == (momentum == "sum")


OWN_ANSWERS = {
    "self-referential": (2 / 3, {"gradient": "self_referential"}),
    "self-referential, erase none": (1.0, {"gradient": "self_referential", "erase": "none"}),
    "self-referential, dot": (1.0, {"gradient": "self_referential", "objective": "dot"}),
    "fresh": (2 / 3, {"gradient": "fresh"}),
    "fresh, erase none": (1.0, {"gradient": "fresh", "erase": "none"}),
    "border": (1 - 3 ** (-1 / 4), {}),
    "border, erase none": (1 / 4, {"erase": "none"}),
    "border, erase since the border": (1.0, {"erase_since": "border"}),
}
"""Linear memories with chunks of 4 that are taught their own answers: largest rate and options."""


@pytest.mark.parametrize(("rate", "options"), OWN_ANSWERS.values(), ids=OWN_ANSWERS)
def test_how_much_memories_may_write_that_are_taught_their_own_answers(rate, options):
    """A key and values at every angle to it, at the limit; beyond it the opposite value, at alternating rates."""
    at, beyond = (make_rule(4, depth=1, adapt=("memory",), rates=(factor * rate,), **options) for factor in (0.99, 1.3))
    assert at.unbounded() is None
    assert f"use rates up to {rate:.4g}" in beyond.unbounded()
    for angle in (-1.0, -0.5, 0.0, 0.5):
        assert _written_again_and_again(at, angle=angle) < 50, angle
    alternate = options.get("erase_since") == "border" or options.get("gradient") == "fresh"
    assert max(_written_again_and_again(beyond, angle=-1.0, one_in=n) for n in ((1, 4) if alternate else (1,))) > 1e3


@pytest.mark.parametrize("targets", ["generated", "values"])
def test_erasing_in_the_first_layer_alone_bounds_memories_that_are_taught_values(targets):
    rule = make_rule(16, adapt=("memory",), rates=(1.0,), erase="input", targets=targets)
    assert (rule.unbounded() is None) == (targets == "values")
    assert make_rule(16, adapt=("memory",), rates=(0.4,), erase="input", targets=targets).unbounded() is None
    if targets == "values":
        assert _written_again_and_again(rule, tokens=2048) < 50


@pytest.mark.parametrize("targets", ["generated", "values"])
def test_inner_products_with_own_answers_need_the_erase_term(targets):
    given = {"objective": "dot", "depth": 1, "adapt": ("memory",), "rates": (0.5,), "targets": targets}
    rule = make_rule(4, erase="none", targets_generators="values", **given)
    assert (rule.unbounded() is None) == (targets == "values")
    assert (_written_again_and_again(rule) > 1e4) == (targets == "generated")
    assert make_rule(4, erase="both", **given).unbounded() is None


def test_a_mean_whose_share_changes_needs_half_of_the_bound_in_linear_memories():
    at, beyond = (
        make_rule(8, depth=1, adapt=("memory",), rates=(r / 8,), erase="none", targets="values", momentum="mean")
        for r in (0.99, 1.9)
    )
    assert at.unbounded() is None
    assert "use rates up to 0.125" in beyond.unbounded()
    assert _written_again_and_again(at, share=None) < 50
    assert _written_again_and_again(beyond, share=None) > 1e3


def _written_again_and_again(rule, *, share=0.5, tokens=400, angle=0.5, one_in=1):
    """Largest norm of a layer's distance after one key was written at the largest rate, hardly fading.

    share: of a momentum; None: nothing and nearly all in turns of a chunk. angle: cosine between key and value.
    one_in: every so many tokens write, the others do not.
    """
    problem = Problem(rule, batch=1, tokens=tokens, heads=1, width=8)
    inputs, start, readout, _ = problem.arguments()
    if rule.depth == 1:
        start = MemoryWeights(torch.eye(8).expand_as(start.inner).to(start.inner), start.outer)
    inputs = MemoryInputs(*(None if x is None else x[:, :1].expand_as(x) for x in inputs))
    key = unit(inputs.key)
    across = unit(inputs.value - (inputs.value * key).sum(-1, keepdim=True) * key)
    shares = torch.full((tokens,), share if share is not None else 0.001)
    if share is None:
        shares[torch.arange(tokens) // rule.chunk % 2 == 1] = 0.999
    rate = torch.full_like(inputs.rate, 50.0)
    rate[:, torch.arange(tokens) % one_in != 0] = -50.0
    inputs = inputs._replace(
        key=key,
        value=angle * key + (1 - angle**2) ** 0.5 * across,
        rate=rate,
        decay=torch.full_like(inputs.decay, 9.0),
        momentum=torch.logit(shares).to(rate)[None, :, None].expand_as(rate) if rule.momentum else None,
    )
    state = zero_state(start, 1, momentum=bool(rule.momentum))
    with torch.no_grad():
        out = memory_chunked.self_modify(inputs, start, readout, state, rule=rule, position=0, resets=None)
    return max(tensor.norm().nan_to_num(math.inf, math.inf).item() for tensor in out.state.current)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1, "objective": "dot", "targets": "values", "targets_generators": "values"},
        {"depth": 1, "gradient": "fresh"},
    ],
)
def test_erase_the_inner_product_and_fresh_gradients_need_no_such_bound(options):
    erase = {"erase": "none"} if options else {}
    assert make_rule(64, **erase, **options).unbounded() is None


def test_erasing_what_the_first_layer_wrote_since_the_border_does_not_bound_the_second():
    assert "of memory" in make_rule(64, rate_generators=0.1, erase="input", erase_since="border").unbounded()
    assert "of k" in make_rule(64, erase="input", erase_since_generators="border").unbounded()
    assert make_rule(64, erase_since="border").unbounded() is None


def test_each_memory_has_its_own_chunk():
    rule = make_rule(4, 64, rate_memory=0.5, rate_generators=0.05, erase="none")
    assert "rate 0.05 and chunk 64 of k" in rule.unbounded()
    assert make_rule(4, 16, rate_memory=0.5, rate_generators=0.05, erase="none").unbounded() is None

"""What a GPU needs of the memories: no waiting for the device, full float32 in the solves, chunks that compile."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nested_lm.config.mixers import SelfModifying
from nested_lm.nn.layers import StepContext
from nested_lm.nn.mixers.self_modifying import SelfModifyingTitans
from nested_lm.ops import triangular
from nested_lm.ops.memory import writes as memory_writes
from nested_lm.ops.memory.chunk import ChunkInputs, ChunkWeights, forward_chunk
from nested_lm.ops.memory.state import add, unit
from nested_lm.ops.memory.writes import running_decays, solve_writes
from tests.ops.memory_problems import OPTIONS, Problem, make_rule

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal", "is_nonzero")
"""Operations that read a tensor on the host, or make one there: on a device they copy and wait."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0].removesuffix("_copy")
        assert name not in WAITS, f"{name} waits for the device"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask on the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("waits", [lambda x: x.any().item(), lambda x: x[[0, 1]], lambda x: x[x > 0], torch.nonzero])
def test_the_mode_finds_what_waits(waits):
    x = torch.ones(3)
    with NoWaiting(), pytest.raises(AssertionError, match="device"):
        waits(x)


RULES = {"hope": {"chunk": 8}, "hope_paper": {"chunk": 8}, "titans": {"chunk": 8}, "linear": {"chunk": 8}}
RULES["two chunk sizes"] = {"rule": "hope", "chunk": 4, "chunk_generators": 16}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_training_waits_for_nothing(name, recompute):
    """Forward and backward of the mixer with documents that start inside the rows, from the middle of a chunk."""
    config = SelfModifying.model_validate(
        {"kind": "self_modifying", "num_heads": 2, "head_width": 8, "rule": name, "backend": "torch"} | RULES[name]
    )
    layer = SelfModifyingTitans(16, config, epsilon=1e-6, recompute=recompute)
    layer.initialise(lambda tensor, std: torch.nn.init.normal_(tensor, std=std))
    x = torch.randn(2, 45, 16)
    resets = torch.zeros(2, 45, dtype=torch.bool)
    resets[0, 13] = resets[1, 29] = True
    context = StepContext(position=3, resets=resets, documents=None)

    def step():
        y, _, _ = layer(x, context, layer.initial_state(2))
        y.square().mean().backward()

    step()  # the constants of the rule are made once
    with NoWaiting():
        step()
    assert all(parameter.grad is not None for parameter in layer.parameters())


class TensorFloat32(TorchDispatchMode):
    """Rounds what is multiplied to the ten bits that tensor cores keep. Does not see into operators of our own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::mm", "aten::bmm"):
            args = [(x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in args]
        return function(*args, **(kwargs or {}))


def test_solves_near_rate_2_keep_float32_whatever_the_setting_for_the_rest(monkeypatch):
    """Near rate 2 a wrong write is turned over by the next ones and does not fade, so the solve must be exact."""
    torch.manual_seed(0)
    direction = unit(torch.ones(8) + 0.3 * torch.randn(1, 1, 1, 64, 8))
    rate = torch.full((1, 1, 1, 64, 1), 1.99)
    decays = running_decays(torch.full((1, 1, 64), -1e-4), make_rule(64))
    given = (torch.randn(1, 1, 1, 64, 8), direction, torch.randn(1, 1, 1, 8, 8), rate, decays, decays.erased, None)

    def residual():
        with TensorFloat32():
            found = solve_writes(*given)
        write, known, overlap = (x.double() for x in (found.write, found.known, found.overlap))
        left = write + (decays.erased * rate).double() * overlap.tril(-1) @ write + rate * known
        return (left.norm() / known.norm()).item()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        guarded = residual()
        monkeypatch.setattr(memory_writes, "full_product", torch.matmul)
        unguarded = residual()
    finally:
        torch.set_float32_matmul_precision(before)
    assert guarded < 1e-4 < 1e-3 < unguarded, (guarded, unguarded)


def test_the_full_product_asks_for_full_precision(monkeypatch):
    asked = []
    original = triangular.full_precision

    def watched():
        asked.append(torch.get_float32_matmul_precision())
        return original()

    monkeypatch.setattr(triangular, "full_precision", watched)
    a = torch.ones(2, 2, requires_grad=True)
    triangular.full_product(a, a)
    assert asked == []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        triangular.full_product(a, a).sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["medium"] * 3  # forward, and a product for each factor's gradient


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (2, 3, 4, 5)), ((3, 4), (2, 4, 5))])
def test_the_full_product_is_the_product_with_its_gradients(shapes):
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.equal(triangular._full_product(a, b), a @ b)
    assert torch.autograd.gradcheck(triangular._full_product, (a, b))
    assert torch.autograd.gradgradcheck(triangular._full_product, (a, b))


@pytest.mark.parametrize("name", ["Hope", "Titans, mean", "linear", "read border"])
def test_a_chunk_is_traced_whole(name):
    """No graph break: the whole chunk, with its gradients, is one graph for a compiler."""
    rule = make_rule(8, **OPTIONS[name])
    problem = Problem(rule, tokens=8)
    inputs, start, readout, state = problem.arguments()
    given = ChunkInputs(*(None if x is None else x.transpose(1, 2) for x in inputs))
    border = state.border if any(rule.since_border) else None
    weights = ChunkWeights(add(start, state.border), start, state.current, border, state.momentum)

    def chunk(given, weights, readout):
        return forward_chunk(given, weights, readout, rule, None)

    given, weights, readout = tree_map_only(
        torch.Tensor, lambda x: x.detach().requires_grad_(), (given, weights, readout)
    )
    leaves = [leaf for leaf in tree_leaves((given, weights, readout)) if leaf is not None]
    results = []
    for call in (torch.compile(chunk, fullgraph=True, backend="aot_eager"), chunk):
        after = call(given, weights, readout).after
        loss = after.inner.square().sum() + after.outer.square().sum()
        results.append([*after, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

from typing import NamedTuple

import pytest
import torch
from torch import nn

from nested_lm.config import update_rules as rules
from nested_lm.config.train import AdamW, Deep, MatrixOptimizer, Muon
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock
from nested_lm.optim.rule_optimizer import M3

STEP_TOKENS = 8
ADAMW = AdamW(kind="adamw", rate=1e-2)
MUON = Muon(kind="muon", rate=1e-2, adamw_rate=1e-2)
RULES = {
    "gd": rules.GradientDescent(kind="gd"),
    "momentum": rules.Momentum(kind="momentum"),
    "preconditioned_momentum": rules.PreconditionedMomentum(kind="preconditioned_momentum"),
    "delta_momentum": rules.DeltaMomentum(kind="delta_momentum"),
    "delta_momentum, preconditioned": rules.DeltaMomentum(kind="delta_momentum", square_keep=0.9),
    "dmgd": rules.DeepMomentum(kind="dmgd", hidden=5),
    "adam": rules.Adam(kind="adam"),
    "muon": rules.Muon(kind="muon"),
    "m3": rules.M3(kind="m3", slow_every=2),
}
DEEP = {name: Deep(kind="deep", rule=rule, rate=1e-2, adamw_rate=1e-2) for name, rule in RULES.items()}
M3_SLOWLY = MatrixOptimizer(rule=RULES["m3"], rate=2e-2, weight_decay=0.3)
PER_LEVEL = AdamW(kind="adamw", rate=1e-2, levels=(None, M3_SLOWLY))
CONFIGS = {"adamw": ADAMW, "muon": MUON, "per level": PER_LEVEL} | {f"deep {name}": c for name, c in DEEP.items()}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


class Role(NamedTuple):
    kind: str
    level: int | None = None


ROLES = {
    "embedding": Role("embedding"),
    "matrix": Role("matrix"),
    "fast": Role("matrix", 0),
    "slow": Role("matrix", 1),
    "slow_norm": Role("vector", 1),
}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (6, 4), "matrix": (4, 6), "fast": (4, 4), "slow": (4, 4), "slow_norm": (4,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def clocked(config=ADAMW, periods=(8, 32), seed=0):
    named = parameters(seed)
    return ClockedOptimizer(named, plan_groups(named, ROLES, config), LevelClock(periods), config)


def set_gradients(optimizer, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer, first, last):
    for step in range(first, last + 1):
        set_gradients(optimizer, step)
        optimizer.step(step * STEP_TOKENS, 0.5)


def weights(optimizer):
    return {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Recorder:
    """Stands in for the optimizers and records the gradients they are given."""

    def __init__(self, optimizer):
        self.seen = {name: [] for name in optimizer.parameters}
        names = {id(parameter): name for name, parameter in optimizer.parameters.items()}
        for inner in optimizer._optimizers.values():

            def record(inner=inner):
                for group in inner.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            self.seen[names[id(parameter)]].append(parameter.grad.flatten()[0].item())

            inner.step = record


def test_each_level_learns_from_exactly_its_own_tokens():
    """The gradient of step s is 2**s: a sum tells which steps it is made of."""
    optimizer = clocked(periods=(8, 32))
    recorder = Recorder(optimizer)
    for step in range(1, 9):
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.full_like(parameter, float(2**step))
        optimizer.step(step * STEP_TOKENS, 1.0)
    every_step = [float(2**step) for step in range(1, 9)]
    assert recorder.seen["matrix"] == recorder.seen["embedding"] == recorder.seen["fast"] == every_step
    windows = [sum(2.0**s for s in (1, 2, 3, 4)), sum(2.0**s for s in (5, 6, 7, 8))]
    assert recorder.seen["slow"] == recorder.seen["slow_norm"] == windows  # sums, no step twice, none lost


@every_config
def test_slow_weights_move_only_when_due(config):
    optimizer = clocked(config)
    start = weights(optimizer)
    run(optimizer, 1, 3)
    for name in ("slow", "slow_norm"):
        assert torch.equal(optimizer.parameters[name], start[name])
    for name in ("embedding", "matrix", "fast"):
        assert not torch.equal(optimizer.parameters[name], start[name])
    run(optimizer, 4, 4)
    assert not torch.equal(optimizer.parameters["slow"], start["slow"])
    assert not any(name.startswith("pending/") for name in optimizer.state_tensors())


def test_one_update_of_a_slow_level_is_one_torch_step_on_the_sum():
    optimizer = clocked(ADAMW)
    lone = nn.Parameter(optimizer.parameters["slow"].detach().clone())
    plain = torch.optim.AdamW([lone], lr=0.5e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    total = torch.zeros_like(lone)
    for step in range(1, 5):
        set_gradients(optimizer, step)
        total += optimizer.parameters["slow"].grad
        optimizer.step(step * STEP_TOKENS, 0.5)
    lone.grad = total
    plain.step()
    assert torch.equal(optimizer.parameters["slow"], lone)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_equals_plain_torch_when_every_period_is_one_step(kind):
    config = {"adamw": ADAMW, "muon": MUON}[kind]
    optimizer = clocked(config, periods=(8, 8))
    plain = parameters()
    decayed = [plain[name] for name in ("matrix", "fast", "slow")]
    others = [plain[name] for name in ("embedding", "slow_norm")]
    adamw = {"lr": 0.5e-2, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    rest = torch.optim.AdamW(others, weight_decay=0.0, **adamw)
    if kind == "adamw":
        matrices = torch.optim.AdamW(decayed, weight_decay=0.1, **adamw)
    else:
        matrices = torch.optim.Muon(decayed, lr=0.5e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 6):
        set_gradients(optimizer, step)
        for name, parameter in optimizer.parameters.items():
            plain[name].grad = parameter.grad.clone()
        optimizer.step(step * STEP_TOKENS, 0.5)
        matrices.step()
        rest.step()
    assert_same(weights(optimizer), {name: p.detach() for name, p in plain.items()})


@every_config
@pytest.mark.parametrize("stop", range(1, 9))
def test_continues_bit_identically_from_any_phase_of_a_period(config, stop):
    whole = clocked(config)
    run(whole, 1, 9)

    first = clocked(config)
    run(first, 1, stop)
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    if stop % 4:
        assert {"pending/slow", "pending/slow_norm"} <= saved.keys()
    second = clocked(config, seed=99)
    with torch.no_grad():
        for name, value in weights(first).items():
            second.parameters[name].copy_(value)
    second.load_state_tensors(saved)
    run(second, stop + 1, 9)

    assert_same(weights(whole), weights(second))
    assert_same(whole.state_tensors(), second.state_tensors())


def test_a_resume_without_the_buffers_would_be_noticed():
    """The control of the test above: the buffers matter."""
    whole, forgetful = clocked(), clocked()
    run(whole, 1, 4)
    run(forgetful, 1, 2)
    kept = {n: t.clone() for n, t in forgetful.state_tensors().items() if not n.startswith("pending/")}
    forgetful.load_state_tensors(kept)
    run(forgetful, 3, 4)
    assert not torch.equal(whole.parameters["slow"], forgetful.parameters["slow"])


def test_loading_copies():
    first, second = clocked(), clocked()
    run(first, 1, 1)
    saved = first.state_tensors()
    second.load_state_tensors(saved)
    before = {name: tensor.clone() for name, tensor in saved.items()}
    run(second, 2, 4)
    assert_same(before, saved)


def test_skipping_keeps_weights_moments_and_buffers():
    optimizer = clocked()
    run(optimizer, 1, 2)
    before = weights(optimizer), {n: t.clone() for n, t in optimizer.state_tensors().items()}
    set_gradients(optimizer, 3)
    optimizer.skip()
    assert_same(before[0], weights(optimizer))
    assert_same(before[1], optimizer.state_tensors())
    assert all(parameter.grad is None for parameter in optimizer.parameters.values())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("state/stranger/exp_avg", (4, 4), "belongs to no parameter"),
        ("moments/matrix/exp_avg", (4, 6), "belongs to no parameter"),
        ("state/matrix", (4, 6), "belongs to no parameter"),
        ("pending/slow", (5, 4), r"shape \(5, 4\), its parameter \(4, 4\)"),
    ],
)
def test_foreign_state_is_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        clocked().load_state_tensors({name: torch.zeros(shape)})


def test_a_level_may_have_an_optimizer_of_its_own():
    optimizer = clocked(PER_LEVEL, periods=(8, 8))
    twin = nn.Parameter(optimizer.parameters["slow"].detach().clone())
    plain = clocked(ADAMW, periods=(8, 8))
    alone = M3([twin], lr=1e-2, weight_decay=0.3, slow_every=2)  # half of the rate: the multiplier
    for step in range(1, 6):
        set_gradients(optimizer, step)
        set_gradients(plain, step)
        twin.grad = optimizer.parameters["slow"].grad.clone()
        for one in (optimizer, plain):
            one.step(step * STEP_TOKENS, 0.5)
        alone.step()
    assert torch.equal(optimizer.parameters["slow"], twin)
    for name in ("embedding", "matrix", "fast", "slow_norm"):
        assert torch.equal(optimizer.parameters[name], plain.parameters[name])


@pytest.mark.parametrize("kind", DEEP)
def test_matrices_get_the_rule_and_everything_else_adamw(kind):
    deep, plain = clocked(DEEP[kind], periods=(8, 8)), clocked(ADAMW, periods=(8, 8))
    for optimizer in (deep, plain):
        run(optimizer, 1, 3)
    for name, parameter in deep.parameters.items():
        assert torch.equal(parameter, plain.parameters[name]) == (ROLES[name].kind != "matrix")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state/slow/exp_avg": (4, 4)}, "'state/slow/exp_avg' is not kept by the optimizer of that parameter"),
        ({"state/slow/fast": (4, 5)}, r"shape \(4, 5\), its parameter \(4, 4\)"),
        ({"state/slow/square": None}, "optimizer state of 'slow' lacks square"),
    ],
)
def test_state_of_another_rule_is_refused(change, message):
    optimizer = clocked(PER_LEVEL)
    run(optimizer, 1, 4)
    state = dict(optimizer.state_tensors())
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        clocked(PER_LEVEL).load_state_tensors(state)

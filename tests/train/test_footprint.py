"""Memory that a dry run states: optimizer state exactly, activations beside a measured peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nested_lm.config.load import load_run
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock
from nested_lm.train.costs import footprint
from nested_lm.train.costs.count import count_costs

STEP = 64
SHAPE = {"vocab_size": 512, "width": 128, "num_layers": 3}
HOPE = SHAPE | {
    "mixer": {"kind": "self_modifying", "num_heads": 2, "head_width": 64, "chunk": 64, "backend": "torch"},
    "channel": {"kind": "swiglu", "expansion": 2.0},
}
TRANSFORMER = SHAPE | {
    "mixer": {"kind": "attention", "num_heads": 4},
    "channel": {"kind": "swiglu", "expansion": 4.0},
}
TOLERANCE = (0.9, 1.2)  # of the estimate against the measured peak
CASES = [(HOPE, "none"), (HOPE, "chunk"), (HOPE, "block"), (TRANSFORMER, "none")]
OPTIMIZERS = {
    "adamw": {"kind": "adamw", "rate": 1e-3},
    "muon": {"kind": "muon", "rate": 1e-3, "adamw_rate": 1e-3},
    "deep": {"kind": "deep", "rule": {"kind": "momentum"}, "rate": 1e-3, "adamw_rate": 1e-3},
    "levels": {"kind": "adamw", "rate": 1e-3, "levels": [None, {"rule": {"kind": "m3"}, "rate": 1e-3}]},
}


def test_the_estimate_is_near_the_peak_of_a_process():
    """Forward and backward of a second micro-batch, measured by the operating system in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process can be set back on Linux only")
    rows, tokens = 4, 256
    cases = [{"model": model, "rows": rows, "tokens": tokens, "recompute": how} for model, how in CASES]
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peak.py"))],
        input=json.dumps(cases),
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    shares = {}
    for (model, how), measured in zip(CASES, json.loads(found.stdout), strict=True):
        config = ModelConfig.model_validate(model)
        costs = count_costs(config, tokens, bfloat16=False)
        estimate = footprint.activation_bytes(config, costs, rows=rows, recompute=how)
        shares[f"{config.mixer.kind}, {how}"] = estimate / measured
    print(", ".join(f"{case}: {share:.2f}" for case, share in shares.items()))  # shown by pytest -s
    assert {case: share for case, share in shares.items() if not TOLERANCE[0] < share < TOLERANCE[1]} == {}


@pytest.mark.parametrize("wiring", ["sequential", "nested"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_state_is_that_of_a_run(kind, wiring):
    """Right before the slow level's update, when most is held."""
    levels = [{"period_tokens": STEP, "expansion": 1.0}, {"period_tokens": 4 * STEP, "expansion": 1.0}]
    channel = {"kind": "cms", "levels": levels, "wiring": wiring}
    config = ModelConfig.model_validate(SHAPE | {"mixer": TRANSFORMER["mixer"], "channel": channel})
    train = load_run("hope/demo").train.model_copy(update={"curriculum": ()}).model_dump(mode="json")
    optimizer = type(load_run("hope/demo").train).model_validate(train | {"optimizer": OPTIMIZERS[kind]}).optimizer
    model = LanguageModel(config)
    model.initialise(1)
    parameters = dict(model.named_parameters())
    groups = plan_groups(parameters, model.parameter_roles(), optimizer)
    restarts = config.channel.restarts_levels
    stepper = ClockedOptimizer(parameters, groups, LevelClock(config.channel.periods), optimizer, restarts=restarts)
    for step in range(1, 8):
        for parameter in parameters.values():
            parameter.grad = parameter.detach().clone()
        stepper.step(step * STEP, 1.0)
    held = 4 * sum(tensor.numel() for tensor in stepper.state_tensors().values() if tensor.ndim)
    counted = footprint.held_bytes(config, optimizer, STEP)
    assert counted.weights == 4 * sum(parameter.numel() for parameter in parameters.values())
    starts = sum(p.numel() for n, p in parameters.items() if ".levels.0." in n) if restarts else 0
    numbers = 8 * 2 * len(parameters)  # counters of steps, which are numbers
    assert held <= counted.optimizer <= held + 4 * starts + numbers


def test_recomputing_and_more_devices_hold_less():
    config = load_run("hope/pilot")
    train = config.train.model_copy(update={"batch_size": 4, "accumulation": 32})
    config = config.model_copy(update={"train": train})
    costs = count_costs(config.model, train.context_length, bfloat16=True)

    def peak(recompute, devices=1):
        return footprint.peak_bytes(config, costs, recompute=recompute, devices=devices)

    assert sum(peak("chunk").values()) < sum(peak("none").values())
    one, eight, many = peak("chunk"), peak("chunk", 8), peak("chunk", 64)
    assert eight["weights"] == one["weights"] / 8
    assert eight["optimizer"] == one["optimizer"] / 8
    assert eight["gradients"] == one["gradients"]  # whole until the last micro-batch
    assert eight["gathered"] > one["gathered"] == 0
    assert many["activations"] < eight["activations"]  # the sequences of a micro-batch are shared
    needed = {how: footprint.devices_needed(config, [costs], recompute=how, memory=80e9) for how in ("none", "chunk")}
    assert needed["chunk"] < needed["none"]
    assert footprint.devices_needed(config, [costs], recompute="none", memory=1e9) is None

"""Bytes that training holds on one device: weights, gradients, optimizer state, activations."""

from functools import cache
from typing import NamedTuple

import torch

from nested_lm.config.model import ModelConfig
from nested_lm.config.run import RunConfig
from nested_lm.config.train import Optimizer
from nested_lm.errors import ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.optim.clocked import ClockedOptimizer
from nested_lm.optim.groups import plan_groups
from nested_lm.optim.level_clock import LevelClock
from nested_lm.train.costs.count import RECOMPUTE, Costs
from nested_lm.train.costs.probe import Recompute
from nested_lm.train.strategies.base import micro_batches

DEVICE_BYTES = {"h100": 80e9, "h200": 141e9, "a100": 80e9}
"""Memory of the devices, as the makers state it."""

MOST_DEVICES = 64  # that `devices_needed` tries

_FLOAT32 = 4  # bytes of a weight, a gradient, an entry of optimizer state


class Held(NamedTuple):
    """Bytes of what stays over a step, uncut.

    optimizer: state of the optimizer, gradients that wait for their level's clock, starts of nested levels.
    outside: weights of embedding, head and last norm, which FSDP2 gathers as one.
    block: weights of one block.
    """

    weights: int
    optimizer: int
    outside: int
    block: int


@cache
def held_bytes(model: ModelConfig, optimizer: Optimizer, step_tokens: int) -> Held:
    """Count weights and optimizer state; exact, from the shapes on the meta device."""
    with torch.device("meta"):
        network = LanguageModel(model)
    parameters = dict(network.named_parameters())
    stepper = ClockedOptimizer(
        parameters,
        plan_groups(parameters, network.parameter_roles(), optimizer),
        LevelClock(model.channel.periods),
        optimizer,
        restarts=model.channel.restarts_levels,
    )
    weights = _FLOAT32 * sum(parameter.numel() for parameter in parameters.values())
    block = _FLOAT32 * sum(parameter.numel() for parameter in network.blocks[0].parameters())
    state = _FLOAT32 * stepper.state_numel(step_tokens)
    return Held(weights, state, weights - model.num_layers * block, block)


def activation_bytes(model: ModelConfig, costs: Costs, *, rows: int, recompute: Recompute) -> float:
    """Estimate the most that forward and backward hold at once, beside weights, gradients and optimizer state."""
    kept = costs.kept[recompute].at(rows)
    again = costs.kept["none"].at(rows) if recompute == "block" else 0.0  # of the block that is computed again
    return model.num_layers * kept + max(costs.head_work.at(rows), again + costs.block_work.at(rows))


def peak_bytes(config: RunConfig, costs: Costs, *, recompute: Recompute, devices: int = 1) -> dict[str, float]:
    """Estimate the peak of training memory of one device, by part.

    Weights, gradients and optimizer state are exact. Under FSDP2 they are cut, but gradients are whole while a device
    has more than one micro-batch, and two blocks and everything outside the blocks are gathered at once. Activations,
    which include the fast weights, are those of torch's operations on a CPU: what CUDA kernels need on the way and the
    fragments of the allocator come on top. Memories that run in C (mixer.backend) hold several times less.

    Raises:
        ConfigError: devices that cannot share a step.
    """
    train = config.train
    micro, rows = micro_batches(train, devices)
    rows *= train.context_length // costs.tokens
    held = held_bytes(config.model, train.optimizer, train.step_tokens)
    is_cut = train.strategy == "fsdp2" and devices > 1
    cut = devices if is_cut else 1
    return {
        "weights": held.weights / cut,
        "gradients": held.weights / (1 if micro > 1 else cut),
        "optimizer": held.optimizer / cut,
        "gathered": float(held.outside + 2 * held.block) if is_cut else 0.0,
        "activations": activation_bytes(config.model, costs, rows=rows, recompute=recompute),
    }


def devices_needed(config: RunConfig, costs: list[Costs], *, recompute: Recompute, memory: float) -> int | None:
    """Fewest devices, a power of two, on which every stage fits; None: not even `MOST_DEVICES` are enough."""
    devices = 1
    while devices <= (MOST_DEVICES if config.train.strategy == "fsdp2" else 1):
        try:
            peaks = [sum(peak_bytes(config, c, recompute=recompute, devices=devices).values()) for c in costs]
        except ConfigError:
            return None  # more devices cannot share a step either
        if max(peaks) <= memory:
            return devices
        devices *= 2
    return None


def describe_memory(
    config: RunConfig, costs: list[Costs], *, device: str | None, devices: int
) -> list[tuple[str, str]]:
    """Say what a device holds at most, for every way to recompute, and how many devices are needed."""
    train = config.train
    chosen = max(
        (peak_bytes(config, c, recompute=train.recompute, devices=devices) for c in costs),
        key=lambda peak: sum(peak.values()),
    )
    parts = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in chosen.items() if size)
    rows = [
        ("peak", f"about {sum(chosen.values()) / 1e9:.3g} GB a device: {parts} (estimate; activations the least sure)")
    ]
    for recompute in RECOMPUTE:
        peak = max(sum(peak_bytes(config, c, recompute=recompute, devices=devices).values()) for c in costs)
        mark = " (this run)" if recompute == train.recompute else ""
        held = f"recompute={recompute}{mark}: {peak / 1e9:.3g} GB a device with {devices}"
        if device is None:
            rows.append(("", held))
            continue
        memory = DEVICE_BYTES[device]
        needed = devices_needed(config, costs, recompute=recompute, memory=memory)
        if needed is None:
            fits = f"does not fit {memory / 1e9:g} GB on any number of devices tried; lower train.batch_size"
        elif needed == 1:
            fits = f"fits one {device} of {memory / 1e9:g} GB"
        else:
            fits = f"fits {device}s of {memory / 1e9:g} GB from {needed} on, with fsdp2"
        rows.append(("", f"{held}; {fits}"))
    return rows

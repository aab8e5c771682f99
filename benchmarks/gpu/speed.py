"""Training tokens a second, share of the peak, peak memory, and milliseconds to decode a token."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.models import PRESETS, built, configured, takes
from nested_lm.nn.model import token_losses
from nested_lm.train.costs.count import DEVICE_FLOPS, count_costs

TOKENS = 32_768
"""Of a micro-batch, at every length."""

LENGTHS = (2048, 8192, 32_768, 4096, 16_384)
"""In the order of what they tell, for time may run out."""

REPEATS = 3


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Least time of a few repeats, after one that compiles and warms up."""
    work()
    found = []
    for _ in range(REPEATS):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - begun)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 operations a second that the GPU promises; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((flops for known, flops in DEVICE_FLOPS.items() if known in name), None)


def training(name: str, layers: int | None, length: int, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Forward and backward of a micro-batch under bfloat16 autocast."""
    config = configured(name, layers=layers, tiny=tiny)
    length = takes(length, config)
    rows = 1 if tiny else max(1, TOKENS // length)
    model = built(config, device)
    tokens = torch.randint(config.vocab_size, (rows, length), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            token_losses(model(tokens).logits, tokens).mean().backward()
        model.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = seconds(step, device)
    found: dict[str, Any] = {"rows": rows, "length": length, "tokens_per_second": rows * length / took}
    peak = peak_flops(device)
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if peak is not None:
        found["mfu"] = rows * count_costs(config, length, bfloat16=True).training / took / peak
    return found


@torch.no_grad()
def decoding(name: str, read: int, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Milliseconds a token of one stream that has read some text."""
    config = configured(name, layers=None, tiny=tiny)
    model = built(config, device).eval()
    state = model.initial_state(1)
    piece = takes(min(read, 16_384), config)
    text = torch.randint(config.vocab_size, (1, piece), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for _ in range(max(1, read // piece)):
            state = model(text, state=state, predictions="last").state
        count = 2 if tiny else 32

        def several() -> None:
            after = state
            for place in range(count):
                after = model(text[:, place : place + 1], state=after, predictions="last").state

        return {"read": read, "milliseconds_a_token": seconds(several, device) / count * 1000}


def run(report: Any, device: torch.device, until: float, *, tiny: bool) -> None:
    """Time what there is time for: one layer and whole models, then decoding."""

    def attempt(label: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() > until:
            report.add("speed", label, {"left_out": "no time"})
        else:
            report.attempt("speed", label, measure)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    lengths = (32,) if tiny else LENGTHS
    for length in lengths:
        for name in PRESETS:
            for what, layers in (("layer", 1), ("model", None)):
                if tiny and what == "model":
                    continue
                attempt(
                    f"{name}, training, {what}, {length}",
                    lambda n=name, k=layers, t=length: training(n, k, t, device, tiny=tiny),
                )
        if length == lengths[0]:
            for name in PRESETS:
                for read in (32,) if tiny else (2048, 524_288):
                    attempt(f"{name}, decoding, {read}", lambda n=name, r=read: decoding(n, r, device, tiny=tiny))

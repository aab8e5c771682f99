"""Hope, Titans and a Transformer++ of the pilot's size, trained side by side in turns on the bundled speeches."""

import tarfile
import time
from importlib import resources
from typing import Any

import torch

from benchmarks.gpu.models import built, configured, takes
from nested_lm.nn.model import token_losses

ARMS = ("Hope", "Titans LMM", "Transformer++")
LENGTH, ROWS, RATE = 2048, 8, 6e-4


def speeches() -> torch.Tensor:
    """The bundled speeches as bytes."""
    with (
        resources.as_file(resources.files("nested_lm.data") / "corpora" / "sotu.tar.xz") as path,
        tarfile.open(path) as archive,
    ):
        files = (archive.extractfile(member) for member in archive if member.isfile())
        text = b"".join(file.read() for file in files if file is not None)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def run(report: Any, device: torch.device, until: float, *, tiny: bool) -> None:
    """Train all arms on the same batches, a step each in turn, until the time is over."""
    text = speeches()
    configs = {name: configured(name, layers=None, tiny=tiny) for name in ARMS}
    models = {name: built(config, device) for name, config in configs.items()}
    fused = device.type == "cuda"
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
        for name, model in models.items()
    }
    length = max(takes(32 if tiny else LENGTH, config) for config in configs.values())
    rows = 1 if tiny else ROWS
    generator = torch.Generator().manual_seed(0)
    seconds = dict.fromkeys(ARMS, 0.0)
    step = 0
    while time.monotonic() < until or step == 0:
        places = torch.randint(len(text) - length - 1, (rows,), generator=generator)
        batch = torch.stack([text[place : place + length + 1] for place in places.tolist()]).to(device)
        losses = {}
        for name, model in models.items():
            begun = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = token_losses(model(batch[:, :-1]).logits, batch[:, 1:]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name] = loss.item()
            seconds[name] += time.perf_counter() - begun
        step += 1
        if step == 1 or step % 10 == 0:
            figure = {"tokens": step * rows * length, "nats_a_byte": losses, "seconds": dict(seconds)}
            report.add("training", f"step {step}", figure)
        if tiny:
            break

"""Train one model on one task, and test it."""

import math
import time
from dataclasses import dataclass

import torch

from benchmarks.learning.protocol import RECIPE, Measures, Task


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. measures: empty when the training diverged, at step `diverged_at`."""

    measures: Measures
    diverged_at: int | None
    final_loss: float  # mean of the last tenth of the steps
    cpu_s: float
    wall_s: float


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine down to the floor."""
    warmup = min(1.0, (step + 1) / RECIPE.warmup_steps)
    return warmup * max(RECIPE.floor, 0.5 * (1 + math.cos(math.pi * step / steps)))


def run_cell(task: Task, arm: str, seed: int, *, steps: int, rows: int) -> Outcome:
    """Train with one seed, then test on `rows` sequences a length. The seed draws the model and the batches.

    A loss that is not finite ends the training: the cell has diverged, which is a result.
    """
    cpu, wall = time.process_time(), time.monotonic()
    model = task.build(arm, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.rate, betas=RECIPE.betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses: list[float] = []
    diverged_at = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = task.rate * rate_at(step, steps)
        loss = task.loss(model, generator, step / steps)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            diverged_at = step
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, RECIPE.clip)
        optimizer.step()
    with torch.no_grad():
        measures = task.measure(model, rows) if diverged_at is None else {}
    tail = losses[-max(1, len(losses) // 10) :]
    return Outcome(measures, diverged_at, sum(tail) / len(tail), time.process_time() - cpu, time.monotonic() - wall)

"""Train one model on one task, and test it."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.learning.protocol import RECIPE, Measures, Progress, Task


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. measures: empty when the training diverged, at step `diverged_at`."""

    measures: Measures
    diverged_at: int | None
    final_loss: float  # mean of the last tenth of the steps
    cpu_s: float
    wall_s: float
    rate: float  # of the training that counts
    trained_steps: int


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine down to the floor."""
    warmup = min(1.0, (step + 1) / RECIPE.warmup_steps)
    return warmup * max(RECIPE.floor, 0.5 * (1 + math.cos(math.pi * step / steps)))


def run_cell(task: Task, arm: str, seed: int, *, steps: int, rows: int) -> Outcome:
    """Train with one seed, then test on `rows` sequences a length. The seed draws the model and the batches.

    A loss that is not finite ends the training: the cell has diverged, which is a result. Where a task names several
    rates, they are tried until one solves it, and the one with the lowest training loss counts.
    """
    cpu, wall = time.process_time(), time.monotonic()
    found = []
    for rate in task.rates or (task.rate,):
        found.append(_train(task, arm, seed, steps=steps, rate=rate))
        if found[-1].solved:
            break
    best = min(found, key=lambda trained: math.inf if trained.diverged_at is not None else trained.final_loss)
    with torch.no_grad():
        measures = task.measure(best.model, rows) if best.diverged_at is None else {}
    spent = time.process_time() - cpu, time.monotonic() - wall
    return Outcome(measures, best.diverged_at, best.final_loss, *spent, best.rate, best.steps)


class _Trained(NamedTuple):
    model: nn.Module
    diverged_at: int | None
    final_loss: float
    solved: bool
    rate: float
    steps: int


def _train(task: Task, arm: str, seed: int, *, steps: int, rate: float) -> _Trained:
    model = task.build(arm, seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=RECIPE.betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses: list[float] = []
    diverged_at = None
    progress = Progress()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps)
        progress.share = step / steps
        loss = task.loss(model, generator, progress)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            diverged_at = step
            break
        if progress.solved:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, RECIPE.clip)
        optimizer.step()
    tail = losses[-max(1, len(losses) // 10) :]
    return _Trained(model, diverged_at, sum(tail) / len(tail), progress.solved, rate, len(losses))

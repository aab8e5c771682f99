"""Train every arm on every task with several seeds, and write a table with intervals.

Cells that the result file already has, with the same configuration and recipe, are skipped, so the suite can be run in
pieces. One thread, float32, AdamW, half a cosine, the same recipe for all arms of a task.

    python benchmarks/learning/run.py [--tasks parity,mqar] [--arms hope,transformer] [--seeds 3] [--out FILE.json]
                                      [--table FILE.md] [--quick]
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from benchmarks.learning.arms import MIXERS, configuration
from benchmarks.learning.tasks import IGNORED, TASKS, Task
from nested_lm.nn.model import LanguageModel
from nested_lm.nn.sizing import count_parameters

BATCH, TEST_ROWS, WARMUP_STEPS = 64, 256, 20
T_QUANTILE = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t for so many seeds."""


def train(task: Task, arm: str, seed: int, steps: int) -> LanguageModel:
    """Train one model."""
    model = LanguageModel(configuration(arm, task.vocab))
    model.initialise(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = task.rate * share
        shortest, longest = task.train_lengths
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        tokens, targets = task.make(BATCH, length, generator)
        logits = model(tokens).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if not torch.isfinite(loss):
            raise SystemExit(f"{task.name}, {arm}, seed {seed}: loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def test(task: Task, model: LanguageModel) -> dict[str, float]:
    """Share of right tokens and of wholly right strings at every test length, and of stale answers."""
    found = {}
    for length in task.test_lengths:
        tokens, targets = task.make(TEST_ROWS, length, torch.Generator().manual_seed(length))
        answers = model(tokens).logits.argmax(-1)
        scored = targets != IGNORED
        right = (answers == targets) & scored
        found[f"tokens@{length}"] = (right.sum() / scored.sum()).item()
        found[f"strings@{length}"] = (right | ~scored).all(1).float().mean().item()
        if task.stale is not None:
            stale = task.stale(tokens, targets)
            overwritten = stale != IGNORED
            found[f"stale@{length}"] = ((answers == stale) & overwritten).sum().item() / overwritten.sum().item()
    return found


def cell(task: Task, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and test one arm on one task with one seed."""
    started = time.process_time()
    model = train(task, arm, seed, steps)
    return {"task": task.name, "arm": arm, "seed": seed, **test(task, model), "cpu_s": time.process_time() - started}


def identity(task: Task, arm: str, steps: int) -> str:
    """Hash of everything a cell depends on besides the code."""
    recipe = [task.name, task.train_lengths, task.test_lengths, task.rate, steps, BATCH, TEST_ROWS, WARMUP_STEPS]
    config = configuration(arm, task.vocab).model_dump(mode="json")
    return hashlib.sha256(json.dumps([recipe, config], sort_keys=True).encode()).hexdigest()[:16]


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds (Student's t), clipped to [0, 1]."""
    mean = statistics.fmean(values)
    if len(values) not in T_QUANTILE:
        return f"{mean:.2f}"
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} ({max(0.0, mean - half):.2f}-{min(1.0, mean + half):.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a task and arm; mean over seeds and interval."""
    lines = []
    for task in TASKS.values():
        mine = [row for row in rows if row["task"] == task.name]
        if not mine:
            continue
        keys = [key for key in mine[0] if "@" in key]
        lines += [f"### {task.name}", "", f"Chance for a token about {task.chance:.2f}; {task.steps} steps.", ""]
        lines += ["| Arm | " + " | ".join(keys) + " | Seeds |", "|---" * (len(keys) + 2) + "|"]
        for arm in MIXERS:
            of_arm = [row for row in mine if row["arm"] == arm]
            if of_arm:
                cells = [interval([row[key] for row in of_arm]) for key in keys]
                lines.append(f"| {arm} | " + " | ".join(cells) + f" | {len(of_arm)} |")
        lines.append("")
    return "\n".join(lines)


def stamp() -> dict[str, str]:
    """What the numbers were made with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit or "unknown", "torch": torch.__version__, "machine": platform.machine()}


def main() -> None:
    """Run the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--arms", default=",".join(MIXERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning.json"))
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="five steps and one seed: does everything run?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(arguments.out.read_text())["cells"] if arguments.out.exists() else []
    wanted = [
        (TASKS[task], arm, seed)
        for task in arguments.tasks.split(",")
        for seed in range(1 if arguments.quick else arguments.seeds)
        for arm in arguments.arms.split(",")
    ]
    for number, (task, arm, seed) in enumerate(wanted, start=1):
        steps = 5 if arguments.quick else task.steps
        key = identity(task, arm, steps)
        if any((row["identity"], row["seed"]) == (key, seed) for row in rows):
            continue
        rows = [row for row in rows if (row["task"], row["arm"], row["seed"]) != (task.name, arm, seed)]
        size = count_parameters(configuration(arm, task.vocab))["total"]
        rows.append({**cell(task, arm, seed, steps), "parameters": size, "identity": key, **stamp()})
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"cells": rows}, indent=1) + "\n")
        shown = {k: round(v, 3) for k, v in rows[-1].items() if "@" in k}
        print(f"{number}/{len(wanted)} {task.name} {arm} seed {seed} {shown} {rows[-1]['cpu_s']:.0f}s", flush=True)
    if arguments.table is not None:
        arguments.table.write_text(table(rows))


if __name__ == "__main__":
    main()

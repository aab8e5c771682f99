"""What it saves to read once what the sequences of zero-shot documents have in common, in tokens and by the clock.

Both ways score the same documents of the same model, one after the other in turns, so that other work on the machine
meets both. The shares are medians over the turns; the scores of both ways must agree.

    python -m benchmarks.forking RUN_OR_CHECKPOINT DATA_DIR [--tasks ...] [--limit 400] [--turns 5] [--out FILE]

What is published lies in `benchmarks/results/forking.json`.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.streaming import hardware
from nested_lm.checkpoint import LoadedCheckpoint, find_checkpoint
from nested_lm.cli.arguments import Device, open_checkpoint
from nested_lm.reading.reader import Document
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit
from nested_lm_lab.tasks.zeroshot.data_folder import verified_files
from nested_lm_lab.tasks.zeroshot.harness import build_requests, open_tasks
from nested_lm_lab.tasks.zeroshot.sequences import ModelScorer
from nested_lm_lab.tasks.zeroshot.tasks import choose_tasks

TOLERANCE = 1e-4  # of a score in nats, relative: float32, other batches
ROWS = 32
THREADS = 1


def documents_of(task, loaded, limit: int | None) -> list[Document]:
    """The sequences of a task's documents, cut to the training context as in an evaluation."""
    from nested_lm_lab.tasks.zeroshot.language_model import HarnessModel

    build_requests(task, limit)
    scorer = ModelScorer(loaded.model, batch_rows=1)
    encoder = HarnessModel(loaded.tokenizer, scorer, max_length=loaded.config.train.context_length)
    return encoder.requests(task.instances).documents


def compare(model, documents: list[Document], turns: int) -> dict:
    """Tokens and seconds of both ways, and the largest difference between their scores."""
    scorers = {shared: ModelScorer(model, batch_rows=ROWS, shared=shared) for shared in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    worst = 0.0
    for turn in range(turns):
        found = {}
        for shared in (True, False) if turn % 2 else (False, True):
            started = time.perf_counter()
            found[shared] = scorers[shared].score(documents)
            seconds[shared].append(time.perf_counter() - started)
        pairs = (pair for rows in zip(found[True], found[False], strict=True) for pair in zip(*rows, strict=True))
        worst = max(worst, *(abs(a.nats - b.nats) / max(b.nats, 1.0) for a, b in pairs))
    assert worst < TOLERANCE, f"forked and unforked scores are {worst:g} apart"
    tokens = {shared: scorer.planned_tokens(documents) for shared, scorer in scorers.items()}
    ratios = [alone / forked for alone, forked in zip(seconds[False], seconds[True], strict=True)]
    return {
        "documents": len(documents),
        "tokens_forked": tokens[True],
        "tokens_unforked": tokens[False],
        "tokens_ratio": tokens[False] / tokens[True],
        "seconds_forked": statistics.median(seconds[True]),
        "seconds_unforked": statistics.median(seconds[False]),
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "worst_relative_difference": worst,
    }


def stamped(loaded: LoadedCheckpoint, options: argparse.Namespace, tasks: dict[str, Any]) -> dict[str, Any]:
    """The measurement with what it was made with: code, machine, checkpoint and options."""
    identity = loaded.identity
    return {
        "what": "zero-shot documents scored with and without sharing what sequences begin with; float32, wall seconds",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": current_commit(),
        "hardware": hardware() | {"threads": THREADS},
        "model": {field: identity[field] for field in ("name", "run_id", "parameters")} | {"step": loaded.step},
        "max_length": loaded.config.train.context_length,
        "limit": options.limit,
        "turns": options.turns,
        "tasks": tasks,
    }


def main() -> None:
    """Measure and print one line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--tasks", default="arc_easy,arc_challenge,boolq,social_iqa")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    loaded = open_checkpoint(find_checkpoint(options.source, report=print), Device.cpu)
    names = choose_tasks(options.tasks)
    found = {}
    with open_tasks(names, verified_files(options.data_dir, names)) as tasks:
        for name, task in tasks.items():
            found[name] = compare(loaded.model, documents_of(task, loaded, options.limit), options.turns)
            one = found[name]
            low, high = one["time_ratio_range"]
            print(
                f"{name}: {one['documents']:,} documents, tokens {one['tokens_ratio']:.3f}, time "
                f"{one['time_ratio']:.2f} ({low:.2f} to {high:.2f}) times as fast forked",
                flush=True,
            )
    if options.out is not None:
        content = json.dumps(stamped(loaded, options, found), indent=1) + "\n"
        write_atomically(options.out, content.encode())


if __name__ == "__main__":
    main()

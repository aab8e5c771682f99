"""A script: trains small models for a step and prints the most memory that each took beside what it began with.

It reads JSON, a list of cases with `model`, `rows`, `tokens` and `recompute`, and writes a list of bytes. Linux only:
the peak of the process is set back between two cases. The allocator must give memory back
at once (MALLOC_MMAP_THRESHOLD_).
"""

import gc
import json
import sys
from pathlib import Path

import torch

from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel, token_losses


def read_status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(case: dict) -> int:
    """Peak of forward and backward of the second micro-batch, beside weights and gradients."""
    model = LanguageModel(ModelConfig.model_validate(case["model"]), recompute=case["recompute"])
    model.initialise(1)

    def run(rows: int, tokens: int) -> None:
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        token_losses(model(ids).logits, ids).sum().backward()

    run(1, 64)  # gradients exist from now on, and what the first call imports is there
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    run(case["rows"], case["tokens"])
    return read_status("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([measure(case) for case in json.load(sys.stdin)]))

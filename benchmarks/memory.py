"""Time the self-modifying layer against its token-by-token reference and a causal attention layer of equal width.

The sides take turns in one process, so that a noisy machine disturbs them alike; what is reported is processor time of
one thread (wall time is useless on a shared machine), the median and the spread of the turns, and the ratio of medians.
Nothing is timed unless the two forms of the memory agree first.

    python benchmarks/memory.py [--tokens 512] [--width 256] [--turns 5] [--out FILE]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nested_lm.config.mixers import FullAttention, SelfModifying
from nested_lm.nn.attention import Attention
from nested_lm.nn.layers import StepContext
from nested_lm.nn.self_modifying import SelfModifyingTitans
from nested_lm.ops import memory_chunked, memory_reference
from nested_lm.ops.memory import GateReadout, MemoryInputs, MemoryWeights, unit, zero_state
from nested_lm.write_rule import WriteRule

AGREEMENT = 1e-10  # relative error in float64 below which the timed forms count as the same
HEAD_WIDTH = 64


def memory_problem(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    shape = (batch, tokens, heads, HEAD_WIDTH)
    inputs = MemoryInputs(
        *(unit(normal(*shape)).requires_grad_() for _ in range(3)), normal(*shape[:3]), normal(*shape[:3]) + 5
    )
    start = MemoryWeights(
        (normal(heads, 5, HEAD_WIDTH, HEAD_WIDTH) / HEAD_WIDTH**0.5).requires_grad_(),
        (normal(heads, 5, HEAD_WIDTH, HEAD_WIDTH) * 0.1 / HEAD_WIDTH**0.5).requires_grad_(),
    )
    readout = GateReadout(normal(heads, HEAD_WIDTH), normal(heads, HEAD_WIDTH))
    return inputs, start, readout, zero_state(start, batch)


def write_rule(chunk: int) -> WriteRule:
    return WriteRule(chunk, chunk)


def gate() -> float:
    """Worst relative difference between the two forms, outputs and gradients, in float64."""
    problem = memory_problem(2, 37, 2, torch.float64)
    found = []
    for backend in (memory_reference, memory_chunked):
        reads = backend.self_modify(*problem, rule=write_rule(16), position=0, resets=None).reads
        weight = torch.linspace(-1, 1, reads.numel(), dtype=reads.dtype).view_as(reads)
        found.append([reads, *torch.autograd.grad((reads * weight).sum(), [*problem[0][:3], *problem[1]])])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found, strict=True))


def training_pass(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        call().square().mean().backward()

    return run


def sides(batch: int, tokens: int, width: int) -> dict[str, tuple[int, Callable[[], None]]]:
    """Name -> (tokens a call, one forward and backward)."""
    x = torch.randn(batch, tokens, width)
    context = StepContext(0, None, None)
    attention = Attention(width, FullAttention(kind="attention", num_heads=width // HEAD_WIDTH))
    result = {
        "attention": (batch * tokens, training_pass(lambda: attention(x, context, attention.initial_state(batch))[0]))
    }
    for chunk in (16, 64):
        config = SelfModifying(kind="self_modifying", num_heads=width // HEAD_WIDTH, head_width=HEAD_WIDTH, chunk=chunk)
        layer = SelfModifyingTitans(width, config, epsilon=1e-6, recompute=False)
        layer.initialise(lambda tensor, std: torch.nn.init.normal_(tensor, std=std))
        call = training_pass(lambda layer=layer: layer(x, context, layer.initial_state(batch))[0])
        result[f"self_modifying_chunk_{chunk}"] = (batch * tokens, call)
    few = 32  # the reference is slow; its cost a token does not depend on how many there are
    problem = memory_problem(1, few, width // HEAD_WIDTH, torch.float32)
    for name, backend in (("reference", memory_reference), ("chunked", memory_chunked)):
        rule = write_rule(few)

        def call(backend=backend, rule=rule) -> torch.Tensor:
            return backend.self_modify(*problem, rule=rule, position=0, resets=None).reads

        result[f"memory_only_{name}"] = (few, training_pass(call))
    return result


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--matmul-precision", choices=["highest", "high", "medium"], default="highest")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    error = gate()
    if error > AGREEMENT:
        raise SystemExit(f"not timed: the chunked form differs from the reference by {error:.1e} (limit {AGREEMENT})")
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    competitors = sides(arguments.batch, arguments.tokens, arguments.width)
    speeds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(arguments.turns + 1):
        for name, (tokens, call) in competitors.items():
            began = time.process_time()
            call()
            if turn:  # the first turn warms up
                speeds[name].append(tokens / (time.process_time() - began))
    rows = {
        name: {"tokens_per_cpu_s": statistics.median(values), "low": min(values), "high": max(values)}
        for name, values in speeds.items()
    }
    median = {name: row["tokens_per_cpu_s"] for name, row in rows.items()}
    result = {
        "what": "forward and backward, float32, one thread, processor time",
        "agreement_float64": error,
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "rows": rows,
        "ratios": {
            "chunk 16 / attention": median["self_modifying_chunk_16"] / median["attention"],
            "chunk 64 / attention": median["self_modifying_chunk_64"] / median["attention"],
            "chunked / reference": median["memory_only_chunked"] / median["memory_only_reference"],
        },
        "hardware": {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Compile every kernel ahead of time and count launches: `python -m benchmarks.kernels [--page docs/gpu.md]`.

Needs no GPU. Results are kept by source (`compiling.CACHE`), so that only what changed is compiled again: 5 to 40
seconds a kernel and architecture.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import triton

from benchmarks.kernels.compiling import SHARED_KIB, compiled
from benchmarks.kernels.recording import bytes_moved, launches
from benchmarks.pages import insert
from nested_lm.config.load import load_run
from nested_lm.ops.memory.rule import WriteRule

RESULT = Path("benchmarks/results/kernels.json")
HOPE = load_run("hope/pilot").model.mixer
TITANS = load_run("baselines/titans_lmm_pilot").model.mixer
LINEAR = WriteRule.model_validate({"rule": "linear", "chunk": 64})
CASES = {
    # name: rule, head width, hidden width, compute capabilities
    "Hope, width 64": (HOPE, 64, 64, (80, 90, 100)),
    "Titans, width 64": (TITANS, 64, 128, (90,)),
    "linear, width 64": (LINEAR, 64, 64, (90,)),
    "Hope, width 32": (HOPE, 32, 32, (90,)),
    "Hope, width 128": (HOPE, 128, 128, (90,)),
}


def resources(names: list[str]) -> list[dict]:
    """Resources of each kernel of some cases."""
    rows = []
    for name in names:
        rule, width, hidden, capabilities = CASES[name]
        seen = set()
        for launch in launches(rule, width=width, hidden=hidden, low=True):
            variant = "writes" if launch.constants.get("CARRY") is False else ""
            label = " ".join(filter(None, (launch.kernel.__name__.removesuffix("_kernel"), variant)))
            if launch.constants.get("LAYER", -1) >= 0 and rule.depth == 2:
                label += f" layer {launch.constants['LAYER']}"
            if label in seen:
                continue
            seen.add(label)
            for capability in capabilities:
                found = compiled(launch, capability)
                programs = found.programs(capability)
                row = {"case": name, "kernel": label, "sm": capability, **found._asdict(), "programs": programs}
                print(row, flush=True)
                rows.append(row)
    return rows


def micro_batch() -> dict:
    """Launches and bytes of the memories of one layer of hope/pilot, 8 rows of 4,096 tokens."""
    found = launches(HOPE, width=64, hidden=64, low=True, batch=8, tokens=4096, heads=HOPE.num_heads)
    count = Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in found)
    moved: Counter[str] = Counter()
    for launch in found:
        moved[launch.kernel.__name__.removesuffix("_kernel")] += bytes_moved(launch)
    forward = sum(1 for launch in found if not launch.kernel.__name__.endswith("backward_kernel"))
    gigabytes = {name: number / 1e9 for name, number in moved.items()}
    return {"launches": dict(count), "forward_and_recomputed": forward, "gigabytes": gigabytes}


def page(rows: list[dict], counted: dict) -> str:
    """The tables as Markdown."""
    lines = [
        "| Rule | Kernel | GPU | Registers | Spilled, bytes a thread | Shared memory, KiB | Warps | Programs at once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['case']} | {r['kernel'].replace('_', ' ')} | sm_{r['sm']} | {r['registers']} | {r['spilled']:,} | "
        f"{r['shared'] / 1024:.0f} of {SHARED_KIB[r['sm']]} | {r['warps']} | {r['programs']} |"
        for r in rows
    ]
    total = sum(counted["launches"].values())
    lines += ["", f"One layer of `hope/pilot`, forward and backward, 8 rows of 4,096 tokens: {total} launches,"]
    lines += [f"{sum(counted['gigabytes'].values()):.0f} GB if nothing stays in a cache (counted, not measured):", ""]
    lines += ["| Kernel | Launches | GB |", "|---|---|---|"]
    lines += [
        f"| {k.replace('_', ' ')} | {n} | {counted['gigabytes'][k]:.1f} |" for k, n in counted["launches"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    counted, rows = micro_batch(), resources(arguments.cases)
    result = {"triton": triton.__version__, "resources": rows, "pilot_layer": counted}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.page:
        insert(arguments.page, page(rows, counted))


if __name__ == "__main__":
    main()

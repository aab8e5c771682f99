"""Costs of the presets of the three scales, a table: `python -m benchmarks.scales --page docs/scales.md` writes it.

Counts and arithmetic, no measurement; a few minutes on one core.
"""

import argparse
import math
from pathlib import Path

from benchmarks.pages import insert, line
from nested_lm.config.compose import preset_names
from nested_lm.config.load import load_run
from nested_lm.config.run import RunConfig
from nested_lm.nn.sizing import count_parameters
from nested_lm.train.costs.count import DEFAULT_MFU, RECOMPUTE, stage_costs, training_hours
from nested_lm.train.costs.footprint import DEVICE_BYTES, devices_needed, peak_bytes

MARKERS = "<!-- table of benchmarks.scales: begin -->", "<!-- table of benchmarks.scales: end -->"
SCALES = ("pilot", "mid", "target")
PARTS = ("embedding", "mixer", "memory_starts", "channel", "norms", "total")
DEVICE = "h100"
HEAD = (
    "Preset",
    *(part.replace("_", " ") for part in PARTS),
    "tokens",
    "steps",
    "state, bytes",
    "training, MFLOP a token",
    "H100 hours",
    *(f"{recompute}, GB" for recompute in RECOMPUTE),
    "devices, none / chunk / block",
)


def presets() -> list[str]:
    """Presets of the table: every scale, Hope first."""
    names = preset_names()
    return [
        name
        for scale in SCALES
        for name in (f"hope/{scale}", *(n for n in names if n.startswith("baselines/") and n.endswith(f"_{scale}")))
    ]


def exact_cells(config: RunConfig) -> list[str]:
    """Parameters by part, tokens and steps."""
    parts = count_parameters(config.model)
    return [f"{parts[part]:,}" for part in PARTS] + [f"{config.train.budget_tokens:,}", f"{config.train.num_steps:,}"]


def counted_cells(config: RunConfig) -> list[str]:
    """What probes count: state, operations, hours, memory of one device, devices that are needed."""
    costs = stage_costs(config)
    hours = sum(training_hours(config, costs, device=DEVICE, mfu=DEFAULT_MFU, devices=1))
    training = sorted(
        {f"{each.training / each.tokens / 1e6:,.0f}" for each in costs}, key=lambda x: float(x.replace(",", ""))
    )
    peaks = [
        max(sum(peak_bytes(config, each, recompute=recompute).values()) for each in costs) for recompute in RECOMPUTE
    ]
    needed = [
        devices_needed(config, costs, recompute=recompute, memory=DEVICE_BYTES[DEVICE]) for recompute in RECOMPUTE
    ]
    return [
        f"{max(each.state_bytes for each in costs):,}",
        " to ".join(dict.fromkeys((training[0], training[-1]))),
        f"{rounded(hours):,}",
        *(f"{peak / 1e9:,.0f}" for peak in peaks),
        " / ".join("no" if count is None else str(count) for count in needed),
    ]


def rounded(value: float) -> int | float:
    """Three digits."""
    digits = 2 - math.floor(math.log10(value))
    return round(value, digits) if digits > 0 else round(value)


def row(name: str) -> str:
    """Make the line of a preset."""
    config = load_run(name)
    return line([f"`{name}`", *exact_cells(config), *counted_cells(config)])


def main() -> None:
    """Write the table between its markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, required=True, help="page that has the markers")
    page = parser.parse_args().page
    lines = [line(HEAD), "|---|" + "---:|" * (len(HEAD) - 1)]
    for name in presets():
        print(name, flush=True)
        lines.append(row(name))
    insert(page, "\n".join(lines), MARKERS)


if __name__ == "__main__":
    main()

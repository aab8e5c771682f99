"""Check and time the memories' kernels on a GPU: `python -m benchmarks.gpu [--minutes 8] [--rehearse]`, or `make gpu`.

Four parts, each with its share of the minutes: what the machine has; the kernels beside torch's form in float64,
outputs and every gradient; training tokens per second, share of the peak, memory and decoding of each architecture;
the rest goes to Hope, Titans and a Transformer++ trained side by side on the bundled speeches. The result file is
written after every figure, so that a run that is cut loses nothing. --rehearse: on a processor, in Triton's
interpreter, at tiny sizes.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nested_lm.cli.doctor import examine
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit

RESULTS = Path("benchmarks/results/gpu")
PARTS = ("doctor", "agreement", "speed", "training")
SHARES = {"doctor": 0.05, "agreement": 0.25, "speed": 0.45, "training": 0.25}
"""Of the minutes, at most; what a part leaves goes to those behind it."""


class Report:
    """A result file that is written after every figure."""

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"stamp": stamp, "figures": []}

    def add(self, part: str, name: str, figure: dict[str, Any]) -> None:
        """Keep a figure."""
        self.content["figures"].append({"part": part, "name": name, **figure})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())
        print(f"{part}: {name}: {figure}", flush=True)

    def attempt(self, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure; what fails is a figure as well."""
        try:
            figure = measure()
        except Exception as error:
            figure = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        self.add(part, name, figure)


def stamp(device: torch.device) -> dict[str, Any]:
    """Say what ran where."""
    from importlib.metadata import version

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def deadlines(minutes: float) -> Iterator[tuple[str, float]]:
    """Each part, and until when it may begin something new."""
    begun = time.monotonic()
    until = begun
    for part in PARTS:
        until += SHARES[part] * minutes * 60
        yield part, until


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --rehearse runs every part on a processor at tiny sizes")
    from benchmarks.gpu import agreement, speed, training
    from benchmarks.kernels import interpreting

    if arguments.rehearse:
        interpreting.mend()

    device = torch.device("cpu" if arguments.rehearse else "cuda")
    name = "rehearsal" if arguments.rehearse else torch.cuda.get_device_name(device).replace(" ", "_")
    folder = Path("artifacts/gpu") if arguments.rehearse else RESULTS
    report = Report(folder / f"{name}.json", stamp(device))
    for part, until in deadlines(arguments.minutes):
        if part == "doctor":
            for check in examine(Path("artifacts")):
                report.add(part, check.name, {"state": check.state, "found": check.found})
        elif part == "agreement":
            agreement.run(report, device, until, tiny=arguments.rehearse)
        elif part == "speed":
            speed.run(report, device, until, tiny=arguments.rehearse)
        else:
            training.run(report, device, until, tiny=arguments.rehearse)
    print(f"written: {report.path}")


if __name__ == "__main__":
    main()

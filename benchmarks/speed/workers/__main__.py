"""Prepare and run jobs on request. Requests and answers are lines of JSON on standard input and output.

    python -m benchmarks.speed.workers benchmarks.speed.workers.ours

`{"do": "prepare", "key": K, "job": NAME, "precision": P, "arguments": {...}}` builds a job;
`{"do": "run", "key": K}` runs it once and answers with processor and wall time; `{"do": "drop"}` forgets all jobs;
`{"do": "stamp"}` answers with versions, `{"do": "memory"}` with resident and peak memory. What goes wrong is answered
as `{"error": ...}`.
"""

import gc
import importlib
import json
import os
import sys
import time
import warnings
from typing import Any

import torch


class Worker:
    """Jobs of one module, by key."""

    def __init__(self, module: str) -> None:
        self.makers = importlib.import_module(module).JOBS
        self.jobs: dict[str, tuple[Any, str]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says."""
        return getattr(self, "do_" + request.pop("do"))(**request)

    def do_prepare(self, key: str, job: str, precision: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build a job."""
        torch.manual_seed(0)
        made = self.makers[job](**arguments)
        self.jobs[key] = made, precision
        return {"tokens": made.tokens, "parameters": made.parameters}

    def do_run(self, key: str) -> dict[str, Any]:
        """Run a job once."""
        job, precision = self.jobs[key]
        torch.set_float32_matmul_precision(precision)
        gc.collect()
        began, cpu_began = time.perf_counter(), time.process_time()
        job.call()
        return {"cpu_s": time.process_time() - cpu_began, "wall_s": time.perf_counter() - began}

    def do_drop(self) -> dict[str, Any]:
        """Forget all jobs."""
        self.jobs.clear()
        gc.collect()
        return {}

    def do_stamp(self) -> dict[str, Any]:
        """Versions of what runs here."""
        return {"python": sys.version.split()[0], "torch": torch.__version__, "threads": torch.get_num_threads()}

    def do_memory(self) -> dict[str, Any]:
        """Resident memory of this process, now and at its highest, in bytes."""
        from benchmarks.streaming import peak_bytes, resident_bytes

        return {"resident": resident_bytes(), "peak": peak_bytes()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of packages as they are, which this suite does not mend
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        try:
            found = worker.answer(json.loads(line))
        except Exception as error:  # the other side decides whether it can go on without this job
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()

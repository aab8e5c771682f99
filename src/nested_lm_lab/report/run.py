"""One run in the terminal: what it is, what it took, and every result with its intervals."""

from collections.abc import Iterator
from pathlib import Path

from nested_lm_lab.evaluation.registry import find_task
from nested_lm_lab.report.collect import collect_run
from nested_lm_lab.report.tables import duration


def run_lines(folder: Path) -> Iterator[str]:
    """The results of a run folder, line by line.

    Raises ReportError when the folder is no run, or a file of it is damaged.
    """
    campaign = collect_run(folder)
    (run,) = campaign.runs
    tokens, seconds = run.steps.last("tokens") or 0, run.steps.last("seconds")
    size = "" if run.parameters is None else f"{run.parameters:,} parameters, "
    speed = f" in {duration(seconds)} ({tokens / seconds:,.0f} tokens/s)" if seconds else ""
    yield f"{run.arm}, run {run.config.name}, seed {run.config.seed}: {size}{tokens:,.0f} training tokens{speed}"
    validation = run.evaluations.last("validation_bpb")
    if validation is not None:
        yield f"last validation while training: {validation:.3f} bits per byte"
    for name, result in run.results.items():
        yield f"{name} (checkpoint {result.checkpoint.name})"
        yield from find_task(result.metrics.kind).lines(result)
    yield from campaign.notes
    if run.results:
        yield "One seed: intervals are over documents or prompts and leave out the luck of an initialisation."

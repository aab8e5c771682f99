"""What a person sees while a run trains: a live line on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainConsole:
    """Progress, time left, tokens per second, loss and memory.

    On a terminal one line is redrawn at every step. Elsewhere (a file, a pipe, CI) a plain line is printed
    every `every_steps` steps, so that logs stay readable.
    """

    def __init__(self, name: str, *, total_steps: int, done_steps: int, every_steps: int, console: Console) -> None:
        self._console = console
        self._total, self._every = total_steps, every_steps
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._progress.add_task(name, total=total_steps, completed=done_steps, figures="")
            self._progress.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step record."""
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], figures=_figures(record))
        elif record["step"] % self._every == 0 or record["step"] == self._total:
            left = (self._total - record["step"]) * record["seconds"] / record["step"]
            self.note(f"step {record['step']}/{self._total}  {_figures(record)}  {_duration(left)} left")

    def note(self, text: str) -> None:
        """Print a sentence; a live line stays below it."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop redrawing."""
        if self._progress is not None:
            self._progress.stop()


def _figures(record: Mapping[str, Any]) -> str:
    """Loss, speed and memory of a step."""
    return f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  {record['memory_mb']:,.0f} MB"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

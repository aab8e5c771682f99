"""What is asked in long texts: where samples come from, and how outputs are judged."""

from collections.abc import Callable
from dataclasses import dataclass

from nested_lm_lab.tasks.needles.prompts import Sample


@dataclass(frozen=True)
class Suite:
    """One task: where its samples come from, and how outputs are judged.

    upstream: its name where it comes from. haystack: what a result says about the text; None: the text is the task.
    rows: prompts of the full length that a sample has, its control included. make: a sample of a length, by number.
    match: score of an output, 0 to 1. settled: whether no more tokens can change it.
    """

    name: str
    upstream: str
    haystack: str | None
    rows: int
    max_new_tokens: int
    make: Callable[[int, int], Sample]
    match: Callable[[str, Sample], float]
    settled: Callable[[str, Sample], bool]

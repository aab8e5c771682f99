"""RULER's tasks as suites, from settings."""

from collections.abc import Callable

from nested_lm.data.tokenizer import TextTokenizer
from nested_lm.errors import ConfigError
from nested_lm_lab.tasks.needles.answers import string_match
from nested_lm_lab.tasks.needles.haystack import Books, Haystack, Needles, Noise
from nested_lm_lab.tasks.needles.lists import make_list_sample
from nested_lm_lab.tasks.needles.prompts import Sample, make_sample
from nested_lm_lab.tasks.needles.settings import NiahSettings
from nested_lm_lab.tasks.needles.suite import Suite
from nested_lm_lab.tasks.needles.tasks import TASKS, Task


def ruler_suites(tokenizer: TextTokenizer, settings: NiahSettings) -> tuple[Suite, ...]:
    """The tasks that settings name.

    Raises:
        ConfigError: a haystack is asked for that a task cannot have, or books that no task reads.
        DataError: a book cannot be read.
    """
    return tuple(
        _suite(TASKS[name], tokenizer, haystack, settings)
        for name, haystack in _open_haystacks(tokenizer, settings).items()
    )


def _suite(task: Task, tokenizer: TextTokenizer, haystack: Haystack | None, settings: NiahSettings) -> Suite:
    return Suite(
        name=task.name,
        upstream=task.ruler,
        haystack=None if haystack is None else haystack.identity,
        rows=(len(settings.depths) if task.has_depth else 1) + 1,
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        make=_maker(task, tokenizer, haystack, settings),
        match=lambda output, sample: string_match(output, sample.references),
        settled=lambda output, sample: string_match(output, sample.references) == 1.0,
    )


def _maker(
    task: Task, tokenizer: TextTokenizer, haystack: Haystack | None, settings: NiahSettings
) -> Callable[[int, int], Sample]:
    def make(length: int, number: int) -> Sample:
        if haystack is None:
            return make_list_sample(task, tokenizer, length=length, seed=settings.seed, number=number)
        return make_sample(
            task, tokenizer, haystack, length=length, depths=settings.depths, seed=settings.seed, number=number
        )

    return make


def _open_haystacks(tokenizer: TextTokenizer, settings: NiahSettings) -> dict[str, Haystack | None]:
    """The haystack of each task."""
    kinds = {}
    for name in settings.tasks:
        task = TASKS[name]
        kinds[name] = task.haystack if settings.haystack is None else settings.haystack
        if settings.haystack is not None and (
            task.haystack is None or (task.shape == "variables" and settings.haystack == "needle")
        ):
            raise ConfigError(
                f"--haystack {settings.haystack}: task {name} cannot have it; leave --haystack out, or name other tasks"
            )
    if settings.books and "books" not in kinds.values():
        raise ConfigError("--books: no task reads them; name one that does with --tasks, or add --haystack books")
    books = Books.open(tokenizer, settings.books) if "books" in kinds.values() else None
    made: dict[str, Haystack | None] = {}
    for name, kind in kinds.items():
        task = TASKS[name]
        choices = {None: None, "noise": Noise(tokenizer), "books": books}
        made[name] = Needles(tokenizer, task.keys, task.values) if kind == "needle" else choices[kind]
    return made

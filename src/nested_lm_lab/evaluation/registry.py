"""The tasks there are: one line each.

Classes are named by their place and imported when they are asked for, so that a command line that needs one task loads
one task. To add a task, write its file and add its line (docs/extending.md).
"""

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from nested_lm.errors import ConfigError

if TYPE_CHECKING:
    from nested_lm_lab.evaluation.task import Task

    AnyTask = type[Task[Any, Any]]

RUN, CONTINUAL = "run", "continual"


class Entry(NamedTuple):
    """One task.

    kind: of its results, and the name of the task. place: `module:class`. verb: of `nested-lm eval`: its own, `run` or
    `continual`; kind and verb are equal where the task has a verb of its own. word: its name in the --tasks of
    `eval continual`.
    """

    kind: str
    place: str
    verb: str = RUN
    word: str | None = None


_TASKS = "nested_lm_lab.tasks"
_CONTINUAL_TASKS = f"{_TASKS}.continual.tasks"

ENTRIES = (
    Entry("language_modelling", f"{_TASKS}.language_modelling:LanguageModellingTask"),
    Entry("passkey", f"{_TASKS}.needles.passkey:PasskeyTask"),
    Entry("sampling", f"{_TASKS}.sampling:SamplingTask"),
    Entry("continual", f"{_CONTINUAL_TASKS}:Stream", word="stream"),
    Entry("regret", f"{_CONTINUAL_TASKS}:Regret", CONTINUAL, "regret"),
    Entry("carried", f"{_CONTINUAL_TASKS}:Carried", CONTINUAL, "carried"),
    Entry("lesion", f"{_CONTINUAL_TASKS}:Lesion", CONTINUAL, "lesion"),
    Entry("events", f"{_CONTINUAL_TASKS}:Events", CONTINUAL, "events"),
    Entry("retention", f"{_CONTINUAL_TASKS}:Retention", CONTINUAL, "retention"),
    Entry("class_incremental", f"{_CONTINUAL_TASKS}:Classes", CONTINUAL, "classes"),
    Entry("changing_facts", f"{_CONTINUAL_TASKS}:Facts", CONTINUAL, "facts"),
    Entry("invented_languages", f"{_CONTINUAL_TASKS}:Languages", CONTINUAL, "languages"),
    Entry("niah", f"{_TASKS}.needles.niah:NiahTask", "niah"),
    Entry("babilong", f"{_TASKS}.needles.babilong:BabilongTask", "babilong"),
    Entry("books", f"{_TASKS}.books:BooksTask", "books"),
    Entry("zeroshot", f"{_TASKS}.zeroshot.task:ZeroShotSuite", "zeroshot"),
)


def kinds() -> tuple[str, ...]:
    """All kinds of results."""
    return tuple(entry.kind for entry in ENTRIES)


def own_verbs() -> tuple[Entry, ...]:
    """Tasks that have a verb of their own."""
    return tuple(entry for entry in ENTRIES if entry.verb == entry.kind)


def tasks_of_run() -> tuple[Entry, ...]:
    """Tasks that the section `eval` of a run names, in the order in which they are measured."""
    return tuple(entry for entry in ENTRIES if entry.verb == RUN)


def continual_words() -> dict[str, Entry]:
    """Tasks of `nested-lm eval continual`, by their names there."""
    return {entry.word: entry for entry in ENTRIES if entry.word is not None}


def find_entry(name: str) -> Entry | None:
    """The task of a result: `name` is its kind, or `KIND_LABEL`; None when there is none."""
    return next((e for e in ENTRIES if name == e.kind or name.startswith(f"{e.kind}_")), None)


def find_task(kind: str) -> "AnyTask":
    """The class of a task.

    Raises:
        ConfigError: no task has this name.
    """
    entry = next((entry for entry in ENTRIES if entry.kind == kind), None)
    if entry is None:
        raise ConfigError(f"unknown task {kind!r}; choices: {', '.join(kinds())}")
    found: AnyTask = resolve(entry.place)
    return found


def resolve(place: str) -> Any:
    """The object at `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)

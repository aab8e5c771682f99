"""The tasks: what is hidden, what is asked, and what counts as an answer. Shapes and wording are RULER's.

Source: RULER (arXiv 2404.06654, github.com/NVIDIA/RULER), scripts/data/synthetic and synthetic.yaml. Deviations: words
come from lists of our own; `books` stands for the essays; variable tracking and common words have no worked example
before them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nested_lm_lab.tasks.needles.haystack import NEEDLE
from nested_lm_lab.tasks.needles.words import draw_letters, draw_numbers, draw_uuids, draw_words

HaystackKind = Literal["noise", "needle", "books"]

VERSION = "2"
"""Of everything that makes prompts and scores them. Results of different versions share no table.

2: every needle stands between two whole sentences. In version 1 noise, or an unfinished sentence, stood before the
asked needle and before no other, which gave mk1, mk2 and mk3 away.
"""

GIVEN_AWAY = ("mk1", "mk2", "mk3")
"""Tasks whose results of version 1 say nothing."""


@dataclass(frozen=True)
class Task:
    """One task.

    ruler: its name in RULER. shape: what the text is made of. haystack: where the rest of the text comes from; None:
    the text is all its own. keys, values: what a key and a value look like. num_keys: needles with a key of their own,
    of which num_queries are asked for. num_values: needles that share a key. max_new_tokens: that are generated.
    """

    name: str
    ruler: str
    shape: Literal["needles", "variables", "common_words", "frequent_words"]
    haystack: HaystackKind | None
    max_new_tokens: int
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def has_depth(self) -> bool:
        """Whether one needle is asked for, so that its depth can be chosen. Several lie at random depths."""
        return self.shape == "needles" and self.num_values == 1 and self.num_queries == 1


TASKS = {
    task.name: task
    for task in (
        Task("s1", "niah_single_1", "needles", "noise", 128),
        Task("s2", "niah_single_2", "needles", "books", 128),
        Task("s3", "niah_single_3", "needles", "books", 128, values="uuids"),
        Task("mk1", "niah_multikey_1", "needles", "books", 128, num_keys=4),
        Task("mk2", "niah_multikey_2", "needles", "needle", 128),
        Task("mk3", "niah_multikey_3", "needles", "needle", 128, keys="uuids", values="uuids"),
        Task("mv", "niah_multivalue", "needles", "books", 128, num_values=4),
        Task("mq", "niah_multiquery", "needles", "books", 128, num_keys=4, num_queries=4),
        Task("vt", "vt", "variables", "noise", 30),
        Task("cwe", "cwe", "common_words", None, 120),
        Task("fwe", "fwe", "frequent_words", None, 50),
    )
}
"""All tasks by their short names."""

NUM_HOPS = 4
_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Asked:
    """What one sample hides and asks for.

    header: before the text. question: after it, up to where the answer begins. answer: how a model that knows it would
    go on. references: strings that its output is searched for. needles: sentences that hold the answer. others: needles
    that are not asked for. keys: that must not occur elsewhere.
    """

    header: str
    question: str
    answer: str
    references: tuple[str, ...]
    needles: tuple[str, ...]
    others: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def ask(task: Task, rng: np.random.Generator, *, joint: str = " ") -> Asked:
    """Draw what a sample of a task with needles or variables hides. joint: what stands before a needle."""
    return _ask_variables(rng, joint) if task.shape == "variables" else _ask_needles(task, rng, joint)


def _ask_needles(task: Task, rng: np.random.Generator, joint: str) -> Asked:
    count = task.num_keys * task.num_values
    keys = draw_uuids(rng, task.num_keys) if task.keys == "uuids" else draw_words(rng, task.num_keys)
    values = draw_uuids(rng, count) if task.values == "uuids" else draw_numbers(rng, count)
    sentences = [
        joint + NEEDLE.format(kind=task.values, key=keys[index // task.num_values], value=value)
        for index, value in enumerate(values)
    ]
    asked = task.num_queries * task.num_values
    return Asked(
        *_needle_frame(task, keys[: task.num_queries]),
        answer=" " + ", ".join(values[:asked]),
        references=tuple(values[:asked]),
        needles=tuple(sentences[:asked]),
        others=tuple(sentences[asked:]),
        keys=tuple(keys),
    )


def _needle_frame(task: Task, queries: list[str]) -> tuple[str, str]:
    """Header and question."""
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    if task.has_depth:
        kind = task.values.removesuffix("s")
        return (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {kind} afterwards.\n",
            f"\nWhat is the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} "
            f"for {query} mentioned in the provided text is",
        )
    kind = task.values
    return (
        f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {kind} afterwards.\n",
        f"\nWhat are all the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} "
        f"for {query} mentioned in the provided text are",
    )


def _ask_variables(rng: np.random.Generator, joint: str) -> Asked:
    """One chain of assignments, each of the variable before it."""
    names = draw_letters(rng, NUM_HOPS + 1, length=5, letters=_UPPER)
    (value,) = draw_numbers(rng, 1, digits=5)
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return Asked(
        header="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        question=f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
        f"According to the chain(s) of variable assignment in the text above, {len(names)} variables are assigned the "
        f"value {value}, they are:",
        answer=" " + " ".join(names),
        references=tuple(names),
        needles=tuple(f"{joint}VAR {name} = {source}" for name, source in zip(names, sources, strict=True)),
    )

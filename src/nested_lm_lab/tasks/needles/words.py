"""Words that keys are made of: adjective-noun pairs, as in RULER, from lists of this project's own."""

import uuid
from importlib.resources import files

import numpy as np


def _listed(name: str) -> tuple[str, ...]:
    return tuple((files("nested_lm_lab.tasks.needles") / name).read_text(encoding="utf-8").split())


ADJECTIVES = _listed("adjectives.txt")
NOUNS = _listed("nouns.txt")


def draw_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different adjective-noun pairs.

    Raises:
        ValueError: more than there are.
    """
    total = len(ADJECTIVES) * len(NOUNS)
    if count > total:
        raise ValueError(f"{count} different keys are wanted, the word lists make {total}")
    chosen = rng.choice(total, size=count, replace=False)
    return [f"{ADJECTIVES[index % len(ADJECTIVES)]}-{NOUNS[index // len(ADJECTIVES)]}" for index in chosen]


def draw_numbers(rng: np.random.Generator, count: int, *, digits: int = 7) -> list[str]:
    """Different numbers, none of them beginning with 0."""
    low, high = 10 ** (digits - 1), 10**digits
    found: dict[str, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(str(number) for number in rng.integers(low, high, size=count - len(found)))
    return list(found)


def draw_uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Random UUIDs of version 4."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def draw_letters(rng: np.random.Generator, count: int, *, length: int, letters: str) -> list[str]:
    """Different strings of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = rng.integers(len(letters), size=(count - len(found), length))
        found |= dict.fromkeys("".join(letters[index] for index in row) for row in drawn)
    return list(found)

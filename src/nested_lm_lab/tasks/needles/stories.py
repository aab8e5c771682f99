"""bAbI stories: read from the data set's files, or made by a small generator for its first two tasks.

Source: arXiv 1502.05698. The files are CC BY 3.0; none of them is part of this package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nested_lm.errors import DataError

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_PEOPLE = ("Daniel", "John", "Mary", "Sandra")
_ITEMS = ("apple", "football", "milk")
_MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_TAKES = ("picked up", "took", "got", "grabbed")
_DROPS = ("dropped", "put down", "left")
_FACTS = (4, 10)  # fewest and most of a story that is made here

GENERATED = ("qa1", "qa2")


class Story(NamedTuple):
    """Facts in order, a question about them, and the facts that it takes. supports: indices, ascending."""

    facts: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]


def read_stories(folder: Path, task: str) -> list[Story]:
    """Every question of a task's test file `<task>_*test.txt`, with all facts before it.

    Raises:
        DataError: no such file, several of them, or one that is not in bAbI's format.
    """
    found = sorted(folder.glob(f"{task}_*test.txt"))
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise DataError(f"{folder} holds {what} {task}_*test.txt; name the folder of bAbI's English files with --facts")
    (path,) = found
    stories: list[Story] = []
    facts: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            index, text = line.split(" ", 1)
            at = int(index)
            if at == 1:
                facts = {}
            if "\t" not in text:
                facts[at] = text.strip()
                continue
            question, answer, supports = (part.strip() for part in text.split("\t"))
            places = list(facts)
            story = Story(
                tuple(facts.values()), question, answer, tuple(sorted(places.index(int(s)) for s in supports.split()))
            )
        except ValueError as error:
            raise DataError(f"{path}:{number} is not a line of a bAbI task: {line!r:.80}") from error
        stories.append(story)
    if not stories:
        raise DataError(f"{path} holds no question")
    return stories


def make_story(task: str, rng: np.random.Generator) -> Story:
    """Make a story of a task in `GENERATED`: where is somebody (qa1), or where is something (qa2)?"""
    while True:
        world = _World(rng, with_items=task == "qa2")
        for _ in range(int(rng.integers(_FACTS[0], _FACTS[1] + 1))):
            world.step()
        found = world.ask()
        if found is not None:
            return found


class _World:
    """Who is where and has what, and the sentences that said so."""

    def __init__(self, rng: np.random.Generator, *, with_items: bool) -> None:
        self.rng, self.with_items = rng, with_items
        self.facts: list[str] = []
        self.places: dict[str, tuple[str, int]] = {}  # of people, and the fact that said so
        self.holders: dict[str, tuple[str, int]] = {}  # of items that are carried
        self.lying: dict[str, tuple[str, tuple[int, ...]]] = {}  # places of items that were dropped

    def _one(self, choices: Sequence[str]) -> str:
        return choices[int(self.rng.integers(len(choices)))]

    def step(self) -> None:
        """Let something happen."""
        person = self._one(_PEOPLE)
        held = [item for item, (holder, _) in self.holders.items() if holder == person]
        free = [item for item in _ITEMS if item not in self.holders]
        act = self.rng.random()
        if not self.with_items or person not in self.places or act < 0.5:
            self._move(person)
        elif held and act < 0.65:
            self._drop(person, self._one(held))
        elif free:
            self._take(person, self._one(free))
        else:
            self._move(person)

    def _move(self, person: str) -> None:
        here = self.places.get(person, ("", 0))[0]
        place = self._one([place for place in PLACES if place != here])
        self.places[person] = place, len(self.facts)
        self.facts.append(f"{person} {self._one(_MOVES)} the {place}.")

    def _take(self, person: str, item: str) -> None:
        # Things are wherever somebody takes them, unless they were dropped elsewhere.
        if item in self.lying and self.lying[item][0] != self.places[person][0]:
            self._move(person)
            return
        self.lying.pop(item, None)
        self.holders[item] = person, len(self.facts)
        self.facts.append(f"{person} {self._one(_TAKES)} the {item} there.")

    def _drop(self, person: str, item: str) -> None:
        place, said = self.places[person]
        _, taken = self.holders.pop(item)
        self.lying[item] = place, tuple(sorted({taken, said, len(self.facts)}))
        self.facts.append(f"{person} {self._one(_DROPS)} the {item}.")

    def ask(self) -> Story | None:
        """Ask for something that the facts tell; None when there is nothing."""
        facts = tuple(self.facts)
        if not self.with_items:
            person = self._one(sorted(self.places))
            place, said = self.places[person]
            return Story(facts, f"Where is {person}?", place, (said,))
        known = {item: self.lying[item] for item in self.lying}
        for item, (holder, taken) in self.holders.items():
            place, said = self.places[holder]
            known[item] = place, tuple(sorted({taken, said}))
        if not known:
            return None
        item = self._one(sorted(known))
        place, supports = known[item]
        return Story(facts, f"Where is the {item}?", place, supports)

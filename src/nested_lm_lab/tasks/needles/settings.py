"""What `nested-lm eval niah` measures, as written on the command line and in result files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from nested_lm.config.section import Count, Fraction, Section
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.interval import Natural
from nested_lm_lab.tasks.needles.tasks import TASKS, HaystackKind

GROUPS = {
    "all": tuple(TASKS),
    "niah": tuple(name for name, task in TASKS.items() if task.shape == "needles"),
}
"""Names that stand for several tasks."""

_SIZE = re.compile(r"(\d+)(k?)")


class NiahSettings(Section):
    """Tasks, lengths and samples. haystack: None takes that of each task in RULER. books: files; none: shipped text.

    max_new_tokens: None takes RULER's number for each task.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)]
    depths: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    samples: Count
    seed: Natural
    haystack: HaystackKind | None
    books: tuple[str, ...]
    max_new_tokens: Count | None
    batch_rows: Count
    max_state_mib: Count
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000

    @field_validator("lengths", "depths")
    @classmethod
    def _ascending(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError(f"{list(values)} must be different and ascending")
        return values

    @property
    def files(self) -> tuple[Path, ...]:
        """Books as paths."""
        return tuple(Path(name) for name in self.books)

    def of_result(self, haystacks: Mapping[str, str | None]) -> dict[str, Any]:
        """What two results must share to be compared; limits of the machine are not part of it.

        haystacks: identity of each task's haystack.
        """
        fields = self.model_dump(mode="json", exclude={"haystack", "books", "batch_rows", "max_state_mib"})
        return fields | {"haystacks": dict(haystacks)}


def parse_settings(*, tasks: str, lengths: str, depths: str, **others: Any) -> NiahSettings:
    """Read what the command line says.

    Args:
        tasks: names or groups with commas between.
        lengths: tokens with commas between; 2k is 2,048.
        depths: a whole number says how many, spread evenly from 0 to 1 (1: the middle); with a point or commas it is
            the depths themselves, as in 0.25 or 0,0.5,1.

    Raises:
        ConfigError: an unknown task, or a value that cannot be.
    """
    fields = {
        "tasks": tuple(dict.fromkeys(name for word in split_words(tasks) for name in _expand(word))),
        "lengths": tuple(sorted({parse_size(word) for word in split_words(lengths)})),
        "depths": _parse_depths(depths),
        **others,
    }
    try:
        return NiahSettings(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg'].removeprefix('Value error, ')}") from error


def split_words(text: str) -> list[str]:
    """Words with commas between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_size(word: str, *, option: str = "--lengths") -> int:
    """Tokens, as in 2048 or 2k. option: that the word was given to, for the message.

    Raises:
        ConfigError: not a whole number.
    """
    found = _SIZE.fullmatch(word)
    if found is None:
        raise ConfigError(f"{option}: {word!r} is not a number of tokens; write 2048 or 2k")
    return int(found[1]) * (1024 if found[2] else 1)


def _expand(word: str) -> Sequence[str]:
    if word in GROUPS:
        return GROUPS[word]
    if word not in TASKS:
        raise ConfigError(f"--tasks: unknown task {word!r}; choices: {', '.join([*GROUPS, *TASKS])}")
    return (word,)


def _parse_depths(text: str) -> tuple[float, ...]:
    words = split_words(text)
    try:
        if len(words) == 1 and "," not in text and "." not in words[0]:
            return _spread(int(words[0]))
        return tuple(float(word) for word in words)
    except ValueError:
        raise ConfigError(
            f"--depths: {text!r} is neither how many depths, as in 11, nor shares of the text, as in 0.5 or 0,0.5,1"
        ) from None


def _spread(count: int) -> tuple[float, ...]:
    if count < 1:
        raise ConfigError(f"--depths {count}: a whole number is how many depths; write 0.0 for the depth itself")
    return (0.5,) if count == 1 else tuple(index / (count - 1) for index in range(count))

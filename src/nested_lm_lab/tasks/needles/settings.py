"""What `nested-lm eval niah` and `eval babilong` measure, as given on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from nested_lm.config.section import Count, Fraction, Section
from nested_lm.errors import ConfigError
from nested_lm_lab.evaluation.interval import Natural
from nested_lm_lab.evaluation.options import Option, sizes, words
from nested_lm_lab.tasks.needles.stories import GENERATED
from nested_lm_lab.tasks.needles.tasks import TASKS, HaystackKind

GROUPS = {
    "all": tuple(TASKS),
    "niah": tuple(name for name, task in TASKS.items() if task.shape == "needles"),
}
"""Names that stand for several tasks."""

BABILONG = ("qa1", "qa2", "qa3", "qa4", "qa5")

_LENGTHS = (2048, 4096, 8192, 16384, 32768)


def read_tasks(text: str) -> tuple[str, ...]:
    """Names or groups with commas between.

    Raises:
        ValueError: an unknown one, or none.
    """
    found: list[str] = []
    for word in words(text):
        if word not in GROUPS and word not in TASKS:
            raise ValueError(f"unknown task {word!r}; choices: {', '.join([*GROUPS, *TASKS])}")
        found += GROUPS.get(word, (word,))
    return tuple(dict.fromkeys(found))


def read_depths(text: str) -> tuple[float, ...]:
    """A whole number says how many, spread evenly from 0 to 1 (1: the middle); with a point or commas it is the depths
    themselves, as in 0.25 or 0,0.5,1.

    Raises:
        ValueError: neither.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        if len(parts) == 1 and "," not in text and "." not in parts[0]:
            count = int(parts[0])
        else:
            return tuple(float(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither how many depths, as in 11, nor shares of the text, as in 0.5 or 0,0.5,1"
        ) from None
    if count < 1:
        raise ValueError(f"{count}: a whole number is how many depths; write 0.0 for the depth itself")
    return spread(count)


def spread(count: int) -> tuple[float, ...]:
    """Depths spread evenly from 0 to 1; a single one is the middle."""
    return (0.5,) if count == 1 else tuple(index / (count - 1) for index in range(count))


class LongTextSettings(Section):
    """What all suites of hidden needles have in common.

    books: files; none: shipped text. max_state_mib: changes no number, but ends what is measured.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    lengths: Annotated[
        tuple[Count, ...],
        Field(min_length=1),
        Option("Tokens of a prompt, with commas between; 2k is 2,048.", read=sizes, shown="2k,4k,8k,16k,32k"),
    ] = _LENGTHS
    samples: Annotated[Count, Option("Questions for each length; fewer than 23 show no length at RULER's 0.856.")] = 24
    books: Annotated[
        tuple[Path, ...],
        Option(
            "Text to hide things in; repeat for more files. The shipped corpus by default.",
            metavar="FILE",
            repeat=True,
        ),
    ] = ()
    seed: Annotated[Natural, Option("The same seed asks the same questions.")] = 0
    batch_rows: Annotated[Count, Option("Prompts read side by side.")] = 48
    max_state_mib: Annotated[
        Count, Option("MiB for states read side by side; a length of which one takes more is left out.")
    ] = 2048
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000

    @field_validator("lengths")
    @classmethod
    def _ascending(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return _different_and_ascending(values)


class NiahSettings(LongTextSettings):
    """Tasks, lengths and samples. haystack, max_new_tokens: null takes what each task has in RULER."""

    tasks: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        Option(f"{' '.join(TASKS)}, commas between; niah: the first eight; all.", read=read_tasks, shown="niah"),
    ] = GROUPS["niah"]
    depths: Annotated[
        tuple[Fraction, ...],
        Field(min_length=1),
        Option(
            "How many, evenly from 0 to 1 (1: the middle); or the depths, as 0.5 or 0,0.5,1.",
            read=read_depths,
            shown="11",
        ),
    ] = spread(11)
    haystack: Annotated[
        HaystackKind | None,
        Option("noise, needle or books for all tasks; what each has in RULER by default."),
    ] = None
    max_new_tokens: Annotated[Count | None, Option("Tokens generated for an answer; RULER's number by default.")] = None

    @field_validator("depths")
    @classmethod
    def _depths_ascend(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return _different_and_ascending(values)

    def of_result(self, haystacks: Mapping[str, str | None]) -> dict[str, Any]:
        """What two results must share to be compared; limits of the machine are not part of it.

        haystacks: identity of each task's haystack.
        """
        fields = self.model_dump(mode="json", exclude={"haystack", "books", "batch_rows", "max_state_mib"})
        return fields | {"haystacks": dict(haystacks)}


class BabilongSettings(LongTextSettings):
    """Tasks, lengths and samples. facts: folder of bAbI's files; null: facts are made."""

    tasks: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        Option("qa1 to qa5, with commas between.", read=words, shown="qa1,qa2"),
    ] = GENERATED
    facts: Annotated[
        Path | None,
        Option("bAbI's English files, such as qa1_test.txt; made here by default: qa1, qa2.", metavar="DIR"),
    ] = None
    examples: Annotated[bool, Option("Put two worked examples before the text.")] = True
    max_new_tokens: Annotated[Count, Option("Tokens generated for an answer.")] = 20

    @model_validator(mode="after")
    def _tasks_have_facts(self) -> "BabilongSettings":
        for name in self.tasks:
            if name not in BABILONG:
                raise ConfigError(f"--tasks: unknown task {name!r}; choices: {', '.join(BABILONG)}")
            if self.facts is None and name not in GENERATED:
                raise ConfigError(
                    f"--tasks {name}: its facts are not made here, only those of {', '.join(GENERATED)}; name the "
                    "folder of bAbI's English files with --facts"
                )
        return self


def _different_and_ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{list(values)} must be different and ascending")
    return values

"""Options of the command line, declared once: on the fields of a task's settings."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from nested_lm.config.section import Section
from nested_lm.errors import ConfigError

S = TypeVar("S", bound=Section)

_SIZE = re.compile(r"(\d+)(k?)")


@dataclass(frozen=True)
class Option:
    """How the command line gives a field; part of the field's annotation.

    help: what it means. read: makes the value of the words; None: they are what the field's type says. shown: the
    field's default as a user writes it, for fields that are read; None: there is none to show. name: of the option;
    by default that of the field. metavar: what help calls the value. repeat: given once for each entry of a tuple.
    argument: stands without a name. off: the option is a flag without a value, which sets the field to null.
    """

    help: str
    read: Callable[[str], Any] | None = None
    shown: str | None = None
    name: str | None = None
    metavar: str | None = None
    repeat: bool = False
    argument: bool = False
    off: bool = False

    def flag(self, field: str) -> str:
        """The option's name, dashes included."""
        return self.name or f"--{field.replace('_', '-')}"


def options_of(model: type[Section]) -> dict[str, Option]:
    """Options by their fields, in the order of the fields."""
    return {
        name: option
        for name, field in model.model_fields.items()
        for option in field.metadata
        if isinstance(option, Option)
    }


def read_settings(model: type[S], given: Mapping[str, Any]) -> S:
    """Settings from what a command line says. given: by field; null where an option was left out.

    Raises:
        ConfigError: words that mean nothing, or a value that cannot be. Says which option, and what was found.
    """
    options = options_of(model)
    values = {}
    for field, value in given.items():
        option = options[field]
        if value is None or (value is False and option.off):
            continue
        try:
            values[field] = None if option.off else _value(option, value)
        except ValueError as error:
            raise ConfigError(f"{option.flag(field)}: {error}") from error
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigError(message) from error
        flag = options[str(first["loc"][0])].flag(str(first["loc"][0]))
        raise ConfigError(f"{flag}: {message} (found {first['input']!r})") from error


def _value(option: Option, value: Any) -> Any:
    if option.repeat or option.argument:
        return tuple(option.read(each) if option.read else each for each in value)
    return option.read(value) if option.read and isinstance(value, str) else value


def words(text: str) -> tuple[str, ...]:
    """Names with commas between, each once.

    Raises:
        ValueError: there is none.
    """
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise ValueError(f"{text!r} names nothing; write names with commas between, or leave the option out")
    return found


def size(text: str) -> int:
    """Tokens, as in 2048 or 2k.

    Raises:
        ValueError: not a whole number.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a number of tokens; write 2048 or 2k")
    return int(found[1]) * (1024 if found[2] else 1)


def sizes(text: str) -> tuple[int, ...]:
    """Different numbers of tokens, ascending, with commas between."""
    return tuple(sorted({size(word) for word in words(text)}))


def count_or_all(text: str) -> int | None:
    """A number of at least one; None for `all`.

    Raises:
        ValueError: neither.
    """
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"{text!r} is neither a number of at least 1 nor `all`")
    return int(text)


def counts_or_all(text: str) -> tuple[int | None, ...]:
    """The same, with commas between."""
    return tuple(count_or_all(word) for word in words(text))


def file_names(files: tuple[Path, ...]) -> list[str]:
    """Names of files, as results keep them: where they lay on one machine is nobody's concern."""
    return [path.name for path in files]

"""What each field of a configuration means: its type, default and comment, read from the sections themselves.

`nested-lm explain train.schedule` and reports/settings.md are made of it, so that a field is described in one place:
by the comment behind it, or by its line in the docstring of its section.
"""

import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nested_lm.config.ablation import AblationConfig
from nested_lm.config.campaign import CampaignConfig
from nested_lm.config.explain import Kind, describe, kind_of, nearest
from nested_lm.config.run import RunConfig
from nested_lm.errors import ConfigError

ROOTS: dict[str, type[BaseModel]] = {"campaign": CampaignConfig, "ablations": AblationConfig}
"""What the first part of a path may name beside the sections of a run."""

_FIELD = re.compile(r"(\w+): ")
_DOCUMENTED = re.compile(r"^ {4}([\w, ]+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def explain_field(path: str) -> list[str]:
    """Say in lines what a field or section means, and name the fields below it.

    path: dotted, such as `train.schedule` or `campaign.runner`; a part may name a kind, as in `train.optimizer.muon`.

    Raises:
        ConfigError: there is no such field, with the nearest that is there.
    """
    parts = path.split(".")
    root = ROOTS.get(parts[0])
    kind = kind_of(root or RunConfig)
    lines: list[str] = []
    walked: list[str] = [parts.pop(0)] if root else []
    for part in parts:
        walked.append(part)
        kind, lines = _step(kind, part, walked)
    return [*lines, *(_summary(kind) if lines or root else [])]


def _step(kind: Kind, part: str, walked: list[str]) -> tuple[Kind, list[str]]:
    """Go down by one part of a path; the kind there, and the lines about it."""
    if part.isdigit() and kind.section is None and not kind.variants and get_args(kind.annotation):
        return kind_of(get_args(kind.annotation)[0]), [f"{'.'.join(walked)}: one entry of the list"]
    if part in kind.variants:
        return Kind(kind.variants[part]), [f"{'.'.join(walked)}: the kind `{part}`"]
    if kind.section is None and not kind.variants and get_args(kind.annotation):
        kind = kind_of(get_args(kind.annotation)[0])  # entries of a list
    for section in kind.variants.values() or ([kind.section] if kind.section else []):
        if part in section.model_fields:
            field = section.model_fields[part]
            return kind_of(field.annotation, field.metadata), _field_lines(section, part, ".".join(walked))
    names = sorted({name for name, *_ in _rows(kind)} | set(kind.variants))
    near = nearest(part, names)
    raise ConfigError(
        f"there is no setting `{'.'.join(walked)}`\n"
        f"    allowed  {', '.join(names) or 'nothing: the setting before it holds a plain value'}\n"
        f"    repair   {f'did you mean `{near}`?' if near else 'choose one of these'}"
    )


def _field_lines(section: type[BaseModel], name: str, path: str) -> list[str]:
    field = section.model_fields[name]
    lines = [path, f"  type     {describe(kind_of(field.annotation, field.metadata))}", f"  default  {default(field)}"]
    return lines + ([f"  meaning  {meaning}"] if (meaning := meanings(section).get(name)) else [])


def _summary(kind: Kind) -> list[str]:
    """The fields below a section, or those of each kind it may have."""
    if kind.section is None and not kind.variants and get_args(kind.annotation):
        kind = kind_of(get_args(kind.annotation)[0])
    lines = []
    for name, section in kind.variants.items() or ([("", kind.section)] if kind.section else []):
        lines += ["", f"  {f'{name}: ' if name else ''}{_first_line(section)}"]
        width = max(map(len, section.model_fields))
        for field, info in section.model_fields.items():
            meaning = meanings(section).get(field, "")
            lines.append(f"    {field:<{width}}  {default(info)}{f'  # {meaning}' if meaning else ''}")
    return lines


def _rows(kind: Kind) -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    for section in kind.variants.values() or ([kind.section] if kind.section else []):
        yield from ((name, section, field) for name, field in section.model_fields.items())


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().split("\n")[0]


def default(field: FieldInfo) -> str:
    """What a field holds when nothing is said."""
    if field.default_factory is not None:
        return "made from the other fields"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "a section of defaults"
    value = field.default
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


@cache
def meanings(section: type[BaseModel]) -> dict[str, str]:
    """What each field of a section means, by name, from its comment or the docstring of its class."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if not (isinstance(owner, type) and issubclass(owner, BaseModel)) or owner is BaseModel:
            continue
        for names, text in _DOCUMENTED.findall(owner.__doc__ or ""):
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
        found |= _comments(inspect.getsource(owner))
    return {name: text for name, text in found.items() if name in section.model_fields}


def _comments(source: str) -> dict[str, str]:
    """Comments behind the fields of a class; those that go on below a field are joined."""
    found: dict[str, str] = {}
    lines = source.splitlines()
    last = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = lines[token.start[0] - 1], token.string.lstrip("# ")
        before = line[: token.start[1]].strip()
        named = _FIELD.match(before)
        if named:
            last = named[1]
            found[last] = text
        elif not before and last is not None and found.get(last, "").endswith((",", ";")):
            found[last] += f" {text}"
    return found


def page() -> str:
    """The page reports/settings.md: a table for each section, in the order in which a run names them."""
    lines = [
        "# Settings",
        "",
        "Made by `python -m nested_lm.config.meanings`; `nested-lm explain train.schedule` says it in a terminal.",
    ]
    for path, section in _sections():
        lines += [
            "",
            f"## {path}",
            "",
            _first_line(section),
            "",
            "| Field | Holds | Default | Meaning |",
            "|---|---|---|---|",
        ]
        for name, field in section.model_fields.items():
            holds = describe(kind_of(field.annotation, field.metadata))
            cells = (f"`{name}`", holds, default(field), meanings(section).get(name, ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section, once, under the first path that reaches it."""
    waiting = [("a run", "", kind_of(RunConfig)), *((name, name, kind_of(root)) for name, root in ROOTS.items())]
    seen: set[type[BaseModel]] = set()
    while waiting:
        title, path, kind = waiting.pop(0)
        if kind.section is None and not kind.variants and (inner := get_args(kind.annotation)):
            kind = kind_of(inner[0])
        below = []
        for name, section in kind.variants.items() or ([("", kind.section)] if kind.section else []):
            if section in seen:
                continue
            seen.add(section)
            yield f"{title}, kind {name}" if name else title, section
            for field, info in section.model_fields.items():
                full = f"{path}.{field}" if path else field
                below.append((full, full, kind_of(info.annotation, info.metadata)))
        waiting = below + waiting


if __name__ == "__main__":
    print(page(), end="")

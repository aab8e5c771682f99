"""Turns pydantic's errors into issues a person can mend: field, place, found, allowed, repair."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nested_lm.config.provenance import Issue, Provenance, join
from nested_lm.config.secrets import redact_text

_RANGE_WORDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
_PATHS = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*")


@dataclass
class Kind:
    """What a field may hold: its bare type, the sections of a union by their `kind`, its range."""

    annotation: Any
    variants: dict[str, type[BaseModel]] = field(default_factory=dict)
    optional: bool = False
    metadata: list[Any] = field(default_factory=list)

    @property
    def section(self) -> type[BaseModel] | None:
        """The section, where the field holds one that has no variants."""
        return self.annotation if isinstance(self.annotation, type) and issubclass(self.annotation, BaseModel) else None


@dataclass
class Place:
    """Where an error sits: its dotted path without union tags, and the types around it."""

    path: str
    name: str  # last part of the path
    kind: Kind | None  # None: the section has no such field
    section: type[BaseModel]  # the section that holds the field
    siblings: dict[str, type[BaseModel]]  # variants of that section, by kind


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> Kind:
    """Unwrap Annotated and `| None`, and collect the variants of a tagged union."""
    notes = list(metadata)
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            for note in more:
                notes.extend(note.metadata if isinstance(note, FieldInfo) else [note])
            continue
        if get_origin(annotation) in (Union, UnionType):
            members = [member for member in get_args(annotation) if member is not type(None)]
            optional = optional or len(members) < len(get_args(annotation))
            if len(members) == 1:
                annotation = members[0]
                continue
            tagged = all(isinstance(member, type) and issubclass(member, BaseModel) for member in members)
            variants = {_tag(member): member for member in members} if tagged else {}
            return Kind(Union[tuple(members)], variants, optional, notes)  # noqa: UP007  # made of a tuple
        return Kind(annotation, {}, optional, notes)


def _tag(section: type[BaseModel]) -> str:
    return str(get_args(section.model_fields["kind"].annotation)[0])


def locate(root: type[BaseModel], location: Sequence[str | int]) -> Place:
    """Follow pydantic's location through the types, leaving out the union tags it contains."""
    kind: Kind | None = kind_of(root)
    place = Place("", "", kind, root, {})
    siblings: dict[str, type[BaseModel]] = {}
    for item in location:
        if kind is not None and kind.variants and item in kind.variants:
            siblings = kind.variants
            kind = Kind(kind.variants[str(item)])
            place = Place(place.path, place.name, kind, place.section, place.siblings)
            continue
        section = kind.section if kind is not None else None
        if section is not None:
            info = section.model_fields.get(str(item))
            kind = kind_of(info.annotation, info.metadata) if info is not None else None
            place = Place(join(place.path, str(item)), str(item), kind, section, siblings)
        else:
            inner = get_args(kind.annotation) if kind is not None else ()
            kind = kind_of(inner[0]) if inner else None
            place = Place(join(place.path, str(item)), str(item), kind, place.section, place.siblings)
        siblings = {}
    return place


def explain(error: ValidationError, root: type[BaseModel], provenance: Provenance, primary: str) -> list[Issue]:
    """Give one issue for each error of a validation; `primary` stands for fields that no file set."""
    errors = error.errors(include_url=False)
    return [_issue(details, root, provenance, primary) for details in errors if not _follows(details, errors)]


def _follows(details: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    """Whether a list counts as too short only because pydantic left out the entries that are wrong."""
    depth = len(details["loc"])
    return details["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == details["loc"] for other in errors
    )


def _issue(details: ErrorDetails, root: type[BaseModel], provenance: Provenance, primary: str) -> Issue:
    place = locate(root, details["loc"])
    source = provenance.find(place.path) or primary
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "value_error":
        return _broken_rule(place, str(context["error"]), provenance, source)
    if kind == "extra_forbidden":
        return _unknown_key(place, value, source)
    if kind == "missing":
        allowed = describe(place.kind) if place.kind else ""
        return Issue(place.path, source, "nothing: the key is required", allowed, f"add `{place.name}: ...`")
    if kind in {"union_tag_invalid", "union_tag_not_found"} and place.kind is not None:
        return _wrong_variant(place, place.kind, value, provenance, source)
    allowed = describe(place.kind) if place.kind else details["msg"]
    return Issue(place.path, source, show(value), allowed, _repair(place, value))


def _broken_rule(place: Place, message: str, provenance: Provenance, source: str) -> Issue:
    """A rule between fields: the message says what is wrong, the places of the fields it names are added."""
    places = {}
    for word in _PATHS.findall(message):
        path = join(place.path, word.replace("[", ".").replace("]", ""))
        if path in provenance.sources:
            places[word] = provenance.sources[path]
    found, _, repair = message.rpartition("; ")
    where = ", ".join(f"{word} in {where}" for word, where in places.items())
    return Issue(place.path or "the whole preset", where or source, found or message, "", repair if found else "")


def _unknown_key(place: Place, value: Any, source: str) -> Issue:
    names = list(place.section.model_fields)
    found = f"unknown key `{place.name}` = {show(value)}"
    near = nearest(place.name, names)
    owners = [kind for kind, section in place.siblings.items() if place.name in section.model_fields]
    if owners:
        own = _tag(place.section)
        found = f"`{place.name}` = {show(value)}, a key of kind {' and '.join(owners)}; the kind here is {own}"
        repair = f"delete it (`~{place.path}` on the command line), or set kind: {owners[0]}"
    elif near:
        repair = f"did you mean `{near}`?"
    else:
        repair = "delete it"
    return Issue(place.path, source, found, "the keys " + ", ".join(names), repair)


def _wrong_variant(place: Place, kind: Kind, value: Any, provenance: Provenance, source: str) -> Issue:
    choices = list(kind.variants)
    if not isinstance(value, Mapping):
        return Issue(place.path, source, show(value), describe(kind), f"write `kind: {choices[0]}` below {place.name}")
    path = join(place.path, "kind")
    source = provenance.find(path) or source
    if "kind" not in value:
        repair = f"add `kind: {choices[0]}`"
        return Issue(path, source, "nothing: the key is required", "one of " + ", ".join(choices), repair)
    near = nearest(str(value["kind"]), choices)
    repair = f"did you mean `{near}`?" if near else f"choose one of {', '.join(choices)}"
    return Issue(path, source, show(value["kind"]), "one of " + ", ".join(choices), repair)


def _repair(place: Place, value: Any) -> str:
    """Propose a value of the right type; the nearest one where that is clear."""
    kind = place.kind
    if kind is None:
        return ""
    if get_origin(kind.annotation) is Literal:
        near = nearest(str(value), [str(choice) for choice in get_args(kind.annotation)])
        return f"did you mean `{near}`?" if near else "choose one of these"
    if kind.annotation in (int, float) and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return f"write a number, such as `{place.name}: {_example(kind)}`"
        return f"write it without quotes: `{place.name}: {value}`"
    if kind.annotation is int and isinstance(value, float):
        near_number = max(round(value), _example(kind)) if abs(value) < 1e18 else _example(kind)
        return f"write `{place.name}: {near_number}`"
    if kind.annotation in (int, float) and not isinstance(value, bool) and isinstance(value, int | float):
        return f"choose a value in that range, such as {_example(kind, value if isfinite(value) else 1)}"
    if kind.annotation is str and isinstance(value, int | float | bool):
        return f'put it in quotes: `{place.name}: "{value}"`'
    if kind.annotation in (int, float):
        return f"write a number, such as `{place.name}: {_example(kind)}`"
    if kind.annotation is bool:
        return "write true or false"
    if get_origin(kind.annotation) is tuple:
        return f"write a list: `{place.name}: [...]`"
    if kind.section is not None:
        return f"write the keys of {place.name} below it, indented"
    return f"write {describe(kind)}"


def _example(kind: Kind, value: float = 1) -> Any:
    """The allowed number nearest to `value`, for messages."""
    near: float = value
    for note in kind.metadata:
        for bound, name, _ in _RANGE_WORDS:
            if isinstance(note, bound):
                limit = getattr(note, name)
                step = 0 if name in {"ge", "le"} else (1 if kind.annotation is int else abs(limit) * 0.1 or 0.1)
                near = max(near, limit + step) if name in {"ge", "gt"} else min(near, limit - step)
    return int(near) if kind.annotation is int else near


def describe(kind: Kind) -> str:
    """Say in words what a field may hold."""
    annotation = kind.annotation
    if kind.variants:
        text = f"a section with `kind` one of {', '.join(kind.variants)}"
    elif kind.section is not None:
        text = f"a section with the keys {', '.join(kind.section.model_fields)}"
    elif get_origin(annotation) is Literal:
        text = "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    elif get_origin(annotation) is Union:
        text = " or ".join(describe(kind_of(member)) for member in get_args(annotation))
    elif get_origin(annotation) is dict:
        text = "a section with keys of your own"
    elif get_origin(annotation) is tuple:
        text = f"a list; each entry {describe(kind_of(get_args(annotation)[0]))}"
    else:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        text = words.get(annotation, str(annotation))
    return text + _limits(kind.metadata) + (", or null" if kind.optional else "")


def _limits(metadata: Iterable[Any]) -> str:
    limits: list[str] = []
    for note in metadata:
        limits.extend(f"{sign} {getattr(note, name)}" for bound, name, sign in _RANGE_WORDS if isinstance(note, bound))
        if (length := getattr(note, "min_length", None)) is not None:
            limits.append(f"with at least {length} entry" if length == 1 else f"with at least {length} entries")
        if pattern := getattr(note, "pattern", None):
            limits.append(f"that matches {pattern}")
    return (" " + " and ".join(limits)) if limits else ""


def show(value: Any) -> str:
    """A found value with its type, short enough for one line."""
    if value is None:
        return "null (an empty value)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, str):
        text = redact_text(value)
        text = text if len(text) <= 80 else text[:77] + "..."
        return f"{text!r} (text)"
    if isinstance(value, Mapping):
        return f"a section with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return str(value)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice a typo most likely meant."""
    lower = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return lower[match[0]] if match else None

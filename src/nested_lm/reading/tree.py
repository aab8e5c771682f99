"""Trees of a stream's state as names, tensors and a description of their form, and back.

A tree is made of named tuples, tuples, tensors, numbers, strings and None, whatever mixers and levels made it. What is
stored names its types; what is loaded is built from the types of a template that the model makes, so that no file can
name code to run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import xxhash
from torch import Tensor

from nested_lm.nn.state import StreamState

PLAIN = (bool, int, float, str)
"""Types of the values that are stored beside the tensors."""

STORED = tuple(field.name for field in fields(StreamState) if field.name != "model")
"""Fields that are stored. Which model a state belongs to, the header says, with more than its configuration."""

Form = dict[str, str]
"""What stands at each path of a tree: the type of a node, or that and the number of dimensions of a tensor."""


@dataclass(frozen=True)
class FlatTree:
    """A tree taken apart. tensors, values: leaves by path. form: every node by path."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    form: Form


def flatten(state: StreamState) -> FlatTree:
    """Take a state apart.

    Raises:
        TypeError: a leaf of a type that cannot be stored.
    """
    flat = FlatTree({}, {}, {})
    for name in STORED:
        for path, node in _walk(getattr(state, name), name):
            _note(path, node, flat)
    return flat


def rebuild(template: StreamState, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> StreamState:
    """Build a state with the types of a template and the given leaves."""

    def build(path: str, node: Any) -> Any:
        if isinstance(node, Tensor):
            return tensors[path]
        if isinstance(node, tuple):
            children = [build(child_path, child) for child_path, child in _children(path, node)]
            return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
        return None if node is None else values[path]

    return replace(template, **{name: build(name, getattr(template, name)) for name in STORED})


def first_difference(found: Form, expected: Form) -> tuple[str, str, str] | None:
    """First path at which two forms differ, with what stands there in each; None when they are equal."""
    for path in [*expected, *found]:
        here, there = found.get(path, "nothing"), expected.get(path, "nothing")
        if here != there:
            return path, here, there
    return None


def form_hash(form: Form) -> str:
    """Identity of a form: 16 hex digits."""
    digest = xxhash.xxh3_64()
    for path, node in form.items():
        digest.update(f"{path}={node}\n".encode())
    return digest.hexdigest()


def _note(path: str, node: Any, flat: FlatTree) -> None:
    if isinstance(node, Tensor):
        flat.tensors[path] = node
        flat.form[path] = f"{str(node.dtype).removeprefix('torch.')} tensor of {node.ndim} dimensions"
    elif isinstance(node, tuple):
        flat.form[path] = type(node).__name__ if hasattr(node, "_fields") else f"tuple of {len(node)}"
    elif node is None:
        flat.form[path] = "None"
    elif isinstance(node, PLAIN):
        flat.values[path] = node
        flat.form[path] = type(node).__name__
    else:
        raise TypeError(
            f"{path} is a {type(node).__name__}; a state holds (named) tuples, tensors, None and "
            f"{', '.join(kind.__name__ for kind in PLAIN)}"
        )


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, node
    if isinstance(node, tuple):
        for child_path, child in _children(path, node):
            yield from _walk(child, child_path)


def _children(path: str, node: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    names = getattr(node, "_fields", range(len(node)))
    for name, child in zip(names, node, strict=True):
        yield f"{path}.{name}", child

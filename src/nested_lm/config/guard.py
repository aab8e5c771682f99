"""Bounds of what is composed: overrides, `${...}`, and the settings of Hydra that a user may choose."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from nested_lm.config.provenance import Issue, join
from nested_lm.config.secrets import refuse_environment

MOST_NODES = 20_000  # of a preset, and of a composed configuration, with every alias and `${...}` written out
MOST_DEPTH = 32  # brackets or sections inside one another
LONGEST_OVERRIDE = 10_000  # characters

_ENDLESS = 2**62
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_SWEEP_SETTINGS = re.compile(r"hydra/(launcher|sweeper)|hydra\.(launcher|sweeper|sweep)\.[\w.]+")


def is_folder(entry: str) -> bool:
    """Whether an entry of Hydra's search path names a folder; `pkg://` imports a module."""
    return isinstance(entry, str) and ("://" not in entry or entry.startswith("file://")) and "${" not in entry


def check_override(text: str) -> str | None:
    """What is wrong with the size or the depth of an override; None when nothing is."""
    if len(text) > LONGEST_OVERRIDE:
        return f"{len(text):,} characters, more than {LONGEST_OVERRIDE:,}"
    depth = deepest = 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    return f"brackets {deepest} deep, more than {MOST_DEPTH}" if deepest > MOST_DEPTH else None


def is_sweep_setting(key: str) -> bool:
    """Whether an override of Hydra's own settings chooses a launcher, a sweeper or the folder of a sweep."""
    return _SWEEP_SETTINGS.fullmatch(key) is not None and "_target_" not in key


def check_references(config: Any) -> list[Issue]:
    """Issues with `${...}`: code it would call, references inside one another, and sizes beyond every use.

    config: a composed configuration; nothing of it is resolved here.
    """
    tree = OmegaConf.to_container(config, resolve=False)
    issues: list[Issue] = []
    for path, text in _references(tree):
        for reference in _REFERENCE.findall(text):
            resolver, colon, _ = reference.partition(":")
            if colon and resolver.strip() != "oc.env":
                repair = "write the value, or refer to a field, as in ${name}"
                issues.append(
                    Issue(path, "", f"the resolver `{resolver}` in ${{...}}", "${field}, ${oc.env:NAME}", repair)
                )
        if (wrong := refuse_environment(path, text)) is not None:
            repair = "write the value; only folders, as in output_dir, may be named by a variable"
            issues.append(Issue(path, "", wrong, "", repair))
        if "${" in _REFERENCE.sub("", text):
            issues.append(
                Issue(path, "", "`${` inside `${...}`", "${field}, ${oc.env:NAME}", "name one field directly")
            )
    if not issues and isinstance(tree, dict) and _written_out(tree, tree, "", {}) > MOST_NODES:
        found = f"`${{...}}` that refer to themselves or stand for more than {MOST_NODES:,} values"
        issues.append(Issue("the whole preset", "", found, "", "write the values out"))
    return issues


def _references(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text with `${` in it, by its dotted path."""
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _references(child, join(path, str(key)))
    elif isinstance(tree, list):
        for index, child in enumerate(tree):
            yield from _references(child, join(path, str(index)))
    elif isinstance(tree, str) and "${" in tree:
        yield path, tree


def _written_out(node: Any, root: Any, path: str, sizes: dict[str, int | None]) -> int:
    """Values below a node with every reference written out; `_ENDLESS` where one leads back to itself."""
    if path in sizes:
        known = sizes[path]
        return _ENDLESS if known is None else known
    sizes[path] = None
    if isinstance(node, Mapping):
        total = 1 + sum(_written_out(child, root, join(path, str(key)), sizes) for key, child in node.items())
    elif isinstance(node, list):
        total = 1 + sum(_written_out(child, root, join(path, str(index)), sizes) for index, child in enumerate(node))
    else:
        total = 1
        for reference in _REFERENCE.findall(node) if isinstance(node, str) else ():
            target = _absolute(reference.strip(), path)
            if ":" not in reference and (found := _at(root, target)) is not None:
                total += _written_out(found, root, target, sizes)
    sizes[path] = total = min(_ENDLESS, total)
    return total


def _absolute(reference: str, path: str) -> str:
    """The dotted path that a reference means; leading dots start from the section around it."""
    dots = len(reference) - len(reference.lstrip("."))
    if dots == 0:
        return reference
    parts = path.split(".")
    return ".".join([*parts[: max(0, len(parts) - dots)], reference.lstrip(".")]).strip(".")


def _at(tree: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree

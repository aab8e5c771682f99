"""Where a setting was made: files and lines of YAML keys, and which of them a composition took."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from nested_lm.errors import ConfigError


@dataclass(frozen=True)
class Issue:
    """One thing a user has to mend, with everything needed to mend it."""

    path: str  # dotted field, or the override or file that cannot be read
    source: str  # `file:line`, or the override of the command line
    found: str
    allowed: str
    repair: str

    def __str__(self) -> str:
        rows = (("found", self.found), ("allowed", self.allowed), ("repair", self.repair))
        head = f"{self.path}  ({self.source})" if self.source else self.path
        return "\n".join([head, *(f"    {label:<8} {text}" for label, text in rows if text)])


def config_error(subject: str, issues: Sequence[Issue]) -> ConfigError:
    """Put all issues of one preset into one error."""
    count = "1 mistake" if len(issues) == 1 else f"{len(issues)} mistakes"
    numbered = (f"  {number}. {issue}" for number, issue in enumerate(issues, start=1))
    return ConfigError("\n".join([f"{subject} cannot be used: {count}", *numbered]))


def shown(path: Path) -> str:
    """A path as a person would write it: relative when it lies below the working directory."""
    working = Path.cwd()
    return str(path.relative_to(working)) if path.is_relative_to(working) else str(path)


def children(node: yaml.Node) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Give (name or index, node that marks the place, value node) of a mapping or sequence."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key, value
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield str(index), value, value


def join(prefix: str, name: str) -> str:
    """Append a key to a dotted path."""
    return f"{prefix}.{name}" if prefix else name


@dataclass
class Provenance:
    """Last place that set each dotted path, in the order in which Hydra merged the files."""

    sources: dict[str, str] = field(default_factory=dict)

    def add_file(self, path: Path, root: yaml.Node, package: str) -> None:
        """Record every key of a YAML file that was merged below `package`."""
        if package:
            self.sources.setdefault(package, f"{shown(path)}:1")
        self._add_node(root, package, path)

    def _add_node(self, node: yaml.Node, prefix: str, path: Path) -> None:
        for name, mark, value in children(node):
            if not prefix and name in {"defaults", "hydra"}:
                continue
            full = join(prefix, name)
            if value.value == "???" and full in self.sources:  # asks for a value that an earlier file gave
                continue
            if isinstance(value, yaml.SequenceNode):  # a list replaces the list before it, whole
                self._forget_below(full)
            self.sources[full] = f"{shown(path)}:{mark.start_mark.line + 1}"
            self._add_node(value, full, path)

    def add_override(self, key: str, value: object, text: str) -> None:
        """Record a command-line override; a mapping sets each of its keys."""
        self.sources[key] = f"command line override `{text.removeprefix('++')}`"
        if isinstance(value, Mapping):
            for name, child in value.items():
                self.add_override(join(key, str(name)), child, text)
        else:
            self._forget_below(key)

    def _forget_below(self, key: str) -> None:
        for old in [path for path in self.sources if path.startswith(key + ".")]:
            del self.sources[old]

    def find(self, path: str) -> str:
        """Say where a dotted path, or the nearest section around it, was set; empty when no file did."""
        while path:
            if path in self.sources:
                return self.sources[path]
            path = path.rpartition(".")[0]
        return ""

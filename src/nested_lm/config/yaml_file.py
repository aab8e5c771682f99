"""Reads YAML files of presets into nodes with line marks, and refuses what is more than plain data of bounded size.

A preset may come from somebody else: aliases make a small file enormous, tags and `_target_` name classes, and Hydra
imports the modules that its search path and its callbacks name.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from nested_lm.config.guard import MOST_DEPTH, MOST_NODES, is_folder
from nested_lm.config.provenance import Issue, children, config_error, join, shown
from nested_lm.errors import ConfigError

MOST_BYTES = 2**20  # of a preset; the largest of the project has 14 KB

_STRING = "tag:yaml.org,2002:str"
_ENDLESS = 2**62


def read_yaml_node(path: Path) -> yaml.Node | None:
    """Parse a YAML file into nodes with line marks; None for an empty file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or YAML, gives a key twice, or is more than plain data.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_text(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {shown(path)}: {error.strerror}; check its name and rights") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{shown(path)} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            "save it as UTF-8 text"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{shown(path)}{line} is not YAML: {error.problem or error.context}; "
            "check indentation, quotes and colons there"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown(path)} is not YAML: {error}; save it as plain UTF-8 text") from error
    if root is None:
        return None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{shown(path)}:{root.start_mark.line + 1} does not hold `key: value` lines but a "
            f"{'list' if isinstance(root, yaml.SequenceNode) else 'single value'}; "
            "write one `key: value` a line"
        )
    check_nodes(root, path)
    twice = list(_repeated_keys(root, "", path))
    if twice:
        raise config_error(shown(path), twice)
    return root


def check_text(text: str, path: Path) -> None:
    """Refuse YAML that is more than plain data of bounded size.

    Raises:
        ConfigError: with file and line.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{shown(path)} has {len(text):,} characters; a preset has at most {MOST_BYTES:,}")
    depth, nodes = 0, 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{shown(path)}:{event.start_mark.line + 1}" if event.start_mark else shown(path)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > MOST_DEPTH:
            raise ConfigError(f"{where} is nested more than {MOST_DEPTH} deep; write fewer brackets or sections")
        if nodes > MOST_NODES:
            raise ConfigError(
                f"{where} is beyond the {MOST_NODES:,} values that a preset may have; write a shorter one"
            )
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":  # "!" is how the parser says that a value stands in quotes
            raise ConfigError(f"{where} has the tag {tag!r}; presets are plain data, delete the tag")


def check_nodes(root: yaml.Node, path: Path) -> None:
    """Refuse keys that are no names, merge keys, code, and aliases that make the file enormous.

    Raises:
        ConfigError: every one of them with its line.
    """
    issues = list(_bad_keys(root, path, set()))
    if issues:
        raise config_error(shown(path), issues)
    sizes: dict[int, int | None] = {}
    if (size := _size(root, sizes)) > MOST_NODES:
        found = "aliases that contain themselves" if size == _ENDLESS else f"aliases that stand for {size:,} values"
        raise ConfigError(f"{shown(path)} has {found}; a preset has at most {MOST_NODES:,} values, write them out")


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Values below a node with every alias written out. sizes: by node; None while the node is being counted."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in sizes:
        known = sizes[id(node)]
        return _ENDLESS if known is None else known
    sizes[id(node)] = None
    children = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
    sizes[id(node)] = total = min(_ENDLESS, 1 + sum(_size(child, sizes) for child in children))
    return total


def _bad_keys(node: yaml.Node, path: Path, seen: set[int], prefix: str = "") -> Iterator[Issue]:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _bad_keys(value, path, seen, join(prefix, str(index)))
        return
    for key, value in node.value:
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "(a list or section)"
        full = join(prefix, name)
        source = f"{shown(path)}:{key.start_mark.line + 1}"
        if name == "<<":
            yield Issue(full, source, "the merge key `<<`", "plain keys", "write the keys out, or use a defaults list")
        elif key.tag != _STRING:
            yield Issue(full, source, f"a key that is no name: {name}", "names", "put quotes around it, or delete it")
        elif name == "_target_":
            yield Issue(full, source, "`_target_`, which names code", "plain data", "delete it")
        elif not prefix and name.startswith("hydra"):
            yield from _bad_hydra(full, value, source)
        yield from _bad_keys(value, path, seen, full)


def _bad_hydra(name: str, value: yaml.Node, source: str) -> Iterator[Issue]:
    """A preset may say in which folders Hydra looks for groups, and nothing else of Hydra."""
    allowed = "hydra: {searchpath: [folders]}"
    if name != "hydra" or not isinstance(value, yaml.MappingNode):
        yield Issue(name, source, "a setting of Hydra", allowed, "delete it")
        return
    for key, child in value.value:
        if key.value != "searchpath":
            repair = "delete it; with -m, launchers and sweepers are chosen on the command line"
            yield Issue(f"hydra.{key.value}", source, "a setting of Hydra", allowed, repair)
            continue
        entries = child.value if isinstance(child, yaml.SequenceNode) else [child]
        for entry in entries:
            if not isinstance(entry, yaml.ScalarNode) or not is_folder(entry.value):
                repair = "name a folder, as in file:///path/to/folder"
                yield Issue("hydra.searchpath", source, f"{entry.value!r}, which is no folder", allowed, repair)


def _repeated_keys(node: yaml.Node, prefix: str, path: Path) -> Iterator[Issue]:
    lines: dict[str, int] = {}
    for name, key, value in children(node):
        full = join(prefix, name)
        line = key.start_mark.line + 1
        if name in lines and isinstance(node, yaml.MappingNode):
            yield Issue(
                path=full,
                source=f"{shown(path)}:{lines[name]} and {shown(path)}:{line}",
                found=f"the key `{name}` twice, on lines {lines[name]} and {line}",
                allowed="every key once",
                repair=f"delete line {lines[name]} or line {line}",
            )
        lines[name] = line
        yield from _repeated_keys(value, full, path)

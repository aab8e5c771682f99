"""Finds presets and lets Hydra compose them into plain values, without Hydra's side effects."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nested_lm.config.explain import nearest
from nested_lm.config.guard import check_override, check_references, is_sweep_setting
from nested_lm.config.provenance import Issue, Provenance, children, config_error, join, shown
from nested_lm.config.secrets import held_secrets
from nested_lm.config.yaml_file import read_yaml_node
from nested_lm.errors import ConfigError

HYDRA_VERSION_BASE = "1.3"
PARTS = ("data", "model", "train", "eval")  # groups of which a run preset is composed


@dataclass(frozen=True)
class Preset:
    """A YAML file and the folders in which Hydra looks for the groups it names."""

    file: Path
    folders: tuple[Path, ...]  # the file's own folder first, the project's presets last

    @property
    def config_name(self) -> str:
        """Hydra's name of the file."""
        return self.file.name.removesuffix(".yaml")

    @property
    def group(self) -> str | None:
        """The folder of one of the project's presets (`hope`, `data`, ...); None for any other file."""
        presets = self.folders[-1]
        return self.file.relative_to(presets).parts[0] if self.file.is_relative_to(presets) else None

    def find(self, config_path: str) -> Path | None:
        """The file that Hydra takes for a path such as `model/hope_demo`."""
        candidates = (folder / f"{config_path}.yaml" for folder in self.folders)
        return next((file for file in candidates if file.is_file()), None)

    def is_group(self, key: str) -> bool:
        """Whether a key names a folder of alternatives rather than a field."""
        return any((folder / key.partition("@")[0]).is_dir() for folder in self.folders)

    def options(self, group: str) -> list[str]:
        """Names that may be chosen from a group."""
        return sorted({file.stem for folder in self.folders for file in (folder / group).glob("*.yaml")})


@dataclass(frozen=True)
class Composed:
    """What Hydra made of a preset: plain values, their places, and values that could not be resolved."""

    values: dict[str, Any]
    provenance: Provenance
    issues: list[Issue]


def presets_folder() -> Path:
    """The folder with the project's presets: inside an installed package, or the checkout's `configs/`."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "configs", package.parents[1] / "configs")
    for folder in candidates:
        if (folder / "hope").is_dir():
            return folder
    raise ConfigError(
        f"the presets are missing: neither {candidates[0]} nor {candidates[1]} exists; install the package again"
    )


def find_preset(name_or_path: str) -> Preset:
    """Find a preset by its name below the presets folder (`hope/demo`) or by a path to a YAML file."""
    presets = presets_folder()
    given = Path(name_or_path).expanduser()
    if given.suffix == ".yml":
        raise ConfigError(f"{name_or_path} ends in .yml, which Hydra does not read; rename it to .yaml")
    if given.suffix != ".yaml":
        file = presets / f"{name_or_path}.yaml"
    elif given.is_file() or given.is_absolute():
        file = given.resolve()
    else:  # `configs/hope/demo.yaml` means the project's preset from any working directory
        file = presets / Path(*given.parts[1:]) if given.parts[0] == "configs" else given.resolve()
    if not file.is_file():
        raise _unknown_preset(name_or_path)
    own = [file.parent, *_search_path(file)]
    return Preset(file, (*(folder for folder in own if folder != presets), presets))


def _search_path(file: Path) -> list[Path]:
    """Folders that a preset names for its groups, in `hydra.searchpath`."""
    root = read_yaml_node(file)
    hydra = [node for name, _, node in children(root) if name == "hydra"] if root is not None else []
    entries = [entry for node in hydra for _, _, named in children(node) for _, _, entry in children(named)]
    return [Path(entry.value.removeprefix("file://")).absolute() for entry in entries]


def preset_names() -> list[str]:
    """Names of all presets and parts of the project, such as `hope/demo`."""
    presets = presets_folder()
    return sorted(str(file.relative_to(presets).with_suffix("")) for file in presets.rglob("*.yaml"))


def preset_titles(folder: str | None = None) -> dict[str, str]:
    """First line of the comment of every preset that can be named on the command line, by name.

    folder: only those of one folder; the parts of runs (`model`, `train`) when it names one.

    Raises:
        ConfigError: there is no such folder.
    """
    names = preset_names()
    folders = sorted({name.partition("/")[0] for name in names})
    if folder is not None and folder not in folders:
        raise ConfigError(f"no folder of presets is called `{folder}`; choose one of {', '.join(folders)}")
    listed = [group for group in folders if group not in ("model", "train")] if folder is None else [folder]
    chosen = [name for name in names if name.partition("/")[0] in listed]
    return {name: _title(presets_folder() / f"{name}.yaml") for name in chosen}


def _title(file: Path) -> str:
    comments = (line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").splitlines())
    return next((line for line in comments if line and not line.startswith("@")), "")


def _unknown_preset(name: str) -> ConfigError:
    names = preset_names()
    plain = name.removesuffix(".yaml").removeprefix("configs/")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'`{match}`' for match in near)}?" if near else "choose one of these"
    return ConfigError(
        f"no preset is called `{name}`\n"
        f"    allowed  a path to a YAML file, or one of {', '.join(names)}\n"
        f"    repair   {hint}"
    )


@contextmanager
def hydra_at(preset: Preset) -> Iterator[None]:
    """Set Hydra up for one preset and leave its global state as it was, also inside a Hydra job."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(preset.file.parent), job_name="nested-lm", version_base=HYDRA_VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer


def search_path_override(preset: Preset) -> str:
    """The override that lets any file use the project's groups, beside those the file itself names."""
    return f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in preset.folders[1:])}]"


def quoted(text: str) -> str:
    """A text as Hydra's override grammar takes it, whatever characters it has."""
    return "'" + text.replace("'", r"\'") + "'"


def parse_overrides(preset: Preset, overrides: Sequence[str], *, sweep: bool) -> list[Override]:
    """Parse `path.to.field=value` arguments, reporting every one that cannot be read.

    Raises:
        ConfigError: bad syntax; outside a sweep also several values for a field and `hydra.` settings.
    """
    issues: list[Issue] = []
    parsed: list[Override] = []
    for text in overrides:
        if (wrong := check_override(text)) is not None:
            issues.append(Issue(f"{text[:60]}...", "command line override", wrong, "", "write it into a preset"))
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except (OverrideParseException, HydraException) as error:
            issues.append(_bad_override(text, error))
            continue
        if not sweep and override.is_hydra_override():
            found = "a setting of Hydra's sweeps and launchers"
            issues.append(Issue(text, "command line override", found, "", "add -m to sweep, or leave it out"))
        elif not sweep and override.is_sweep_override():
            repair = "quote it for text, put [ ] around it for a list, or add -m to sweep over it"
            issues.append(Issue(text, "command line override", "several values", "one value", repair))
        elif override.is_hydra_override() and not is_sweep_setting(override.key_or_group):
            allowed = "hydra/launcher, hydra/sweeper, and their fields"
            issues.append(Issue(text, "command line override", "a setting of Hydra", allowed, "leave it out"))
        parsed.append(override)
    if issues:
        raise config_error(shown(preset.file), issues)
    return parsed


def _bad_override(text: str, error: Exception) -> Issue:
    reason = next((line for line in str(error).splitlines() if line.strip()), "cannot be read")
    allowed = "path.to.field=value, group=option, +new.field=value or ~field"
    repair = "write it as path.to.field=value and quote the whole argument where the value has spaces or brackets"
    if "[" in text.partition("=")[0]:
        repair = "write a position in a list with a dot: levels.0.period_tokens=..."
    return Issue(text, "command line override", reason, allowed, repair)


def as_hydra_argument(preset: Preset, override: Override) -> str:
    """Let an override also set fields that no file mentions; the sections judge whether they exist."""
    text = str(override.input_line)
    is_plain = override.type == OverrideType.CHANGE and not override.is_hydra_override()
    if not is_plain:
        return text
    names_group = preset.is_group(override.key_or_group)
    if names_group and (override.is_sweep_override() or not isinstance(override.value(), dict)):
        return text
    return "++" + text


def compose_preset(preset: Preset, overrides: Sequence[str]) -> Composed:
    """Let Hydra compose a preset with its groups and overrides.

    Raises:
        ConfigError: unknown group option, unreadable file or override.
    """
    parsed = parse_overrides(preset, overrides, sweep=False)
    nodes = read_files(preset, parsed)
    arguments = [search_path_override(preset), *(as_hydra_argument(preset, override) for override in parsed)]
    with readable_errors(preset), hydra_at(preset):
        config = compose(preset.config_name, arguments)
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        defaults = hydra.config_loader.compute_defaults_list(preset.config_name, arguments, RunMode.RUN)
    provenance = Provenance()
    for entry in defaults.defaults:
        file = preset.find(entry.config_path) if entry.config_path else None
        if file is not None and (node := nodes.get(file) or read_yaml_node(file)) is not None:
            provenance.add_file(file, node, entry.package or "")
    for override in parsed:
        if not preset.is_group(override.key_or_group) or isinstance(override.value(), dict):
            provenance.add_override(override.key_or_group, override.value(), str(override.input_line))
    if issues := check_references(config):
        raise config_error(shown(preset.file), [replace(issue, source=provenance.find(issue.path)) for issue in issues])
    values = _plain(config, "", provenance, issues)
    issues += held_secrets(values, provenance)
    return Composed(values, provenance, issues)


def read_files(preset: Preset, overrides: Sequence[Override]) -> dict[Path, yaml.Node]:
    """Read a preset and every file that it or an override names, before Hydra does.

    Raises:
        ConfigError: one of them is more than plain data.
    """
    nodes: dict[Path, yaml.Node] = {}
    chosen = {
        str(override.key_or_group): override.value() for override in overrides if preset.is_group(override.key_or_group)
    }
    waiting = [(preset.file, "")]
    waiting += [(file, key) for key, value in chosen.items() if (file := preset.find(f"{key}/{value}")) is not None]
    while waiting:
        file, group = waiting.pop()
        if file in nodes or (node := read_yaml_node(file)) is None:
            continue
        nodes[file] = node
        for name in _named_files(node, group):
            if (found := preset.find(name)) is not None:
                waiting.append((found, name.rpartition("/")[0]))
    return nodes


def _named_files(root: yaml.Node, group: str) -> Iterator[str]:
    """Paths of the groups' files that the defaults list of a file names. group: where the file itself stands."""
    entries = next((value for name, _, value in children(root) if name == "defaults"), None)
    for _, _, entry in children(entries) if isinstance(entries, yaml.SequenceNode) else ():
        pairs = (
            [("", entry)]
            if isinstance(entry, yaml.ScalarNode)
            else [(name, value) for name, _, value in children(entry)]
        )
        for key, value in pairs:
            folder = key.removeprefix("override ").removeprefix("optional ").partition("@")[0].strip()
            options = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for option in (str(node.value).partition("@")[0] for node in options):
                name = f"{folder}/{option}" if folder else option
                yield name.removeprefix("/") if name.startswith("/") else f"{group}/{name}".removeprefix("/")


@contextmanager
def hydra_errors(preset: Preset) -> Iterator[None]:
    """Turn Hydra's own errors into ours."""
    try:
        yield
    except MissingConfigException as error:
        raise _missing_part(preset, error) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _refused(preset, error) from error


@contextmanager
def readable_errors(preset: Preset) -> Iterator[None]:
    """Turn every error of composing a preset into ours."""
    subject = shown(preset.file)
    try:
        with hydra_errors(preset):
            yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            read_yaml_node(Path(mark.name))  # says more than Hydra: both lines of a key given twice
        raise ConfigError(f"{subject}: {error}") from error
    except UnicodeDecodeError as error:
        for file in sorted({file for folder in preset.folders for file in folder.rglob("*.yaml")}):
            read_yaml_node(file)
        raise ConfigError(f"{subject} or a file it names is not UTF-8; save it as UTF-8 text") from error
    except ConfigError:
        raise
    except Exception as error:  # Hydra meets malformed files with whatever its internals raise
        raise _refused(preset, error) from error


def _refused(preset: Preset, error: Exception) -> ConfigError:
    subject = shown(preset.file)
    reasons = [str(error) or f"Hydra cannot compose it ({type(error).__name__})"]
    reasons += [str(error.__cause__)] if error.__cause__ is not None else []
    text = "; ".join(line.strip() for reason in reasons for line in reason.splitlines() if line.strip())
    text = text.replace(" ++", " ")  # our prefix, not the user's
    issue = Issue(subject, "", text, "", "correct the override or the defaults list it names")
    return config_error(subject, [issue])


def _missing_part(preset: Preset, error: MissingConfigException) -> ConfigError:
    wanted = str(error.missing_cfg_file or "")
    group, _, option = wanted.rpartition("/")
    choices = preset.options(group)
    near = nearest(option, choices)
    first = str(error).splitlines()[0]
    inside = first[len("In '") :].partition("'")[0] if first.startswith("In '") else preset.config_name
    named_by = preset.find(inside) or preset.file
    return config_error(
        shown(preset.file),
        [
            Issue(
                path=group or wanted,
                source=f"command line override, or the defaults list of {shown(named_by)}",
                found=f"`{option}`, for which there is no file {wanted}.yaml",
                allowed="one of " + ", ".join(choices) if choices else "a file in a folder beside the preset",
                repair=f"did you mean `{near}`?" if near else "choose one of these or write that file",
            )
        ],
    )


def _plain(node: Any, path: str, provenance: Provenance, issues: list[Issue]) -> Any:
    """Resolve a composed tree into plain values; a value that cannot be resolved becomes an issue."""
    if isinstance(node, DictConfig):
        values: dict[str, Any] = {}
        for key in map(str, node):
            full = join(path, key)
            if not OmegaConf.is_interpolation(node, key) and OmegaConf.is_missing(node, key):
                continue  # `???` asks the user for a value: the sections report it as missing
            try:
                child = node[key]
            except OmegaConfBaseException as error:
                issues.append(_unresolved(full, error, provenance))
                continue
            values[key] = _plain(child, full, provenance, issues)
        return values
    if isinstance(node, ListConfig):
        entries = []
        for index in range(len(node)):
            full = join(path, str(index))
            try:
                child = node[index]
            except OmegaConfBaseException as error:
                issues.append(_unresolved(full, error, provenance))
                continue
            entries.append(_plain(child, full, provenance, issues))
        return entries
    return node


def _unresolved(path: str, error: OmegaConfBaseException, provenance: Provenance) -> Issue:
    reason = str(error.msg or error).splitlines()[0]
    repair = "correct the name inside ${...}, or set the variable it reads"
    return Issue(path, provenance.find(path), reason, "a ${...} that can be resolved", repair)

"""Loads presets: Hydra composes, pydantic judges the whole tree, and every mistake is reported at once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from pydantic import ValidationError

from nested_lm.config.ablation import AblationConfig
from nested_lm.config.campaign import CampaignConfig
from nested_lm.config.compose import PARTS, Preset, compose_preset, find_preset, preset_names
from nested_lm.config.data import DataConfig
from nested_lm.config.evaluation import EvalConfig
from nested_lm.config.explain import explain, nearest
from nested_lm.config.mixers import STORED
from nested_lm.config.provenance import Issue, Provenance, config_error, shown
from nested_lm.config.run import RunConfig
from nested_lm.config.secrets import redact
from nested_lm.config.section import Section
from nested_lm.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_run(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run: a preset's name (`hope/demo`) or a YAML file, changed by `path.to.field=value` overrides.

    Raises:
        ConfigError: every mistake, with its file and line, what was found, what is allowed, and a repair.
    """
    return _load(RunConfig, name_or_path, overrides)


def load_data(name_or_path: str, overrides: Sequence[str] = ()) -> DataConfig:
    """Load a data set's preset; arguments and errors as for `load_run`."""
    return _load(DataConfig, name_or_path, overrides)


def load_evaluation(name_or_path: str, overrides: Sequence[str] = ()) -> EvalConfig:
    """Load evaluation settings: an `eval/` preset or a file of its kind, or the section `eval` of a run's preset.

    Overrides and errors are as for `load_run`; those of a run's preset name its sections (`eval.passkey.samples=4`).
    """
    preset = find_preset(name_or_path)
    if preset.group != "eval" and {"model", "train"} <= set(compose_preset(preset, overrides).values):
        return load_run(name_or_path, overrides).eval
    return _load(EvalConfig, name_or_path, overrides)


def load_campaign(name_or_path: str, overrides: Sequence[str] = ()) -> CampaignConfig:
    """Load a campaign's preset; arguments and errors as for `load_run`. Overrides set its variables, and add none."""
    config = _load(CampaignConfig, name_or_path, overrides)
    if any(override.startswith("variables.") for override in overrides):
        preset = find_preset(name_or_path)
        declared = list(compose_preset(preset, ()).values.get("variables", {}))
        issues = [
            Issue(
                f"variables.{name}",
                "command line",
                f"a variable that no step of the campaign names, {name!r}",
                f"one of {', '.join(declared)}" if declared else "none: the campaign has no variables",
                f"did you mean `{near}`?" if (near := nearest(name, declared)) else "leave it out",
            )
            for name in config.variables
            if name not in declared
        ]
        if issues:
            raise config_error(shown(preset.file), issues)
    return config


def load_ablation(name_or_path: str, overrides: Sequence[str] = ()) -> AblationConfig:
    """Load an ablation grid; arguments and errors as for `load_run`. The variants are not resolved."""
    return _load(AblationConfig, name_or_path, overrides)


def parse_run(data: dict[str, Any], source: str) -> RunConfig:
    """Judge a run's configuration that was stored in a checkpoint or run folder, named by `source`.

    Raises:
        ConfigError: it does not fit this version of the program, with every field that does not.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} does not hold a configuration but {type(data).__name__}; restore the file")
    config, issues = _judge(RunConfig, dict(data), Provenance(), source, is_stored=True)
    if config is None:
        raise config_error(source, issues)
    return config


def dump_resolved(config: Section, path: Path) -> None:
    """Write a configuration as YAML that loads again, with every secret replaced by `<redacted>`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(redact(config.model_dump(mode="json")))), encoding="utf-8")


def config_hash(config: Section) -> str:
    """Identity of a configuration: the first 16 hex digits of the sha256 of its canonical JSON, without `backend`."""
    return _digest(config.model_dump(mode="json"))


def training_hash(config: RunConfig) -> str:
    """Identity of a training: as `config_hash`, but without the evaluation settings, which cannot change weights."""
    return _digest(config.model_dump(mode="json", exclude={"eval"}))


_LATER: dict[str, Any] = {"gated": False, "flat_gates": [], "control": None, "facts": None}
"""Settings that came later, at the values at which a configuration is what it was before, and keeps its identity."""


def identifying(value: Any) -> Any:
    """Plain settings without `backend`, which changes rounding only, and without later settings at rest."""
    if isinstance(value, Mapping):
        told = {key: child for key, child in value.items() if key not in _LATER or child != _LATER[key]}
        return {key: identifying(child) for key, child in told.items() if key != "backend"}
    return [identifying(child) for child in value] if isinstance(value, list) else value


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identifying(values), sort_keys=True).encode()).hexdigest()[:16]


def _load(root: type[S], name_or_path: str, overrides: Sequence[str]) -> S:
    preset = find_preset(name_or_path)
    _check_purpose(root, preset, name_or_path)
    composed = compose_preset(preset, overrides)
    source = shown(preset.file)
    config, issues = _judge(root, composed.values, composed.provenance, source)
    unresolved = {issue.path for issue in composed.issues}
    issues = [*composed.issues, *(issue for issue in issues if issue.path not in unresolved)]
    if issues or config is None:
        raise config_error(source, issues)
    return config


def _judge(
    root: type[S], values: dict[str, Any], provenance: Provenance, source: str, *, is_stored: bool = False
) -> tuple[S | None, list[Issue]]:
    try:
        return root.model_validate(values, context={STORED: is_stored}), []
    except ValidationError as error:
        return None, explain(error, root, provenance, source)


_PURPOSES: dict[type[Section], tuple[str, str]] = {  # words for what a preset describes, and what takes it
    RunConfig: ("a run", "`nested-lm train {}` takes it"),
    DataConfig: ("a data set", "`nested-lm data {}` takes it"),
    CampaignConfig: ("a campaign", "`nested-lm campaign {}` takes it"),
    AblationConfig: ("an ablation grid", "name it in a step of kind grid of a campaign"),
    EvalConfig: ("evaluation settings", "`nested-lm eval RUN_DIR --settings {}` takes them"),
}


def _check_purpose(root: type[Section], preset: Preset, name: str) -> None:
    """Refuse one of the project's presets where another kind of preset is needed."""
    folder = preset.group
    if folder is None or _purpose(folder) is root:
        return
    actual = _purpose(folder)
    if actual is None:
        found, repair = f"the part `{folder}` of a run", "name a preset that uses it"
    else:
        found, taken = _PURPOSES[actual]
        repair = taken.format(name)
    choices = [other for other in preset_names() if _purpose(other.partition("/")[0]) is root]
    raise ConfigError(
        f"{name} is {found}, not {_PURPOSES[root][0]}\n"
        f"    allowed  {', '.join(choices)}, or a YAML file of your own\n"
        f"    repair   {repair}"
    )


def _purpose(folder: str) -> type[Section] | None:
    """What the presets of a folder describe; None for the parts that runs are composed of."""
    special: dict[str, type[Section]] = {
        "data": DataConfig,
        "campaign": CampaignConfig,
        "ablations": AblationConfig,
        "eval": EvalConfig,
    }
    return special.get(folder, None if folder in PARTS else RunConfig)

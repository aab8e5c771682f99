"""Sweeps: Hydra's own sweeper and launcher choose and start the jobs, our loader judges each."""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nested_lm.config.compose import (
    as_hydra_argument,
    find_preset,
    hydra_at,
    hydra_errors,
    parse_overrides,
    quoted,
    read_files,
    readable_errors,
    search_path_override,
)
from nested_lm.config.load import load_run
from nested_lm.config.provenance import Issue, config_error, shown
from nested_lm.config.run import RunConfig

_SETTINGS = {  # Hydra's settings of a sweep, unless the user gives others
    "hydra.sweep.dir": "${output_dir}/sweep",
    "hydra.sweep.subdir": ".",
    "hydra.output_subdir": "null",  # the run folder records its configuration itself
    "hydra/hydra_logging": "none",
    "hydra/job_logging": "none",
}
_LONGEST_NAME = 120  # characters of a folder name; file systems allow 255 bytes


def run_sweep(name_or_path: str, overrides: Sequence[str], job: Callable[[RunConfig], None]) -> None:
    """Run one job for each combination of the swept values, in `<output_dir>/sweep/<swept values>`.

    `job` must be importable by name, for Hydra's launchers may send it to other processes. `hydra.` settings
    among the overrides choose another sweeper, launcher or folder. A job that fails does not stop the
    others; its error is raised at the end.

    Raises:
        ConfigError: nothing is swept, or the configuration of a job is wrong.
    """
    preset = find_preset(name_or_path)
    parsed = parse_overrides(preset, overrides, sweep=True)
    if not any(override.is_sweep_override() or override.is_hydra_override() for override in parsed):
        repair = "name the values, such as seed=1,2, or leave -m out"
        issue = Issue("-m", "command line", "no field with several values", "", repair)
        raise config_error(shown(preset.file), [issue])
    given = {override.key_or_group for override in parsed}
    settings = [f"{key}={value}" for key, value in _SETTINGS.items() if key not in given]
    fixed = {o.key_or_group for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()}
    arguments = [as_hydra_argument(preset, override) for override in parsed]
    task = partial(_run_job, name_or_path, frozenset(fixed), "hydra.sweep.subdir" in given, job)
    arguments = [search_path_override(preset), *settings, *arguments]
    with hydra_at(preset):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        read_files(preset, parsed)
        with readable_errors(preset):
            hydra.compose_config(preset.config_name, arguments, RunMode.MULTIRUN, with_log_configuration=False)
        with hydra_errors(preset):
            hydra.multirun(preset.config_name, task, arguments, with_log_configuration=False)


def _run_job(
    name_or_path: str,
    fixed: frozenset[str],
    own_folder: bool,
    job: Callable[[RunConfig], None],
    _: DictConfig,
) -> None:
    """Load one job's configuration from the overrides Hydra chose, give it a folder of its own, run it."""
    hydra = HydraConfig.get()
    overrides = [str(text) for text in hydra.overrides.task]
    folder = Path(hydra.runtime.output_dir)
    if not own_folder:
        folder /= _folder_name([text for text in overrides if _key(text) not in fixed])
    job(load_run(name_or_path, [*overrides, f"++output_dir={quoted(shown(folder))}"]))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _folder_name(swept: Sequence[str]) -> str:
    """A folder name that states the swept values, such as `model=hope_demo,seed=1`."""
    text = ",".join(sorted(override.lstrip("+") for override in swept))
    name = re.sub(r"[^A-Za-z0-9._=,~-]+", "-", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]  # keeps apart what the name cannot
    return f"{name[:_LONGEST_NAME]}-{digest}"

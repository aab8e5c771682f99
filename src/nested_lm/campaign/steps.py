"""The steps of a campaign with everything resolved: commands, outputs and fingerprints."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nested_lm.config.campaign import CampaignConfig, DataStep, EvalStep, TrainStep
from nested_lm.config.load import config_hash, load_data, load_run
from nested_lm.errors import ConfigError
from nested_lm.report.manifest import CampaignManifest, RunEntry, StepEntry


@dataclass(frozen=True)
class PlannedStep:
    """One step, ready to run.

    arguments: of the `nested-lm` command.
    needs: ids of earlier steps that must have succeeded.
    fingerprint: hash of the resolved settings and of the fingerprints of its needs.
    outputs: a finished step has left a file of this pattern in its folder; without it the step runs again.
    folder: where the step writes.
    run_name: of a train step.
    """

    id: str
    kind: Literal["data", "train", "eval", "report"]
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    fingerprint: str
    folder: Path
    outputs: str
    run_name: str | None = None

    def has_output(self) -> bool:
        """Whether what the step makes is there. A training that saved and stopped early is not at its end."""
        if not any(self.folder.glob(self.outputs)):
            return False
        return self.kind != "train" or _reached_the_end(self.folder / "metrics.jsonl")


def plan_steps(config: CampaignConfig) -> tuple[PlannedStep, ...]:
    """Resolve every step, in the order of the preset, which is one of its dependencies.

    Raises ConfigError when a preset of a step cannot be resolved, or two runs share a folder.
    """
    planned: dict[str, PlannedStep] = {}
    for step in config.steps:
        needs = tuple(dict.fromkeys((*((step.run,) if isinstance(step, EvalStep) else ()), *step.after)))
        run_name = None
        if isinstance(step, DataStep):
            data = load_data(step.config, step.overrides)
            arguments = ("data", step.config, *step.overrides)
            folder, outputs, settings = Path(data.output_dir), "manifest.json", config_hash(data)
        elif isinstance(step, TrainStep):
            run = load_run(step.config, step.overrides)
            run_name = run.name
            arguments = ("train", step.config, *step.overrides)
            folder, outputs, settings = Path(run.output_dir), "checkpoints/*/manifest.json", config_hash(run)
        elif isinstance(step, EvalStep):
            folder, outputs, settings = planned[step.run].folder, "results/*.json", "eval"
            arguments = ("eval", str(folder))
        else:
            folder, outputs, settings = Path(config.output_dir), "report.html", config.title
            arguments = ("report", config.output_dir)
        planned[step.id] = PlannedStep(
            id=step.id,
            kind=step.kind,
            arguments=arguments,
            needs=needs,
            fingerprint=_fingerprint(step.kind, settings, [planned[need].fingerprint for need in needs]),
            folder=folder,
            outputs=outputs,
            run_name=run_name,
        )
    _refuse_shared_folders(config, planned)
    return tuple(planned.values())


def describe(config: CampaignConfig, steps: tuple[PlannedStep, ...]) -> CampaignManifest:
    """What the report has to know of the campaign; folders become relative to the campaign's own."""
    root = Path(config.output_dir).absolute()
    evaluated = {step.run for step in config.steps if isinstance(step, EvalStep)}

    def relative(folder: Path) -> str:
        return Path(os.path.relpath(folder.absolute(), root)).as_posix()

    return CampaignManifest(
        schema_version=1,
        name=config.name,
        title=config.title,
        data=tuple(relative(step.folder) for step in steps if step.kind == "data"),
        runs=tuple(
            RunEntry(
                step=step.id,
                name=step.run_name,
                folder=relative(step.folder),
                evaluated=step.id in evaluated,
            )
            for step in steps
            if step.run_name is not None
        ),
        steps=tuple(StepEntry(id=step.id, kind=step.kind, arguments=step.arguments) for step in steps),
    )


def _reached_the_end(metrics: Path) -> bool:
    """Whether a training wrote its last event, `done`."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False
    for line in reversed(lines):
        try:
            if json.loads(line).get("event") == "done":
                return True
        except ValueError:  # a line cut short by a kill: resume repairs it
            continue
    return False


def _fingerprint(kind: str, settings: str, needs: list[str]) -> str:
    return hashlib.sha256(json.dumps([kind, settings, needs]).encode()).hexdigest()[:16]


def _refuse_shared_folders(config: CampaignConfig, planned: dict[str, PlannedStep]) -> None:
    owners: dict[Path, str] = {}
    for step in planned.values():
        if step.kind not in ("data", "train"):
            continue
        folder = step.folder.absolute()
        if folder in owners:
            raise ConfigError(
                f"{config.name}: steps {owners[folder]!r} and {step.id!r} both write to {step.folder}\n"
                f'  Give one another folder, such as overrides: ["output_dir={step.folder}-{step.id}"]'
            )
        owners[folder] = step.id

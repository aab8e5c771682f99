"""The steps of a campaign with everything resolved: commands, outputs and fingerprints."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nested_lm.config.campaign import CampaignConfig, DataStep, EvalStep, GridStep, TrainStep
from nested_lm.config.load import config_hash, load_ablation, load_data, load_evaluation, load_run, training_hash
from nested_lm.config.run import RunConfig
from nested_lm.errors import ConfigError
from nested_lm_lab.campaign.grid import BASE, Arm, plan_arms
from nested_lm_lab.campaign.results import option_of, results_of_run, results_of_suite
from nested_lm_lab.evaluation.registry import own_verbs
from nested_lm_lab.report.manifest import CampaignManifest, GridEntry, RunEntry, StepEntry, VariantEntry


@dataclass(frozen=True)
class PlannedStep:
    """One step, ready to run.

    arguments: of the `nested-lm` command.
    needs: ids of earlier steps that must have succeeded.
    fingerprint: hash of the resolved settings and of the fingerprints of its needs.
    outputs: a finished step has left a file of each of these patterns in its folder; without one it runs again.
    folder: where the step writes.
    run: configuration of a train step. seconds: that an evaluation is known to take.
    arm: of an ablation grid's train step: the grid's id and the arm.
    results: of an evaluation, by the names that the report knows; suite: that measures them.
    """

    id: str
    kind: Literal["data", "train", "eval", "report"]
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    fingerprint: str
    folder: Path
    outputs: tuple[str, ...]
    run: RunConfig | None = None
    arm: tuple[str, Arm] | None = None
    seconds: float | None = None
    results: tuple[str, ...] = ()
    suite: str = "run"

    def has_output(self) -> bool:
        """Whether what the step makes is there. A training that saved and stopped early is not at its end."""
        if not all(any(self.folder.glob(pattern)) for pattern in self.outputs):
            return False
        return self.kind != "train" or _reached_the_end(self.folder / "metrics.jsonl")


class _Plan:
    """Collects planned steps; `aliases` maps the id of a grid to the steps it became, of a step left out to none."""

    def __init__(self, config: CampaignConfig) -> None:
        self.config = config
        self.steps: dict[str, PlannedStep] = {}
        self.aliases: dict[str, tuple[str, ...]] = dict.fromkeys(config.left_out(), ())

    def add(
        self,
        id: str,
        kind: Literal["data", "train", "eval", "report"],
        arguments: tuple[str, ...],
        *,
        after: Sequence[str],
        settings: str,
        folder: Path,
        outputs: tuple[str, ...],
        run: RunConfig | None = None,
        arm: tuple[str, Arm] | None = None,
        seconds: float | None = None,
        results: tuple[str, ...] = (),
        suite: str = "run",
    ) -> None:
        if id in self.steps:
            raise ConfigError(f"{self.config.name}: two steps became {id!r}; rename the grid or the step")
        needs = tuple(dict.fromkeys(real for name in after for real in self.aliases.get(name, (name,))))
        text = json.dumps([kind, settings, [self.steps[need].fingerprint for need in needs]])
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.steps[id] = PlannedStep(
            id, kind, arguments, needs, fingerprint, folder, outputs, run, arm, seconds, results, suite
        )

    def add_run(
        self,
        id: str,
        preset: str,
        overrides: Sequence[str],
        run: RunConfig,
        *,
        after: Sequence[str],
        arm: tuple[str, Arm] | None = None,
    ) -> None:
        self.add(
            id,
            "train",
            ("train", preset, *overrides),
            after=after,
            settings=training_hash(run),
            folder=Path(run.output_dir),
            outputs=("checkpoints/*/manifest.json",),
            run=run,
            arm=arm,
        )

    def add_evaluation(
        self,
        id: str,
        of: str,
        settings: str,
        overrides: Sequence[str],
        *,
        after: Sequence[str] = (),
        seconds: float | None = None,
    ) -> None:
        folder, run = self.steps[of].folder, self.steps[of].run
        assert run is not None
        evaluation = load_evaluation(settings, overrides)
        results = results_of_run(evaluation, run)
        self.add(
            id,
            "eval",
            ("eval", str(folder), *overrides, "--settings", settings),
            after=(of, *after),
            settings=config_hash(evaluation),
            folder=folder,
            outputs=results.files,
            seconds=seconds,
            results=results.names,
        )

    def add_suite(self, step: EvalStep) -> None:
        folder = self.steps[step.run].folder
        results = results_of_suite(step, folder)
        # Alone of the suites, zeroshot writes outside the run unless it is told where the report looks.
        is_told = step.suite != "zeroshot" or option_of(step, "output") is not None
        place = () if is_told else (f"--output={folder / results.files[0]}",)
        self.add(
            step.id,
            "eval",
            ("eval", step.suite, str(folder), *step.options, *place),
            after=(step.run, *step.after),
            settings=json.dumps([step.suite, *step.options]),
            folder=folder,
            outputs=results.files,
            seconds=step.seconds,
            results=results.names,
            suite=step.suite,
        )


def plan_steps(config: CampaignConfig) -> tuple[PlannedStep, ...]:
    """Resolve every step, in the order of the preset, which is one of its dependencies.

    Raises ConfigError when a preset of a step cannot be resolved, a variant of a grid changes more than one factor,
    two steps write to one place, or several processes would train the same run side by side.
    """
    plan = _Plan(config)
    for step in config.steps:
        if step.id in plan.aliases:  # left out
            continue
        if isinstance(step, DataStep):
            data = load_data(step.config, step.overrides)
            plan.add(
                step.id,
                "data",
                ("data", step.config, *step.overrides),
                after=step.after,
                settings=config_hash(data),
                folder=Path(data.output_dir),
                outputs=("manifest.json",),
            )
        elif isinstance(step, TrainStep):
            run = load_run(step.config, step.overrides)
            plan.add_run(step.id, step.config, step.overrides, run, after=step.after)
        elif isinstance(step, EvalStep):
            trained = next(other for other in config.steps if other.id == step.run)
            assert isinstance(trained, TrainStep)
            if step.suite != "run":
                plan.add_suite(step)
                continue
            settings, overrides = step.settings, step.overrides
            if settings is None:
                settings, overrides = trained.config, trained.overrides
            plan.add_evaluation(step.id, step.run, settings, overrides, after=step.after, seconds=step.seconds)
        elif isinstance(step, GridStep):
            _add_grid(plan, step)
        else:
            plan.add(
                step.id,
                "report",
                ("report", config.output_dir),
                after=step.after,
                settings=config.title,
                folder=Path(config.output_dir),
                outputs=("report.html",),
            )
    _refuse_shared_folders(config, plan.steps)
    _refuse_shared_results(config, plan.steps)
    _refuse_copies(config, plan.steps)
    return tuple(plan.steps.values())


def _add_grid(plan: _Plan, step: GridStep) -> None:
    """Every arm with every seed, seed by seed, so that a grid that is cut short has whole seeds."""
    grid = load_ablation(step.ablations)
    arms = plan_arms(grid, shared=step.overrides, only=step.only)
    made: list[str] = []
    for seed in step.seeds:
        for arm in arms:
            name = f"{arm.name}-seed{seed}"
            folder = f"{plan.config.output_dir}/runs/{step.id}-{name}"
            run = arm.config.model_copy(update={"name": name, "output_dir": folder, "seed": seed})
            overrides = (*arm.overrides, f"name={name}", f"output_dir={folder}", f"seed={seed}")
            id = f"{step.id}.{name}"
            plan.add_run(id, grid.base, overrides, run, after=step.after, arm=(step.id, arm))
            plan.add_evaluation(f"{id}.eval", id, step.evaluation, ())
            made += [id, f"{id}.eval"]
    plan.aliases[step.id] = tuple(made)


def describe(config: CampaignConfig, steps: tuple[PlannedStep, ...]) -> CampaignManifest:
    """What the report has to know of the campaign; folders become relative to the campaign's own.

    It is published: what only the user knows, such as the folder of somebody else's data, stays a variable.
    """
    root = Path(config.output_dir).absolute()
    required = {name for step in config.steps if isinstance(step, EvalStep) for name in step.requires}
    own = {name: value for name in sorted(required) if (value := config.variables[name])}

    def public(argument: str) -> str:
        for name, value in own.items():
            argument = argument.replace(value, f"${{variables.{name}}}")
        return argument

    evaluated = {need for step in steps if step.kind == "eval" for need in step.needs}

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
                name=step.run.name,
                folder=relative(step.folder),
                evaluated=step.id in evaluated,
                grid=step.arm[0] if step.arm else None,
                arm=step.arm[1].name if step.arm else None,
            )
            for step in steps
            if step.run is not None
        ),
        steps=tuple(
            StepEntry(id=step.id, kind=step.kind, arguments=tuple(map(public, step.arguments))) for step in steps
        ),
        grids=tuple(_describe_grid(step, steps) for step in config.steps if isinstance(step, GridStep)),
    )


def _describe_grid(grid: GridStep, steps: tuple[PlannedStep, ...]) -> GridEntry:
    loaded = load_ablation(grid.ablations)
    arms = {step.arm[1].name: step.arm[1] for step in steps if step.arm is not None and step.arm[0] == grid.id}
    return GridEntry(
        id=grid.id,
        title=loaded.title,
        base=loaded.base,
        seeds=grid.seeds,
        variants=tuple(
            VariantEntry(
                name=arm.name,
                factor=arm.variant.factor,
                change=arm.variant.change,
                delta=arm.variant.delta,
                balance=arm.variant.balance,
                against=arm.variant.against or BASE,
                row=arm.variant.paper.row if arm.variant.paper else None,
                reversed=arm.variant.paper is not None and arm.variant.paper.sense == "reversed",
            )
            for arm in arms.values()
            if arm.variant is not None
        ),
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


def _refuse_shared_results(config: CampaignConfig, planned: dict[str, PlannedStep]) -> None:
    """Refuse two evaluations of a run that leave one result: the later would replace it, the report takes but one."""
    owners: dict[tuple[Path, str], str] = {}
    for step in planned.values():
        for result in (*step.results, *step.outputs) if step.kind == "eval" else ():
            owner = owners.setdefault((step.folder.absolute(), result), step.id)
            if owner != step.id:
                repair = (
                    f"Add --label=... to the options of step {step.id!r}, such as --label=long, to keep both."
                    if step.suite in [entry.kind for entry in own_verbs()]
                    else "A run has one such result: measure it in one of the steps."
                )
                raise ConfigError(
                    f"{config.name}: steps {owner!r} and {step.id!r} both write result {Path(result).stem!r} of "
                    f"{step.folder}; the later would replace the earlier\n  {repair}"
                )


def _refuse_copies(config: CampaignConfig, planned: dict[str, PlannedStep]) -> None:
    """Refuse torchrun for a run that would not share its work: each process would train all of it."""
    if config.runner.processes == 1:
        return
    for step in planned.values():
        if step.run is not None and step.run.train.strategy == "single":
            raise ConfigError(
                f"{config.name}: runner {config.runner.kind} starts {config.runner.processes} processes, but step "
                f"{step.id!r} has train.strategy single, so each would train the whole run\n"
                '  Add overrides: ["train.strategy=fsdp2"] to the step, or use runner local.'
            )

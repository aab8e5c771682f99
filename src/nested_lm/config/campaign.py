"""A campaign: a graph of data, training, evaluation and report steps, and where they run."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from nested_lm.config.section import Count, Name, Place, PositiveFloat, Section

Names = Annotated[tuple[Name, ...], Field(strict=False)]
Overrides = Annotated[tuple[str, ...], Field(strict=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


Variable = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) in (int, float) else given)]
"""Text; a number on the command line is its digits."""


class DataStep(Section):
    """Build a data set."""

    kind: Literal["data"]
    id: Name  # name of the step in the campaign
    config: str  # preset name below configs/, or a path to a YAML file
    after: Names = ()  # steps that must be over before
    overrides: Overrides = ()  # changes to the preset


class TrainStep(Section):
    """Train one run."""

    kind: Literal["train"]
    id: Name  # name of the step in the campaign
    config: str
    after: Names = ()  # steps that must be over before
    overrides: Overrides = ()  # changes to the preset


class EvalStep(Section):
    """Evaluate the newest checkpoint of a run, or the border checkpoints of a chronological one.

    suite: `run` measures what `settings` ask for; the others are the verbs of `nested-lm eval` by that name, which take
        command line options.
    requires: variables of the campaign without which the step is left out, such as the folder of somebody else's data.
    """

    kind: Literal["eval"]
    id: Name  # name of the step in the campaign
    run: Name  # id of a train step
    settings: str | None = None  # evaluation preset; null: the section `eval` of the run's own preset
    after: Names = ()  # steps that must be over before
    overrides: Overrides = ()  # of the settings
    suite: Name = "run"
    options: Overrides = ()  # of a suite's verb, such as --tasks=s1,mk1
    requires: Names = ()
    seconds: PositiveFloat | None = None  # what it takes where `speed` was measured; null: part of `run_seconds`

    @model_validator(mode="after")
    def _settings_belong_to_the_suite(self) -> "EvalStep":
        if self.suite == "run" and self.options:
            raise ValueError("options belong to suites; suite run takes `settings` and `overrides`")
        if self.suite != "run" and self.settings is not None:
            raise ValueError(f"suite {self.suite} takes command line options, not settings; put them into `options`")
        if wrong := [option for option in self.options if not option.startswith("--")]:
            raise ValueError(f"option {wrong[0]!r} must be one word that begins with --, such as --tasks=s1,mk1")
        return self

    @model_validator(mode="after")
    def _overrides_have_settings(self) -> "EvalStep":
        if self.overrides and self.settings is None:
            raise ValueError(
                "overrides change the preset named by `settings`; name one, or put them into the train step"
            )
        return self


class GridStep(Section):
    """Train and evaluate the arms of an ablation grid, each with every seed."""

    kind: Literal["grid"]
    id: Name  # name of the step in the campaign
    ablations: str  # preset such as ablations/phase2_nano
    evaluation: str  # preset of the measurements, such as eval/ablations
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)]
    only: Names | None = None  # variants to take besides the base; null: all
    after: Names = ()  # steps that must be over before
    overrides: Overrides = ()  # of every run

    @model_validator(mode="after")
    def _seeds_differ(self) -> "GridStep":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name a seed twice: the second run would be a copy; use others")
        return self


class ReportStep(Section):
    """Render tables and figures from the runs so far."""

    kind: Literal["report"]
    id: Name  # name of the step in the campaign
    after: Names = ()  # steps that must be over before


Step = Annotated[DataStep | TrainStep | EvalStep | GridStep | ReportStep, Field(discriminator="kind")]


class Local(Section):
    """Steps are processes of this machine."""

    kind: Literal["local"]
    parallel: Count = 1  # steps at a time
    threads: Count | None = None  # of each step (OMP_NUM_THREADS); null: as torch chooses

    @property
    def processes(self) -> int:
        """Processes that share one training."""
        return 1


class Torchrun(Section):
    """Trainings are shared by processes that torchrun starts on this machine; other steps are single processes."""

    kind: Literal["torchrun"]
    processes: Annotated[int, Field(ge=2)]  # that share one training, on this machine

    @property
    def parallel(self) -> int:
        """One step at a time: it has all devices."""
        return 1

    @property
    def threads(self) -> int | None:
        """As torchrun chooses."""
        return None


class Slurm(Section):
    """Steps are Slurm jobs on one node each, submitted through submitit; reports are rendered here."""

    kind: Literal["slurm"]
    parallel: Count = 64  # jobs in the queue at a time
    processes: Count = 1  # that share one training, started by torchrun
    timeout_minutes: Count  # of a job; when it ends the step saves and the job is queued again
    cpus: Count = 8  # of a job
    gpus: Annotated[int, Field(ge=0)] = 0  # of a job
    memory_gb: Count | None = None  # of a job
    partition: str | None = None  # Slurm's partition
    account: str | None = None  # Slurm's account
    qos: str | None = None  # Slurm's quality of service


class Ray(Section):
    """Steps are Ray tasks on one node each."""

    kind: Literal["ray"]
    parallel: Count = 1  # tasks at a time, also those that wait for a node
    address: str | None = None  # host:port of a cluster; auto: the one this machine is in; null: a Ray of our own here
    processes: Count = 1  # that share one training, started by torchrun
    cpus_per_step: Count = 1  # of a task
    gpus_per_step: Annotated[float, Field(ge=0)] = 0  # a share of one lets several steps use it


Runner = Annotated[Local | Torchrun | Slurm | Ray, Field(discriminator="kind")]


class Speed(Section):
    """What a dry run computes hours from: speeds that somebody measured, and where."""

    tokens_per_s: PositiveFloat  # of one training
    by_preset: dict[str, PositiveFloat] = Field(default_factory=dict)  # tokens_per_s of these presets' trainings
    run_seconds: PositiveFloat  # besides training: start of the programs, evaluation steps that state no seconds
    measured_on: Annotated[str, Field(min_length=1)]


class CampaignConfig(Section):
    """Steps, run in order of their dependencies; each is a subprocess of the same command line.

    variables: values that steps name as ${variables.NAME}, null where only the user knows them.
    """

    name: Name  # folder name of its evidence
    title: str  # headline of its report
    output_dir: Place  # folder of the campaign
    variables: dict[Name, Variable | None] = Field(default_factory=dict)
    steps: Annotated[tuple[Step, ...], Field(min_length=1, strict=False)]  # what is done, as a graph
    runner: Runner = Local(kind="local")  # what starts the steps
    speed: Speed | None = None  # null: a dry run gives no hours

    def left_out(self) -> dict[str, str]:
        """Ids of the steps whose variables are not set, and what sets them."""
        found = {}
        for step in self.steps:
            unset = [name for name in step.requires if self.variables[name] is None] if step.kind == "eval" else []
            if unset:
                found[step.id] = " ".join(f"variables.{name}=..." for name in unset)
        return found

    @model_validator(mode="after")
    def _required_variables_exist(self) -> "CampaignConfig":
        for step in self.steps:
            unknown = [name for name in step.requires if name not in self.variables] if step.kind == "eval" else []
            if unknown:
                known = ", ".join(self.variables) or "(none)"
                raise ValueError(f"step {step.id!r} requires variable {unknown[0]!r}; `variables` has {known}")
        return self

    @model_validator(mode="after")
    def _steps_form_a_graph(self) -> "CampaignConfig":
        seen: dict[str, str] = {}
        for step in self.steps:
            if step.id in seen:
                raise ValueError(f"step id {step.id!r} is used twice; rename one of them")
            needs = list(step.after) + ([step.run] if isinstance(step, EvalStep) else [])
            for need in needs:
                if need not in seen:
                    raise ValueError(
                        f"step {step.id!r} needs {need!r}, which no earlier step has; "
                        f"name one of the earlier steps: {', '.join(seen) or '(none)'}"
                    )
            if isinstance(step, EvalStep) and seen[step.run] != "train":
                raise ValueError(
                    f"step {step.id!r} evaluates {step.run!r}, which is not a train step; "
                    f"name one of {', '.join(id for id, kind in seen.items() if kind == 'train') or '(none)'}"
                )
            seen[step.id] = step.kind
        return self

"""A campaign: a graph of data, training, evaluation and report steps."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nested_lm.config.section import Name, Section


class DataStep(Section):
    """Build a data set."""

    kind: Literal["data"]
    id: Name
    config: str  # preset name below configs/, or a path to a YAML file
    after: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()


class TrainStep(Section):
    """Train one run."""

    kind: Literal["train"]
    id: Name
    config: str
    after: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()


class EvalStep(Section):
    """Evaluate the newest checkpoint of a run, or the border checkpoints of a chronological one."""

    kind: Literal["eval"]
    id: Name
    run: Name  # id of a train step
    after: Annotated[tuple[Name, ...], Field(strict=False)] = ()


class ReportStep(Section):
    """Render tables and figures from the runs so far."""

    kind: Literal["report"]
    id: Name
    after: Annotated[tuple[Name, ...], Field(strict=False)] = ()


Step = Annotated[DataStep | TrainStep | EvalStep | ReportStep, Field(discriminator="kind")]


class CampaignConfig(Section):
    """Steps, run in order of their dependencies; each is a subprocess of the same command line."""

    name: Name
    title: str
    output_dir: str
    steps: Annotated[tuple[Step, ...], Field(min_length=1, strict=False)]

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

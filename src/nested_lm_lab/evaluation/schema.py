"""What a result file holds: run identity, settings and the metrics of one task, strict and finite."""

from typing import Literal

from pydantic import JsonValue, SerializeAsAny, model_validator

from nested_lm.config.section import Count, NonNegativeFloat, Section
from nested_lm_lab.evaluation.interval import Natural

SCHEMA_VERSION = 1


class RunIdentity(Section):
    """What a number came from."""

    run_id: str
    name: str
    arm: str
    config_hash: str
    data_hash: str
    tokenizer_hash: str
    commit: str | None  # null: not run from a git checkout
    seed: Natural
    parameters: Count
    tokens: Natural  # training tokens seen
    step: Natural
    context_length: Count


class Metrics(Section):
    """The numbers of one task; each kind of result has a class of its own, which its task names."""

    kind: str


class CheckpointMark(Section):
    """Which checkpoint was scored: folder name and digest of its manifest."""

    name: str
    digest: str


class ResultFile(Section):
    """One task on one checkpoint (or on the border checkpoints of a chronological run)."""

    schema_version: Literal[1]
    task: str  # the kind of the metrics, or `KIND_LABEL` for another result of that kind
    task_version: str
    identity: RunIdentity
    settings: dict[str, JsonValue]  # of the task; equal in every row of one table
    checkpoint: CheckpointMark
    device: str
    scored_commit: str | None = None  # of the program that scored, identity.commit trained; null: not known
    metrics: SerializeAsAny[Metrics]
    created: str
    wall_seconds: NonNegativeFloat

    @property
    def label(self) -> str:
        """What sets the result apart from another of its kind; empty for the one that has the kind's own name."""
        return self.task.removeprefix(self.metrics.kind).removeprefix("_")

    @model_validator(mode="after")
    def _metrics_belong_to_the_task(self) -> "ResultFile":
        if self.task != self.metrics.kind and not self.task.startswith(f"{self.metrics.kind}_"):
            raise ValueError(f"task is {self.task!r} but the metrics are those of {self.metrics.kind!r}")
        return self

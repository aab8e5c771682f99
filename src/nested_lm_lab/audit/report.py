"""The file an audit writes: what was audited, where and with what, every figure; strict, and refused when edited."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from nested_lm.config.load import config_hash
from nested_lm.config.section import Count, NonNegativeFloat, Section
from nested_lm.errors import NumericsError, ReportError
from nested_lm.nn.sizing import count_parameters
from nested_lm.storage.atomic import write_atomically
from nested_lm.storage.commit import current_commit
from nested_lm_lab.audit.finding import Finding
from nested_lm_lab.audit.machine import describe_hardware, package_versions
from nested_lm_lab.audit.subject import TOKEN_SEED, Subject
from nested_lm_lab.evaluation.results import content_digest

SCHEMA_VERSION = 1

Natural = Annotated[int, Field(ge=0)]


class Identity(Section):
    """What was audited, and on what."""

    source: str  # preset, or path of the checkpoint
    name: str
    config_hash: str  # of the configuration that was asked for
    audited_hash: str  # of the model that was audited
    commit: str | None  # null: not run from a git checkout
    seed: Natural  # of the weights
    token_seed: Natural  # of the tokens that the checks read
    step: Natural | None  # of training; null: fresh weights
    tokens: Natural | None
    parameters: Count  # of the model that was asked for
    audited_parameters: Count
    shrunk: tuple[str, ...]  # changed settings, as `field: from -> to`; empty: audited as it is
    versions: dict[str, str]
    hardware: dict[str, str]
    created: str


class Row(Section):
    """One figure. value: null where the check does not apply or broke, and where the figure is not finite."""

    check: str
    figure: str
    value: float | None
    low: float | None
    high: float | None
    state: Literal["passed", "missed", "does not apply"]
    reason: str

    @model_validator(mode="after")
    def _state_follows(self) -> "Row":
        if self.value is None:
            if self.state == "passed" or not self.reason:
                raise ValueError(f"{self.figure}: without a value there must be a reason, and no pass")
            return self
        inside = (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)
        if self.state != ("passed" if inside else "missed"):
            raise ValueError(f"{self.figure}: {self.value:g} is {self.state}, against {self.low} to {self.high}")
        return self


class AuditFile(Section):
    """A whole audit."""

    schema_version: Literal[1] = SCHEMA_VERSION
    identity: Identity
    checks: tuple[str, ...]  # that were run
    seconds: NonNegativeFloat
    passed: bool  # no figure missed
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _verdict_follows(self) -> "AuditFile":
        if self.passed == any(row.state == "missed" for row in self.rows):
            raise ValueError(f"passed is {self.passed}, which is not what the rows say")
        unknown = sorted({row.check for row in self.rows} ^ set(self.checks))
        if unknown:
            raise ValueError(f"checks and rows do not name the same checks: {', '.join(unknown)}")
        return self


def make_row(check: str, finding: Finding) -> Row:
    """Turn a finding into a row; JSON has no word for a value that is not finite."""
    value, reason = finding.value, finding.reason
    if value is not None and not math.isfinite(value):
        value, reason = None, f"the figure is {finding.value}{f'; {reason}' if reason else ''}"
    return Row(
        check=check,
        figure=finding.figure,
        value=value,
        low=finding.low,
        high=finding.high,
        state=finding.state,
        reason=reason,
    )


def make_file(subject: Subject, rows: tuple[Row, ...], checks: tuple[str, ...], *, seconds: float) -> AuditFile:
    """Put an audit together."""
    identity = Identity(
        source=subject.source,
        name=subject.run.name,
        config_hash=config_hash(subject.run),
        audited_hash=config_hash(subject.config),
        commit=current_commit(),
        seed=subject.run.seed,
        token_seed=TOKEN_SEED,
        step=subject.step,
        tokens=subject.tokens,
        parameters=count_parameters(subject.run.model)["total"],
        audited_parameters=count_parameters(subject.config)["total"],
        shrunk=subject.shrunk,
        versions=package_versions(),
        hardware=describe_hardware(subject.device),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    passed = all(row.state != "missed" for row in rows)
    return AuditFile(identity=identity, checks=checks, seconds=seconds, passed=passed, rows=rows)


def write_audit(path: Path, audit: AuditFile) -> None:
    """Write an audit with its digest.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    document = audit.model_dump(mode="json")
    document["digest"] = content_digest(document)
    write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load_audit(path: Path) -> AuditFile:
    """Read an audit.

    Raises:
        ReportError: it is missing, is not JSON, was changed after it was written, or does not fit the schema.
    """
    again = "Run `nested-lm audit` again."
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ReportError(f"{path}: expected a JSON object, found {type(document).__name__}. {again}")
        found = content_digest(document)
    except (OSError, ValueError, NumericsError) as error:
        raise ReportError(f"{path} cannot be read as an audit: {error}. {again}") from error
    if document.get("digest") != found:
        raise ReportError(f"{path} was changed after it was written; audits are never edited. {again}")
    content = {key: value for key, value in document.items() if key != "digest"}
    try:
        return AuditFile.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ReportError(f"{path} does not fit the schema of audits at {where}: {first['msg']}. {again}") from error

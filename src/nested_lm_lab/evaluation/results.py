"""Write, read and compare result files. A file edited after it was written is refused."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError

from nested_lm.errors import ConfigError, NumericsError, ReportError
from nested_lm.storage.atomic import write_atomically
from nested_lm_lab.evaluation.registry import CONTINUAL, RUN, find_entry, find_task, kinds
from nested_lm_lab.evaluation.schema import SCHEMA_VERSION, Metrics, ResultFile

PARAMETER_TOLERANCE = 0.02
"""Rows of one table are models of equal size: parameters within this share of the larger."""

_EQUAL_IDENTITY = ("data_hash", "tokenizer_hash", "tokens", "context_length")
_EQUAL_RESULT = ("task", "task_version")

_ABSENT = "absent"


def labelled(kind: str, label: str | None) -> str:
    """The name of a result: its kind, or `KIND_LABEL` to keep it beside another of the same run and kind.

    Raises ConfigError when the label is not small letters and digits.
    """
    if label is None:
        return kind
    if not re.fullmatch("[a-z0-9]+", label):
        raise ConfigError(f"--label {label!r}: write small letters and digits only, such as long")
    return f"{kind}_{label}"


def readable_result(path: Path, report: Callable[[str], None]) -> ResultFile | None:
    """The result that is there; None when there is none, or one that must be measured again, and why is reported."""
    if not path.exists():
        return None
    try:
        return load_result(path)
    except ReportError as error:
        report(f"measured again: {error}")
        return None


def stored_result(
    path: Path, fields: Mapping[str, Any], report: Callable[[str], None], *, replace: bool
) -> ResultFile | None:
    """The result of these fields that is there already; None when it is to be measured, and why is reported.

    fields: of `ResultFile`, `identity` among them. An older result of the same run may be replaced. replace: that of
    another run may be, too, since the folder is this run's own.

    Raises:
        ConfigError: the file is another run's, and does not lie in this run's results.
    """
    old = readable_result(path, report)
    if old is None:
        return None
    run_id = fields["identity"].run_id
    if old.identity.run_id != run_id and not replace:
        raise ConfigError(
            f"{path} holds the scores of run {old.identity.run_id}, this is {run_id}; name another file with "
            "--output, or move that one away"
        )
    other = [name for name, value in fields.items() if getattr(old, name) != value]
    if other:
        report(f"measured again: {path} is of another {' and '.join(other).replace('_', ' ')}, and will be replaced")
        return None
    return old


def shared_settings(result: ResultFile) -> dict[str, Any]:
    """Settings that all rows of a table must have in common."""
    own = find_task(result.metrics.kind).own_settings
    return {key: value for key, value in result.settings.items() if key not in own}


def content_digest(document: dict[str, Any]) -> str:
    """xxh3_128 of the canonical JSON of `document` without its `digest` field.

    Raises NumericsError when a number is not finite: JSON has no such numbers.
    """
    content = {key: value for key, value in document.items() if key != "digest"}
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericsError(f"a result holds a number that is not finite: {error}") from error
    return xxhash.xxh3_128_hexdigest(text.encode())


def write_result(path: Path, result: ResultFile) -> None:
    """Write a result file with its digest. A crash leaves the old file, the new one or none.

    Raises DataError when the disk is full or the folder cannot be written.
    """
    document = result.model_dump(mode="json")
    document["digest"] = content_digest(document)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def load_result(path: Path) -> ResultFile:
    """Read a result file.

    Raises ReportError when it is missing, is not JSON, was changed after it was written, was written by
    another schema version or does not fit the schema.
    """
    again = _way_out(path, path.stem)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path}: there is no such result file\n  {again}") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}\n  {again}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not a JSON file: {error}\n  {again}") from error
    if not isinstance(document, dict):
        raise ReportError(f"{path}: expected a JSON object, found {type(document).__name__}\n  {again}")
    again = _way_out(path, str(document.get("task", path.stem)))
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ReportError(f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}\n  {again}")
    _check_digest(path, document, again)
    return _validated(path, document, again)


def _validated(path: Path, document: dict[str, Any], again: str) -> ResultFile:
    """The file's content as its task's schema has it."""
    fields = {key: value for key, value in document.items() if key != "digest"}
    metrics = fields.get("metrics")
    kind = metrics.get("kind") if isinstance(metrics, dict) else None
    if kind not in kinds():
        raise ReportError(
            f"{path} does not fit the result schema:\n"
            f"  metrics.kind: found {kind!r:.80}, allowed are {', '.join(kinds())}\n  {again}"
        )
    problems = []
    try:
        # Strict mode reads JSON arrays as tuples from text only.
        fields["metrics"] = find_task(kind).Metrics.model_validate_json(json.dumps(metrics))
    except ValidationError as error:
        problems += [("metrics", problem) for problem in error.errors()]
        fields["metrics"] = Metrics(kind=kind)
    try:
        found = ResultFile.model_validate(fields)
    except ValidationError as error:
        problems += [("", problem) for problem in error.errors()]
    if not problems:
        return found
    lines = "\n".join(
        f"  {'.'.join([*filter(None, [part]), *map(str, item['loc'])]) or 'file'}: {item['msg']} "
        f"(found {item['input']!r:.80})"
        for part, item in problems[:5]
    )
    raise ReportError(f"{path} does not fit the result schema ({len(problems)} problems):\n{lines}\n  {again}")


def _way_out(path: Path, task: str) -> str:
    """How to have a result file whole again: measure it again, or restore it where it is published evidence.

    Results lie in RUN/results, those of a checkpoint named by itself in RUN/results/CHECKPOINT; other places are named
    on the command line.
    """
    entry = find_entry(task)
    verb = "" if entry is None or entry.verb == RUN else entry.verb
    results = next((folder for folder in path.parents[:2] if folder.name == "results"), None)
    if results is not None and not (results.parent / "checkpoints").is_dir():
        return (
            f"{results.parent} holds no checkpoints to measure it again from. Restore the file with "
            f"`git checkout -- {path}`, or publish its campaign again with `nested-lm report CAMPAIGN_DIR --publish`."
        )
    words = ["nested-lm", "eval", *([verb] if verb else [])]
    if results is None:
        words.append("RUN")
    elif path.parent == results:
        words.append(str(results.parent))
    else:
        words.append(str(results.parent / "checkpoints" / path.parent.name))
    owns_verb = entry is not None and entry.verb == entry.kind
    if entry is not None and owns_verb and task != entry.kind:
        words += ["--label", task.removeprefix(f"{entry.kind}_")]
    if owns_verb and (results is None or path.stem != task):
        words += ["--output", str(path)]
    elif results is None and verb == CONTINUAL:
        words += ["--output-dir", str(path.parent)]
    return f"Run `{' '.join(words)}` with the options it was measured with to write it again."


def _check_digest(path: Path, document: dict[str, Any], again: str) -> None:
    written = document.get("digest")
    try:
        found = content_digest(document)
    except NumericsError as error:  # NaN and Infinity are read by Python's JSON but never written by us
        raise ReportError(f"{path} was changed after it was written: {error}\n  {again}") from error
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no text that we write holds
        raise ReportError(
            f"{path} was changed after it was written: it holds half a character, "
            f"{error.object[error.start : error.end]!a}\n  {again}"
        ) from error
    if written != found:
        raise ReportError(
            f"{path} was changed after it was written\n"
            f"  its digest field says {written!r}, its content has {found!r}\n"
            f"  Results are never edited. {again}"
        )


def differences(a: ResultFile, b: ResultFile) -> tuple[str, ...]:
    """What keeps two results out of one table, one line for each field; empty when they may be compared.

    They may differ in configuration hash, seed, run, arm, commit and step, in parameters by 2 %, and in what a row has
    for itself: the memorize arms of zero-shot results, the oracle of regret.
    """
    found = [
        f"{field}: {getattr(a, field)!r} against {getattr(b, field)!r}"
        for field in _EQUAL_RESULT
        if getattr(a, field) != getattr(b, field)
    ]
    one, other = shared_settings(a), shared_settings(b)
    found += [
        f"settings.{key}: {one.get(key, _ABSENT)!r} against {other.get(key, _ABSENT)!r}"
        for key in {**one, **other}
        if one.get(key, _ABSENT) != other.get(key, _ABSENT)
    ]
    found += [
        f"{field}: {getattr(a.identity, field)!r} against {getattr(b.identity, field)!r}"
        for field in _EQUAL_IDENTITY
        if getattr(a.identity, field) != getattr(b.identity, field)
    ]
    few, many = sorted((a.identity.parameters, b.identity.parameters))
    if many - few > PARAMETER_TOLERANCE * many:
        found.append(
            f"parameters: {a.identity.parameters:,} against {b.identity.parameters:,}, "
            f"{(many - few) / many:.1%} apart (at most {PARAMETER_TOLERANCE:.0%})"
        )
    return tuple(found)


def comparable(a: ResultFile, b: ResultFile) -> bool:
    """Whether two results may be rows of one table."""
    return not differences(a, b)


def require_comparable(results: Sequence[ResultFile]) -> None:
    """Refuse to put results into one table that came from unlike conditions.

    Raises ReportError naming the first pair and every field that differs.
    """
    for index, first in enumerate(results):
        for second in results[index + 1 :]:
            found = differences(first, second)
            if found:
                lines = "\n".join(f"  {line}" for line in found)
                raise ReportError(
                    f"results of {first.identity.name!r} and {second.identity.name!r} may not share a table\n"
                    f"{lines}\n  Rows may differ in configuration, seed and commit only. Evaluate both runs "
                    "on the same data with the same settings, or report them apart."
                )

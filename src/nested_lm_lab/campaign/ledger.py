"""What a campaign has done: a JSON line for each finished attempt of a step and each first start with new settings."""

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from nested_lm.errors import CampaignError
from nested_lm.storage.sealed import seal, unseal_lines


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True)
class Attempt:
    """One attempt of a step, written when it ended. Times are ISO 8601 in UTC."""

    step: str
    command: tuple[str, ...]
    fingerprint: str
    started: str
    ended: str
    exit_code: int  # negative: killed by that signal
    seconds: float
    interrupted: bool  # the campaign was told to stop while the step ran


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True)
class Begin:
    """A step whose output is of these settings from now on, written before it starts."""

    step: str
    fingerprint: str
    began: str


_ATTEMPT: TypeAdapter[Attempt] = TypeAdapter(Attempt)
_BEGIN: TypeAdapter[Begin] = TypeAdapter(Begin)


class Ledger:
    """Append-only list of attempts in a file. Use it only while the campaign's lock is held.

    Raises CampaignError when a line is damaged or the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: list[Attempt] = []
        self._fingerprints: dict[str, str] = {}
        try:
            entries = _read(path)
        except OSError as error:
            raise CampaignError(
                f"{path} cannot be read: {error.strerror or error}\n  Make it readable and start again."
            ) from error
        for entry in entries:
            self._note(entry)

    def append(self, entry: Attempt | Begin) -> None:
        """Write one line and wait until it is on disk. Raises CampaignError when it cannot be written."""
        line = seal(asdict(entry))
        try:
            _drop_half_line(self.path)
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CampaignError(
                f"{self.path} cannot be written: {error.strerror or error}\n"
                f"  What step {entry.step} did is not recorded. Free some space or make the file writable, and start "
                "the campaign again: the step is looked at again, finished work inside it is kept."
            ) from error
        self._note(entry)

    def begin(self, step: str, fingerprint: str) -> None:
        """Record of which settings a step's output is from now on. Raises as `append`."""
        if self.fingerprint(step) != fingerprint:
            self.append(Begin(step, fingerprint, now()))

    def last(self, step: str) -> Attempt | None:
        """The newest attempt of a step, None when it was never finished."""
        return next((a for a in reversed(self.attempts) if a.step == step), None)

    def fingerprint(self, step: str) -> str | None:
        """Of the settings that a step was last started with, whether or not it ended; None: it never was."""
        return self._fingerprints.get(step)

    def order_of_success(self, step: str) -> int | None:
        """Position of a step's newest attempt among all attempts if that one succeeded, else None."""
        for index in range(len(self.attempts) - 1, -1, -1):
            if self.attempts[index].step == step:
                return index if self.attempts[index].exit_code == 0 else None
        return None

    def _note(self, entry: Attempt | Begin) -> None:
        self._fingerprints[entry.step] = entry.fingerprint
        if isinstance(entry, Attempt):
            self.attempts.append(entry)


def now() -> str:
    """The time as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> list[Attempt | Begin]:
    """All entries. A last line without its newline was cut off while it was written: it does not count."""
    if not path.exists():
        return []
    entries: list[Attempt | Begin] = []
    for line in unseal_lines(path.read_bytes()):
        why = line.error
        if why is None:
            try:
                kind = _BEGIN if "began" in line.document else _ATTEMPT
                entries.append(kind.validate_json(json.dumps(line.document)))
            except ValidationError as error:
                found = error.errors()[0]
                why = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
        if why is not None:
            raise CampaignError(
                f"{path} line {line.number} is not a ledger entry ({why})\n"
                "  Every line is written by `nested-lm campaign`; the file was edited or damaged.\n"
                "  Delete that line: at worst its step is looked at again, finished work inside it is kept."
            )
    return entries


def _drop_half_line(path: Path) -> None:
    """Cut a last line that never got its newline, so that the next one starts on its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("r+b") as file:
            file.truncate(whole)

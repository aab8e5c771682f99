"""What a campaign has done: one JSON line for each finished attempt of a step, never changed afterwards."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from nested_lm.errors import CampaignError


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


class Ledger:
    """Append-only list of attempts in a file. Use it only while the campaign's lock is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts = _read(path)

    def append(self, attempt: Attempt) -> None:
        """Write one line and wait until it is on disk."""
        _drop_half_line(self.path)
        line = json.dumps(asdict(attempt), sort_keys=True) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.attempts.append(attempt)

    def last(self, step: str) -> Attempt | None:
        """The newest attempt of a step, None when it was never finished."""
        return next((a for a in reversed(self.attempts) if a.step == step), None)

    def order_of_success(self, step: str) -> int | None:
        """Line number of a step's newest attempt if that one succeeded, else None."""
        for index in range(len(self.attempts) - 1, -1, -1):
            if self.attempts[index].step == step:
                return index if self.attempts[index].exit_code == 0 else None
        return None


def _read(path: Path) -> list[Attempt]:
    """All attempts. A last line without its newline was cut off while it was written: it does not count."""
    if not path.exists():
        return []
    attempts = []
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            attempts.append(Attempt(**{**fields, "command": tuple(fields["command"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise CampaignError(
                f"{path} line {number} is not a ledger entry ({error})\n"
                "  Every line is written by `nested-lm campaign`; the file was edited or damaged.\n"
                "  Delete that line: at worst its step is looked at again, finished work inside it is kept."
            ) from error
    return attempts


def _drop_half_line(path: Path) -> None:
    """Cut a last line that never got its newline, so that the next one starts on its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("r+b") as file:
            file.truncate(whole)

"""The unit of every corpus: one text with an identity, a date if it has one, and where it was found."""

import datetime
import re
from dataclasses import dataclass

_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2})(?:[T ].*)?)?)?")


@dataclass(frozen=True, slots=True)
class Document:
    """One text as its source holds it.

    id: name within the source, the same on every machine. date: "1790", "1790-01" or "1790-01-08".
    position: file, and line or row, for messages.
    """

    id: str
    text: str
    date: str | None
    position: str


@dataclass(frozen=True, slots=True)
class BadDocument:
    """A place in the source where a document was expected and could not be used.

    reason: short key that skips are counted under. detail: what was found, for the error message.
    """

    position: str
    reason: str
    detail: str


def parse_date(value: object) -> str | None:
    """The date as "YYYY", "YYYY-MM" or "YYYY-MM-DD"; None when `value` is neither a year nor an ISO date."""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return f"{value:04d}" if 1 <= value <= 9999 else None
    if not isinstance(value, str):
        return None
    match = _DATE.fullmatch(value.strip())
    if match is None:
        return None
    year, month, day = match.groups()
    try:
        datetime.date(int(year), int(month or 1), int(day or 1))
    except ValueError:
        return None
    return "-".join(part for part in (year, month, day) if part)


def year_of(date: str) -> int:
    """Year of a date that `parse_date` returned."""
    return int(date[:4])


def judge(*, identity: str, text: object, date: str | None, position: str, max_bytes: int) -> Document | BadDocument:
    """Accept a text, or say why it cannot be trained on: not text, not Unicode, empty, too large."""
    if not isinstance(text, str):
        return BadDocument(position, "not_text", f"the text is of type {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is not a character and has no UTF-8 form.
        return BadDocument(position, "not_unicode", f"character {error.start} is a lone surrogate")
    if size > max_bytes:
        return BadDocument(position, "too_large", f"{size} bytes, max_document_bytes is {max_bytes}")
    if not text.strip():
        return BadDocument(position, "empty", "the text is empty")
    return Document(identity, text, date, position)

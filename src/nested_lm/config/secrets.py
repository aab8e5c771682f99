"""Keeps keys and passwords out of everything that is written or printed."""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

_SECRET_WORDS = {
    "key",
    "apikey",
    "token",
    "secret",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
}
_SECRET_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSWORD")
_SHORTEST_INSIDE = 8  # characters; a shorter secret is only recognised as a whole value


def names_secret(field: str) -> bool:
    """Whether a field's name says that its value is secret; counts such as `budget_tokens` are not."""
    return not _SECRET_WORDS.isdisjoint(field.lower().split("_"))


def redact_text(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the value of every environment variable whose name contains KEY, TOKEN, SECRET or PASSWORD."""
    variables = os.environ if environment is None else environment
    secrets = {value for name, value in variables.items() if value and _SECRET_VARIABLE.search(name.upper())}
    if text in secrets:
        return REDACTED
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_INSIDE and not secret.startswith("/"):  # KEY_FILE=/path is no secret
            text = text.replace(secret, REDACTED)
    return text


def redact(value: Any, name: str = "") -> Any:
    """Copy a tree of plain values with every secret string replaced; numbers are never secret."""
    if isinstance(value, Mapping):
        return {key: redact(child, str(key)) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redact(child, name) for child in value]
    if isinstance(value, str):
        return REDACTED if value and names_secret(name) else redact_text(value)
    return value

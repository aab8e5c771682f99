"""Keeps what the environment holds out of everything that is written or printed.

A preset may name a folder by `${oc.env:NAME}`. No other field may: its value would land in manifests, ledgers and
reports. Values of variables whose names speak of secrets are refused wherever they stand, and redacted in messages.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nested_lm.config.provenance import Issue, Provenance, join

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
_SECRET_VARIABLE = re.compile(
    r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|COOKIE|PRIVATE|SIGNATURE|WEBHOOK"
    r"|(^|_)(PAT|AUTH|DSN|URL|URI|CONN|CONNECTION|JWT)(_|$)"
)
_SHORTEST_INSIDE = 8  # characters; a shorter secret is only recognised as a whole value
_PATH_FIELDS = {"output_dir", "path", "init_from", "folder", "file", "root"}
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}]*)[^}]*\}")


def names_secret(field: str) -> bool:
    """Whether a field's name says that its value is secret; counts such as `budget_tokens` are not."""
    return not _SECRET_WORDS.isdisjoint(field.lower().split("_"))


def secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables whose names speak of secrets, by value; those that hold a path are none, as KEY_FILE=/path."""
    variables = os.environ if environment is None else environment
    named = {value: name for name, value in variables.items() if value and _SECRET_VARIABLE.search(name.upper())}
    return {value: name for value, name in named.items() if not value.startswith("/")}


def redact_text(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the value of every environment variable whose name speaks of a secret."""
    known = secrets(environment)
    if text in known:
        return REDACTED
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= _SHORTEST_INSIDE:
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


def refuse_environment(path: str, text: str) -> str | None:
    """What is wrong with the variables that a field reads; None when it is a folder named by plain variables."""
    for name in _ENVIRONMENT.findall(text):
        if path.rpartition(".")[2] not in _PATH_FIELDS:
            return f"the environment variable {name}, whose value would be written into files"
        if _SECRET_VARIABLE.search(name.upper()) and not os.environ.get(name, "/").startswith("/"):
            return f"the environment variable {name}, whose name speaks of a secret"
    return None


def held_secrets(values: Any, provenance: Provenance, path: str = "") -> Iterator[Issue]:
    """An issue for every value that contains a secret of the environment, however it came there."""
    if isinstance(values, Mapping):
        for key, child in values.items():
            yield from held_secrets(child, provenance, join(path, str(key)))
    elif isinstance(values, list):
        for index, child in enumerate(values):
            yield from held_secrets(child, provenance, join(path, str(index)))
    elif isinstance(values, str):
        for secret, name in secrets().items():
            if len(secret) >= _SHORTEST_INSIDE and secret in values:
                found = f"the value of the environment variable {name}, which would be written into files"
                yield Issue(path, redact_text(provenance.find(path)), found, "", "write something else")

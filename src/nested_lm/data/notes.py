"""Notes of a build: sealed JSON that also names the build it belongs to."""

from collections.abc import Mapping
from typing import Any

from nested_lm.storage.sealed import seal, unseal

_BUILD = "build"


def sealed(document: Mapping[str, Any], *, key: str = "") -> bytes:
    """A note as a line of sealed JSON. key: the build's fingerprint."""
    return seal({_BUILD: key, **document})


def unsealed(content: bytes, *, key: str = "") -> dict[str, Any]:
    """What `sealed` made bytes of. Raises ValueError when one was changed, or the note is of another build."""
    document, is_sealed = unseal(content)
    if not is_sealed or document.pop(_BUILD, None) != key:
        raise ValueError("it has no seal, or belongs to another build")
    return document

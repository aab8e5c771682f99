"""Sealed JSON: the last member of a document, `seal`, is the digest of the rest, so that a changed bit is noticed."""

import json
import re
from collections.abc import Mapping
from typing import Any

import xxhash

SEAL = "seal"

_LOOKS_SEALED = re.compile(rb'"[0-9a-f]{16}"\s*\}\s*$')


def seal(document: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """JSON of a document that is not empty, with its xxh3_64 as last member, and a newline.

    Raises ValueError for numbers that are not finite.
    """
    end = "\n}" if indent else "}"
    body = json.dumps(document, allow_nan=False, indent=indent).removesuffix(end)
    space = "\n" + " " * indent if indent else " "
    return f'{body},{space}"{SEAL}": "{xxhash.xxh3_64_hexdigest(body.encode())}"{end}\n'.encode()


def unseal(content: bytes) -> tuple[dict[str, Any], bool]:
    """Read a document; say whether it was sealed. One of an earlier version is not.

    Raises ValueError with what is wrong: not a JSON object, or changed after it was sealed.
    """
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"not a JSON object but {type(document).__name__}")
    if SEAL not in document:
        if _LOOKS_SEALED.search(content):
            raise ValueError("it was changed after it was written")
        return document, False
    del document[SEAL]
    indent = 2 if content.startswith(b"{\n") else None
    try:
        is_whole = bool(document) and seal(document, indent=indent) == content.rstrip(b"\n") + b"\n"
    except ValueError:  # NaN, which we never write
        is_whole = False
    if not is_whole:
        raise ValueError("it was changed after it was written")
    return document, True

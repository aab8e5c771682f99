"""Sealed JSON: the last member of a document, `seal`, is the digest of the rest, so that a changed bit is noticed."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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


class Line(NamedTuple):
    """One line of a file of sealed lines. number: from 1. error: what is wrong with it; None when it is whole."""

    number: int
    text: str
    document: dict[str, Any]
    error: str | None


def unseal_lines(content: bytes) -> Iterator[Line]:
    """Read a file of documents, one a line. A last line that was cut off is left out.

    A file of an earlier version has no seals; after a sealed line every other one must be sealed as well.
    """
    lines, is_sealed = content.split(b"\n"), False
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not _has_changed_end(line):
            return  # what follows the last newline was never finished
        document: dict[str, Any] = {}
        error = None
        try:
            document, has_seal = unseal(line)
            if is_sealed and not has_seal:
                error = "it has no seal, the lines before it have one"
            is_sealed = has_seal
        except ValueError as found:
            error = str(found)
        yield Line(number, line[:80].decode(errors="replace"), document, error)


def _has_changed_end(tail: bytes) -> bool:
    """Whether what follows the last newline is a whole document whose newline was changed, not one that was cut off."""
    try:
        unseal(tail[:-1])
    except ValueError:
        return False
    return True

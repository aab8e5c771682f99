"""Files that are either whole or absent: written aside, flushed to the disk, then renamed."""

import errno
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

from nested_lm.errors import DataError

_ASIDE = ".tmp-"


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file so that a crash at any moment leaves the old one, the new one or none, never half of one.

    Raises: DataError when the disk is full or the folder cannot be written; nothing is left behind then.
    """
    aside = path.with_name(f"{_ASIDE}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"no space left on the disk while writing {path}\n"
                "  Free some space and run the same command again: what was finished before is kept."
            ) from error
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer had begun in this folder. Its owner alone may: others may be writing."""
    for path in folder.glob(f"{_ASIDE}*"):
        if re.match(rf"\{_ASIDE}[0-9a-f]+-", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The files below a folder that readers know. What cannot be looked into is named, and never left out unsaid."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from nested_lm.config.data import FolderSource
from nested_lm.data.readers import SUFFIXES
from nested_lm.errors import DataError

_ENDINGS = ", ".join(SUFFIXES)
_SHOWN = 5  # of what cannot be looked into


@dataclass
class Scan:
    """What a folder holds. Links are followed.

    files: by their path below the folder, in the order of these names. ignored: files whose ending no reader knows.
    hidden: files and folders whose name starts with a dot, which are not looked into. unseen: what could not be
    looked into: path, short reason, and what the operating system says.
    """

    files: dict[str, Path]
    ignored: int = 0
    hidden: int = 0
    unseen: list[tuple[Path, str, str]] = field(default_factory=list)


def scan(source: FolderSource) -> Scan:
    """Find the files of a folder, or take the one file that `source.path` names.

    Raises: DataError when there is none, or when something cannot be looked into and bad documents may not be skipped.
    """
    root = Path(source.path)
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except FileNotFoundError as error:
        raise DataError(f"source.path {root} does not exist\n  Name a folder, or one file ({_ENDINGS}).") from error
    except OSError as error:
        raise DataError(f"source.path {root} cannot be read: {error.strerror}") from error
    if not is_folder:
        if not root.is_file() or not root.name.endswith(SUFFIXES):
            raise DataError(f"source.path {root} cannot be read\n  It is no file that ends in one of {_ENDINGS}.")
        return Scan({root.name: root})
    found = Scan({})
    _look(root, "", (), found)
    if found.unseen and source.on_bad_document == "error":
        raise _cannot_look(found)
    if not found.files:
        raise DataError(
            f"source.path {root} holds no text: {found.ignored} files, none of them ending in {_ENDINGS}; "
            f"{found.hidden} hidden files and folders, {len(found.unseen)} places that cannot be looked into\n"
            "  Name another folder, or convert the files."
        )
    found.files = dict(sorted(found.files.items()))
    return found


def _look(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], found: Scan) -> None:
    """Add what a folder holds. above: device and number of the folders it lies in, as links may lead in a circle."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        found.unseen.append((folder, "unreadable_folder", error.strerror or str(error)))
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        found.unseen.append((folder, "link_in_a_circle", "it leads back to a folder above it"))
        return
    for entry in entries:
        path, name = folder / entry.name, f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            found.hidden += 1
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            reason = "broken_link" if path.is_symlink() else "unreadable_file"
            found.unseen.append((path, reason, error.strerror or str(error)))
            continue
        if stat.S_ISDIR(mode):
            _look(path, f"{name}/", (*above, here), found)
        elif not entry.name.endswith(SUFFIXES):
            found.ignored += 1
        elif not stat.S_ISREG(mode):
            found.unseen.append((path, "no_regular_file", "it is a pipe, socket or device"))
        elif not name.isascii() and name.encode(errors="replace") != name.encode(errors="surrogateescape"):
            found.unseen.append((path, "name_not_utf8", "its name is not UTF-8"))
        elif not os.access(path, os.R_OK):
            found.unseen.append((path, "unreadable_file", "Permission denied"))
        else:
            found.files[name] = path


def _cannot_look(found: Scan) -> DataError:
    lines = [f"  {str(path)!a}: {reason.replace('_', ' ')}: {says}" for path, reason, says in found.unseen[:_SHOWN]]
    if len(found.unseen) > _SHOWN:
        lines.append(f"  and {len(found.unseen) - _SHOWN} more")
    return DataError(
        f"{len(found.unseen)} places of the source cannot be looked into, and their documents would be missing\n"
        + "\n".join(lines)
        + "\n  Mend or remove them, or set source.on_bad_document=skip to leave them out and count them."
    )

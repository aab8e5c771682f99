"""Which source code is running."""

import subprocess
from pathlib import Path

import nested_lm

_PACKAGE = Path(nested_lm.__file__).parent


def current_commit() -> str | None:
    """Commit of the source tree, with `-dirty` when it has changes; None when it is no git checkout of this project.

    A package that is installed inside somebody's repository, as in its virtual environment, is not of that repository.
    """
    found = _git("ls-files", "--error-unmatch", "--full-name", "__init__.py")
    if found != "src/nested_lm/__init__.py":
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What git says in the folder of the package; None when it fails or is not there."""
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None

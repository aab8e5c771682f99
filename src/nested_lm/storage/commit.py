"""Which source code is running."""

import subprocess
from pathlib import Path


def current_commit() -> str | None:
    """Commit of the source tree, with `-dirty` when it has changes; None outside a git checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None

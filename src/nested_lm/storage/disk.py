"""What a checkpoint needs of a disk."""

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class Disk:
    """Every write to disk a checkpoint needs, one method each, so that tests can stop or fail before any."""

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents."""
        path.mkdir(parents=True, exist_ok=True)

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file."""
        save_file(tensors, path)

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write a small file."""
        path.write_bytes(content)

    def sync(self, path: Path) -> None:
        """Make a file, or the entries of a folder, survive a power cut."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Move a folder; atomic within a file system."""
        source.rename(target)

    def remove_folder(self, path: Path) -> None:
        """Delete a folder and its files, or a file."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def free_bytes(self, path: Path) -> int:
        """Space left for this user."""
        return shutil.disk_usage(path).free

"""Data sets of the Hugging Face hub: fetched once, then read like any folder of files."""

import fnmatch
from pathlib import Path
from types import ModuleType

from nested_lm.config.data import HubSource
from nested_lm.data.readers import SUFFIXES
from nested_lm.errors import DataError, pip_install


def fetch(source: HubSource) -> dict[str, Path]:
    """Fetch what is missing of the source's files; return all of them by name, in the order of names.

    A transfer that was cut off goes on where it stopped. `HF_TOKEN` and `HF_HUB_OFFLINE` of the environment count.

    Raises: DataError when the hub package is missing, the hub cannot be reached or refuses, or a pattern matches no
    file that can be read.
    """
    hub = _hub()
    where = f"data set {source.repository} at {source.revision[:12]}"
    try:
        hub.snapshot_download(
            source.repository,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=list(source.files),
            local_dir=source.path,
        )
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"{where} cannot be fetched: {str(error).splitlines()[0]}\n"
            "  Check the name, the revision and the network (for a gated set: HF_TOKEN), then start again; "
            f"files that are already in {source.path} are kept."
        ) from error
    root = Path(source.path)
    present = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    readable = [name for name in present if name.endswith(SUFFIXES)]
    files: dict[str, Path] = {}
    for pattern in source.files:
        found = fnmatch.filter(readable, pattern)
        if not found:
            raise DataError(
                f"{where} has no file {pattern!r} that can be read; readable endings are {', '.join(SUFFIXES)}\n"
                "  Mend source.files: look up the names on the hub."
            )
        files |= {name: root / name for name in found}
    return dict(sorted(files.items()))


def _hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise DataError(
            "a source of kind hub needs the package huggingface_hub, which is not installed\n"
            f"  Install it with: {pip_install('data')}"
        ) from error
    return huggingface_hub

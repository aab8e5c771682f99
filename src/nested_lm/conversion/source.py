"""Finds the files of a Hugging Face checkpoint: in a folder, or on the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_lm.errors import CheckpointError, ConfigError, pip_install

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WANTED = [CONFIG, TOKENIZER, WEIGHTS, INDEX, "model-*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A checkpoint of Hugging Face on this disk.

    name: folder or hub name, as it was given.
    revision: commit of the hub; None for a folder.
    """

    name: str
    folder: Path
    revision: str | None

    def document(self, name: str) -> dict[str, Any]:
        """Read a JSON file that holds a mapping.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self.folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing: {self.name} is not a Hugging Face checkpoint; "
                "name a folder with config.json, tokenizer.json and model.safetensors"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; copy it again from where it came") from error
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds {type(content).__name__}, not a mapping; copy it again from where it came"
            )
        return content


def find_source(name: str, *, revision: str | None) -> Source:
    """Take a folder as it is, and download anything else from the hub.

    Args:
        name: a folder, or a hub name such as `meta-llama/Llama-3.2-1B`.
        revision: branch, tag or commit on the hub; None takes its main branch.

    Raises:
        CheckpointError: neither a folder nor a repository that can be downloaded.
        ConfigError: a revision of a folder, or the package for the hub is missing.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _download(name, revision)
    if revision is not None:
        raise ConfigError(f"--revision {revision} is for the hub, and {name} is a folder; leave it out")
    return Source(name, folder, None)


def _download(name: str, revision: str | None) -> Source:
    try:
        import httpx
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ConfigError(
            f"{name} is no folder, and loading from the hub needs the package huggingface_hub; "
            f"{pip_install('hf')}, or name a folder"
        ) from error
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} is no folder, and cannot be loaded from the hub: {reason}\n"
            "  Check the spelling and the network; a gated model needs `hf auth login`. Or download it elsewhere and "
            "name its folder."
        ) from error
    return Source(name, folder, folder.name)  # the hub's cache names a snapshot by its commit

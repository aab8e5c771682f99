"""What a result was measured on: the run, the checkpoint and the machine, from a loaded checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from nested_lm.checkpoint import MANIFEST, LoadedCheckpoint
from nested_lm_lab.evaluation.schema import CheckpointMark, RunIdentity

UNKNOWN_DATA = "none"
"""Stands for the data of a converted model, which was trained on none of ours."""


def identify(loaded: LoadedCheckpoint, *, data_hash: Callable[[], str]) -> RunIdentity:
    """Identity of a run. The arm is the kind of mixer and channel memory.

    data_hash: says what stands for a converted model, which was trained on none of our data sets.
    """
    run, model = loaded.identity, loaded.config.model
    return RunIdentity(
        run_id=run["run_id"],
        name=run["name"],
        arm=f"{model.mixer.kind}+{model.channel.kind}",
        config_hash=run["config_hash"],
        data_hash=run["data_hash"] or data_hash(),
        tokenizer_hash=run["tokenizer_hash"],
        commit=run["commit"],
        seed=run["seed"],
        parameters=run["parameters"],
        tokens=loaded.tokens,
        step=loaded.step,
        context_length=loaded.config.train.context_length,
    )


def mark_checkpoint(path: Path) -> CheckpointMark:
    """Name of a checkpoint folder and its digest: its manifest holds the digests of all its files."""
    return CheckpointMark(name=path.name, digest=xxhash.xxh3_128_hexdigest((path / MANIFEST).read_bytes()))


def device_name(device: torch.device) -> str:
    """How result files name the machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

"""Starts a run from the weights of another checkpoint instead of drawn ones."""

from pathlib import Path
from typing import Any

from nested_lm.checkpoint import (
    MANIFEST,
    find_checkpoint,
    load_weights,
    read_document,
    read_identity,
    read_tensors,
    verify_checkpoint,
)
from nested_lm.config.architecture import architecture_differences
from nested_lm.config.load import parse_run
from nested_lm.config.run import RunConfig
from nested_lm.data.shards import TokenDataset, file_sha256
from nested_lm.errors import CheckpointError
from nested_lm.nn.model import LanguageModel


def load_start(model: LanguageModel, config: RunConfig, dataset: TokenDataset) -> dict[str, Any]:
    """Copy the weights of `train.init_from` into a new model; return what they came from, for the run's identity.

    Only weights: optimizer, schedule, data order and random state are those of a new run.

    Raises:
        CheckpointError: no valid checkpoint, one of another architecture, or one with another tokenizer.
    """
    assert config.train.init_from is not None
    path = find_checkpoint(Path(config.train.init_from))
    verify_checkpoint(path)
    identity = read_identity(path)
    if identity["tokenizer_hash"] != dataset.tokenizer_hash:
        raise CheckpointError(
            f"{path} has tokenizer {identity['tokenizer_hash'][:16]}, the data set in {dataset.folder} has "
            f"{dataset.tokenizer_hash[:16]}; build the data set with the tokenizer.json of that checkpoint "
            "(data.tokenizer: {kind: file, path: ...})"
        )
    there = parse_run(read_document(path, "config.json"), str(path / "config.json")).model
    differences = architecture_differences(there, config.model)
    if differences:
        raise CheckpointError(
            f"{path} is of another architecture; these fields differ (there -> here):\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\n  Take the section `model` of that checkpoint's config.json, or leave train.init_from out."
        )
    load_weights(model, read_tensors(path, "model"), where=path)
    return {"checkpoint": str(path), "run_id": identity["run_id"], "manifest_sha256": file_sha256(path / MANIFEST)}

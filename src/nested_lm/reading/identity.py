"""Which model a memory belongs to: fast weights are distances from learned starts, and noise under other weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from nested_lm.config.architecture import settings_difference
from nested_lm.config.load import config_hash
from nested_lm.config.model import ModelConfig
from nested_lm.nn.model import LanguageModel

DIGITS = 16
"""Hex digits of a hash that messages show."""


@dataclass(frozen=True)
class ModelIdentity:
    """What must be equal for a stored state to mean the same.

    label: for people, such as the name of the run and its step; not compared.
    config_hash: of the model's settings without `backend`, since every backend reads and writes the same state.
    settings: all of them, so that a difference can be named.
    dtype: of the weights. weights_hash: of every weight's name, type, shape and bytes.
    tokenizer_hash: sha256 of tokenizer.json.
    """

    label: str
    config_hash: str
    settings: dict[str, Any]
    dtype: str
    weights_hash: str
    tokenizer_hash: str

    def as_document(self) -> dict[str, Any]:
        """Form for JSON."""
        return asdict(self)


def identify(model: LanguageModel, *, tokenizer_hash: str, label: str) -> ModelIdentity:
    """Identity of a model as it is in memory. Reads every weight once."""
    return ModelIdentity(
        label=label,
        config_hash=config_hash(model.config),
        settings=model.config.model_dump(mode="json"),
        dtype=type_name(next(model.parameters()).dtype),
        weights_hash=tensors_hash(model.state_dict()),
        tokenizer_hash=tokenizer_hash,
    )


def difference(stored: ModelIdentity, present: ModelIdentity) -> str | None:
    """Say in what a stored identity differs from the model at hand; None when they are the same model."""
    if present.config_hash not in (stored.config_hash, _hash_of(stored.settings)):
        return (
            f"its model has configuration {stored.config_hash}, this one {present.config_hash}: "
            f"{settings_difference(stored.settings, present.settings)}"
        )
    if stored.tokenizer_hash != present.tokenizer_hash:
        return (
            f"its text was encoded by tokenizer {stored.tokenizer_hash[:DIGITS]}, this model has "
            f"{present.tokenizer_hash[:DIGITS]}"
        )
    if stored.dtype != present.dtype:
        return f"its model computed in {stored.dtype}, this one computes in {present.dtype}"
    if stored.weights_hash != present.weights_hash:
        return (
            f"its model has weights {stored.weights_hash[:DIGITS]}, this one {present.weights_hash[:DIGITS]}: "
            "the same architecture, trained differently or for another number of steps"
        )
    return None


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """xxh3_128 over names, types, shapes and bytes, in the order of the names."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, type_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def type_name(dtype: torch.dtype) -> str:
    """Name of a type without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _hash_of(settings: Mapping[str, Any]) -> str | None:
    """Hash that this version gives to stored settings; an earlier one may have lacked a field, or hashed more."""
    try:
        return config_hash(ModelConfig.model_validate(settings))
    except ValidationError:
        return None

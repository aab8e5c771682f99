"""Writes a run folder whose only checkpoint, of step 0, holds the weights of a trained Llama."""

import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nested_lm.checkpoint import folder_name, load_weights, write_checkpoint
from nested_lm.config.architecture import architecture_differences
from nested_lm.config.compose import compose_preset, find_preset
from nested_lm.config.data import LoadTokenizer
from nested_lm.config.load import dump_resolved, load_data, load_run, parse_run
from nested_lm.config.model import ModelConfig
from nested_lm.config.run import RunConfig
from nested_lm.config.secrets import redact
from nested_lm.conversion.llama import LlamaConfig, parse_config
from nested_lm.conversion.source import CONFIG, TOKENIZER, find_source
from nested_lm.conversion.tokenizer import convert_tokenizer
from nested_lm.conversion.weights import read_weights, weight_files
from nested_lm.data.shards import file_sha256
from nested_lm.errors import CheckpointError, ConfigError
from nested_lm.nn.model import LanguageModel
from nested_lm.train.run_folder import CHECKPOINTS, RESOLVED, new_identity, write_run_identity
from nested_lm.train.state import STATE_VERSION, Progress

DATA_PRESET = "data.yaml"
_RATIOS = (1, 4, 16)  # of the default periods; the slowest and the fastest are those of figure 5, 16M and 1M tokens


@dataclass(frozen=True)
class Converted:
    """A finished conversion. levels: level of each layer's MLP, bottom layer first."""

    folder: Path
    config: RunConfig
    levels: tuple[int, ...]
    parameters: int


def convert(
    name: str,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    periods: tuple[int, ...] | None,
    data: str = "data/demo",
    revision: str | None = None,
) -> Converted:
    """Convert a Llama checkpoint of Hugging Face into a run folder of ours; nothing is written unless all fits.

    The logits are those of the original. Its blocks stay where they are; the MLP of each layer is assigned to a level.

    Args:
        name: folder, or name on the hub.
        output: run folder; it must not exist, or be empty.
        overrides: changes to the run's configuration that leave the model's architecture alone.
        periods: training tokens between two updates of each level, fastest first; None: three levels (fewer in a
            model of fewer layers) of 1, 4 and 16 training steps.
        data: preset of the data set for training and evaluation; its tokenizer is replaced by the model's.
        revision: of the hub.

    Raises:
        CheckpointError: a source that is missing, damaged or no Llama that can be converted, or a full disk.
        ConfigError: levels or overrides that do not fit, or an output folder that is in use.

    Source: arXiv 2512.24695 section 7.3: every MLP starts as the trained one, and a level that is never updated
    leaves the trained model as it was.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty folder; choose another place for the converted model")
    source = find_source(name, revision=revision)
    llama = parse_config(source.document(CONFIG), where=str(source.folder / CONFIG))
    with tempfile.TemporaryDirectory() as scratch:
        config = _configure(llama, output, overrides, periods=periods, data=data, scratch=Path(scratch))
        tokenizer = Path(scratch) / TOKENIZER
        tokenizer_hash = convert_tokenizer(source, llama, tokenizer).hash
        tensors = read_weights(source, config.model)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        origin = {
            "name": source.name,
            "revision": source.revision,
            "sha256": {file: file_sha256(source.folder / file) for file in [CONFIG, TOKENIZER, *weight_files(source)]},
        }
        identity = new_identity(
            config, data_hash=None, tokenizer_hash=tokenizer_hash, device="cpu", parameters=parameters
        )
        _write(output, config, identity | {"converted_from": origin}, tensors, tokenizer)
    channel = config.model.channel
    assert channel.kind == "layer_levels"
    return Converted(output, config, channel.levels_of_layers(config.model.num_layers), parameters)


def _configure(
    llama: LlamaConfig,
    output: Path,
    overrides: Sequence[str],
    *,
    periods: tuple[int, ...] | None,
    data: str,
    scratch: Path,
) -> RunConfig:
    """Make the run's configuration, apply the overrides, and check that they leave the architecture alone."""
    train = compose_preset(find_preset("train/continual"), ()).values
    train["context_length"] = min(train["context_length"], llama.max_position_embeddings)
    step = train["context_length"] * train["batch_size"] * train["accumulation"]
    if periods is None:
        periods = tuple(ratio * step for ratio in _RATIOS[: llama.num_hidden_layers])
    values: dict[str, Any] = {
        "name": output.name,
        "output_dir": f"{output}-trained",
        "seed": 1,
        "data": _data_section(data, output),
        "model": llama.model_section(periods),
        "train": train,
        "eval": compose_preset(find_preset("eval/demo"), ()).values,
    }
    if overrides:  # Hydra applies them to files
        preset = scratch / "converted.yaml"
        preset.write_text(OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
        config = load_run(str(preset), overrides)
    else:
        config = parse_run(values, f"the configuration of {output}")
    original = ModelConfig.model_validate(llama.model_section((1,)))  # levels are no part of the comparison
    changed = architecture_differences(original, config.model)
    if changed:
        raise ConfigError(
            "an override changes what the converted weights compute\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\n  Leave it out; clocks, the assignment of layers, data, training and evaluation may be changed."
        )
    return config


def _data_section(preset: str, output: Path) -> dict[str, Any]:
    """The data set of a preset, with the tokenizer of the converted model, in a folder of its own."""
    data = load_data(preset)
    changes = {
        "name": f"{data.name}-{output.name}",
        "output_dir": str(output / "data"),
        "tokenizer": LoadTokenizer(kind="file", path=str(output / TOKENIZER)),
    }
    return data.model_copy(update=changes).model_dump(mode="json")


def _write(
    output: Path, config: RunConfig, identity: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Path
) -> None:
    """Write the run folder aside and rename it, so that it is either whole or not there."""
    with torch.device("meta"):
        model = LanguageModel(config.model, seed=None)
    load_weights(model, {name: tensor.to("meta") for name, tensor in tensors.items()}, where=output)
    aside = output.parent / f".tmp-{output.name}-{uuid.uuid4().hex[:8]}"
    try:
        write_checkpoint(
            aside / CHECKPOINTS / folder_name(0),
            tensors={"model": tensors},
            documents={
                "train_state.json": {"schema_version": STATE_VERSION, **Progress().as_document()},
                "config.json": redact(config.model_dump(mode="json")),
                "run.json": identity,
            },
            extra_files={TOKENIZER: tokenizer},
            config_hash=identity["config_hash"],
        )
        shutil.copyfile(tokenizer, aside / TOKENIZER)
        dump_resolved(config.data, aside / DATA_PRESET)
        dump_resolved(config, aside / RESOLVED)
        write_run_identity(aside, identity)
        if output.exists():
            output.rmdir()  # empty, or it would have been refused
        aside.rename(output)
    except OSError as error:
        raise CheckpointError(
            f"{output} could not be written: {error}; free some space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
